"""Predictions of exported students for any texts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd.data.texts import Texts
from kd.data.tokenized import Tokens, in_order
from kd.errors import InputError
from kd.forward import Needs
from kd.models import Encoder
from kd.models.pretrained import load_config, load_model, load_tokenizer
from kd.system import hardware
from kd.system.model_sources import damaged_file


def check_export(directory: Path, folder: Path, files: Mapping[str, Any], key: str) -> None:
    """Check that an exported student is as its run wrote it.

    Args:
        directory: directory of the run.
        folder: folder of the student.
        files: `files` of the run's record; empty for a record of an earlier version, with which nothing is compared.
        key: the key that names the run.

    Raises:
        InputError: if a file is missing or has changed.
    """
    own = {name: recorded for name, recorded in files.items() if (directory / name).parent == folder}
    if why := damaged_file(directory, own, thorough=True):
        raise InputError(f"'{folder}' is not as its run wrote it: {why}. The command of the run exports it again", key)


def load_student(folder: Path, key: str) -> Encoder:
    """Return an exported student, in float32 and eval mode.

    Args:
        folder: folder of the student.
        key: the key that names the run.

    Raises:
        InputError: if it cannot be loaded.
    """
    source = str(folder)
    return Encoder(load_model(source, key, load_config(source, key), head_needed=True), load_tokenizer(source, key)).eval()


@torch.no_grad()
def logits_over(student: Encoder, texts: Texts, max_length: int, device: torch.device) -> np.ndarray:
    """Return the logits of a student for texts, in their order, (examples, classes), float32.

    Args:
        student: the student, in eval mode.
        texts: one or two texts for each example.
        max_length: number of tokens to which they are truncated, as in training.
        device: device on which it runs.
    """
    student.to(device)

    def logits(batch: dict[str, torch.Tensor]) -> np.ndarray:
        inputs = {name: hardware.to_device(tensor, device) for name, tensor in batch.items()}
        return student(inputs, Needs()).logits.float().cpu().numpy()  # type: ignore[no-any-return]

    return in_order(Tokens(student.tokenizer, texts, max_length), logits)
