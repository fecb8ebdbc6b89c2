"""Legal and illegal values of every configuration key: what hypothesis draws from."""

import dataclasses
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from omegaconf import OmegaConf

from kd.config.compose import conf_folder
from kd.config.schema import RunSpec


@dataclass(frozen=True)
class Values:
    """Legal and illegal values of a key, and the other keys that an error about it may name."""

    legal: st.SearchStrategy[Any]
    illegal: st.SearchStrategy[Any]
    also: tuple[str, ...] = ()


NEVER: st.SearchStrategy[Any] = st.sampled_from(
    [
        "zero \0 byte",
        "half \ud83d",
        "x" * 20_000,
        math.nan,
        math.inf,
        -math.inf,
        10**400,
        "${nothing}",
        "${oc.env:NOT_SET_HERE}",
    ]
)
"""Values that are illegal for every key."""

NESTED: st.SearchStrategy[Any] = st.sampled_from(
    [{"a": 1}, {"a": {"b": []}}, [[1]], [None], [{"a": 1}], {"_target_": "os.system"}]
)
WORDS = st.sampled_from(["", " ", "none of these", "-", "Ünïcode", "0x10", "../..", "null", "'", "a=b", "__class__"])


def union(*strategies: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """One of several, the plain illegal ones among them."""
    return st.one_of(*strategies)


def real(low: float, high: float, *, zero: bool = False, null: bool = False, also: tuple[str, ...] = ()) -> Values:
    """A number in a range."""
    legal = [st.floats(low, high, allow_nan=False), st.sampled_from([low, high])]
    legal += [st.just(0)] if zero else []
    legal += [st.none()] if null else []
    outside = [v for v in (-1, -1e-9, -0.5, 0.0, 1e-320, 1e-45, 1e30, 1e300, high * 2 + 1) if not low <= v <= high]
    outside = [v for v in outside if not (zero and v == 0)]
    illegal = [st.sampled_from(outside), WORDS, NESTED, NEVER, st.booleans(), *([] if null else [st.none()])]
    return Values(union(*legal), union(*illegal), also)


def whole(low: int, high: int, *, most: int | None = None, null: bool = False, also: tuple[str, ...] = ()) -> Values:
    """A whole number in a range; `most` is the largest that the tests' small models and data allow."""
    legal = [st.integers(low, high if most is None else most), *([st.none()] if null else [])]
    outside = [low - 1, -(10**6), high + 1, 10**19, 10**30, 0.5, 2.0, 1e300]
    illegal = [st.sampled_from(outside), WORDS, NESTED, NEVER, st.booleans(), *([] if null else [st.none()])]
    return Values(union(*legal), union(*illegal), also)


def word(*allowed: str, null: bool = False, also: tuple[str, ...] = ()) -> Values:
    """A word of a closed list."""
    illegal = [WORDS, NESTED, NEVER, st.booleans(), st.sampled_from([0, 3, -1, 2.5]), *([] if null else [st.none()])]
    return Values(st.sampled_from([*allowed, *([None] if null else [])]), union(*illegal), also)


def switch(*, null: bool = False) -> Values:
    """A truth value."""
    illegal = [st.sampled_from(["maybe", "", 2, -1, 0.5, "10"]), NESTED, NEVER, *([] if null else [st.none()])]
    return Values(st.sampled_from([True, False, *([None] if null else [])]), union(*illegal))


def name(legal: str) -> Values:
    """A part of a folder's name."""
    bad = st.sampled_from(["", " ", "a/b", "a b", "x" * 65, "ü" * 40, "a\nb", "..;", None, True, 1.5, "???"])
    return Values(st.sampled_from([legal, "n.a-m_e", "näme", "x" * 64]), union(bad, NESTED, NEVER))


def target(legal: str) -> Values:
    """A class."""
    bad = [
        "os.system",
        "subprocess.Popen",
        "builtins.dict",
        "builtins.print",
        "nowhere.Thing",
        "kd.nothing",
        "",
        ".",
        "a b",
        None,
        3,
    ]
    return Values(st.just(legal), union(st.sampled_from(bad), NESTED, NEVER))


def path(legal: str | None, *, null: bool, also: tuple[str, ...] = (), strict: bool = True) -> Values:
    """A file or folder. With `strict` it has to be there."""
    bad: list[Any] = [True, 2.5, "y" * 300, *(["/not/there", "", "ü/ö"] if strict else [""]), *([] if null else [None])]
    return Values(st.sampled_from([legal, *([None] if null else [])]), union(st.sampled_from(bad), NESTED, NEVER), also)


def words(*legal: list[str] | None, also: tuple[str, ...] = (), null: bool = False) -> Values:
    """A list of words."""
    bad = [
        "text",
        3,
        [],
        [None],
        [[]],
        [True],
        [1.5],
        [""],
        ["a", "a"],
        [{"a": 1}],
        {"a": 1},
        ["no such"],
        *([] if null else [None]),
    ]
    return Values(st.sampled_from(list(legal)), union(st.sampled_from(bad), NEVER), also)


def mapping(*legal: Mapping[str, Any] | None) -> Values:
    """A mapping."""
    bad = st.sampled_from([3, "word", [1], True, 2.5, {"": 1}, {"no_such_argument": 1}])
    return Values(st.sampled_from(list(legal)), union(bad, NEVER))


def weight() -> Values:
    """A weight of a term: a number or a schedule."""
    schedule = {"_target_": "kd.schedules.Linear", "start": 0.0, "end": 1.0}
    bad = [{**schedule, "start": value} for value in (-1, math.inf, "a", True, None, 1e300)]
    bad += [{**schedule, "begin": 2}, {**schedule, "_target_": "os.system"}, {**schedule, "more": 1}, {"start": 0}]
    illegal = union(st.sampled_from([-1, -1e-9, 1e-320, 1e30, True, None, *bad]), WORDS, NESTED, NEVER)
    return Values(st.one_of(st.floats(1e-12, 1e9), st.just(schedule)), illegal)


def temperature() -> Values:
    """A temperature: a number or a schedule."""
    schedule = {"_target_": "kd.schedules.Cosine", "start": 4.0, "end": 1.0}
    bad = [{**schedule, "end": value} for value in (0, -1, math.nan, "a", 1e30, False)]
    illegal = union(st.sampled_from([0, -1, 1e-320, 1e300, True, None, *bad]), WORDS, NESTED, NEVER)
    return Values(st.one_of(st.floats(1e-3, 1e4), st.just(schedule)), illegal)


def layer_map(*names: str) -> Values:
    """Which layers meet: a name, or pairs."""
    bad = [[[1, 9]], [[-1, 1]], [[1]], [1, 2], [["a", "b"]], [[True, 1]], [[1.0, 2]], [], 3, True, None, {"a": 1}, [[1, 2, 3]]]
    return Values(st.sampled_from([*names, [[1, 2], [2, 4]]]), union(st.sampled_from(bad), WORDS, NEVER))


NOISE = {"_target_": "kd.data.edits.LabelNoise", "rate": 0.2}
IMBALANCE = {"_target_": "kd.data.edits.Imbalance", "ratio": 2}
COUNT = 1_000_000
SEED = 2**63 - 1


def every_value(backbone: str, data: str) -> dict[str, Values]:
    """Key -> values, for the typed specification over the default configuration with `task=file`.

    Args:
        backbone: folder of a BERT, 4 x 32 with 4 heads and 64 positions.
        data: folder with `train.csv`, `validation.csv` and `test.csv`, of which train has 96 examples of two classes.
    """
    own = ("student.init", "student.heads")
    return {
        "seed": whole(0, SEED),
        "backbone": Values(st.just(backbone), union(st.sampled_from([None, True, 1.5]), NESTED, NEVER)),
        "cache": Values(
            st.sampled_from(["auto", "on", "off", True, False, "20GB", "1.5 mb", 1000]),
            union(st.sampled_from(["-1", "much", "", None, -5, "1e3", "10 XB"]), NESTED, NEVER),
        ),
        "preflight": switch(),
        "resume": switch(),
        "method.name": name("pkd"),
        "method._target_": target("kd.methods.pkd.PKD"),
        "method.layers": layer_map("skip", "last", "uniform"),
        "method.temperature": temperature(),
        "method.normalize": switch(),
        "method.loss": word("kl", "ce", "mse"),
        "method.reduction": word("batchmean", "elementmean"),
        "method.hidden_reduction": word("elements", "vectors", "examples"),
        "method.weights": Values(
            st.just({"task": 1, "logits": 0.0, "hidden": 0}),
            union(st.sampled_from([3, "a", None, [], {}, {"task": 1}, {"task": 0, "logits": 0, "hidden": 0.0}]), NEVER),
            ("method.weights.task", "method.weights.logits"),
        ),
        "method.weights.task": weight(),
        "method.weights.logits": weight(),
        "method.weights.hidden": weight(),
        "engine._target_": target("kd.engines.distiller.Distiller"),
        "student.name": name("2l"),
        "student.layers": Values(st.sampled_from([2, 3, 4, None]), whole(1, 256, null=True).illegal, (*own, "method.layers")),
        "student.width": Values(st.none(), whole(1, 65_536, null=True).illegal, own),
        "student.heads": Values(st.sampled_from([4, None]), whole(1, 65_536, null=True).illegal, own),
        "student.intermediate": Values(st.sampled_from([64, None]), whole(1, 1_048_576, null=True).illegal, own),
        "student.family": Values(st.sampled_from(["bert", None]), word("bert", null=True).illegal),
        "student.backbone": path(backbone, null=True),
        "student.init": Values(
            st.sampled_from(["random", "first", "every", "last", [1, 3], [2, 2]]),
            union(
                st.sampled_from([None, 3, [], [1], [0, 1], [1, 9], [True, 2], ["first"], [1.0, 2.0], [None, 1], True]),
                NEVER,
                WORDS,
            ),
        ),
        "student.init_from": word("pretrained", "teacher", "auto"),
        "student.checkpoint": Values(st.none(), union(st.sampled_from([True, 2.5]), NESTED, NEVER)),
        "student.run": Values(st.none(), NEVER),
        "student.dropout": real(0, 0.99, null=True),
        "teacher.minilm": Values(
            st.just({"backbone": backbone}), union(st.sampled_from([None, 3, "a", [1]]), NEVER), ("teacher",)
        ),
        "teacher.minilm.model": Values(st.none(), union(st.sampled_from([True, 2.5]), NESTED, NEVER)),
        "teacher.minilm.backbone": path(backbone, null=False, also=("teacher.minilm.model",)),
        "teacher.minilm.student_backbone": path(backbone, null=True),
        "teacher.minilm.labels": Values(st.none(), union(st.sampled_from([3, "a", [None], [True], [1.5], {"a": 1}]), NEVER)),
        "teacher.minilm.tasks": Values(
            st.sampled_from([None, "each"]), union(st.sampled_from([3, "all", True, [], [1], ["rte"], {"a": 1}]), NEVER)
        ),
        "teacher.minilm.method": Values(
            st.just("finetune"), union(st.sampled_from([None, True, 1.5, "no such", "", "[kd]"]), NESTED, NEVER)
        ),
        "teacher.minilm.member": Values(st.none(), union(st.sampled_from([3, True, 2.5, "2l", "full", ""]), NESTED, NEVER)),
        "teacher.minilm.run": Values(st.just({}), union(st.sampled_from([None, 3, "a", [1]]), NEVER)),
        "teacher.minilm.run.seed": whole(0, SEED),
        "teacher.minilm.run.optimizer.lr": real(1e-12, 100),
        "teacher.minilm.run.trainer.max_epochs": whole(1, COUNT),
        "pool.name": Values(st.just("none"), union(st.sampled_from([None, True, 1.5]), NESTED, NEVER)),
        "pool.wrapper": Values(st.none(), union(st.sampled_from([3, "a", [1]]), NEVER)),
        "pool.chain": Values(st.just(False), switch().illegal),
        "pool.distribution": Values(st.none(), union(st.sampled_from([3, "a", [1], "uniform", True, {"a": 1}]), NEVER)),
        "pool.sharpness": real(0, 100),
        "pool.holdout": Values(
            st.floats(0.01, 0.99), union(st.sampled_from([0, 1, -0.5, 2, 1e300, True, None]), WORDS, NESTED, NEVER)
        ),
        "cohort.name": Values(st.just("single"), union(st.sampled_from([None, True, 1.5]), NESTED, NEVER)),
        "cohort.students": Values(
            st.sampled_from([1, ["2l"], [{}]]),
            union(
                st.sampled_from(
                    [
                        0,
                        -1,
                        20_000,
                        10**30,
                        [],
                        "2l",
                        None,
                        True,
                        1.0,
                        [3],
                        [[]],
                        ["nobody"],
                        [{"no": 1}],
                        [{"backbone": "nowhere"}],
                        {},
                    ]
                ),
                NEVER,
            ),
            ("cohort",),
        ),
        "cohort.teacher": word("frozen"),
        "cohort.share": Values(
            st.none(), union(st.sampled_from([3, True, 2.5, "head", "none", "body"]), NESTED, NEVER), ("cohort.students",)
        ),
        "cohort.peers": Values(st.none(), union(st.sampled_from([3, "a", [1]]), NEVER)),
        "task.name": name("file"),
        "task.kind": word("classification"),
        "task.text": words(["text"], also=("task.source",)),
        "task.label": Values(st.just("label"), union(st.sampled_from(["no such", True, 1.5]), NESTED, NEVER)),
        "task.labels": words(["negative", "positive"], ["positive", "negative"], None, null=True),
        "task.codes": Values(
            st.sampled_from([{}, {"0": "negative"}]), union(st.sampled_from([3, "a", [1], {"0": "nobody"}, {"0": None}]), NEVER)
        ),
        "task.metrics": words(["accuracy"], ["accuracy", "f1"], ["matthews_corrcoef", "accuracy"]),
        "task.monitor": word("accuracy"),
        "task.max_length": whole(3, COUNT, most=64),
        "task.limit_train": Values(st.one_of(st.integers(60, 10**6), st.none()), whole(1, 2**40, null=True).illegal),
        "task.limit_validation": Values(st.one_of(st.integers(1, 10**6), st.none()), whole(1, 2**40, null=True).illegal),
        "task.limit_test": Values(st.one_of(st.integers(1, 10**6), st.none()), whole(1, 2**40, null=True).illegal),
        "task.format": word("csv", null=True),
        "task.delimiter": Values(
            st.sampled_from(["comma", ",", None]), union(st.sampled_from(["::", "", '"', "\n", True, 1.5]), NESTED, NEVER)
        ),
        "task.pattern": Values(
            st.none(),
            union(st.sampled_from(["(", "", "(?P<label>", "no group", "(?P<text>a)(?P<label>b)", True, 1.5, 3]), NESTED, NEVER),
            ("task.text", "task.label"),
        ),
        "task.encoding": Values(
            st.sampled_from([None, "latin-1", "utf-8", "cp1252"]),
            union(st.sampled_from(["", "no such", "base64", "utf-16", True, 1.5, 3]), NESTED, NEVER),
        ),
        "task.columns": Values(st.none(), union(st.sampled_from([[], ["a", "a"], ["text", "label"], [""]]), NEVER)),
        "task.extra": Values(
            st.sampled_from([None, {}, {"label": "classes"}]),
            union(
                st.sampled_from([3, "a", [1], {"": "classes"}, *({name: "number"} for name in ("no such", "text", "label"))]),
                NEVER,
            ),
        ),
        "task.where": Values(
            st.sampled_from([None, {}]),
            union(st.sampled_from([3, "a", [1], {"": "a"}, {"label": "negative"}, {"no such": ["a"]}]), NEVER),
            ("task.extra",),
        ),
        "task.where_evaluated": Values(
            st.sampled_from([None, {}]),
            union(st.sampled_from([3, "a", [1], {"": "a"}, {"label": "negative"}, {"no such": ["a"]}]), NEVER),
            ("task.extra",),
        ),
        "task.of": Values(st.just({}), union(st.sampled_from([3, "a", [1], {"a": 3}, {"rte": {"kind": "regression"}}]), NEVER)),
        "task.tau": Values(st.just(1.0), union(st.sampled_from([0, -1, 2.5, "a", None, True, 1e300]), NESTED, NEVER)),
        "task.edits": Values(
            st.sampled_from([None, [], {}, [NOISE], {"noise": NOISE, "few": {**IMBALANCE, "order": ["positive", "negative"]}}]),
            union(
                st.sampled_from(
                    [3, "a", True, [1], {"a": 3}, [{}], [{"_target_": "os.system"}], [{**NOISE, "rates": 1}]]
                    + [[{**NOISE, "rate": value}] for value in (-0.1, 1.1, "a", None, True)]
                    + [{"few": {**IMBALANCE, "ratio": value}} for value in (0.99, 1e5, 1e30, "a", None)]
                    + [
                        [{"_target_": "kd.data.augmentation.WordReplacement", **given}]
                        for given in ({}, {"model": 3}, {"run": 3})
                    ]
                    + [[{**NOISE, "teachers": value}] for value in (None, 1, "a")]
                    + [[{**IMBALANCE, name: value}] for name in ("profile", "order", "seed") for value in (-1, "a", ["a"])]
                ),
                NEVER,
            ),
        ),
        "task.holdout": Values(
            st.one_of(st.floats(0.2, 0.8), st.none()), union(st.sampled_from([0, 1, -0.5, 2, 1e300, True]), NESTED, NEVER)
        ),
        "task.train": path(f"{data}/train.csv", null=False),
        "task.validation": path(f"{data}/validation.csv", null=True),
        "task.test": path(f"{data}/test.csv", null=True),
        "task.unlabelled": path(f"{data}/train.csv", null=True),
        "task.quoted": switch(null=True),
        "task.source._target_": Values(
            st.just("kd.data.sources.Files"), target("kd.data.sources.Files").illegal, ("task.source",)
        ),
        "optimizer.name": Values(st.just("adamw"), union(st.sampled_from([None, True, 1.5]), NESTED, NEVER)),
        "optimizer.lr": real(1e-12, 100),
        "optimizer.weight_decay": real(1e-12, 100, zero=True),
        "optimizer.schedule": word("linear", "cosine", "constant"),
        "optimizer.warmup": Values(
            st.floats(0, 1), union(st.sampled_from([-1, -1e-9, 1.001, 1e300, True, None]), WORDS, NESTED, NEVER)
        ),
        "optimizer.factory._target_": target("torch.optim.AdamW"),
        "optimizer.factory._partial_": Values(st.just(True), switch().illegal),
        "optimizer.factory.betas": Values(
            st.sampled_from([[0.9, 0.999], [0.0, 0.5]]),
            union(st.sampled_from([3, "a", None, [], [1], [2, 3], [-1, 0.9], ["a", "b"], {"a": 1}]), NEVER),
            ("optimizer.factory",),
        ),
        "optimizer.factory.eps": Values(
            st.floats(1e-12, 1), union(st.sampled_from([-1, "a", None, [1], {"a": 1}]), NEVER), ("optimizer.factory",)
        ),
        "optimizer.factory.fused": Values(st.sampled_from([True, False]), NEVER, ("optimizer.factory",)),
        "trainer.max_epochs": whole(1, COUNT),
        "trainer.batch_size": whole(1, COUNT),
        "trainer.batch_tokens": Values(st.one_of(st.integers(128, 2**31), st.none()), whole(1, 2**31, null=True).illegal),
        "trainer.pad_multiple": whole(1, 65_536, null=True),
        "trainer.accumulate": whole(1, COUNT),
        "trainer.clip": Values(
            st.one_of(st.floats(1e-12, 1e12), st.none()),
            union(st.sampled_from([-1, 0, 1e-320, 1e300, True]), WORDS, NESTED, NEVER),
        ),
        "trainer.precision": word("32-true", "bf16-mixed", "64-true", "auto"),
        "trainer.compile": Values(  # compiling takes long, and CUDA graphs need a GPU
            st.sampled_from([False, "off"]), union(st.sampled_from(["reduce", "default"]), switch().illegal)
        ),
        "trainer.selection": word("best", "last"),
        "trainer.accelerator": word("cpu", "auto"),
        "trainer.devices": Values(
            st.sampled_from([1, "1", "auto"]), union(st.sampled_from([0, -1, "many", True, None, 1.0, 10**19]), NESTED, NEVER)
        ),
        "trainer.strategy": word("auto", "ddp"),
        "trainer.embedding_rows": word("occurring", "all"),
        "trainer.deterministic": switch(),
        "trainer.eval_batch_size": whole(1, COUNT),
        "trainer.num_workers": whole(0, 1024),
        "trainer.checkpoint_minutes": real(0, 525_600),
        "trainer.progress": word("auto", "bar", "plain", "none"),
        "logger.group": Values(
            st.sampled_from([None, "pkd_dev", "a sweep: lr/seed", "Ünïcode", "x" * 128]),
            union(st.sampled_from(["", " ", " a", "a ", "a\nb", "x" * 129, True, 1.5]), NESTED, NEVER),
        ),
        "trainer.keep": word("all", "best", "student", "figures"),
        "logger.extra": Values(
            st.sampled_from([{}, {"shown": {"_target_": "kd.training.trackers.tensorboard.TensorBoardTracker"}}]),
            union(
                st.sampled_from(
                    [3, "a", [1], {"a": 1}, {"a": None}, {"a": {}}, {"_target_": "os.system"}]
                    + [{"a": {"_target_": name}} for name in ("os.system", "builtins.dict", "kd.methods.pkd.PKD", 3)]
                ),
                NEVER,
            ),
        ),
        "tuned.study": Values(
            st.sampled_from([None, "pkd-3l-rte-s0-0123456789ab", "x" * 240]),
            union(st.sampled_from(["", " ", "a b", "a/b", "x" * 241, True, 1.5]), NESTED, NEVER),
        ),
        "tuned.trials": whole(1, COUNT, null=True),
        "tuned.by": Values(
            st.sampled_from([None, "validation accuracy", "x" * 100]),
            union(st.sampled_from(["", " ", " a", "a ", "a\nb", "x" * 101, True, 1.5]), NESTED, NEVER),
        ),
        "launcher.name": word("none", "local", "slurm", "ray"),
        "launcher.workers": Values(
            union(st.integers(1, 1024), st.sampled_from([None, "measure"])), whole(1, 1024, null=True).illegal
        ),
        "launcher.array_limit": whole(1, COUNT),
        "launcher.time": Values(
            st.sampled_from(["04:00:00", "90", "1-12", "1-12:30:00"]),
            union(st.sampled_from(["", "soon", "4h", "-1", "1:2:3:4", None, True, 1.5]), NESTED, NEVER),
        ),
        "launcher.sbatch": Values(
            st.sampled_from([[], ["--gres=gpu:1", "-p short"]]),
            union(st.sampled_from(["text", 3, [None], [""], ["gres"], ["--a\nb"], {"a": 1}, None]), NEVER),
        ),
        "launcher.address": Values(
            st.sampled_from(["auto", "local", "10.0.0.1:6379", "ray://head:10001"]),
            union(st.sampled_from(["", " ", "a b", None, True, 1.5]), NESTED, NEVER),
        ),
        "paths.runs": Values(
            st.sampled_from(["/tmp/runs of mine", "läufe/ä'b", "a,b=c"]), path("", null=False, strict=False).illegal
        ),
        "paths.glue": Values(st.none(), union(st.sampled_from([True, 2.5]), NESTED, NEVER)),
        "surgery": Values(
            st.sampled_from([{}, {"cut_vocabulary": {"_target_": "kd.models.surgery.embeddings.CutVocabulary"}}]),
            union(
                st.sampled_from([3, "a", [1], {"x": 3}, {"x": {}}, {"x": {"_target_": "os.system", "command": "true"}}]), NEVER
            ),
            ("surgery.x", "surgery.x._target_"),
        ),
        "pretrain": Values(st.just({}), union(st.sampled_from([3, "a", [1]]), NEVER)),
    }


WHOLE_PARTS = ("method", "engine", "teacher", "task.source", "optimizer.factory", "pool.wrapper", "cohort.peers")
"""Keys of the typed specification that are mappings, whose entries have values of their own."""


def typed_keys(part: Any = RunSpec, prefix: str = "") -> list[str]:
    """Every key of the typed specification that holds a value."""
    found = []
    for key, hint in typing.get_type_hints(part).items():
        found += typed_keys(hint, f"{prefix}{key}.") if dataclasses.is_dataclass(hint) else [f"{prefix}{key}"]
    return found


def leaves(node: Any, prefix: str = "") -> list[str]:
    """Every key of a composed configuration that holds no mapping with entries."""
    if not isinstance(node, Mapping) or not node:
        return [prefix.removesuffix(".")]
    return [key for entry, inner in node.items() for key in leaves(inner, f"{prefix}{entry}.")]


def method_keys() -> dict[str, list[str]]:
    """Method -> its keys, as its file has them."""
    found = {}
    for file in sorted((conf_folder() / "method").glob("*.yaml")):
        node = OmegaConf.to_container(OmegaConf.load(file))
        assert isinstance(node, dict)
        node.pop("defaults", None)
        found[file.stem] = [f"method.{key}" for key in leaves(node)]
    return found


def names_key(found: str | None, key: str, also: tuple[str, ...]) -> bool:
    """Return whether an error names the key that was set, a key inside it, or one of `also`."""
    if found is None:
        return False
    return found == key or found in also or found.startswith(f"{key}.") or re.sub(r"\[\d+\]$", "", found) == key
