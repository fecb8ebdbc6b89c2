"""Export of a run's student: a plain Hugging Face model, its tokenizer, and a model card."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from kd.config.schema import StudentSpec
from kd.errors import InputError
from kd.forward import Needs
from kd.models import Encoder
from kd.models.heads import HEADS
from kd.results.eval_results import hub_splits
from kd.results.tables import score
from kd.results.tuned import selection_words
from kd.runs.identity import backbone_of
from kd.runs.run import Run
from kd.system.files import remove, writing
from kd.system.model_sources import base_name, hub_commit, pretrained, source_name

TOLERANCE = 1e-5
"""Largest difference between the logits of the run's and of the exported model that counts as rounding."""


def export(student: Encoder, folder: Path, documents: Mapping[str, str]) -> None:
    """Write a student to a folder, atomically.

    Args:
        student: the model; extras such as projections are not exported.
        folder: target folder, replaced if it exists.
        documents: path in the folder -> text of a file: the model card, and results for the hub.

    Raises:
        InputError: if the folder cannot be written.
    """
    draft = folder.with_name(folder.name + ".part")
    with writing(folder):
        remove(draft)
        draft.mkdir(parents=True)
        for name, text in documents.items():
            (draft / name).parent.mkdir(exist_ok=True)
            (draft / name).write_text(text, encoding="utf-8")
        student.save(draft)
        readable = (
            (draft / "README.md").stat().st_mode
        )  # as the umask allows; safetensors makes files readable by the owner only
        for file in draft.rglob("*"):
            if file.is_file():
                file.chmod(readable)
        remove(folder)
        os.replace(draft, folder)


@torch.no_grad()
def largest_difference(student: Encoder, folder: Path, inputs: Mapping[str, torch.Tensor], head: str = "classifier") -> float:
    """Return the largest absolute difference between the logits of a student and of its export, loaded by transformers.

    Args:
        student: the student of the run.
        folder: its exported folder.
        inputs: one batch.
        head: a key of `kd.models.heads.HEADS`.

    Raises:
        RuntimeError: if outputs that are not exported were not masked.
    """
    student.eval()
    exported = HEADS[head].auto.from_pretrained(folder).eval()
    model_inputs = {name: tensor for name, tensor in inputs.items() if name in student.family.inputs}
    ours, theirs = student(inputs, Needs()).logits, exported(**model_inputs).logits
    if "predicted" in inputs:
        theirs = theirs[inputs["predicted"]]
    outputs = theirs.shape[-1]
    if not ours[..., outputs:].isneginf().all():  # outputs that are not exported must be masked in training
        raise RuntimeError(f"the run's model has {ours.shape[-1]} outputs, the exported one {outputs}")
    return float((theirs - ours[..., :outputs]).abs().max())


def stated_license(source: str, key: str) -> str | None:
    """Return the licence in a local model's own card; None if there is no card, or no licence in it.

    The licence of the package that ships a model need not be the model's, so it is not used.
    """
    try:
        name, _ = pretrained(source, key)
        stated = ModelCard.load(Path(name) / "README.md").data.to_dict().get("license")
    except (OSError, ValueError, TypeError, AttributeError, YAMLError, InputError):  # an unreadable card states no licence
        return None
    return stated if isinstance(stated, str) and re.fullmatch(r"[\w.+-]+", stated) else None


def origin(run: Run, student: StudentSpec | None = None) -> dict[str, Any]:
    """Return the backbone and data of a run for the model card: names, without paths on this machine.

    Args:
        run: the run.
        student: a student of its cohort, which may have a backbone of its own; None for the run's student.
    """
    source, key = backbone_of(run.spec, student)
    data = run.digest_inputs["data"]
    identifier = str(data.get("hub") or data.get("package") or "")
    return {
        "backbone": source_name(source),
        **({"commit": commit} if (commit := hub_commit(source)) is not None else {}),
        "license": stated_license(source, key),
        "data": identifier.rpartition("/")[0] if "hub" in data else identifier.partition("==")[0] or run.spec.task.name,
        "columns": len(run.spec.task.source.get("text") or [""]),
    }


def _metadata(result: Mapping[str, Any]) -> ModelCardData:
    """Return the card's metadata for the hub. Metrics are fractions, as in `result.json`; a missing licence is `unknown`.

    Figures that are none of a data set of the hub are left out, see `hub_splits`.
    """
    figures = [
        EvalResult(
            task_type=result["pipeline"],
            dataset_type=result["origin"]["data"],
            dataset_name=result["task"],
            dataset_split=split,
            metric_type=name,
            metric_value=value,
        )
        for split in hub_splits(result)
        for name, value in result["metrics"][split].items()
        if value is not None
    ]
    return ModelCardData(
        license=result["origin"]["license"] or "unknown",
        library_name="transformers",
        pipeline_tag=result["pipeline"],
        tags=["knowledge-distillation", result["method"]],
        base_model=base_name(result["origin"]["backbone"]),
        datasets=[result["origin"]["data"]],
        metrics=list(dict.fromkeys(name for values in result["metrics"].values() for name in values)),
        model_name=f"{result['student']}-{result['method']}-{result['task']}",
        eval_results=figures or None,
    )


