"""State that the methods of a run keep for later runs: `method.safetensors` beside the exported student (`Method.keeps`)."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from kd.system.files import atomic_write, writing
from kd.system.model_sources import kept_beside, kept_file


def write_kept(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write what the method of an exported student keeps; no file if that is nothing.

    Raises:
        InputError: if the file cannot be written.
    """
    path = kept_file(folder)
    with writing(path):
        if not state:
            path.unlink(missing_ok=True)
            return
        with atomic_write(path, "wb") as file:
            # Copies, because safetensors refuses tensors that share memory.
            form = torch.contiguous_format
            file.write(save({name: tensor.detach().cpu().clone(memory_format=form) for name, tensor in state.items()}))


def read_kept(source: str, key: str) -> dict[str, Tensor]:
    """Return the state that the method of a model's run kept, by name; nothing if there is none.

    Args:
        source: source of the model.
        key: the configuration key that names the source.

    Raises:
        InputError: if the source is a folder that is missing or holds no model.
    """
    path = kept_beside(source, key)
    return {} if path is None else load_file(path)
