"""State that the methods of a run keep for later runs: `method.safetensors` beside the exported student (`Method.keeps`)."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from kd.system.files import atomic_write, writing


def kept_file(folder: Path) -> Path:
    """Return the path of what the method of an exported student keeps.

    >>> kept_file(Path("run/student")).as_posix(), kept_file(Path("run/peers/s1")).as_posix()
    ('run/method.safetensors', 'run/peers/s1.method.safetensors')
    """
    return folder.with_name("method.safetensors" if folder.name == "student" else f"{folder.name}.method.safetensors")


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
            file.write(save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}))


def read_kept(folder: Path) -> dict[str, Tensor]:
    """Return the state that the method of an exported student kept, by name; nothing if there is no such file."""
    path = kept_file(folder)
    return load_file(path) if path.is_file() else {}