def _rows(split: str, values: Mapping[str, float | None], model: str, metric: str | None = None) -> list[str]:
    return [f"| {model} | {split} | {name} | {score(metric or name, value, ' %')} |" for name, value in values.items()]


def _results(result: Mapping[str, Any]) -> str:
    """Return the Markdown table of the student's metrics, its agreement with its teachers, and the teachers' metrics."""
    rows = [row for split, values in result["metrics"].items() for row in _rows(split, values, "this model")]
    for name, splits in result["metrics_teacher"].items():
        rows += [row for split, values in splits.items() for row in _rows(split, values, f"teacher {name}")]
    for split, values in result["agreement"].items():
        kind = "pearson" if result["labels"] is None and result["pipeline"] != "fill-mask" else "accuracy"
        rows += _rows(split, {f"agreement with {name}": value for name, value in values.items()}, "this model", kind)
    return "\n".join(["| model | split | metric | value |", "|---|---|---|---|", *rows])


def _use(result: Mapping[str, Any]) -> str:
    """Return Python code that uses the model; longer texts are truncated as in training."""
    pipeline, length = result["pipeline"], result["max_length"]
    cut = f"truncation=True, max_length={length}"
    if pipeline == "fill-mask":
        return f"""from transformers import pipeline
use = pipeline("{pipeline}", model="path/to/this/folder", tokenizer_kwargs=dict({cut}))
use(f"a text with a {{use.tokenizer.mask_token}} in it")"""
    text = '"a text"' if result["origin"]["columns"] == 1 else '{"text": "a first text", "text_pair": "a second text"}'
    more = ', function_to_apply="none"' if result["labels"] is None else ""
    return f"""from transformers import pipeline
use = pipeline("{pipeline}", model="path/to/this/folder", {cut}{more})
use({text})"""


def _settings(result: Mapping[str, Any]) -> str:
    """Return the Markdown table of the main hyper-parameters."""
    identity = result["identity"]
    optimizer, trainer = identity["optimizer"], identity["trainer"]
    batch = f"{result['batch_size']} examples" if result["batch_tokens"] is None else f"{result['batch_tokens']} tokens"
    method = {name: value for name, value in identity["method"].items() if name not in ("name", "_target_", "weights")}
    rows = {
        "epochs": result["epochs"],
        "batch of an optimiser step": batch,
        "peak learning rate": result["lr"],
        "schedule": f"{optimizer['schedule']}, warmup {optimizer['warmup']}",
        "weight decay": optimizer["weight_decay"],
        "optimiser": str(optimizer["factory"].get("_target_", "")).rpartition(".")[2],
        "gradient clipping": trainer.get("clip"),
        "precision of training": result["precision"],
        "seed": result["seed"],
        "weights of the method's terms": result["weights"],
        **{f"method.{name}": value for name, value in method.items()},
    }
    return "\n".join(["| setting | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def model_card(result: Mapping[str, Any]) -> str:
    """Return the text of the model card: use, origin, metrics and how they were measured, and hyper-parameters."""
    teachers = ", ".join(result["teacher"]) or "none"
    about = result["origin"]
    unnamed = {"fill-mask": "the vocabulary (masked language model)"}.get(result["pipeline"], "one score (regression)")
    labels = ", ".join(result["labels"]) if result["labels"] else unnamed
    parameters = f"{result['parameters']['student']:,} (embeddings included)"
    if result["parameters"]["exported"] != result["parameters"]["student"]:
        parameters += f" in training, {result['parameters']['exported']:,} in this folder, which transformers reads as it is"
    lineage = "\n".join(f"- {name}: run `{digest}`" for name, digest in result["inputs"].items()) or "- no other runs"
    identity = result["identity"]
    data = ", ".join(f"{name} `{value}`" for name, value in identity["data"].items() if isinstance(value, str | int | float))
    examples = ", ".join(f"{count:,} {split}" for split, count in result["examples"].items())
    mixture = identity.get("mixture")
    together = (
        f"\n- Tasks that it was trained on, with a head for each: {', '.join(mixture['tasks'])}, drawn in proportion to "
        f"n^{mixture['tau']:g}; the settings below are of all of them"
        if mixture
        else ""
    )
    stated = f"{about['license']}, as the card of the base model states" if about["license"] else "unknown, nothing states one"
    return f"""---
{_metadata(result).to_yaml(line_break=chr(10))}
---
# {result["student"]} student of {teachers}, {result["method"]} on {result["task"]}

Made with kd {result["versions"]["kd"]}, run `{result["digest"]}`, seed {result["seed"]}.

```python
{_use(result)}
```

- Licence: {stated}. That of the data is not known to kd
- Base model: `{about["backbone"]}` (`{result.get("backbone") or identity["student"]["backbone"]}`)
- Data: {result["task"]}: {examples} examples; {data}{together}
- Labels: {labels}
- Parameters: {parameters}
- Initialisation: {result["init"]}
- Maximum length in training: {result["max_length"]} tokens

## Results

{_results(result)}

One seed. Checkpoint: {selection_words(result)}. Models are scored in float32. What is in
percent here is a fraction in the metadata of this card.

## Training

{_settings(result)}

## Lineage

{lineage}

Everything that made this model is in the run's `config.yaml`.
"""
