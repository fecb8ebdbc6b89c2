"""The rows of the word embeddings that occur in training are trained alone, and nothing else changes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from conftest import FILLER
from kd.build.parts import build_parts, engine_of, examples_of
from kd.errors import InputError
from kd.models.occurring_rows import KEY, OccurringRows
from kd.runs.run import Run
from kd.training import execute
from kd.training.rows import Table, TrainOccurringRows, plan_tables, readers_of
from whole_runs import broken_off, last_weights, made, planned, same_weights

Small = Callable[..., list[str]]

IDS = torch.tensor([0, 2, 3, 6])


@pytest.fixture
def both() -> tuple[nn.Embedding, OccurringRows]:
    """A table, and the same with some rows."""
    torch.manual_seed(0)
    whole, part = nn.Embedding(8, 5, padding_idx=0), nn.Embedding(8, 5, padding_idx=0)
    nn.init.normal_(whole.weight)  # the row of padding too
    part.load_state_dict(whole.state_dict())
    return whole, OccurringRows(part, IDS)


def test_rows_are_looked_up_and_trained_as_in_the_whole_table(both: tuple[nn.Embedding, OccurringRows]) -> None:
    whole, part = both
    text = torch.tensor([[2, 6, 2, 0], [3, 3, 0, 0]])
    weights = torch.randn(2, 4, 5)
    for module in both:
        (module(text) * weights).sum().backward()
    assert torch.equal(part(text), whole(text))
    assert torch.equal(part.expanded(part.weight.grad), whole.weight.grad)
    assert not part.weight.grad[0].any()  # padding
    with torch.no_grad():
        assert torch.equal(part(torch.arange(8)), whole(torch.arange(8)))


def test_a_word_that_does_not_occur_is_refused_where_it_would_be_trained(both: tuple[nn.Embedding, OccurringRows]) -> None:
    with pytest.raises(InputError, match="reads the word 5 of the vocabulary") as refused:
        both[1](torch.tensor([[2, 5]]))
    assert refused.value.key == KEY


@pytest.mark.parametrize("fused", [False, True])
def test_decay_follows_adamw_through_warm_up_and_steps_without_a_gradient(
    both: tuple[nn.Embedding, OccurringRows], fused: bool
) -> None:
    """As of the whole table after each step, and in words that no step has read to the last bit of `state_dict`."""
    whole, part = both
    callback = TrainOccurringRows([])
    callback.rows = {"student": part}
    optimizers = [torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.3, fused=fused) for module in both]
    optimizers[1].register_step_post_hook(callback.follow)
    for step in range(12):
        for module, optimizer in zip(both, optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = 0.1 * min(step, 5) / 5
            optimizer.zero_grad()
            if step != 7:  # then the optimiser leaves the table out
                (module(IDS[1:]) ** 2).sum().backward()
            optimizer.step()
        assert torch.allclose(part.whole(), whole.weight, rtol=1e-6, atol=0)
    assert not torch.allclose(part.table, whole.weight, rtol=0.1)
    with torch.no_grad():
        assert torch.equal(part(torch.arange(8)), part.state_dict()["weight"])


def test_weights_are_saved_loaded_and_given_back_whole(both: tuple[nn.Embedding, OccurringRows]) -> None:
    whole, part = both
    part.factor = 0.5
    state = part.state_dict()
    assert list(state) == ["weight"]
    assert state["weight"].shape == (8, 5)
    whole.load_state_dict(state)
    other = OccurringRows(nn.Embedding(8, 5), IDS)
    other.load_state_dict(state)
    assert torch.equal(other.whole(), whole.weight)
    with pytest.raises(RuntimeError, match="is \\(4, 5\\), not \\(8, 5\\)"):
        other.load_state_dict({"weight": part.weight})
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})
    kept = other.weight
    other.restore()
    assert other.weight is kept
    assert torch.equal(kept, whole.weight)


# Of runs

SETTINGS = {
    "accumulation, decay and clipping": (
        "method=pkd",
        "trainer.accumulate=2",
        "optimizer.weight_decay=0.1",
        "trainer.clip=0.1",
        "student.dropout=0.1",
    ),
    "a cohort with an online teacher": ("method=p2p_mutual", "cohort.teacher=online", "optimizer.weight_decay=0.1"),
    "one student after the other": ("method=dml", "engine.update=sequential", "optimizer.weight_decay=0.1"),
    "a vocabulary that is cut": ("method=kd", "surgery=[cut_vocabulary]"),
    "adam": (
        "method=kd",
        "optimizer.factory._target_=torch.optim.Adam",
        "optimizer.weight_decay=0",
        "optimizer.factory.fused=false",
    ),
}


def tables_of(run: Run) -> list[Table]:
    """The embedding tables of a run whose inputs are done."""
    examples = examples_of(run)
    parts = build_parts(run, examples)
    engine = engine_of(run, {name: part.engine for name, part in parts.items()}, examples)
    readers = [reader for part in parts.values() for reader in readers_of(part.models, part.data)]
    return plan_tables(readers, engine, run.spec.trainer)


@pytest.mark.parametrize("setting", SETTINGS)
def test_training_is_the_same_with_all_rows_up_to_rounding(small: Small, tmp_path: Path, setting: str) -> None:
    base = small(*SETTINGS[setting])
    ours = planned([*base, f"paths.runs={tmp_path / 'occurring'}"])
    all_rows = planned([*base, f"paths.runs={tmp_path / 'all'}", "trainer.embedding_rows=all"])
    assert ours.digest == all_rows.digest
    records = [made([*base, f"paths.runs={run.spec.paths.runs}", f"trainer.embedding_rows={kind}"])[1]
               for run, kind in ((ours, "occurring"), (all_rows, "all"))]  # fmt: skip
    tables = tables_of(ours)
    assert tables
    assert all(table.ids is not None and len(table.ids) < table.modules[0].num_embeddings for table in tables), tables
    one, other = last_weights(ours), last_weights(all_rows)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], rtol=0, atol=1e-6), name
    assert records[0]["metrics"] == records[1]["metrics"]
    assert records[0]["parameters"] == records[1]["parameters"]
    states = [torch.load(run.checkpoints / "last.ckpt", weights_only=True)["optimizer_states"] for run in (ours, all_rows)]
    for index, state in states[0][0]["state"].items():
        for name, value in state.items():
            assert torch.allclose(value, states[1][0]["state"][index][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("begun", "resumed"), [("occurring", "occurring"), ("all", "occurring"), ("occurring", "all")])
def test_a_run_resumes_with_other_rows(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: str, resumed: str
) -> None:
    base = small("method=finetune", "teacher=[]", "optimizer.weight_decay=0.1", "trainer.checkpoint_minutes=0")
    whole, _ = made([*base, f"paths.runs={tmp_path / 'whole'}"])
    broken = [*base, f"paths.runs={tmp_path / 'broken'}"]
    broken_off(planned([*broken, f"trainer.embedding_rows={begun}"]), 9, monkeypatch)
    run, record = made([*broken, f"trainer.embedding_rows={resumed}"])
    assert record["resumed"]
    if begun == resumed:
        assert same_weights(last_weights(run), last_weights(whole))
    for name, tensor in last_weights(run).items():
        assert torch.allclose(tensor, last_weights(whole)[name], rtol=0, atol=1e-6), name


REASONS = {
    "steps of BackwardKD read words that train does not have": ("method=backward_kd",),
    "Adam with weight_decay=0.01 is not known to multiply all other rows by one factor": (
        "method=finetune",
        "teacher=[]",
        "optimizer.factory._target_=torch.optim.Adam",
    ),
    "it is a FactorizedEmbedding": ("method=kd", "surgery=[factorized]", "surgery.factorized.rank=4"),
}


@pytest.mark.parametrize("reason", REASONS)
def test_all_rows_are_trained_where_the_others_are_not_known_and_the_reason_is_said(small: Small, reason: str) -> None:
    run = planned(small(*REASONS[reason]))
    for _, needed in run.inputs:
        execute.execute(needed)
    (table,) = tables_of(run)
    assert table.ids is None
    assert table.line == f"student: all rows of the embedding table are trained, because {reason}"


def test_a_table_with_a_tied_decoder_trains_all_rows(small: Small, tmp_path: Path) -> None:
    text = tmp_path / "story.txt"
    text.write_text("\n".join(" ".join(FILLER[index % 5 :]) for index in range(40)))
    plain = [word for word in small() if not word.startswith(("task", "teacher", "student"))]
    run = planned(
        [*plain, "task=text", f"task.train={text}", "task.max_length=16", "method=finetune", "student=2l", "teacher=[]"]
    )
    (table,) = tables_of(run)
    assert table.ids is None
    assert str(table.reason).startswith("a Linear has the same weights")


def test_the_preflight_counts_the_rows(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = made(small("method=finetune", "teacher=[]", f"paths.runs={tmp_path}"))
    (table,) = tables_of(run)
    (texts,) = (examples.texts["train"] for examples in examples_of(run).values())
    tokenizer = AutoTokenizer.from_pretrained(run.student)
    occur = {token for text in texts for token in tokenizer(*text)["input_ids"]} | {tokenizer.pad_token_id}
    assert table.ids is not None
    assert set(table.ids.tolist()) == occur
    line = f"student: {len(occur)} of {len(tokenizer)} rows of the embedding table occur in train"
    assert line in " ".join(capsys.readouterr().out.split())
