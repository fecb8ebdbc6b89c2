"""Exporters on small models of every family: masks, shapes, modes, types, and operators that are refused."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from encoders import families
from torch import nn

from conftest import tiny_model
from kd.deploy import exporters
from kd.deploy.check import ROUNDING, SHAPES, Check, Shape, drop_of, random_batch, shapes_of
from kd.deploy.exporters import Logits, write_int8, write_onnx, write_openvino
from kd.deploy.runtimes import OnnxRuntime, OpenVinoRuntime, TorchRuntime, input_names
from kd.errors import InputError

MADE = ("input_ids", "token_type_ids", "attention_mask")


def model_of(family: str) -> nn.Module:
    """A model with dropout, of weights so large that attention and masks matter."""
    model = tiny_model(model_type=family, layers=2, width=24, heads=3)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "LayerNorm" not in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def example_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(random_batch(input_names(model.config.model_type, MADE), model.config, 2, 16))


@families
def test_logits_of_onnx_and_openvino_are_torchs(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    example = example_of(model)
    write_onnx(model, example, tmp_path / "model.onnx")
    assert not model.training, "torch.onnx left dropout on"
    write_openvino(model, example, tmp_path / "model.xml")
    assert not model.training, "OpenVINO left dropout on"
    for runtime in (OnnxRuntime(tmp_path / "model.onnx"), OpenVinoRuntime(tmp_path / "model.xml")):
        assert sorted(runtime.names) == sorted(example)
        shapes = shapes_of(runtime, TorchRuntime(model), list(example), model.config, 60)
        assert [(shape.batch, shape.tokens) for shape in shapes] == [(b, min(t, 60)) for b, t in SHAPES]
        assert all(shape.largest > 0.05 for shape in shapes)
        assert max(shape.difference for shape in shapes) < 2e-5


@families
def test_padding_does_not_change_logits_of_onnx(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    write_onnx(model, example_of(model), tmp_path / "model.onnx")
    runtime = OnnxRuntime(tmp_path / "model.onnx")
    names = list(example_of(model))
    alone = random_batch(names, model.config, 1, 9, seed=3)
    padded = {name: torch.cat([values, values.new_full((1, 11), 0)], dim=1) for name, values in alone.items()}
    if family in ("roberta", "mpnet"):  # their padding is the token with which positions are counted
        padded["input_ids"][:, 9:] = model.config.pad_token_id
    assert np.abs(runtime.logits(alone) - runtime.logits(padded)).max() < 1e-5
    shown = {**padded, "attention_mask": torch.ones_like(padded["attention_mask"])}
    assert np.abs(runtime.logits(alone) - runtime.logits(shown)).max() > 1e-3, "the mask is not read"


def test_weights_of_int8_are_eight_bits_the_embedding_table_too(tmp_path: Path) -> None:
    model = model_of("bert")
    write_onnx(model, example_of(model), tmp_path / "model.onnx")
    write_int8(tmp_path / "model.onnx", tmp_path / "int8.onnx")
    tensors = onnx.load(tmp_path / "int8.onnx").graph.initializer
    matrices = {tuple(one.dims): one.data_type for one in tensors if len(one.dims) == 2}
    words, width = model.config.vocab_size, model.config.hidden_size
    for shape in ((words, width), (width, width), (width, model.config.intermediate_size)):
        assert matrices[shape] in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8), shape
    assert {tuple(one.dims) for one in onnx.load(tmp_path / "model.onnx").graph.initializer} >= {(words, width)}
    shapes = shapes_of(OnnxRuntime(tmp_path / "int8.onnx"), TorchRuntime(model), list(example_of(model)), model.config, 60)
    assert 0 < max(shape.difference for shape in shapes) < 0.5


def test_dynamo_writes_the_same_model(tmp_path: Path) -> None:
    model = model_of("bert")
    write_onnx(model, example_of(model), tmp_path / "model.onnx", "dynamo")
    assert not model.training
    shapes = shapes_of(OnnxRuntime(tmp_path / "model.onnx"), TorchRuntime(model), list(example_of(model)), model.config, 60)
    assert max(shape.difference for shape in shapes) < 2e-5
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"], "weights in a file of their own"


class Refused(nn.Module):
    """A layer with an operator that is no part of ONNX, nor known to OpenVINO."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states * torch.linalg.eigvalsh(states @ states.transpose(-1, -2))[..., :1, None]


