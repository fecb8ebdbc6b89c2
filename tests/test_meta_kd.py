"""Whole runs of Meta-KD on toy domains: weights of examples, a teacher of all domains, a student of one."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from conftest import BAD, GOOD, sentence
from kd.build.check import check_run
from kd.build.data import build_examples
from kd.build.parts import examples_of
from kd.errors import InputError
from kd.functional.prototypes import transferability
from kd.training import execute
from whole_runs import broken_off, last_weights, made, planned, same_weights, torchrun

DOMAINS = ("books", "dvd", "electronics", "kitchen")
Overrides = Callable[..., list[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reviews of four domains."""
    root = tmp_path_factory.mktemp("amazon4")
    for number, domain in enumerate(DOMAINS):
        generator = random.Random(number)
        (root / domain).mkdir()
        for name, count in {"train": 40, "dev": 16}.items():
            rows = [f"{sentence(generator, (BAD, GOOD)[row % 2])}\t{row % 2}" for row in range(count)]
            (root / domain / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return root


@pytest.fixture(scope="module")
def small(folder: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Overrides:
    runs = tmp_path_factory.mktemp("runs")

    def overrides(*more: str) -> list[str]:
        return [
            "method=meta_kd",
            "student=2l",
            "task=amazon4",
            f"task.train={folder}",
            "task.max_length=32",
            "task.edits.prototype_weights.max_length=32",
            f"teacher.meta.backbone={backbone}",
            "teacher.meta.run.trainer.max_epochs=1",
            "teacher.meta.run.optimizer.lr=5e-3",
            f"backbone={backbone}",
            f"paths.runs={runs}",
            "trainer.progress=none",
            "trainer.keep=all",
            "trainer.max_epochs=1",
            "trainer.batch_size=16",
            "optimizer.lr=5e-3",
            "method.before.run.trainer.max_epochs=1",
            *more,
        ]

    return overrides


def test_the_column_is_that_of_the_raw_backbone(small: Overrides, backbone: Path) -> None:
    whole, part = (build_examples(planned(small(*more))) for more in ([], ["task.where={domain: [dvd]}"]))
    model, tokenizer = AutoModel.from_pretrained(backbone).eval(), AutoTokenizer.from_pretrained(backbone)
    vectors = []
    with torch.no_grad():
        for (text,) in whole.texts["train"]:
            states = model(**tokenizer(text, truncation=True, max_length=32, return_tensors="pt")).last_hidden_state[0]
            vectors.append(states[1:].mean(dim=0))
    domains = torch.from_numpy(whole.columns["train"]["domain"])
    expected = transferability(torch.stack(vectors), domains, 4)
    found = whole.columns["train"]["transferability"]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    rows = np.flatnonzero(whole.columns["train"]["domain"] == 1)  # the prototypes are of all domains in both
    np.testing.assert_array_equal(part.columns["train"]["transferability"], found[rows])
    assert all("transferability" not in whole.columns[split] for split in ("validation", "test"))
    assert "column transferability" in whole.edits[0]


def test_padding_of_the_authors_counts_padding(small: Overrides) -> None:
    strict, reference = (
        build_examples(planned(small(*more))).columns["train"]["transferability"]
        for more in ([], ["task.edits.prototype_weights.padding=reference"])
    )
    assert not np.allclose(strict, reference, atol=1e-4)


def test_students_of_each_domain_share_a_teacher_of_all(small: Overrides) -> None:
    books, record = made(small("task.where={domain: [books]}"))
    dvd = planned(small("task.where={domain: [dvd]}"))
    teacher = books.inputs.teachers["meta"]
    assert dvd.inputs.teachers["meta"].digest == teacher.digest
    assert teacher.spec.method["name"] == "meta_teacher"
    whole = sum(planned_count(small, domain) for domain in DOMAINS)
    assert (teacher.result or {})["examples"]["train"] == whole
    kept = load_file(teacher.directory / "method.safetensors")
    assert {name.partition(".")[0] for name in kept} == {"head", "domains"}
    assert [str(role) for role, _ in books.inputs] == ["teacher meta", "before"]
    assert record["metrics"]["test"]["accuracy"] is not None


def planned_count(small: Overrides, domain: str) -> int:
    """The number of training examples of a domain."""
    return len(build_examples(planned(small(f"task.where={{domain: [{domain}]}}"))).labels["train"])


def test_a_teacher_has_all_examples_where_its_student_has_few(small: Overrides) -> None:
    run = planned(small("task.where={domain: [books]}", "task.limit_train=7"))
    assert (run.spec.task.limit_train, run.inputs.teachers["meta"].spec.task.limit_train) == (7, None)


def test_columns_with_exchanged_names_have_other_weights(small: Overrides, folder: Path, tmp_path: Path) -> None:
    """The stored result of one may not be read for the other."""
    rows = [
        f"{text}\t{'ab'[n % 2]}\t{'ab'[n // 2 % 2]}\t{n % 2}"
        for n, text in enumerate("a film|the plot|but good|it was".split("|") * 9)
    ]
    found = []
    for number, header in enumerate(("domain\tshop", "shop\tdomain")):
        file = tmp_path / f"{number}.tsv"
        file.write_text("\n".join([f"text\t{header}\tlabel", *rows]) + "\n")
        base = [word for word in small() if not word.startswith("task") or word.startswith("task.edits")]
        splits = [f"task.{split}={file}" for split in ("train", "validation", "test")]
        more = ["task=file", *splits, "task.extra={domain: classes, shop: classes}", "task.max_length=32"]
        found.append(build_examples(planned([*base, *more])).columns["train"]["transferability"])
    assert not np.array_equal(*found)


def test_what_is_held_out_enters_no_weight(small: Overrides) -> None:
    """The texts that remain have other prototypes than all of them."""
    whole, held = (build_examples(planned(small(*more))) for more in ([], ["task.holdout=0.3"]))
    values = dict(zip(whole.texts["train"], whole.columns["train"]["transferability"], strict=True))
    rest = dict(zip(held.texts["train"], held.columns["train"]["transferability"], strict=True))
    assert rest.keys() < values.keys()
    assert not np.allclose([values[text] for text in rest], list(rest.values()), atol=1e-6)


def test_a_domain_is_left_out_of_the_teacher(small: Overrides) -> None:
    run = planned(small("task.where={domain: [books]}", "teacher.meta.run.task.where={domain: [dvd, electronics, kitchen]}"))
    assert run.inputs.teachers["meta"].spec.task.where == {"domain": ["dvd", "electronics", "kitchen"]}
    check_run(run, examples_of(run, planned=True))


def test_a_stopped_teacher_resumes_to_the_bit(small: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = ["method=meta_teacher", "teacher=[]", "trainer.checkpoint_minutes=0", "trainer.max_epochs=2"]
    base = [word for word in small() if not word.startswith(("method", "teacher"))]
    unbroken, _ = made([*base, *teacher])
    again = [*base, *teacher, f"paths.runs={tmp_path}"]
    run = planned(again)
    broken_off(run, 12, monkeypatch)
    execute.execute(run)
    assert same_weights(last_weights(run), last_weights(unbroken))


ONE = ("task.where={domain: [books]}", "trainer.batch_size=8")


def test_a_stopped_first_stage_resumes_to_the_bit(small: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = (*ONE, "trainer.checkpoint_minutes=0", "method.before.run.trainer.max_epochs=2")
    unbroken, _ = made(small(*more))
    run = planned(small(*more, f"paths.runs={tmp_path}"))
    before = run.inputs.before
    assert before is not None
    broken_off(before, 6, monkeypatch)  # in the second epoch of a layer stage of five batches
    execute.execute(before)
    execute.execute(run)
    assert unbroken.inputs.before is not None
    for one, other in ((before, unbroken.inputs.before), (run, unbroken)):
        assert same_weights(last_weights(one), last_weights(other))


@pytest.mark.ddp
def test_two_ranks_train_both_stages_as_one(small: Overrides, tmp_path: Path) -> None:
    more = (
        *ONE,
        "student.dropout=0.0",
        "optimizer.factory.eps=0.01",
    )  # which keeps Adam from dividing rounding errors by themselves
    alone, _ = made(small(*more))
    overrides = small(*more, f"paths.runs={tmp_path}")
    teacher = alone.inputs.teachers["meta"].directory  # with dropout, which ranks draw apart
    shutil.copytree(teacher, tmp_path / teacher.name)
    torchrun(overrides)
    run = planned(overrides)
    assert run.result is not None
    assert run.inputs.before is not None
    assert alone.inputs.before is not None
    for one, two in ((alone, run), (alone.inputs.before, run.inputs.before)):
        for name, tensor in last_weights(one).items():
            torch.testing.assert_close(last_weights(two)[name], tensor, atol=2e-6, rtol=0)


BAD_INPUT = {
    "no weights": (["edit=[]"], "teacher.meta.run.method.transferability", "prototype_weights"),
    "a teacher of labels alone": (["teacher.meta.method=finetune"], "teacher", "no head of domains"),
    "no such method": (["teacher.meta.method=meta"], "teacher.meta.method", "there is no method 'meta'"),
    "no column of domains": (["task.extra=null"], "task.edits.prototype_weights.domain", "two domains"),
    "an unknown domain": (["task.where={domain: [toys]}"], "task.where", "toys"),
    "weights of no domain": (
        ["task.edits.prototype_weights.domain=genre"],
        "task.edits.prototype_weights.domain",
        "two domains",
    ),
    "weights after noise": (["edit=[label_noise,prototype_weights]"], "task.edits", "before the others"),
    "a method of an online teacher": (
        ["method.before=null", "cohort=mutual", "cohort.teacher=online"],
        "teacher.meta.method",
        "run of its own",
    ),
    "a column twice": (["task.edits.prototype_weights.column=domain"], "task.extra", "already"),
}


@pytest.mark.parametrize(("more", "key", "words"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_what_does_not_fit_is_refused_before_anything_is_trained(
    small: Overrides, more: list[str], key: str, words: str, tmp_path: Path
) -> None:
    base = small()
    if "edit=[]" in more:
        base = [word for word in base if not word.startswith("task.edits")]
    with pytest.raises(InputError) as refusal:
        execute.execute(planned([*base, f"paths.runs={tmp_path / 'runs'}", *more]))
    assert refusal.value.key == key, refusal.value.message
    assert words in refusal.value.message
    assert not (tmp_path / "runs").exists()
