"""Runs with a token budget, and tokens that one run leaves for the next."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from kd.data.datamodule import KDDataModule
from kd.data.tokenized import Tokens
from kd.errors import InputError
from kd.training import execute
from whole_runs import planned, torchrun, weights

Small = Callable[..., list[str]]

ALONE = ("method=finetune", "teacher=[]", "student.dropout=0", "preflight=false")


def test_a_run_by_tokens_says_so_in_its_record(small: Small, tmp_path: Path) -> None:
    result = execute.execute(
        planned(small(*ALONE, "trainer.batch_tokens=160", "trainer.accumulate=2", f"paths.runs={tmp_path}"))
    )
    assert (result["batch_size"], result["batch_tokens"]) == (None, 320)
    assert result["metrics"]["validation"]


def test_a_run_by_count_says_so_too(small: Small) -> None:
    result = execute.execute(planned(small(*ALONE)))
    assert (result["batch_size"], result["batch_tokens"]) == (16, None)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("trainer.batch_tokens=8", "trainer.batch_tokens"),
        ("trainer.batch_tokens=0", "trainer.batch_tokens"),
        ("trainer.pad_multiple=0", "trainer.pad_multiple"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(small: Small, tmp_path: Path, override: str, key: str) -> None:
    with pytest.raises(InputError) as caught:
        execute.execute(planned(small(*ALONE, override, f"paths.runs={tmp_path}")))
    assert caught.value.key == key


def test_a_budget_has_an_example_for_each_rank(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    from kd.build.data import build_examples
    from kd.build.models import plan_models

    run = planned(small(*ALONE))
    examples = build_examples(run)
    tokenizer = plan_models(run, examples.task).shapes.student.tokenizer
    data = KDDataModule(examples, [tokenizer], [], 15, 15, 32, 0, rank=1, world=4, batch_tokens=32)
    with pytest.raises(InputError, match=r"trainer\.batch_tokens=32 cuts 'train' into batches of which one has") as caught:
        data.train_dataloader()
    assert caught.value.key == "trainer.batch_tokens"
    # Ranks need not divide a batch size that nobody reads.
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError):
        execute.check_launch(planned(small("trainer.batch_size=15", *ALONE)))
    execute.check_launch(planned(small("trainer.batch_size=15", "trainer.batch_tokens=200", *ALONE)))


def test_a_later_run_reads_what_an_earlier_one_has_cut(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = execute.execute(planned(small(*ALONE, f"paths.runs={tmp_path}")))
    assert len(list((tmp_path / ".tokens").iterdir())) == 3
    call = PreTrainedTokenizerFast.__call__

    def once(tokenizer: PreTrainedTokenizerFast, *texts: list[str], **options: object) -> object:
        assert len(texts[0]) < 32, "a split was cut again"
        return call(tokenizer, *texts, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", once)
    second = execute.execute(planned(small(*ALONE, "seed=1", f"paths.runs={tmp_path}")))
    assert second["examples"] == first["examples"]
    assert len(list((tmp_path / ".tokens").iterdir())) == 3


def test_stored_tokens_change_no_result(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for kept in (True, True, False):
        if not kept:
            monkeypatch.setattr("kd.data.datamodule.Tokens", lambda *given: Tokens(*given[:4]))
        run = planned(small(*ALONE, f"paths.runs={tmp_path}"))
        execute.execute(run)
        found.append(weights(run))
        (run.directory / "result.json").unlink()
        (run.checkpoints / "last.ckpt").unlink()
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


@pytest.mark.slow
@pytest.mark.ddp
def test_two_ranks_share_a_budget_and_the_tokens_of_the_first(small: Small, tmp_path: Path) -> None:
    words = (*ALONE, "trainer.max_epochs=1", "trainer.batch_tokens=160", "trainer.pad_multiple=4", "optimizer.factory.eps=1e-3")
    one = planned(small(*words, f"paths.runs={tmp_path / 'one'}"))
    execute.execute(one)
    arguments = small(*words, f"paths.runs={tmp_path / 'two'}", "trainer=ddp", "trainer.accelerator=cpu")
    torchrun(arguments)
    two = planned(arguments)
    assert two.result is not None
    assert (two.result["ranks"], two.digest) == (2, one.digest)
    assert len(list((tmp_path / "two" / ".tokens").iterdir())) == 3
    ours, theirs = weights(one), weights(two)
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-5, (
        "its eps keeps rounding from deciding a sign"
    )
