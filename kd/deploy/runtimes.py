"""Runtimes that execute a student: torch, onnxruntime and OpenVINO behind one function, from a batch to its logits."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from kd.deploy.folder import FORMATS, KEY, Deployed
from kd.errors import InputError
from kd.forward.taps import family_of
from kd.models.pretrained import first_line, load_config, load_model
from kd.system.hardware import to_device

Batch = Mapping[str, Tensor]
"""Inputs of a model by name, each (batch, tokens), long, on the CPU; names that a model does not take are ignored."""


class Runtime(Protocol):
    """A model that can be called."""

    def logits(self, batch: Batch) -> np.ndarray:
        """Return logits, (batch, outputs), float32."""
        ...


class TorchRuntime:
    """A classifier of transformers.

    Args:
        model: the classifier; it is put into eval mode.
        device: device that it is moved to.
        dtype: type of weights and states; logits are float32 all the same.
    """

    def __init__(self, model: nn.Module, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.device = torch.device(device)
        self.model = model.eval().to(self.device, dtype)
        config: Any = model.config
        self.names = family_of(str(config.model_type)).inputs

    @torch.inference_mode()
    def logits(self, batch: Batch) -> np.ndarray:
        """Return logits, (batch, outputs), float32."""
        inputs = {name: to_device(values, self.device) for name, values in batch.items() if name in self.names}
        return self.model(**inputs).logits.float().cpu().numpy()  # type: ignore[no-any-return]


class OnnxRuntime:
    """A session of onnxruntime on the CPU.

    Threads that wait for work spin during a call alone, so that they take no time from what is called next.

    Args:
        path: the file.
        threads: number of threads; None for onnxruntime's choice.

    Raises:
        InputError: if onnxruntime is not installed, or cannot read the file.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        library = needed("onnxruntime", "onnx")
        options = library.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self.session = library.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # it raises a class of its own for each kind of damage, without a common base
            raise InputError(f"onnxruntime cannot read '{path}': {first_line(error)}", KEY) from error
        self.names = [given.name for given in self.session.get_inputs()]

    def logits(self, batch: Batch) -> np.ndarray:
        """Return logits, (batch, outputs), float32."""
        return self.session.run(["logits"], {name: batch[name].numpy() for name in self.names})[0]  # type: ignore[no-any-return]


class OpenVinoRuntime:
    """A compiled model of OpenVINO on the CPU, in float32: by default OpenVINO computes in bfloat16 where the processor can.

    Args:
        path: the file that ends in `.xml`.
        threads: number of threads; None for OpenVINO's choice.

    Raises:
        InputError: if OpenVINO is not installed, or cannot read the file.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        library = needed("openvino", "onnx")
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            self.model = library.Core().compile_model(str(path), "CPU", options)
        except Exception as error:  # a RuntimeError of C++, or one of its own
            raise InputError(f"OpenVINO cannot read '{path}': {first_line(error)}", KEY) from error
        self.names = [given.get_any_name() for given in self.model.inputs]

    def logits(self, batch: Batch) -> np.ndarray:
        """Return logits, (batch, outputs), float32."""
        return np.array(self.model({name: batch[name].numpy() for name in self.names})[0])


def needed(module: str, extra: str) -> Any:
    """Return an optional library.

    Raises:
        InputError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"this needs the package {module}: pip install 'kd[{extra}]' ({first_line(error)})") from error


def load_classifier(source: str, key: str = KEY) -> nn.Module:
    """Return the classifier of a source, in float32.

    Args:
        source: a folder of transformers, `hf:<id>` or `package:<module>/<folder>`.
        key: key that errors name.

    Raises:
        InputError: if it cannot be loaded.
    """
    return load_model(source, key, load_config(source, key), head_needed=True)


def open_file(format: str, path: Path, threads: int | None = None) -> Runtime:
    """Return the runtime of a file that an exporter wrote.

    Args:
        format: a key of `FORMATS` other than `torch`.
        path: the file.
        threads: number of threads; None for the library's choice.

    Raises:
        InputError: if its library is missing, or cannot read the file.
    """
    return OpenVinoRuntime(path, threads) if FORMATS[format].path.endswith(".xml") else OnnxRuntime(path, threads)


def open_student(deployed: Deployed, format: str, device: torch.device | str = "cpu") -> Runtime:
    """Return the runtime of a student's file.

    Args:
        deployed: the student.
        format: a key of `FORMATS` that it has.
        device: device of torch; the other formats run on the CPU.

    Raises:
        InputError: if it has no such file, the file is damaged, or the library is missing.
    """
    path = deployed.path(format)
    return TorchRuntime(load_classifier(str(deployed.folder)), device) if format == "torch" else open_file(format, path)


def input_names(model_type: str, made: Sequence[str]) -> list[str]:
    """Return the inputs of a model that its tokenizer makes, in the tokenizer's order.

    Args:
        model_type: `model_type` of its configuration.
        made: names of what the tokenizer makes, and `attention_mask`.
    """
    return [name for name in made if name in family_of(model_type).inputs]
