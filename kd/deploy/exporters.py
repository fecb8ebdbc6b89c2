"""Exporters: a classifier of transformers to ONNX, to int8, and to OpenVINO, each by its own library."""

import contextlib
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd.config.values import one_line
from kd.deploy.runtimes import needed
from kd.errors import InputError, disk_is_full
from kd.models.pretrained import quiet

OPSET = 17
"""Version of ONNX's operators: the first with layer normalisation, which all current runtimes read."""

EXPORTERS = ("torchscript", "dynamo")
"""Values of `--exporter`: how torch writes ONNX. `torchscript` traces the model, in seconds; torch calls it deprecated."""

OPERATOR = re.compile(r"\baten::\w+")
"""Name of an operator of torch in the messages of libraries, which may be pages long."""


class Logits(nn.Module):
    """A classifier whose arguments are tensors in a fixed order, and whose only output are its logits.

    Args:
        model: the classifier.
        names: names of its inputs, in the order of the arguments.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names
        self.eval()  # torch.onnx puts the modules of what it exported back into the mode of the outermost one

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return logits, (batch, outputs)."""
        logits: Tensor = self.model(**dict(zip(self.names, inputs, strict=True))).logits
        return logits


def write_onnx(model: nn.Module, example: Mapping[str, Tensor], path: Path, exporter: str = "torchscript") -> None:
    """Write ONNX in float32, for batches of any size and length.

    Args:
        model: the classifier, in eval mode, on the CPU.
        example: two examples of different length with all inputs of the model, each (2, tokens): a batch of one, or without
            padding, would be taken for the only case.
        path: the file.
        exporter: one of `EXPORTERS`.

    Raises:
        InputError: if a package is missing, or torch refuses to export an operator of the model.
    """
    needed("onnx", "onnx")
    names = tuple(example)
    options: dict[str, Any] = {"dynamo": False, "dynamic_axes": {name: {0: "batch", 1: "tokens"} for name in names}}
    options["dynamic_axes"]["logits"] = {0: "batch"}
    if exporter == "dynamo":
        needed("onnxscript", "onnx")
        axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
        options = {"dynamo": True, "dynamic_shapes": {"inputs": tuple(axes for _ in names)}, "external_data": False}
        options["verbose"] = False
    else:
        options["opset_version"] = OPSET
    with exporting(f"torch.onnx ({exporter})"), torch.no_grad():
        torch.onnx.export(
            Logits(model, names),
            tuple(example.values()),
            str(path),
            input_names=list(names),
            output_names=["logits"],
            **options,
        )


def write_int8(onnx: Path, path: Path) -> None:
    """Write ONNX with weights in int8, the embedding tables among them; activations are quantised as they come.

    Source: dynamic quantisation of onnxruntime. Activations are scaled by the range of a whole batch, so that an example's
    logits depend a little on the others of its batch. Weights have a scale for each output and 7 bits: processors without VNNI
    add products of 8 bits in 16 bits, which would overflow. Our choice: of eight ways it was the closest to float32 on two
    students; one scale for each matrix cost up to 3 points of accuracy.

    Args:
        onnx: file in float32.
        path: the file to write.

    Raises:
        InputError: if a package is missing, or onnxruntime refuses the model.
    """
    quantization = needed("onnxruntime.quantization", "onnx")
    with exporting("onnxruntime.quantization"):
        quantization.quantize_dynamic(
            onnx,
            path,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
            op_types_to_quantize=["MatMul", "Gather"],
        )


def write_openvino(model: nn.Module, example: Mapping[str, Tensor], path: Path) -> None:
    """Write OpenVINO's two files in float32, for batches of any size and length, by its converter of torch models.

    The converter is called itself: `openvino.convert_model`, which calls it, sends statistics of use to its makers unless the
    user forbids it.

    Arguments and errors as for `write_onnx`; `path` ends in `.xml`.
    """
    library, frontend = needed("openvino", "onnx"), needed("openvino.frontend", "onnx")
    decoders = needed("openvino.frontend.pytorch.ts_decoder", "onnx")
    names = tuple(example)
    with exporting("OpenVINO"), torch.no_grad():
        decoder = decoders.TorchScriptPythonDecoder(Logits(model, names), example_input=tuple(example.values()))
        converter = frontend.FrontEndManager().load_by_framework("pytorch")
        found = converter.convert(converter.load(decoder))
        for given, name in zip(found.inputs, names, strict=True):
            given.get_tensor().set_names({name})
            given.get_node().set_partial_shape(library.PartialShape([-1, -1]))
            given.get_node().set_element_type(library.Type.i64)
        found.outputs[0].get_tensor().set_names({"logits"})
        found.validate_nodes_and_infer_types()
        library.save_model(found, path, compress_to_fp16=False)


@contextlib.contextmanager
def exporting(library: str) -> Iterator[None]:
    """Silence a library, and turn its errors about a model into an input error.

    Args:
        library: its name.

    Raises:
        InputError: with the beginning of the library's error.
    """
    silent = logging.CRITICAL
    before = logging.root.manager.disable
    logging.disable(silent)
    try:
        with quiet(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except Exception as error:  # each library raises classes of its own for an operator that it does not know
        if disk_is_full(error):
            raise
        operators = ", ".join(dict.fromkeys(OPERATOR.findall(str(error))))
        named = f" with {operators}" if operators else ""
        raise InputError(f"{library} does not export this model{named}: {one_line(error)}", "--formats") from error
    finally:
        logging.disable(before)


@contextlib.contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """Yield a temporary folder of this process alone beside a file or folder, for what it is made from; it is removed."""
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.part.") as name:
        yield Path(name)
