"""Texts without labels from a denoising chain: the chain as a loop, its draws, its starts; and runs that learn from them."""

import itertools
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data.test_augmentation import save_masked_lm
from torch import Tensor
from transformers import AutoModelForMaskedLM

from conftest import BAD, FILLER, GOOD, tiny_config, tiny_tokenizer
from kd.build.check import check_arguments, check_run
from kd.build.data import build_examples
from kd.build.parts import examples_of
from kd.data.augmentation import word_names
from kd.data.denoising import DenoisingChain, Sampler, uniform
from kd.data.edits import Split
from kd.data.held import cut
from kd.data.tasks import Classification, Task
from kd.data.texts import Texts
from kd.errors import InputError
from kd.training import execute
from whole_runs import broken_off, last_weights, made, planned, pool, roles, same_weights, torchrun

Small = Callable[..., list[str]]

WORDS = [*FILLER, *GOOD, *BAD, "play", "act", "##s", "##or", "##ing", "##less", "un"]
TEXTS = [("the playing actor was good",), ("great story the playless acts bored",), ("bad film",), ("",), ("bad film",)]


class TinyModel:
    """A random masked language model that keeps the inputs of its passes."""

    positions = 64

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.tokenizer = tiny_tokenizer(WORDS)
        config = tiny_config(layers=2, vocab_size=len(self.tokenizer), initializer_range=0.3)
        self.model = AutoModelForMaskedLM.from_config(config).eval()
        self.passes: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        given = dict(inputs)
        predicted = given.pop("predicted")
        self.passes.append(inputs)
        return self.model(**given).logits[predicted]


def task() -> Task:
    result = Classification("t", ["a", "b"], {}, ["accuracy"], "accuracy")
    result.column_classes = {"domain": ["books", "dvd"]}
    return result


def split(rows: list[tuple[str, ...]]) -> Split:
    return Split(Texts.of(rows), [row % 2 for row in range(len(rows))], {"domain": np.arange(len(rows)) % 2})


def chain(**options: Any) -> DenoisingChain:
    return DenoisingChain(**{"max_length": 63, "rate": 0.5, "steps": 3, **options})


def derived(edit: DenoisingChain, rows: list[tuple[str, ...]], model: Any) -> list[list[tuple[str, ...]]]:
    """The example and the generated texts, for each example."""
    texts, index = edit.derive(split(rows), task(), model)
    groups: list[list[tuple[str, ...]]] = [[] for _ in rows]
    for text, row in zip(texts, index.tolist(), strict=True):
        groups[row].append(text)
    return groups


def applied(edit: DenoisingChain, rows: list[tuple[str, ...]], model: Any) -> Split:
    edit.stored = lambda train, of: edit.made(train, of, model)
    return edit(split(rows), task())


def naive(text: str, model: TinyModel, edit: DenoisingChain, copy: int) -> list[int]:
    """The tokens after the chain of a copy, token by token."""
    tokenizer = model.tokenizer
    ids = tokenizer(text)["input_ids"]
    names, special = word_names(tokenizer), set(tokenizer.all_special_ids)
    chances = uniform((str(edit.seed), text), (edit.copies, edit.steps, 2, len(ids)))[copy]
    for step in range(edit.steps):
        masked = [place for place, token in enumerate(ids) if token not in special and chances[step, 0, place] < edit.rate]
        given = torch.tensor([[tokenizer.mask_token_id if place in masked else token for place, token in enumerate(ids)]])
        with torch.no_grad():
            logits = model.model(input_ids=given, token_type_ids=torch.zeros_like(given)).logits[0].double()
        new = list(ids)
        for place in masked:
            allowed = [t for t in range(len(tokenizer)) if t not in special and (t in names) == (ids[place] in names)]
            scores = {token: float(logits[place, token]) / edit.temperature for token in allowed}
            if edit.topk is not None:
                best = sorted(allowed, key=lambda token: -scores[token])[: edit.topk]
                scores = {token: scores[token] for token in allowed if token in best}
            total = sum(math.exp(score) for score in scores.values())
            ladder = itertools.accumulate(math.exp(score) / total for score in scores.values())
            below = sum(bound <= float(chances[step, 1, place]) for bound in ladder)
            new[place] = list(scores)[below]
        ids = new
    return ids


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return TinyModel()


# The chain


