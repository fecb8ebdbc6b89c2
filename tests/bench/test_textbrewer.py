"""TextBrewer does the same work as the method it stands beside."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gates import Recorder
from kd.bench.candidates import FINETUNE, LIVE, TEXTBREWER, TEXTBREWER_CUT, Candidate
from kd.bench.harness import prepare
from kd.bench.harness import train_candidate as train_ours
from kd.bench.workers import Finished, Job
from kd.build.engine import build_engine
from kd.errors import InputError
from kd.forward.needs import Needs

pytest.importorskip("textbrewer")

from kd.bench.textbrewer import TextBrewerCollate, build_distiller, check_textbrewer, train_textbrewer

Small = Callable[..., list[str]]

LATER = ["student.layers=3", "student.init=last"]
"""Two pairs of layers, whose states differ: those of the first layers are the teacher's own."""


def job(candidate: Candidate, overrides: list[str], folder: Path, steps: int = 2, turns: int = 3) -> Job:
    return Job(candidate, tuple(candidate.overrides(overrides)), steps, turns, folder)


@pytest.mark.parametrize(
    "options",
    [
        ["method=kd"],
        ["method=kd", "method.loss=ce", "method.reduction=elementmean", "method.temperature=3"],
        ["method=kd", "method.loss=mse"],
        ["method=kd", "method.loss=mse", "method.reduction=elementmean"],
        ["method=pkd", "method.weights.hidden=1000", *LATER],
        ["method=pkd", "method.hidden_reduction=vectors", "method.weights.hidden=2", *LATER],
        ["method=pkd", "method.hidden_reduction=examples", "method.reduction=batchmean", *LATER],
    ],
    ids=" ".join,
)
def test_gradients_equal_the_methods(small: Small, tmp_path: Path, options: list[str]) -> None:
    prepared = prepare(job(TEXTBREWER, small(*options), tmp_path))
    engine = build_engine(prepared.run, prepared.models, prepared.examples.task).eval()
    batch = next(iter(prepared.data.train_dataloader()))
    parameters = list(prepared.models.student.parameters())
    loss = engine.loss(batch)
    assert all(float(term.detach()) > 1e-4 for term in loss.terms.values())
    ours = torch.autograd.grad(loss.total, parameters)
    distiller = build_distiller(prepared, str(tmp_path), 1)
    theirs = torch.autograd.grad(
        distiller.train_on_batch(TextBrewerCollate(prepared, 32)(batch.index.tolist()), {})[0], parameters
    )
    assert max(float(each.abs().max()) for each in ours) > 1e-3
    # Longer batches are added up in another order.
    assert all(torch.allclose(our, their, atol=1e-6, rtol=1e-4) for our, their in zip(ours, theirs, strict=True))


def test_states_without_normalisation_get_the_normalised_loss(small: Small, tmp_path: Path) -> None:
    prepared = prepare(job(TEXTBREWER, small("method=pkd", "method.normalize=false"), tmp_path))
    assert {match.loss for match in build_distiller(prepared, str(tmp_path), 1).d_config.intermediate_matches} == {"pkd"}


def test_widths_that_differ_get_a_map_for_each_pair(small: Small, tmp_path: Path) -> None:
    narrow = small("method=pkd", "student.width=16", "student.heads=2", "student.intermediate=32", "student.init=random")
    distiller = build_distiller(prepare(job(TEXTBREWER, narrow, tmp_path)), str(tmp_path), 1)
    assert [(map_.in_features, map_.out_features) for map_ in distiller.projs] == [(16, 32)]


def test_batches_are_padded_to_the_maximum_or_to_their_longest(small: Small, tmp_path: Path) -> None:
    prepared = prepare(job(TEXTBREWER, small(), tmp_path))
    rows = [0, 3, 5]
    whole, cut = TextBrewerCollate(prepared, 32)(rows), TextBrewerCollate(prepared, None)(rows)
    longest = max(prepared.lengths[rows])
    assert whole["input_ids"].shape == (3, 32)
    assert cut["input_ids"].shape == (3, longest)
    assert whole.keys() == cut.keys() >= {"input_ids", "attention_mask", "labels"}
    for name in cut.keys() - {"labels"}:
        assert torch.equal(whole[name][:, :longest], cut[name])
    assert not whole["attention_mask"][:, longest:].any()
    batch = prepared.data.collate("train")(rows)
    assert torch.equal(batch.labels, cut["labels"])
    assert torch.equal(batch.student["input_ids"], cut["input_ids"])


@pytest.mark.parametrize("candidate", [FINETUNE, LIVE, TEXTBREWER, TEXTBREWER_CUT], ids=lambda each: each.name)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_turn_is_all_its_steps_and_saves_nothing(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, candidate: Candidate, accumulate: int
) -> None:
    gate = Recorder(3, monkeypatch)
    worker = train_textbrewer if candidate in (TEXTBREWER, TEXTBREWER_CUT) else train_ours
    asked = small("method=kd", f"trainer.accumulate={accumulate}", "trainer.precision=32-true")
    with pytest.raises(Finished):
        worker(job(candidate, asked, tmp_path), gate)  # type: ignore[arg-type]
    assert gate.opened == [0, 2, 4]
    assert gate.closed == [(2, 32 * accumulate), (4, 32 * accumulate), (6, 32 * accumulate)]
    assert gate.facts["examples"] == 32 * accumulate
    assert gate.facts["turns_in_epoch"] == 96 / (32 * accumulate)
    assert not [path for path in tmp_path.rglob("*.*") if path.suffix in (".pkl", ".ckpt")]


def test_candidates_have_one_student_and_see_the_same_examples(small: Small, tmp_path: Path) -> None:
    made = [prepare(job(each, small("method=pkd"), tmp_path)) for each in (FINETUNE, LIVE, TEXTBREWER)]
    first = made[0]
    for other in made[1:]:
        assert other.examples.texts["train"] == first.examples.texts["train"]
        assert other.facts("32-true")["tokens"] == first.facts("32-true")["tokens"]
        assert other.facts("32-true")["flops"] == first.facts("32-true")["flops"]
        ours, theirs = (each.models.student.state_dict() for each in (first, other))
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert [len(each.models.teachers) for each in made] == [0, 1, 1]
    batch = made[1].data.probe("train", 4)
    one, two = (each.models.teachers[0](batch.teachers[0], Needs()).logits for each in made[1:])
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["method=skdbert"], "not for method=skdbert"),
        (["method=finetune"], "not for method=finetune"),
        (["method=kd", "cohort=mutual"], "one frozen teacher and one student"),
    ],
)
def test_what_the_peer_cannot_do_is_refused(small: Small, options: list[str], words: str) -> None:
    from kd.config.compose import compose
    from kd.runs.plan import plan

    with pytest.raises(InputError, match=words) as caught:
        check_textbrewer(plan(compose(small(*options))))
    assert caught.value.key == "--peer"
