"""Edits of the training split: label noise, class sizes out of balance, and what of the data they leave alone."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from kd.build.data import build_examples
from kd.build.edits import build_edits
from kd.config.compose import compose, typed
from kd.data.datamodule import KDDataModule
from kd.data.edits import Edit, FewLabels, Imbalance, LabelNoise, Split, described, edited
from kd.data.examples import Examples, load_examples
from kd.data.tasks import Classification, Regression, Task
from kd.data.texts import Texts
from kd.errors import InputError
from kd.runs.identity import prefix_task_errors, source_of
from kd.runs.plan import plan
from kd.runs.run import Run
from kd.training.preflight import Report, check_data

NAMES = ["a", "b", "c", "d"]


def task(classes: int = 4) -> Classification:
    return Classification("t", NAMES[:classes], {}, ["accuracy"], "accuracy")


def split(*sizes: int) -> Split:
    """Examples of so many classes, which take turns as long as they last."""
    labels = [label for turn in range(max(sizes)) for label, size in enumerate(sizes) if turn < size]
    texts = Texts.of((f"text {row} of the class {label}",) for row, label in enumerate(labels))
    return Split(texts, labels, {"row": np.arange(len(labels))})


@pytest.fixture
def load(reviews: Path) -> Callable[..., Examples]:
    """Examples of the test reviews, 48 of each class in train, with further overrides."""

    def load(*overrides: str) -> Examples:
        files = [f"task.{split}={reviews / split}.csv" for split in ("train", "validation", "test")]
        spec = typed(compose(["task=file", *files, *overrides]))
        with prefix_task_errors():
            return load_examples(spec.task, source_of(spec.task), build_edits(spec.task))

    return load


def by_text(examples: Examples, split: str = "train") -> dict[tuple[str, ...], float]:
    """Text -> label; the reviews have no text with two labels."""
    return dict(zip(examples.texts[split], examples.labels[split], strict=True))


# Label noise


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.7, 1.0])
def test_a_label_changes_with_the_rate_to_each_other_class_alike(rate: float) -> None:
    train = split(1000, 1000, 1000, 1000)
    noisy = LabelNoise(rate)(train, task())
    moves = Counter((old, new) for old, new in zip(train.labels, noisy.labels, strict=True) if old != new)
    for old in range(4):
        for new in {*range(4)} - {old}:  # binomial, so within four deviations
            expected, variance = 1000 * rate / 3, 1000 * rate / 3 * (1 - rate / 3)
            assert abs(moves[old, new] - expected) <= 4 * variance**0.5
    if rate in (0, 1):
        assert moves.total() == rate * len(train)


def test_the_drawn_labels_are_the_same_on_every_machine() -> None:
    pinned = [3, 1, 1, 3, 0, 0, 2, 3, 0, 1, 0, 2]
    assert LabelNoise(0.5)(split(3, 3, 3, 3), task()).labels == pinned
    assert LabelNoise(0.5, seed=1)(split(3, 3, 3, 3), task()).labels != pinned


def test_a_higher_rate_changes_the_same_labels_alike_and_more() -> None:
    train = split(200, 200, 200)
    low, high = (LabelNoise(rate)(train, task(3)).labels for rate in (0.2, 0.4))
    changed = [(old, one, other) for old, one, other in zip(train.labels, low, high, strict=True) if old != one]
    assert changed
    assert all(one == other for _, one, other in changed)
    assert sum(old != other for old, other in zip(train.labels, high, strict=True)) > len(changed)


def test_noise_follows_the_text_not_its_place_nor_the_rest() -> None:
    train = split(40, 40)
    rows = np.random.default_rng(0).permutation(80)[:50]
    whole, part = LabelNoise(0.4)(train, task(2)), LabelNoise(0.4)(train.take(rows), task(2))
    assert part.labels == [whole.labels[row] for row in rows]
    assert part.columns["row"].tolist() == rows.tolist()


def test_both_texts_of_a_pair_count() -> None:
    pairs = Texts.of(("the same", f"and another {row}") for row in range(100))
    assert len(set(LabelNoise(0.5)(Split(pairs, [0] * 100), task(2)).labels)) == 2


# Imbalance


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        ("exponential", [800 * 8 ** (-c / 3) for c in range(4)]),
        ("power", [800 * (c + 1) ** (-np.log(8) / np.log(4)) for c in range(4)]),
    ],
)
def test_class_sizes_fall_by_the_ratio(profile: str, expected: list[float]) -> None:
    labels = Imbalance(8, profile)(split(800, 800, 800, 800), task()).labels
    assert np.bincount(labels).tolist() == [round(size) for size in expected]
    assert expected[0] / expected[-1] == pytest.approx(8)


def test_classes_are_ranked_by_size_or_as_given() -> None:
    train = split(100, 400, 200)
    sizes = [np.bincount(Imbalance(4, order=order)(train, task(3)).labels).tolist() for order in (None, ["c", "a", "b"])]
    assert sizes == [[100, 400, 200], [100, 100, 200]], "at most 400, 200, 100, and 200 is all there is of c"


@pytest.mark.parametrize("profile", ["exponential", "power"])
@pytest.mark.parametrize("order", [None, ["c", "b", "a"]])
def test_a_ratio_of_one_and_a_rate_of_zero_change_nothing(profile: str, order: list[str] | None) -> None:
    train = split(10, 30, 20)
    for edit in (LabelNoise(0), Imbalance(1, profile, order)):
        result = edit(train, task(3))
        assert (result.texts, result.labels) == (train.texts, train.labels)
        assert result.columns["row"].tolist() == train.columns["row"].tolist()


def test_a_class_that_train_lacks_has_no_rank() -> None:
    assert np.bincount(Imbalance(4)(split(100, 0, 100), task(3)).labels).tolist() == [100, 0, 25]


def test_what_a_larger_ratio_keeps_a_smaller_one_keeps_too_in_order() -> None:
    train = split(100, 100)
    few, more = (Imbalance(ratio)(train, task(2)).columns["row"].tolist() for ratio in (10, 2))
    assert few == sorted(few)
    assert set(few) < set(more)
    assert Imbalance(10, seed=1)(train, task(2)).columns["row"].tolist() != few


def test_sizes_and_noise_are_drawn_apart() -> None:
    train = split(1000, 1000)
    kept = Imbalance(4)(train, task(2))
    noisy = np.not_equal(LabelNoise(0.2)(kept, task(2)).labels, kept.labels)[np.asarray(kept.labels) == 1]
    assert abs(noisy.mean() - 0.2) < 4 * (0.2 * 0.8 / 250) ** 0.5


# In a task


EDITS = ("edit=[label_noise,imbalance]", "task.edits.imbalance.ratio=3")
NOISE = "task.edits=[{_target_: kd.data.edits.LabelNoise, rate: 0.5}]"


def test_train_alone_is_edited(load: Callable[..., Examples]) -> None:
    clean, noisy = load(), load(*EDITS)
    for split in ("validation", "test"):
        assert (noisy.texts[split], noisy.labels[split]) == (clean.texts[split], clean.labels[split])
    before, after = by_text(clean), by_text(noisy)
    assert set(after) < set(before)
    assert any(before[text] != label for text, label in after.items())


def test_edits_are_applied_in_their_order(load: Callable[..., Examples]) -> None:
    noise, few = "{_target_: kd.data.edits.LabelNoise, rate: 0.3}", "{_target_: kd.data.edits.Imbalance, ratio: 6}"
    one, other = (load(f"task.edits=[{edits}]") for edits in (f"{noise},{few}", f"{few},{noise}"))
    assert min(Counter(one.labels["train"]).values()) < min(Counter(other.labels["train"]).values()), "noise evens them out"


def test_a_limit_takes_from_the_edited_examples(load: Callable[..., Examples]) -> None:
    whole, twenty, ten = (load(NOISE, *more) for more in ([], ["task.limit_train=20"], ["task.limit_train=10"]))
    assert by_text(twenty).items() < by_text(whole).items()
    assert (ten.texts["train"], ten.labels["train"]) == (twenty.texts["train"][:10], twenty.labels["train"][:10])
    assert twenty.texts["train"] == load("task.limit_train=20").texts["train"]
    assert Counter(load(*EDITS, "task.limit_train=60").labels["train"]).total() == 60, "of 64 that the edits leave"


def test_what_is_held_out_of_train_is_clean(load: Callable[..., Examples]) -> None:
    clean, noisy, whole = load("task.holdout=0.3"), load("task.holdout=0.3", NOISE), load(NOISE)
    assert by_text(noisy, "validation") == by_text(clean, "validation")
    assert by_text(noisy) == {text: label for text, label in by_text(whole).items() if text in by_text(clean)}
    assert by_text(noisy) != by_text(clean)
    limited = load("task.holdout=0.3", NOISE, "task.limit_train=20")
    assert by_text(limited, "validation") == by_text(clean, "validation")
    assert by_text(limited).items() < by_text(noisy).items()


def test_ranks_read_the_same_edited_labels(load: Callable[..., Examples], backbone: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    seen = {}
    for rank in (0, 1):
        data = KDDataModule(load(*EDITS), [tokenizer], [], 8, 8, 16, seed=0, rank=rank, world=2)
        for batch in data.train_dataloader():
            seen |= dict(zip(batch.index.tolist(), batch.labels.tolist(), strict=True))
    assert [seen[row] for row in sorted(seen)] == load(*EDITS).labels["train"]


def test_the_preflight_reports_the_edits(load: Callable[..., Examples], backbone: Path) -> None:
    examples, report = load(*EDITS), Report()
    check_data(report, KDDataModule(examples, [AutoTokenizer.from_pretrained(backbone)], [], 8, 8, 16, seed=0))
    noise, few = (line.strip() for line in report.lines if "edited" in line)
    changed = sum(label != by_text(load())[text] for text, label in by_text(load("edit=[label_noise]")).items())
    sizes = Counter(load("edit=[label_noise]").labels["train"])
    after = Counter(examples.labels["train"])
    assert noise == (
        f"train was edited by LabelNoise: {changed} of 96 labels changed; class sizes negative 48 -> {sizes[0]}, "
        f"positive 48 -> {sizes[1]}"
    )
    assert few == (
        f"train was edited by Imbalance: 96 -> {after.total()} examples; class sizes negative {sizes[0]} -> {after[0]}, "
        f"positive {sizes[1]} -> {after[1]}"
    )


def test_examples_without_a_label_are_neither_noisy_nor_left_out() -> None:
    train = split(40, 40)
    labels = [label if row % 4 else float("nan") for row, label in enumerate(train.labels)]
    some, rows = Split(train.texts, labels, train.columns), [row for row in range(80) if row % 4 == 0]
    noisy = LabelNoise(1.0)(some, task(2))
    assert [row for row, label in enumerate(noisy.labels) if label != label] == rows
    assert all(new == 1 - old for new, old in zip(noisy.labels, labels, strict=True) if old == old)
    few = Imbalance(4)(some, task(2))
    assert set(rows) <= set(few.columns["row"].tolist())
    assert described(LabelNoise(0), some, LabelNoise(0)(some, task(2)), task(2)).startswith(
        "LabelNoise: 0 of 80 labels changed"
    )
    counted = FewLabels(5)(some, task(2))
    assert (len(counted), sum(label != label for label in counted.labels)) == (5 + len(rows), len(rows))
    with pytest.raises(InputError, match="no training example with a label"):
        edited(Without([0, 1]), some, task(2))
    with pytest.raises(InputError, match="no training example with a label"):
        FewLabels(5)(some.take(rows), task(2))
    alone = Imbalance(4)(some.take([row for row in range(80) if row % 4]), task(2))
    assert set(few.columns["row"].tolist()) - set(rows) == set(alone.columns["row"].tolist())


# Few labels


def domains(*sizes: int) -> tuple[Split, Task]:
    """Examples of so many domains, and a task with these."""
    train, of = split(*sizes), task(2)
    of.column_classes = {"domain": NAMES[: len(sizes)]}
    return Split(train.texts, [row % 2 for row in range(len(train))], {"domain": np.asarray(train.labels), **train.columns}), of


@pytest.mark.parametrize("where", ["b", ["b"], ["b", "c"]])
def test_a_few_examples_of_some_domains_stay_and_all_others(where: str | list[str]) -> None:
    train, of = domains(30, 40, 50)
    result = FewLabels(12, {"domain": where})(train, of)
    counted = np.isin(train.columns["domain"], [NAMES.index(name) for name in where])
    left = np.isin(result.columns["domain"], [NAMES.index(name) for name in where])
    assert left.sum() == 12
    assert result.columns["row"][~left].tolist() == train.columns["row"][~counted].tolist()
    assert result.columns["row"].tolist() == sorted(result.columns["row"].tolist()), "in their order"


def test_fewer_examples_are_among_more_wherever_they_stand() -> None:
    train, of = domains(60, 40)
    few, more = (FewLabels(count, {"domain": "a"})(train, of) for count in (5, 20))
    assert set(few.texts) <= set(more.texts)
    back = train.take(np.arange(len(train))[::-1])
    assert set(FewLabels(5, {"domain": "a"})(back, of).texts) == set(few.texts)
    assert set(FewLabels(5, {"domain": "a"}, seed=1)(train, of).texts) != set(few.texts)
    assert len(FewLabels(7)(train, of)) == 7, "without a selection all of train is counted"
    assert len(FewLabels(1000, {"domain": "a"})(train, of)) == 100


class Without(Edit):
    """Leave out examples of these classes."""

    def __init__(self, classes: list[int]) -> None:
        self.classes = classes

    def __call__(self, train: Split, task: Task) -> Split:
        return train.take([row for row, label in enumerate(train.labels) if label not in self.classes])


def test_an_edit_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="Without leaves the class 'b' without examples"):
        edited(Without([1]), split(2, 2), task(2))
    with pytest.raises(InputError, match="Without leaves no training example"):
        edited(Without([0, 1]), split(2, 2), task(2))
    with pytest.raises(InputError, match="leaves no training example"):
        edited(Without([0]), Split(Texts.of([("x",)]), [0]), Regression("t", ["mse"], "mse"))


@pytest.mark.parametrize(
    ("edit", "key", "words"),
    [
        ("{_target_: kd.data.edits.LabelNoise, rate: 1.5}", ".rate", "task.edits.0.rate=1.5 must be at least 0 and at most 1"),
        ("{_target_: kd.data.edits.LabelNoise, rate: -0.1}", ".rate", "task.edits.0.rate=-0.1 must be"),
        ("{_target_: kd.data.edits.Imbalance, ratio: 0.9}", ".ratio", "task.edits.0.ratio=0.9 must be at least 1"),
        ("{_target_: kd.data.edits.Imbalance, ratio: 1000}", ".ratio", "leaves the class 'positive' without examples"),
        ("{_target_: kd.data.edits.Imbalance, ratio: 2, order: [good]}", ".order", "name each class once: negative, positive"),
        ("{_target_: kd.data.edits.Imbalance, ratio: 2, profile: linear}", ".profile", "exponential, power"),
        ("{_target_: kd.data.edits.FewLabels, count: 0}", ".count", "task.edits.0.count=0 must be at least 1"),
        ("{_target_: kd.data.edits.FewLabels, count: 1}", "", "leaves the class"),
        ("{_target_: kd.data.edits.FewLabels, count: 9, where: {domain: [dvd]}}", ".where", "no column of classes"),
        ("{_target_: kd.data.edits.FewLabels, count: 9, where: [dvd]}", ".where", "does not select by a column"),
        ("{_target_: kd.data.edits.LabelNoise}", "", "missing 1 required positional argument: 'rate'"),
        ("{_target_: kd.data.edits.LabelNoises, rate: 0}", "._target_", "cannot be imported"),
        ("{_target_: kd.data.edits.Edit}", "._target_", "not an edit"),
        (f"{{_target_: {__name__}.Without, classes: [1]}}", "", "without examples"),
        (f"{{_target_: {__name__}.Without, classes: [0, 1]}}", "", "no training example"),
    ],
)
def test_an_edit_that_cannot_work_names_its_key(load: Callable[..., Examples], edit: str, key: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        load(f"task.edits=[{edit}]")
    assert caught.value.key == f"task.edits.0{key}"
    assert words in caught.value.message


@pytest.mark.parametrize("edit", ["label_noise", "imbalance"])
def test_edits_of_classes_refuse_scores(load: Callable[..., Examples], tmp_path: Path, edit: str) -> None:
    path = tmp_path / "scores.csv"
    path.write_text("text,label\n" + "".join(f"text {row},{row / 4}\n" for row in range(20)))
    scores = [f"task.{part}={path}" for part in ("train", "validation", "test")]
    with pytest.raises(InputError, match="is for classes, and the task 'file' has none") as caught:
        load(f"edit=[{edit}]", *scores, "task.kind=regression", "task.metrics=[mse]", "task.monitor=mse")
    assert caught.value.key == f"task.edits.{edit}"


# Digests


@pytest.fixture
def run(small: Callable[..., list[str]]) -> Callable[..., Run]:
    def run(*more: str) -> Run:
        return plan(compose(small("method=kd", *more)))

    return run


def test_without_edits_a_digest_is_that_of_before(run: Callable[..., Run]) -> None:
    clean = run()
    assert {"edits", "extra"}.isdisjoint(clean.digest_inputs["task"])
    for nothing in ("task.edits=[]", "task.edits={}", "edit=[]", "task.extra={}"):
        assert run(nothing).digest == clean.digest


def test_edits_are_part_of_a_digest_however_they_are_given(run: Callable[..., Run]) -> None:
    node = "{_target_: kd.data.edits.LabelNoise, rate: 0.2, seed: 0}"
    runs = [run("edit=[label_noise]"), run(f"task.edits=[{node}]"), run(f"task.edits={{mine: {node}}}")]
    assert len({each.digest for each in runs}) == 1
    others = [run(), *(run("edit=[label_noise]", f"task.edits.label_noise.{value}") for value in ("rate=0.3", "seed=1"))]
    assert len({each.digest for each in [*others, runs[0]]}) == 4


def test_a_teacher_learns_from_the_same_edited_examples_unless_it_has_its_own(run: Callable[..., Run]) -> None:
    noisy = run("edit=[label_noise]")
    (teacher,) = noisy.inputs.teachers.values()
    assert build_examples(teacher).labels == build_examples(noisy).labels != build_examples(run()).labels
    assert teacher.digest != run().inputs.teachers["minilm"].digest
    own = run("edit=[label_noise]", "+teacher.minilm.run.task.edits=null")
    assert own.inputs.teachers["minilm"].digest == run().inputs.teachers["minilm"].digest
    assert own.digest != noisy.digest