@pytest.mark.parametrize(
    "options", [{}, {"rate": 1.0, "steps": 1}, {"temperature": 0.5, "topk": 3, "copies": 2}, {"rate": 0.15, "steps": 5}]
)
def test_the_chain_as_a_loop(options: dict[str, Any], model: TinyModel) -> None:
    edit = chain(**options)
    sampler = Sampler(model, edit)
    for (text,) in TEXTS[:3]:
        encoding = model.tokenizer(text, return_tensors="pt")
        got = sampler.run(encoding["input_ids"][0], encoding["token_type_ids"][0], (text,))
        assert got.tolist() == [naive(text, model, edit, copy) for copy in range(edit.copies)]


@pytest.mark.parametrize("options", [{"rate": 0.0}, {"steps": 0}])
def test_a_rate_or_a_length_of_zero_changes_nothing_and_runs_no_model(options: dict[str, Any]) -> None:
    model = TinyModel()
    assert derived(chain(**options), TEXTS, model) == [[text] for text in TEXTS]
    assert not model.passes


def test_special_tokens_are_neither_masked_nor_drawn(model: TinyModel) -> None:
    edit = chain(rate=1.0, copies=4)
    model.passes.clear()
    groups = derived(edit, TEXTS, model)
    assert model.passes
    for inputs in model.passes:
        assert not torch.isin(inputs["input_ids"][~inputs["predicted"]], torch.tensor(model.tokenizer.mask_token_id)).any()
        ends = torch.isin(inputs["input_ids"], torch.tensor([model.tokenizer.cls_token_id, model.tokenizer.sep_token_id]))
        assert not (ends & inputs["predicted"]).any()
        assert ends.sum(dim=1).eq(2).all()
    assert sum(map(len, groups)) > 2 * len(TEXTS)
    special = torch.tensor(sorted(model.tokenizer.all_special_ids))
    for (text,) in TEXTS:
        encoding = model.tokenizer(text, return_tensors="pt")
        (ids,), (segments,) = encoding["input_ids"], encoding["token_type_ids"]
        kept = torch.isin(ids, special)
        for tokens in Sampler(model, edit).run(ids, segments, (text,)):
            assert torch.equal(torch.isin(tokens, special), kept)
            assert torch.equal(tokens[kept], ids[kept])


def test_tokens_are_drawn_with_the_probabilities_of_the_model() -> None:
    """One masked word: the shares of what takes its place against the model's distribution, within 5 standard deviations."""
    model = TinyModel()
    sampler = Sampler(model, chain())
    allowed = sampler.allowed[True]
    logits = torch.randn(1, len(model.tokenizer), generator=torch.Generator().manual_seed(1)).expand(20000, -1)
    before = allowed[:1].expand(20000)
    drawn = sampler.drawn(logits, before, torch.rand(20000, generator=torch.Generator().manual_seed(2)).double())
    expected = logits[0, allowed].double().softmax(dim=0)
    counts = Counter(drawn.tolist())
    assert set(counts) <= set(allowed.tolist())
    for token, share in zip(allowed.tolist(), expected.tolist(), strict=True):
        assert abs(counts[token] / 20000 - share) < 5 * math.sqrt(share * (1 - share) / 20000)


def test_generated_texts_follow_from_the_text_alone_and_fewer_are_the_first(model: TinyModel) -> None:
    groups = derived(chain(copies=3), TEXTS, model)
    assert derived(chain(copies=3), TEXTS[::-1], model) == groups[::-1]
    assert groups[2] == groups[4]
    for one, three in zip(derived(chain(copies=1), TEXTS, model), groups, strict=True):
        assert one == three[: len(one)]
    assert derived(chain(copies=3, seed=1), TEXTS, model) != groups


def test_texts_of_a_pair_are_in_one_chain() -> None:
    model = TinyModel()
    rows = [("the playing actor", "was good"), ("bad film", "great story the acts")]
    groups = derived(chain(rate=1.0), rows, model)
    assert {len(row) for group in groups for row in group} == {2}
    assert {tuple(inputs["token_type_ids"].unique().tolist()) for inputs in model.passes} == {(0, 1)}
    assert {inputs["input_ids"].shape[1] for inputs in model.passes} == {
        len(model.tokenizer(*row)["input_ids"]) for row in rows
    }


def test_words_behind_the_longest_input_stay(model: TinyModel) -> None:
    text = "bad film " * 20 + "great story"
    ((_, *generated),) = derived(chain(max_length=10, rate=1.0), [(text,)], model)
    for (other,) in generated:
        assert other.endswith("bad film " * 16 + "great story")


