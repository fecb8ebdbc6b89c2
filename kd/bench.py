"""Throughput of a method beside plain fine-tuning of the same student, in the same harness.

Absolute rates say more about the machine than about the method, so the two take turns and their ratio is the figure.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd.config import compose
from kd.errors import InputError
from kd.planning import backbone_of, plan, without
from kd.runs import Run


def prepare(run: Run, folder: Path) -> tuple[Any, Any, list[Any]]:
    """Engine, optimiser and training batches of a run.

    Teachers that a run would fine-tune are taken as they are, with a new head: speed does not depend on the weights. For the
    same reason a student that would begin from another run begins at random; it has the backbone's vocabulary then.

    Args:
        run: to be measured; nothing is trained, and its directory is not touched.
        folder: for the untrained teachers.
    """
    from kd.build import build_data, build_engine, build_examples, build_models
    from kd.models.students import load_config, load_model, load_tokenizer, with_labels

    examples = build_examples(run)
    if run.inputs.pop("stage", None) is not None:
        run.spec.student.init = "random"
    for role, needed in run.inputs.items():
        if not role.startswith("teacher "):
            raise InputError(f"the {role} needs a run that a benchmark does not make", "surgery")
        source, key = backbone_of(needed.spec)
        needed.directory = folder / role.replace(" ", "_")
        config = with_labels(load_config(source, key), examples.task.labels, examples.task.head)
        load_model(source, key, config, examples.task.head).save_pretrained(needed.student)  # type: ignore[operator]
        load_tokenizer(source, key).save_pretrained(needed.student)
    models = build_models(run, examples.task, texts=examples.texts["train"])
    data = build_data(run, examples, models)
    engine = build_engine(run, models, examples.task)
    engine.train()
    return engine, engine.optimizer_factory.optimizer(engine), list(data.train_dataloader())


def measure(engine: Any, optimizer: Any, batches: Sequence[Any], precision: str, clip: float | None) -> float:
    """Seconds for one pass of training steps over these batches."""
    import torch

    began = time.perf_counter()
    for batch in batches:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = engine.loss(batch).total
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(engine.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - began


def bench(overrides: Sequence[str], steps: int, repeats: int) -> dict[str, Any]:
    """Rates of the chosen method and of fine-tuning, taking turns.

    Args:
        overrides: as for `kd-train`.
        steps: training steps of one turn.
        repeats: turns of each; the first of each is a warm-up and is left out.
    """
    from kd.fit import quieten

    quieten()
    chosen = plan(compose(overrides), overrides)
    plain = [*without(overrides, ["method=", "method."]), "method=finetune"]
    baseline = plan(compose(plain), plain)
    runs = {str(chosen.spec.method["name"]): chosen, "finetune": baseline}
    with tempfile.TemporaryDirectory() as folder:
        made = {name: prepare(run, Path(folder) / name) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    picked = {name: batches[:steps] for name, (_, _, batches) in made.items()}
    for _ in range(repeats + 1):
        for name, (engine, optimizer, _) in made.items():
            trainer = runs[name].spec.trainer
            times[name].append(measure(engine, optimizer, picked[name], trainer.precision, trainer.clip))
    found: dict[str, Any] = {"precision": chosen.spec.trainer.precision, "steps": steps, "repeats": repeats, "rates": {}}
    for name, values in times.items():
        examples = sum(len(batch) for batch in picked[name])
        tokens = sum(int(batch.student["attention_mask"].sum()) for batch in picked[name])
        rates = sorted(examples / seconds for seconds in values[1:])
        found["rates"][name] = {
            "examples_per_second": statistics.median(rates),
            "range": [rates[0], rates[-1]],
            "tokens_per_second": statistics.median(tokens / seconds for seconds in values[1:]),
        }
    ratios = sorted(b / a for a, b in zip(times["finetune"][1:], times[next(iter(times))][1:], strict=True))
    found["seconds_relative_to_finetune"] = {"median": statistics.median(ratios), "range": [ratios[0], ratios[-1]]}
    return found


def main() -> None:
    """The command `kd-bench`."""
    parser = argparse.ArgumentParser(prog="kd-bench", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="as for kd-train: method=pkd student=3l task=rotten_tomatoes ...")
    parser.add_argument("--steps", type=int, default=20, help="training steps of one turn (default 20)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each, after a warm-up (default 5)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_intermixed_args()
    try:
        found = bench(arguments.overrides, arguments.steps, arguments.repeats)
    except InputError as error:
        print(f"kd-bench: {error}", file=sys.stderr)
        sys.exit(2)
    for name, rate in found["rates"].items():
        low, high = rate["range"]
        print(
            f"{name:12s} {rate['examples_per_second']:8.1f} examples/s ({low:.1f} to {high:.1f})  "
            f"{rate['tokens_per_second']:9.0f} tokens/s"
        )
    ratio = found["seconds_relative_to_finetune"]
    low, high = ratio["range"]
    print(
        f"a step costs {ratio['median']:.2f} times fine-tuning's ({low:.2f} to {high:.2f}), {found['precision']}, teacher live"
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
