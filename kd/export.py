"""The deployable folder of a run: a plain Hugging Face model, its tokenizer, and a model card."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kd.forward import Needs
from kd.models import Encoder
from kd.models.heads import HEADS

TOLERANCE = 1e-5
"""Largest difference between the run's logits and the exported model's that is taken for rounding."""


def export(student: Encoder, folder: Path, card: str) -> None:
    """Write a student to a folder, all or nothing.

    Args:
        student: the model; its extras (projections) are not part of it.
        folder: replaced if it is there.
        card: text of `README.md`.
    """
    draft = folder.with_name(folder.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    student.save(draft)
    (draft / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(draft, folder)


@torch.no_grad()
def largest_difference(student: Encoder, folder: Path, inputs: Mapping[str, torch.Tensor], loader: Any = None) -> float:
    """Largest absolute difference between the logits of a student and of its exported folder, loaded by transformers alone.

    Args:
        student: the run's.
        folder: exported.
        inputs: a batch.
        loader: class of transformers; a sequence classifier's by default.
    """
    student.eval()
    found: Any = (loader or HEADS["classifier"].auto).from_pretrained(folder).eval()
    taken = {name: tensor for name, tensor in inputs.items() if name in student.family.inputs}
    ours, theirs = student(inputs, Needs()).logits, found(**taken).logits
    if "predicted" in inputs:
        theirs = theirs[inputs["predicted"]]
    outputs = theirs.shape[-1]
    if not ours[..., outputs:].isneginf().all():  # a vocabulary that is not exported must not have been chosen from
        raise RuntimeError(f"the run's model has {ours.shape[-1]} outputs, the exported one {outputs}")
    return float((theirs - ours[..., :outputs]).abs().max())


def _rows(split: str, metrics: Mapping[str, float | None], prefix: str = "") -> list[str]:
    shown = {name: "undefined" if value is None else f"{value:.4f}" for name, value in metrics.items()}
    return [f"| {split} | {prefix}{name} | {value} |" for name, value in shown.items()]


def model_card(result: Mapping[str, Any]) -> str:
    """The model card: what this model is, where it comes from, what it scores and how that was measured."""
    teachers = ", ".join(result["teacher"]) or "none"
    selection = result["selection"]
    pipeline = result["pipeline"]
    unnamed = {"fill-mask": "the vocabulary (masked language model)"}.get(pipeline, "one score (regression)")
    labels = ", ".join(result["labels"]) if result["labels"] else unnamed
    parameters = f"{result['parameters']['student']:,} (embeddings included)"
    if result["parameters"]["exported"] != result["parameters"]["student"]:
        parameters += f" in training, {result['parameters']['exported']:,} in this folder, which transformers reads as it is"
    lineage = "\n".join(f"- {name}: run `{digest}`" for name, digest in result["inputs"].items()) or "- no other runs"
    metrics = [row for split, values in result["metrics"].items() for row in _rows(split, values)]
    agreement = [row for split, values in result["agreement"].items() for row in _rows(split, values, "agreement with ")]
    table = "\n".join(["| split | metric | value |", "|---|---|---|", *metrics, *agreement])
    return f"""---
library_name: transformers
pipeline_tag: {pipeline}
tags: [knowledge-distillation, {result["method"]}]
---
# {result["student"]} student of {teachers}, {result["method"]} on {result["task"]}

Made with kd {result["versions"]["kd"]}, run `{result["digest"]}`, seed {result["seed"]}.

```python
from transformers import pipeline
use = pipeline("{pipeline}", model="path/to/this/folder")
```

- Labels: {labels}
- Parameters: {parameters}
- Initialisation: {result["init"]}
- Maximum length in training: {result["max_length"]} tokens

## Results

{table}

One seed. The checkpoint is the {selection["kind"]} one, {selection["by"]}. Metrics are in float32.

## Lineage

{lineage}

Method `{result["method"]}`, weights {result["weights"]}. Everything that made this model is in the run's `config.yaml`.
"""