def test_a_chain_that_changes_nothing_adds_nothing(model: TinyModel) -> None:
    """Its text is written in another way than the start, as the tokenizer decodes it."""
    edit = chain(rate=1e-9)
    assert derived(edit, [("Bad FILM ,  the story",)], model) == [[("Bad FILM ,  the story",)]]


def test_tokens_that_the_model_lacks_are_not_drawn(model: TinyModel) -> None:
    sampler = Sampler(model, chain())
    narrow = torch.zeros(50, int(sampler.allowed[True][3]))
    drawn = sampler.drawn(narrow, sampler.allowed[True][:1].expand(50), torch.linspace(0, 0.999, 50).double())
    assert set(drawn.tolist()) == set(sampler.allowed[True][:3].tolist())


# Starts, labels, columns


def test_starts_are_those_of_some_classes_and_at_most_so_many(model: TinyModel) -> None:
    of_books = derived(chain(where={"domain": "books"}), TEXTS, model)
    every = derived(chain(), TEXTS, model)
    assert of_books == [group if row % 2 == 0 else group[:1] for row, group in enumerate(every)]
    many = [(f"{first} {second} story",) for first in GOOD for second in BAD]
    counts = [sum(len(group) > 1 for group in derived(chain(rate=1.0, most=most), many, model)) for most in (2, 5)]
    assert counts == [2, 5]
    few, more = (chain(most=most).starts(split(many), task()) for most in (2, 5))
    assert not (few & ~more).any(), "fewer starts are among more"


