"""Keys of errors: a class names its argument, and the builder adds where the class stands in the configuration."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import kd
from kd.build.data import build_examples
from kd.build.instantiate import bind_method, instantiate, option_names
from kd.build.surgeries import prefix_surgery_errors
from kd.config.schema import RunSpec
from kd.errors import InputError, prefix_error_keys
from kd.methods.base import Bound, Method
from kd.methods.finetune import Finetune
from kd.methods.options import word
from kd.methods.pkd import PKD
from kd.methods.wrappers.mutual import Mutual
from whole_runs import planned

ROOT = Path(kd.__file__).parent
GROUPS = "method student teacher pool cohort task surgery pretrain optimizer trainer engine logger paths".split()
PARTS = ("methods", "models", "engines", "functional", "forward", "data")
"""Folders with classes and functions that the builder instantiates or calls."""

ABSOLUTE = {
    ("methods/base.py", "student.heads"): "the method has no such argument: the student's heads do not suit its teacher's",
    ("methods/simkd.py", "cohort.teacher"): "the method has no such argument: its teacher may not be trained",
    ("engines/base.py", "method.weights."): "terms and weights are compared in every step too, where no builder is involved",
    ("engines/distiller.py", "cohort.teacher"): "the teacher comes from the configuration of the cohort, not of the engine",
    ("engines/nonfinite.py", "optimizer.lr"): "raised in training: the advice for a loss that is not finite",
    ("data/sources.py", "paths.glue"): "all tasks of GLUE share the folder, which is a path of the machine",
    ("data/sampler.py", "trainer.batch_tokens"): "loaders are made when training begins, where no builder is involved",
    ("data/datamodule.py", "trainer.batch_size"): "as the sampler",
    ("data/datamodule.py", "trainer.batch_tokens"): "as the sampler",
    ("data/datamodule.py", "trainer.eval_batch_size"): "as the sampler",
    ("models/occurring_rows.py", "trainer.embedding_rows"): "raised in training, where no builder is involved",
    ("data/stored_tokens.py", "task.unlabelled"): "raised while texts are tokenised in training, where no builder is involved",
    ("data/stored_texts.py", "paths.runs"): "a check of the folder of runs: the class has no such argument",
    ("models/compiled.py", "trainer.compile"): "a check of the machine: the function has no such argument",
}
"""Absolute keys, (file, key or beginning of a key) -> the reason why the code knows it."""


def literal_keys(file: Path) -> Iterator[str]:
    """Every string of a file that is a dotted key, and the constant beginning of every f-string that begins as one."""
    groups = "|".join(GROUPS)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr) and node.values and isinstance(node.values[0], ast.Constant):
            match = re.match(rf"({groups})\.[a-z_.]*", str(node.values[0].value))
        elif isinstance(node, ast.Constant):
            match = re.fullmatch(rf"({groups})(\.[a-z_]+)+", str(node.value))
        else:
            match = None
        if match:
            yield match[0]


def test_no_class_knows_its_key() -> None:
    files = [file for part in PARTS for file in sorted((ROOT / part).rglob("*.py"))]
    found = {(file.relative_to(ROOT).as_posix(), key) for file in files for key in literal_keys(file)}
    assert found - set(ABSOLUTE) == set(), "name the argument; see kd.errors.prefix_error_keys"
    assert set(ABSOLUTE) - found == set(), "no longer used"


@pytest.mark.parametrize(
    ("key", "message", "expected"),
    [
        ("tau", "tau=0 is low", ("method.tau", "method.tau=0 is low")),
        ("tau", "tau is 0", ("method.tau", "method.tau is 0")),
        ("tau", "0 is low for tau", ("method.tau", "0 is low for tau")),
        ("tau", "tau_max=0 is low", ("method.tau", "tau_max=0 is low")),
        ("tau", "of tau=1, other.tau=2 and steps=3", ("method.tau", "of method.tau=1, other.tau=2 and method.steps=3")),
        ("weights.task", "the term has no weight", ("method.weights.task", "the term has no weight")),
        (None, "it cannot work with tau=1", ("method", "it cannot work with method.tau=1")),
        ("student.heads", "tau=1 needs more heads", ("student.heads", "tau=1 needs more heads")),
        ("pool", "one teacher at a time", ("pool", "one teacher at a time")),
        ("tau", "the text 'tau=1' is too long", ("method.tau", "the text 'tau=1' is too long")),
        ("tau", "the users' tau=1, \"it's tau=1\"", ("method.tau", "the users' method.tau=1, \"it's tau=1\"")),
        ("tau", "two texts, 'it isn't tau=1', 'tau=1'", ("method.tau", "two texts, 'it isn't tau=1', 'tau=1'")),
        (
            "tau",
            "give more, as 'tau=[1,2]' or 'tau={a: 1}'",
            ("method.tau", "give more, as 'method.tau=[1,2]' or 'method.tau={a: 1}'"),
        ),
    ],
)
def test_arguments_get_the_key_of_the_node(key: str | None, message: str, expected: tuple[str, str]) -> None:
    with pytest.raises(InputError) as caught, prefix_error_keys("method", {"tau", "steps", "weights"}):
        raise InputError(message, key)
    assert (caught.value.key, caught.value.message) == expected


def test_a_class_without_arguments_can_still_name_itself() -> None:
    with pytest.raises(InputError, match=r"^a=1 cannot be") as caught, prefix_error_keys("surgery.mixed", ()):
        raise InputError("a=1 cannot be")
    assert caught.value.key == "surgery.mixed"


@pytest.mark.parametrize(
    ("content", "options", "key", "words"),
    [
        ("text;label\na;1\n", "", "task.text", "task.delimiter=semicolon|tab|pipe"),
        ("I liked it,1\nbad,0\n", "", "task.text", "'task.columns=[text,label]'"),
        ("text,label\na,1\n", "task.label=text", "task.label", "task.label=text is among task.text=['text']"),
        ("text,label\na,1\n", "task.text=[a,b,c]", "task.text", "task.text=['a', 'b', 'c'] must name"),
        ("text,label\na,1\nlabel=3,0\n", "task.format=tsv", "task.text", "no column 'text'; the columns are text,label"),
        ("text,label\na,labels=3\nb,\n", "", "task.label", "the label is missing ('')"),
        (
            "text,label\na,labels=3\nb,nan\n",
            "",
            "task.label",
            "if 'nan' is the name of a class, list it with the others: task.labels",
        ),
        ("text,label\na,label=3\nb,Label=3\n", "", "task.labels", "has the label 'label=3' and"),
        ("text,label\na,x\nb,y\n", "task.labels=[x,z]", "task.labels", "unknown label 'y'; the labels are x, z"),
        ("text,label\na,x\nb,y\n", "+task.codes={q: x2}", "task.codes", "task.codes maps 'q' to 'x2'"),
        ("text,label\na,x\nb,y\n", "task.limit_train=0", "task.limit_train", "task.limit_train=0 must be at least 1"),
        ("text,label\na,x\nb,y\n", "task.limit_train=1", "task.limit_train", "every training example has the label"),
        ("text,label\na,x\nb,y\n", "task.metrics=[f2]", "task.metrics", "'f2' is not one of"),
        ("text,label\na,x\nb,y\n", "task.kind=regression", "task.metrics", "'accuracy' is not one of"),
        ("text,label\na,x\nb,y\n", "task.validation=[a.csv]", "task.validation", "'task.validation={pos: a.txt, neg: b.txt}'"),
        ("text,label\na,x\nb,y\n", "task.validation=none.csv", "task.validation", "'none.csv' does not exist"),
        ("", "", "task.train", "is empty"),
    ],
)
def test_errors_of_data_name_the_keys_of_the_task(tmp_path: Path, content: str, options: str, key: str, words: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content, encoding="utf-8")
    overrides = ["task=file", f"task.train={path}", f"task.validation={path}", f"paths.runs={tmp_path}", "method=finetune"]
    with pytest.raises(InputError) as caught:
        build_examples(planned([*overrides, *filter(None, [options])]))
    assert caught.value.key == key
    assert words in caught.value.message


def test_errors_of_glue_name_its_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder") as caught:
        planned(["task=rte", f"paths.glue={tmp_path}", f"paths.runs={tmp_path}", "method=finetune"])
    assert caught.value.key == "paths.glue"


class Base(Method):
    def __init__(self, kind: str = "a", size: int = 1) -> None:
        super().__init__()
        self.kind = word(kind, ("a", "b"), "kind")
        self.size = size

    def bind(self, bound: Bound) -> None:
        raise InputError(f"size={self.size} is too large", "size")


class Derived(Base):
    def __init__(self, more: int = 0, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]


def test_arguments_that_a_class_passes_on_are_its_own_too() -> None:
    assert {"kind", "size", "more"} <= option_names(Derived, {})
    with pytest.raises(InputError) as caught:
        instantiate(Derived, {"kind": "c"}, "method")
    assert caught.value.key == "method.kind"


def test_a_method_is_named_by_where_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd.methods.finetune.Derived", Derived, raising=False)
    node = {"_target_": "kd.methods.finetune.Derived"}  # its default is at fault, so the node does not have the key
    with pytest.raises(InputError) as bound:
        bind_method(Mutual(Derived()), node, Bound(None, [], None))  # type: ignore[arg-type]
    assert (bound.value.key, bound.value.message) == ("method.size", "method.size=1 is too large")
    with pytest.raises(InputError) as peers:
        instantiate(Mutual, {"temperature": 0}, "cohort.peers", Finetune())
    assert (peers.value.key, peers.value.message[:29]) == ("cohort.peers.temperature", "cohort.peers.temperature is 0")
    with pytest.raises(InputError) as before:
        instantiate(PKD, {"temperature": 0}, "method.before")
    assert before.value.key == "method.before.temperature"


def test_a_surgery_is_named_by_its_option_and_by_itself() -> None:
    spec = RunSpec(surgery={"mixed_vocab": {"_target_": "kd.models.surgery.mixed_vocab.MixedVocab", "run": {}}})
    for key, expected in (("run", "surgery.mixed_vocab.run"), (None, "surgery.mixed_vocab"), ("surgery", "surgery")):
        with pytest.raises(InputError) as caught, prefix_surgery_errors(spec, "mixed_vocab"):
            raise InputError("run made no vocabulary", key)
        assert caught.value.key == expected
        assert caught.value.message == (
            "surgery.mixed_vocab.run made no vocabulary" if key == "run" else "run made no vocabulary"
        )
