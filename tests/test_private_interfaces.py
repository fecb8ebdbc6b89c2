"""The private interfaces of libraries that are used: all are listed in CONTRIBUTING.md, and do what is relied on."""

import ast
import inspect
import json
import mmap
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MulticlassF1Score
from transformers import AutoConfig, AutoModel, BertConfig
from transformers.utils.hub import cached_file

import kd

ROOT = Path(kd.__file__).parent
DOCUMENTED = {"os._exit"}
"""Names with an underscore that the documentation of their library describes."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def own_names(tree: ast.AST) -> Iterator[str]:
    """Every name that a module defines: functions, classes, variables and attributes of `self` or `cls`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) in ("self", "cls"):
            yield node.attr


def private_names(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """The private names of libraries that a module imports, reads, passes as arguments, or overrides and calls."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            if ast.unparse(node) not in DOCUMENTED:
                yield node.attr
        elif isinstance(node, ast.ImportFrom):
            parts = [*(node.module or "").split("."), *(name.name for name in node.names)]
            if any(map(is_private, parts)):
                yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if any(map(is_private, name.name.split("."))))
        elif isinstance(node, ast.keyword) and node.arg is not None and is_private(node.arg):
            yield node.arg


def used(trees: list[ast.AST]) -> set[str]:
    inherited = {
        node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_super(node.value)
    }
    own = {name for tree in trees for name in own_names(tree)} - inherited
    return {name for tree in trees for name in private_names(tree, own)}


def test_every_private_interface_is_listed() -> None:
    table = (ROOT.parent / "CONTRIBUTING.md").read_text().split("## Private interfaces of libraries")[1].split("\n## ")[0]
    rows = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ") and "`" in line]
    listed = {name for row in rows for name in re.findall(r"`([\w.]+)`", row)}
    assert used([ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))]) == listed


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("import a._b", {"a._b"}),
        ("from a._b import c", {"a._b.c"}),
        ("from a import _b", {"a._b"}),
        ("a.b._c.d()", {"_c"}),
        ("a.b(_c=1)", {"_c"}),
        ("class A(B):\n def _c(self): super()._c()\n def d(self): self._c()", {"_c"}),
        ("class A(B):\n def _c(self): pass\n def d(self): self._c()", set()),
        ("class A(B):\n def __init__(self): self._c = 1\n def d(self): return self._c", set()),
        ("os._exit(0)", set()),
    ],
)
def test_private_names_are_told_from_our_own(code: str, names: set[str]) -> None:
    assert used([ast.parse(code)]) == names


# -- Hydra ---------------------------------------------------------------------------------------------------------------


def test_hydras_parser_finds_overrides_between_options() -> None:
    words = ["seed=0,1", "--multirun", "method=kd", "--cfg", "job", "~task"]
    assert get_args_parser().parse_intermixed_args(words).overrides == ["seed=0,1", "method=kd", "~task"]


def test_hydra_applies_overrides_to_a_configuration_in_their_order() -> None:
    config = OmegaConf.create({"a": {"b": 1, "c": 2}, "d": [1]})
    OmegaConf.set_struct(config, True)
    words = ["a.b=3", "a.b=4", "+a.e=5", "~a.c", "d=[2,3]"]
    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(words), config)
    assert config == {"a": {"b": 4, "e": 5}, "d": [2, 3]}
    with pytest.raises(Exception, match=r"Could not override 'a\.f'") as caught:
        ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(["a.f=1"]), config)
    assert isinstance(caught.value.__cause__, ConfigAttributeError)


def test_hydras_sweeper_makes_the_product_of_the_choices() -> None:
    # Hydra executes the modules of its plugins again when it looks for plugins, so a class that was imported before is stale.
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    sweeper = BasicSweeper(max_batch_size=None, params={"seed": "0,1"})
    assert (sweeper.config, sweeper.hydra_context, sweeper.launcher) == (None, None, None)
    assert sweeper.params == {"seed": "0,1"}
    overrides = OverridesParser.create().parse_overrides(["seed=0,1", "a=x", "b=1,2"])
    points = [[f"seed={seed}", "a=x", f"b={b}"] for seed in (0, 1) for b in (1, 2)]
    assert sweeper.split_arguments(overrides, None) == [points]
    assert list(inspect.signature(BasicSweeper.sweep).parameters) == ["self", "arguments"]


# -- Lightning -----------------------------------------------------------------------------------------------------------


def trainer(folder: Path, steps: int, *callbacks: pl.Callback, log_every: int = 1) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        log_every_n_steps=log_every,
        callbacks=list(callbacks),
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )


def test_lightning_writes_a_checkpoint_when_it_is_told_to(tmp_path: Path) -> None:
    class AtTheSecondStep(ModelCheckpoint):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
            if trainer.global_step == 2:
                self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    callback = AtTheSecondStep(tmp_path / "kept", "last", every_n_train_steps=0, enable_version_counter=False)
    trainer(tmp_path, 3, callback).fit(BoringModel())
    assert torch.load(tmp_path / "kept" / "last.ckpt", weights_only=True)["global_step"] == 2


def test_lightning_tells_which_steps_it_logs(tmp_path: Path) -> None:
    class Asking(BoringModel):
        def __init__(self) -> None:
            super().__init__()
            self.asked: list[bool] = []

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> object:
            self.asked.append(self.trainer._logger_connector.should_update_logs)
            return super().training_step(batch, batch_idx)

    model = Asking()
    trainer(tmp_path, 7, log_every=3).fit(model)
    assert model.asked == [False, False, True, False, False, True, False]


def test_a_module_of_lightning_knows_that_it_has_no_trainer(tmp_path: Path) -> None:
    model = BoringModel()
    assert model._trainer is None
    with pytest.raises(RuntimeError, match="not attached to a `Trainer`"):
        _ = model.trainer
    model.trainer = given = trainer(tmp_path, 1)
    assert model._trainer is given


# -- PyTorch, torchmetrics, transformers, NumPy ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [lambda module: module.to("cpu"), lambda module: module.double(), lambda module: module.cpu()]
)
def test_torch_moves_and_converts_modules_by_one_function(change: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    seen: list[bool] = []

    class Watched(pl.LightningModule):
        def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Watched":
            assert isinstance(fn(torch.zeros(1)), torch.Tensor)
            seen.append(recurse)
            return super()._apply(fn, recurse)

    change(Watched())
    assert seen == [True]


@pytest.mark.parametrize(
    "metric", [MulticlassAccuracy(2, average="micro"), BinaryF1Score(), MulticlassF1Score(2, average="macro")]
)
def test_torchmetrics_computes_from_counts_that_one_function_returns(metric: object) -> None:
    kind = type(metric)

    class Doubled(kind):  # type: ignore[misc, valid-type]
        def _final_state(self) -> tuple[torch.Tensor, ...]:
            counts = super()._final_state()
            assert [count.dtype for count in counts] == [torch.long] * 4
            return tuple(count.double() for count in counts)

    options = {} if kind is BinaryF1Score else {"num_classes": 2, "average": metric.average}
    doubled = Doubled(**options)
    doubled.update(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]))
    assert doubled.compute().dtype == torch.float64


def test_transformers_takes_its_own_kernel_where_a_configuration_names_none(tmp_path: Path) -> None:
    sizes = {"vocab_size": 8, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}
    BertConfig(**sizes).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "attn_implementation": "somebody/kernel"}))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config._attn_implementation == "somebody/kernel"
    config._attn_implementation = None
    assert AutoModel.from_config(config).config._attn_implementation == "sdpa"


def test_transformers_returns_none_for_a_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    ask = {"_raise_exceptions_for_missing_entries": False}
    assert cached_file(str(tmp_path), "model.safetensors", **ask) is None
    assert cached_file(str(tmp_path), "config.json", **ask) == str(tmp_path / "config.json")
    with pytest.raises(OSError, match=re.escape("model.safetensors")):
        cached_file(str(tmp_path), "model.safetensors")


def test_numpy_shows_the_memory_map_whose_pages_are_released(tmp_path: Path) -> None:
    np.arange(4096, dtype=np.int64).tofile(tmp_path / "values")
    values = np.memmap(tmp_path / "values", np.int64, "r", shape=(4096,))
    assert isinstance(values._mmap, mmap.mmap)
    if hasattr(mmap, "MADV_DONTNEED"):
        values._mmap.madvise(mmap.MADV_DONTNEED)
    assert values.sum() == 4095 * 2048