@pytest.mark.parametrize("library", ["torch.onnx (torchscript)", "OpenVINO"])
def test_an_operator_that_an_exporter_does_not_know_is_named(library: str, tmp_path: Path) -> None:
    model = model_of("bert")
    model.bert.embeddings.dropout = Refused()
    write, file = (write_openvino, "model.xml") if library == "OpenVINO" else (write_onnx, "model.onnx")
    with pytest.raises(InputError, match="does not export this model") as caught:
        write(model, example_of(model), tmp_path / file)
    assert library in caught.value.message
    assert "eig" in caught.value.message
    assert caught.value.key == "--formats"


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named '{name}'")

    monkeypatch.setattr("importlib.import_module", missing)
    for attempt in (
        lambda: OnnxRuntime(tmp_path),
        lambda: OpenVinoRuntime(tmp_path),
        lambda: write_onnx(model_of("bert"), {}, tmp_path / "x"),
    ):
        with pytest.raises(InputError, match=r"pip install 'kd\[onnx\]'"):
            attempt()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    for name, runtime in {"model.onnx": OnnxRuntime, "model.xml": OpenVinoRuntime}.items():
        (tmp_path / name).write_text("no model")
        with pytest.raises(InputError, match=rf"cannot read '.*{name}'"):
            runtime(tmp_path / name)


def test_the_wrapper_calls_the_model_by_names() -> None:
    model = model_of("bert")
    example = example_of(model)
    assert torch.equal(Logits(model, tuple(example))(*example.values()), model(**example).logits)
    assert exporters.EXPORTERS[0] == "torchscript"


def test_batches_of_the_check_are_padded_and_reproducible() -> None:
    model = model_of("bert")
    batch = random_batch(MADE, model.config, 3, 17)
    lengths = batch["attention_mask"].sum(1).tolist()
    assert lengths[0] == 17 > lengths[1] > lengths[2] > 0
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()
    assert batch["token_type_ids"].max() == 1
    assert all(torch.equal(batch[name], random_batch(MADE, model.config, 3, 17)[name]) for name in MADE)
    assert (random_batch(MADE, model.config, 3, 17, padded=False)["attention_mask"] == 1).all()


def check(value: float | None, drop: float | None, *differences: float) -> Check:
    shapes = [Shape(1, 8, difference, 2.0) for difference in differences]
    return Check(shapes, "accuracy", value, 0.9, drop, 100)


def test_the_gate_refuses_a_drop_a_difference_and_an_undefined_metric() -> None:
    assert check(0.9, 0.0, 1e-6).failures(exact=True, max_drop=0.5) == []
    assert check(0.895, 0.5, 0.3).failures(exact=False, max_drop=0.5) == []
    assert check(0.95, -5.0, 1e-6).failures(exact=True, max_drop=0.0) == []
    (drop,) = check(0.89, 1.0, 1e-6).failures(exact=True, max_drop=0.5)
    assert "drops by 1.00 points, more than --max-drop 0.5" in drop
    (rounding,) = check(0.9, 0.0, 1e-6, 3 * ROUNDING).failures(exact=True, max_drop=0.5)
    assert "differ from torch's by 0.0003 for 1 text(s) of 8 tokens" in rounding
    assert len(check(0.9, 0.0, float("nan")).failures(exact=False, max_drop=0.5)) == 1
    assert len(check(None, None, 0.1).failures(exact=False, max_drop=0.5)) == 1


def test_a_drop_is_positive_where_a_file_is_worse_for_scores_and_for_errors() -> None:
    assert drop_of("accuracy", 0.75, 0.8) == pytest.approx(5)
    assert drop_of("matthews_corrcoef", 0.6, 0.5) == pytest.approx(-10)
    assert drop_of("mse", 3.0, 2.0) == pytest.approx(50)
    assert drop_of("mse", 1.5, 2.0) == pytest.approx(-25)
    assert (drop_of("mse", 0.0, 0.0), drop_of("mse", 0.1, 0.0)) == (0.0, float("inf"))
    assert drop_of("f1", None, 0.5) is drop_of("f1", 0.5, None) is None
