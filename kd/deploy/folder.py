"""Exported folders: what `kd-export` writes, and how other commands read it. No part that trains is imported."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd.errors import InputError, one_of
from kd.system.model_sources import damaged_file

KEY = "RUN"
"""Name that errors give a run or an exported folder: the argument of the commands."""

RECORD = "deployment.json"
"""File of an exported folder with what the files of Hugging Face do not say: columns of text, truncation, checks."""

VERSION = 1
"""Version of `RECORD`."""


@dataclass(frozen=True)
class Format:
    """A kind of file that a student is exported to.

    Attributes:
        path: file in the folder, as the Hub lays them out.
        words: name in tables and cards.
        beside: further files that belong to it.
        exact: whether its logits are torch's up to rounding.
    """

    path: str
    words: str
    beside: tuple[str, ...] = ()
    exact: bool = True

    @property
    def paths(self) -> tuple[str, ...]:
        """All its files."""
        return (self.path, *self.beside)


FORMATS: Mapping[str, Format] = {
    "torch": Format("model.safetensors", "PyTorch, float32"),
    "onnx": Format("onnx/model.onnx", "ONNX, float32"),
    "int8": Format("onnx/model_quantized.onnx", "ONNX, int8", exact=False),
    "openvino": Format("openvino/openvino_model.xml", "OpenVINO, float32", beside=("openvino/openvino_model.bin",)),
}
"""Formats of an exported folder; values of `--formats` and `--format`."""

FOREIGN: Mapping[str, str] = {
    "saved_model.pb": "TensorFlow",
    "tf_model.h5": "TensorFlow",
    "*.tflite": "TensorFlow Lite",
    "flax_model.msgpack": "Flax",
    "adapter_config.json": "PEFT (adapters)",
    "modules.json": "sentence-transformers",
    "*.gguf": "llama.cpp",
    "*.mlpackage": "Core ML",
}
"""Pattern of a file that tells another framework's folder -> name of the framework."""


@dataclass(frozen=True)
class Deployed:
    """A student that can be run: in an exported folder, or where its run left it.

    Attributes:
        folder: a plain Hugging Face folder.
        name: name of the run, and of the student if the run has several.
        task: name of the task.
        text: columns with its one or two texts, as training read them.
        max_length: number of tokens to which texts are truncated.
        labels: names of the classes in the order of the logits; None for one score.
        files: format -> what is known of its file: `files`, sizes and digests of its files by path, and its check.
    """

    folder: Path
    name: str
    task: str
    text: Sequence[str]
    max_length: int
    labels: Sequence[str] | None
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def path(self, format: str) -> Path:
        """Return the path of the file of a format, after a check that it is as it was written.

        Raises:
            InputError: for a format that there is not, or a file that is missing or has changed.
        """
        if format not in self.files:
            raise one_of(format, tuple(self.files), "--format")
        recorded = self.files[format].get("files", {})
        if why := damaged_file(self.folder, recorded, thorough=True, record=RECORD):
            raise InputError(f"'{self.folder}' is not as it was exported: {why}", KEY)
        return self.folder / FORMATS[format].path


def is_exported(folder: Path) -> bool:
    """Return whether a folder has the record of `kd-export`."""
    return (folder / RECORD).is_file()


def read_folder(folder: Path) -> Deployed:
    """Return the student of an exported folder.

    Raises:
        InputError: if it is none, or its record cannot be read.
    """
    path = folder / RECORD
    if not path.is_file():
        raise InputError(why_none(folder), KEY)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise InputError(
                f"'{path}' has version {content['version']}, and this version of kd reads {VERSION}: export the run again", KEY
            )
        names = ("name", "task", "text", "max_length", "labels", "files")
        found = Deployed(folder, **{name: content[name] for name in names})
        correct = (
            all(isinstance(name, str) for name in found.text)
            and len(found.text) in (1, 2)
            and type(found.max_length) is int
            and (found.labels is None or all(isinstance(name, str) for name in found.labels))
            and all(name in FORMATS and isinstance(about, dict) for name, about in found.files.items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"'{path}' cannot be read ({type(error).__name__}: {error}): export the run again", KEY) from error
    if not correct:
        raise InputError(f"'{path}' is damaged: export the run again", KEY)
    return found


def why_none(folder: Path) -> str:
    """Return why a folder is neither of a finished run nor exported, and what to do."""
    if not folder.is_dir():
        return f"'{folder}' is neither the directory of a finished run nor an exported folder: there is no such folder"
    for pattern, framework in FOREIGN.items():
        if found := sorted(folder.glob(pattern)):
            return (
                f"'{folder}' is a folder of {framework} ({found[0].name}); name a run of kd, or a folder that kd-export wrote"
            )
    runs = [parent for parent in list(folder.parents)[:3] if (parent / "result.json").is_file()]
    if runs:
        return f"'{folder}' does not say which columns are its text; name the run that it is of: {runs[0]}"
    if (folder / "config.json").is_file():
        return (
            f"'{folder}' is a folder of transformers that kd-export did not write: there is no {RECORD} in it, which says "
            "which columns are its text; name a run of kd"
        )
    return f"'{folder}' is neither the directory of a finished run nor an exported folder: no result.json, no {RECORD}"
