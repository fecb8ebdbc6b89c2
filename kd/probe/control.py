"""The control of a run: fine-tuning of the same student, without which a loss by distillation looks like one by size."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from kd.config.compose import compose, quoted
from kd.errors import InputError
from kd.report import load_results
from kd.results.comparison import BASELINE, budget_of, entries_of_records, pairs_of
from kd.results.finished import Finished
from kd.runs.identity import NOT_IN_DIGEST, backbone_of
from kd.runs.plan import plan
from kd.runs.run import is_record

PARTS = ("student", "surgery", "task", "optimizer", "trainer", "paths", "backbone")
"""Parts of a configuration that a run shares with its control; with a student that starts from its teacher also that."""


def controls_beside(directory: Path) -> dict[str, Path]:
    """Return the directories of the controls of the runs in the folder of a run, by the digest of the run.

    A control is the run of the baseline, fine-tuning, that reports compare a run with, and of its seed: of the same student,
    initialisation, data, budget and selection (`kd.results.comparison.pairs_of`). Runs without one are left out.
    """
    records = [record for record in load_results(directory.parent) if is_record(record)]
    names = {record["digest"]: str(record["run"]) for record in records}
    entries, controls = entries_of_records(records), {}
    for index, pair in pairs_of(entries, BASELINE).items():
        for seed, digest in entries[index].digests.items():
            if pair.baseline.digests.get(seed) in names:
                controls[digest] = directory.parent / names[pair.baseline.digests[seed]]
    return controls


def control_command(run: Finished) -> str:
    """Return a command that trains a run's control.

    Its options are those in which the run's configuration differs from the defaults. The command is planned, and compared with
    the run: if it is not of the same budget, options are left to the reader, `...`.

    Args:
        run: a run that has no control.
    """
    spec = run.spec
    taught = run.record["identity"]["student"].get("init_from") == "teacher"  # by initialisation
    teacher = f"teacher=[{','.join(spec.teacher)}]" if taught else "teacher=[]"
    words = [f"method={BASELINE}", teacher, f"student={spec.student.name}", f"task={spec.task.name}", f"seed={spec.seed}"]
    try:
        default = compose(words)
        own = leaves(parts_of(run.config, [*PARTS, "teacher"] if taught else PARTS))
        if not taught and backbone_of(spec)[0] != default.backbone:  # which the first teacher determines if no option does
            own["student.backbone"] = backbone_of(spec)[0]
        command = [*words, *options(own, leaves(parts_of(default, [*PARTS, "teacher"])))]
        planned = plan(compose(command))
        made = {"identity": planned.digest_inputs, "teacher": list(planned.spec.teacher)}
        if budget_of(made) == budget_of(run.record):
            return shlex.join(["kd-train", *command])
    except InputError:  # an option that no file of the package has, or data that are not here
        pass
    return f"{shlex.join(['kd-train', *words])} ..."


def options(own: Mapping[str, Any], default: Mapping[str, Any]) -> Iterator[str]:
    """Yield the overrides that turn the values of a default configuration into those that a run shares with its control.

    Args:
        own: dotted key -> value, of the run.
        default: the same, of the control without options.
    """
    for key, value in own.items():
        machine = key.startswith("trainer.") and key.removeprefix("trainer.") in NOT_IN_DIGEST
        if not machine and not (key in default and default[key] == value):
            text = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
            yield quoted(f"{'' if key in default else '+'}{key}={text}")


def parts_of(config: DictConfig, parts: Sequence[str]) -> dict[str, Any]:
    """Return some parts of a configuration, with interpolations as they are written."""
    values: Any = OmegaConf.to_container(config, resolve=False)
    return {part: values[part] for part in parts if part in values}


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by their dotted keys.

    >>> leaves({"a": {"b": 1, "c": []}, "d": 2})
    {'a.b': 1, 'a.c': [], 'd': 2}
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        inside = isinstance(value, Mapping) and bool(value)
        found |= leaves(value, f"{prefix}{name}.") if inside else {f"{prefix}{name}": value}
    return found