def test_generated_texts_have_no_label_and_the_columns_of_their_start(model: TinyModel) -> None:
    result = applied(chain(copies=2), TEXTS, model)
    assert result.origins is not None
    given = {text: row for row, text in enumerate(TEXTS)}
    for text, origin, label, domain in zip(result.texts, result.origins, result.labels, result.columns["domain"], strict=True):
        if text == origin:
            assert label in (0, 1)
        else:
            assert math.isnan(label)
        if origin != ("bad film",):  # which is there twice
            assert domain == given[origin] % 2
    assert sum(map(math.isnan, result.labels)) == len(result) - len(TEXTS)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("rate", 1.1),
        ("rate", -0.1),
        ("steps", -1),
        ("copies", 0),
        ("temperature", 0),
        ("topk", 0),
        ("most", 0),
        ("max_length", 4),
        ("seed", -1),
        ("where", []),
        ("where", {"domain": []}),
        ("where", {"domain": [3]}),
        ("where", "books"),
    ],
)
def test_an_option_out_of_range_is_refused(option: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        chain(**{option: value})
    assert caught.value.key == option


@pytest.mark.parametrize(
    ("where", "words"), [({"genre": "fiction"}, "no column of classes"), ({"domain": "kitchen"}, "no class 'kitchen'")]
)
def test_starts_of_an_unknown_class_are_refused_before_the_model_runs(where: Any, words: str) -> None:
    model = TinyModel()
    with pytest.raises(InputError, match=words) as caught:
        chain(where=where).check(model, task())
    assert caught.value.key == "where"
    with pytest.raises(InputError, match="positions") as caught:
        chain(max_length=65).check(model, task())
    assert caught.value.key == "max_length"


def test_numbers_are_the_same_on_every_machine() -> None:
    assert uniform(("0", "a text"), (1, 1, 2, 2)).flatten().tolist() == [
        0.18071394485918946,
        0.2652089250904165,
        0.5203237090647715,
        0.9897174500117017,
    ]


# In a run

KEY = "task.edits.denoising_chain"


@pytest.fixture(scope="module")
def mlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_masked_lm(tmp_path_factory.mktemp("models") / "mlm")


@pytest.fixture(scope="module")
def given(small: Small, mlm: Path) -> Small:
    """Overrides of a run of L2A with a masked language model that is there."""
    chains = (f"{KEY}.model={mlm}", f"{KEY}.max_length=48", f"{KEY}.most=40")
    few = ("method.episode=3", "method.holds=0.3", "method.hidden=8", "trainer.max_epochs=1")
    return lambda *more: small("method=l2a", *few, *chains, *more)


def test_a_run_learns_from_generated_texts_and_its_teacher_does_not(given: Small, small: Small) -> None:
    run, result = made(given())
    plain = planned(small("method=kd"))
    assert run.inputs.teachers["minilm"].digest == plain.inputs.teachers["minilm"].digest
    examples = build_examples(run)
    generated = sum(map(math.isnan, examples.labels["train"]))
    assert generated > 20
    assert any(f"{generated} of them without a label" in line for line in examples.edits)
    parts = cut(examples, 0.3)
    assert result["examples"]["held"] == parts.held.sum()
    assert result["examples"]["train"] == parts.trained.sum()


def test_a_run_of_all_examples_has_one_turn(given: Small) -> None:
    _, result = made(given("method.selection=all"))
    assert "held" not in result["examples"]


def test_the_run_of_the_generator_comes_first(small: Small, tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text("\n".join(" ".join((FILLER + GOOD + BAD)[n : n + 12]) for n in range(24)))
    tasks = [f"{KEY}.run.choose.task=text", f"{KEY}.run.task.train={tmp_path / 'story.txt'}", f"{KEY}.run.task.max_length=16"]
    run = planned(small("method=l2a", f"{KEY}.max_length=48", *tasks))
    assert roles(run) == ["teacher minilm", "edit denoising_chain"]
    check_arguments(run)
    check_run(run, examples_of(run, planned=True))


def test_run_resumed_in_mid_episode_ends_with_the_same_weights(
    given: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken, result = made(given())
    run = planned(given(f"paths.runs={tmp_path}", "trainer.checkpoint_minutes=0"))
    broken_off(run, 4, monkeypatch)
    assert execute.execute(run)["metrics"] == result["metrics"]
    assert same_weights(last_weights(run), last_weights(unbroken))


def test_a_pool_of_teachers_has_a_policy_for_each_and_resumes(
    given: Small, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("pool=stochastic", *pool(backbone, "minilm", "minilm_4l"), "trainer.checkpoint_minutes=0", "trainer.clip=0.1")
    unbroken, _ = made(given(*more))
    run = planned(given(*more, f"paths.runs={tmp_path}"))
    broken_off(run, 4, monkeypatch)
    execute.execute(run)
    assert same_weights(last_weights(run), last_weights(unbroken))


def test_a_held_part_depends_on_edits_of_texts_and_says_so(small: Small, given: Small) -> None:
    held = ["method=rl_kd", "method.before=null", "method.reward=3", "edit=[denoising_chain]"]
    chains = [word for word in given() if word.startswith(KEY)]
    assert planned(small(*held, *chains)).digest_inputs["held"] == "by origin"
    assert "held" not in planned(small(*held, "edit=[label_noise]")).digest_inputs
    assert "held" not in planned(small("method=kd", "edit=[denoising_chain]", *chains)).digest_inputs


@pytest.mark.ddp
def test_two_ranks_train_as_one(given: Small, tmp_path: Path) -> None:
    alone, result = made(given("student.dropout=0.0"))
    overrides = given("student.dropout=0.0", f"paths.runs={tmp_path}")
    teacher = alone.inputs.teachers["minilm"].directory  # with dropout, which ranks draw apart
    shutil.copytree(teacher, tmp_path / teacher.name)
    torchrun(overrides)
    run = planned(overrides)
    assert run.result is not None
    assert run.result["examples"] == result["examples"]
    assert len(list((tmp_path / ".edits").glob("*.npz"))) == 1
    one, two = last_weights(alone), last_weights(run)
    assert max(float((one[name] - two[name]).abs().max()) for name in one if one[name].is_floating_point()) < 1e-3


def test_methods_that_need_every_label_are_refused(given: Small, small: Small) -> None:
    chains = [word for word in given() if word.startswith(KEY)]
    more = ["method.before=null", "method.selection=best", "~method.weights.policy"]
    check_arguments(planned(small("method=finetune", "edit=[denoising_chain]", *chains)))
    with pytest.raises(InputError) as caught:
        check_arguments(planned(small("method=rl_kd", "edit=[denoising_chain]", *more, *chains)))
    assert caught.value.key == KEY
    assert "edit=[]" in caught.value.message


@pytest.mark.parametrize("edit", ["[]", "[label_noise]", "[word_replacement]"])
def test_a_policy_without_examples_to_decide_about_is_refused(edit: str, small: Small, mlm: Path) -> None:
    model = [f"task.edits.word_replacement.model={mlm}"] if "word" in edit else []
    with pytest.raises(InputError, match="selects=unlabelled the policy decides about these alone") as caught:
        check_arguments(planned(small("method=l2a", f"edit={edit}", *model)))
    assert caught.value.key == "task.unlabelled"
    check_arguments(planned(small("method=l2a", f"edit={edit}", "method.selects=all", *model)))
    check_arguments(planned(small("method=l2a", f"edit={edit}", "method.selection=all", *model)))
