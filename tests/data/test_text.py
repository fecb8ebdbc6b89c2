"""Unlabelled text: chunks, masks, two vocabularies, files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import FILLER, GOOD, SPECIAL, tiny_tokenizer
from kd.config.compose import compose, typed
from kd.data.direction import higher_is_better
from kd.data.examples import Examples, load_examples
from kd.data.masked_lm.datamodule import MaskedLMDataModule
from kd.data.masked_lm.source import TextFiles
from kd.data.masked_lm.task import NOT_PREDICTED, MaskedLM, by_example
from kd.data.masked_lm.tokenized import MaskedTokens, MixedTokenizer
from kd.data.sampler import Rows
from kd.errors import InputError
from kd.models.surgery.wordpiece import learned_tokens, with_vocabulary
from kd.runs.identity import source_of

TASK = MaskedLM("toy", ["loss", "accuracy"], "loss")
MASK = 4


def texts(count: int, seed: int = 0, least: int = 3, most: int = 20) -> list[tuple[str, ...]]:
    generator = np.random.default_rng(seed)
    words = FILLER + GOOD
    return [(" ".join(generator.choice(words, generator.integers(least, most))),) for _ in range(count)]


def tokens(count: int = 40, seed: int = 0, max_length: int = 32, **sizes: int) -> MaskedTokens:
    return MaskedTokens(tiny_tokenizer(), texts(count, **sizes), max_length, seed)


def mixed(probability: float, max_length: int = 64, size: int = 70) -> MaskedTokens:
    first = tiny_tokenizer()
    plain = [text for (text,) in texts(40)]
    second = with_vocabulary(first, learned_tokens(first, plain, size))
    return MaskedTokens(MixedTokenizer(first, second, len(first), probability), texts(40), max_length, seed=0)


def data(count: int = 40, batch: int = 8, rank: int = 0, world: int = 1, workers: int = 0) -> MaskedLMDataModule:
    examples = Examples(TASK, {"train": texts(count), "validation": texts(12, seed=1)}, {"train": [], "validation": []})
    return MaskedLMDataModule(
        examples, [tiny_tokenizer()], [], batch, batch, 32, seed=3, workers=workers, rank=rank, world=world
    )


# -- masks ---------------------------------------------------------------------------------------------------------------


def test_special_tokens_and_padding_are_never_masked_replaced_or_predicted() -> None:
    found = tokens(200)
    for epoch in range(5):
        inputs, labels = found.pad(list(range(len(found.lengths))), epoch)
        assert torch.equal(inputs["predicted"], labels != NOT_PREDICTED)
        assert not (labels[labels != NOT_PREDICTED] < len(SPECIAL)).any()
        assert (inputs["input_ids"][:, 0] == 2).all()
        ends = inputs["attention_mask"].sum(dim=1) - 1
        assert (inputs["input_ids"].gather(1, ends[:, None]) == 3).all()
        assert (inputs["input_ids"][inputs["attention_mask"] == 0] == 0).all()
        assert set(inputs["input_ids"][labels != NOT_PREDICTED].tolist()) & set(range(len(SPECIAL))) <= {MASK}


def test_fifteen_percent_of_the_tokens_are_predicted_eight_tenths_of_them_masked_one_tenth_replaced() -> None:
    found = tokens(1500, least=17, most=21)
    inputs, labels = found.pad(list(range(1500)), epoch=0)
    chosen = labels != NOT_PREDICTED
    ordinary = (inputs["attention_mask"] == 1).sum(dim=1) - 2
    assert torch.equal(chosen.sum(dim=1), (0.15 * ordinary).round().long().clamp(min=1))
    read, wanted = inputs["input_ids"][chosen], labels[chosen]
    masked, same = (read == MASK).float().mean(), (read == wanted).float().mean()
    # 4,000 draws or so: three standard deviations are 0.019 and 0.014. A replacement may be the token itself, 1 time in 35.
    assert float(masked) == pytest.approx(0.8, abs=0.02)
    assert float(same) == pytest.approx(0.1 + 0.1 / 35, abs=0.015)


def test_masks_are_a_function_of_seed_epoch_and_example_alone() -> None:
    found, other = tokens(), tokens(seed=1)
    alone = found.mask(5, epoch=2)
    for rows in ([5], [1, 5, 9], [9, 5]):
        inputs, labels = found.pad(rows, epoch=2)
        place, length = rows.index(5), len(alone[0])
        assert inputs["input_ids"][place, :length].tolist() == alone[0].tolist()
        assert labels[place, :length].tolist() == alone[1].tolist()
    differing = [other.mask(5, epoch=2), found.mask(5, epoch=3), found.mask(5, epoch=None)]
    assert all(not np.array_equal(alone[1], labels) or not np.array_equal(alone[0], ids) for ids, labels in differing)


def test_validation_masks_are_fixed_and_do_not_follow_the_seed() -> None:
    for one, two in zip(tokens(seed=0).pad(range(9))[0].values(), tokens(seed=7).pad(range(9))[0].values(), strict=True):
        assert torch.equal(one, two)


def test_loader_masks_anew_in_each_epoch_also_in_worker_processes() -> None:
    here, there = data(), data(workers=1)
    seen = []
    for epoch in range(2):
        batches = []
        for made in (here, there):
            loader = made.train_dataloader()
            loader.batch_sampler.set_epoch(epoch)
            batches.append(list(loader))
        for one, two in zip(*batches, strict=True):
            assert torch.equal(one.labels, two.labels)
            assert torch.equal(one.student["input_ids"], two.student["input_ids"])
        seen.append(
            {int(i): row[row != NOT_PREDICTED].tolist() for b in batches[0] for i, row in zip(b.index, b.labels, strict=True)}
        )
    assert seen[0].keys() == seen[1].keys()
    assert sum(seen[0][row] != seen[1][row] for row in seen[0]) > 20


def test_two_ranks_read_what_one_reads() -> None:
    whole, *shares = (data(rank=rank, world=world).train_dataloader() for rank, world in ((0, 1), (0, 2), (1, 2)))
    for one, *parts in zip(whole, *shares, strict=True):
        read = {int(i): r[r != NOT_PREDICTED].tolist() for b in parts for i, r in zip(b.index, b.labels, strict=True)}
        assert read == {int(i): r[r != NOT_PREDICTED].tolist() for i, r in zip(one.index, one.labels, strict=True)}


# -- chunks --------------------------------------------------------------------------------------------------------------


def test_long_texts_become_chunks_and_no_token_is_lost() -> None:
    long = [" ".join(FILLER * 20), "good film", ""]
    found = MaskedTokens(tiny_tokenizer(), [(text,) for text in long], 16, seed=0)
    assert found.lengths.max() <= 16
    read = [found.read(row, None)[0].tolist() for row in range(len(found.lengths))]
    whole = tiny_tokenizer()([text for text in long if text], add_special_tokens=False)["input_ids"]
    assert [number for ids in read for number in ids] == [number for ids in whole for number in ids]
    assert [len(ids) + 2 for ids in read] == found.lengths.tolist()


def test_the_index_of_an_example_counts_chunks_not_texts() -> None:
    texts = [("qqq",), (" ".join(FILLER * 2),), ("good film",)]
    tokenizer = tiny_tokenizer()
    for max_length, chunks in ((64, 2), (16, 4)):
        examples = Examples(TASK, {"train": texts, "validation": texts}, {})
        loaded = MaskedLMDataModule(examples, [tokenizer], [], 2, 2, max_length, seed=0)
        batches = list(loaded.train_dataloader())
        rows = {int(i): ids for batch in batches for i, ids in zip(batch.index, batch.student["input_ids"], strict=True)}
        assert sorted(rows) == list(range(chunks))
        assert int((rows[chunks - 1] > 0).sum()) == 4, "the last text is a chunk of its own"


def test_every_example_has_a_predicted_position_and_text_without_a_known_word_is_left_out() -> None:
    found = MaskedTokens(tiny_tokenizer(), [("qqq zzz",), ("good",), ("qqq film",)], 16, seed=0)
    assert len(found.lengths) == 2
    assert (found.pad([0, 1], 0)[0]["predicted"].sum(dim=1) > 0).all()
    with pytest.raises(InputError, match="no text has a token"):
        MaskedTokens(tiny_tokenizer(), [("qqq",)], 16, seed=0)


# -- two vocabularies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_mixed_text_detokenises_to_the_normalised_input(probability: float) -> None:
    found = mixed(probability)
    first, second = found.vocabularies
    shift = len(tiny_tokenizer())
    names = {number: token for token, number in tiny_tokenizer().get_vocab().items()}
    learned = learned_tokens(tiny_tokenizer(), [text for (text,) in texts(40)], 70)
    names.update({shift + number: token for number, token in enumerate(learned)})
    for row, (text,) in enumerate(texts(40)):
        ids, _, owner = found.read(row, epoch=1)
        assert ((ids >= shift) == (owner == 1)).all()
        assert "".join(names[number] for number in ids).replace("##", "") == text.replace(" ", "")
    assert first.words.tolist() == second.words.tolist()


def test_switch_is_per_word_and_masks_are_of_the_vocabulary_that_cut_the_word() -> None:
    found, shift = mixed(0.5), len(tiny_tokenizer())
    shares = []
    for row in range(40):
        owner = found.read(row, epoch=0)[2]
        shares.append(owner.mean())
        masked, labels = found.mask(row, epoch=0)
        chosen = labels != NOT_PREDICTED
        assert ((masked[chosen] >= shift) == (labels[chosen] >= shift)).all()
        own = masked[chosen] - shift * (masked[chosen] >= shift)
        assert (own[own < len(SPECIAL)] == MASK).all()
        assert (masked[0], masked[-1]) == (2, 3), "the ends are the first vocabulary's"
        assert np.array_equal(found.read(row, epoch=0)[2], owner)
    assert 0.3 < np.mean(shares) < 0.9
    assert any(0 < share < 1 for share in shares)
    assert any(not np.array_equal(found.read(row, 0)[2], found.read(row, 1)[2]) for row in range(40))


def test_without_the_second_vocabulary_mixed_text_is_ordinary_masked_text() -> None:
    plain = MaskedTokens(tiny_tokenizer(), texts(40), 64, seed=0)
    for one, two in zip(mixed(0.0).pad(range(40), 3)[0].values(), plain.pad(range(40), 3)[0].values(), strict=True):
        assert torch.equal(one, two)


def test_chunks_fit_however_their_words_are_cut() -> None:
    found = mixed(0.5, max_length=16)
    for epoch in range(6):
        inputs, _ = found.pad(range(len(found.lengths)), epoch)
        assert inputs["input_ids"].shape[1] <= 16
        assert (inputs["predicted"].sum(dim=1) > 0).all()


# -- the task ------------------------------------------------------------------------------------------------------------


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.full((3, 6), NOT_PREDICTED)
    for row, place in ((0, 1), (0, 4), (1, 2), (2, 0), (2, 1), (2, 5)):
        labels[row, place] = int(torch.randint(0, 7, (1,), generator=generator))
    return torch.randn(6, 7, generator=generator), torch.randn(6, 7, generator=generator), labels


def test_loss_is_the_mean_over_examples_of_the_mean_over_their_positions() -> None:
    logits, _, labels = problem()
    wanted = labels[labels != NOT_PREDICTED]
    losses = [-float(torch.log_softmax(row, -1)[target]) for row, target in zip(logits, wanted, strict=True)]
    naive = (sum(losses[:2]) / 2 + losses[2] + sum(losses[3:]) / 3) / 3
    assert float(TASK.hard(logits, labels)) == pytest.approx(naive, abs=1e-6)
    assert float(TASK.hard(logits[:2], labels[:1])) == pytest.approx(sum(losses[:2]) / 2, abs=1e-6)
    each = [sum(losses[:2]) / 2, losses[2], sum(losses[3:]) / 3]
    assert TASK.hard(logits, labels, reduction="none").tolist() == pytest.approx(each, abs=1e-6)
    with pytest.raises(ValueError, match="'sum' is not one of mean, none"):
        TASK.hard(logits, labels, reduction="sum")
    half = [TASK.hard(values, labels, reduction="none") for values in (logits.bfloat16(), logits.bfloat16().float())]
    assert torch.equal(*half)


def test_gradient_of_an_examples_loss_reaches_its_own_positions() -> None:
    logits, teacher, labels = problem()
    logits.requires_grad_()
    for losses in (TASK.hard(logits, labels, "none"), TASK.of(labels).soft(logits, teacher, 2.0, "kl", "none")):
        (gradient,) = torch.autograd.grad(losses[1], logits)
        assert gradient.abs().sum(-1).nonzero().flatten().tolist() == [2]


def test_an_example_without_predicted_positions_has_a_loss_of_zero_and_counts() -> None:
    logits, teacher, labels = problem()
    labels = torch.cat([labels[:1], torch.full((1, 6), NOT_PREDICTED), labels[1:]])
    task = TASK.of(labels)
    logits.requires_grad_()
    for each, mean in (
        (task.hard(logits, labels, "none"), task.hard(logits, labels)),
        (task.soft(logits, teacher, 2.0, "kl", "none"), task.soft(logits, teacher, 2.0, "kl")),
    ):
        assert each[1] == 0
        assert (each[[0, 2, 3]] > 0).all()
        torch.testing.assert_close(mean, each.sum() / 4)
        assert torch.autograd.grad(mean, logits)[0].isfinite().all()


@pytest.mark.parametrize("loss", ["kl", "ce", "mse"])
def test_soft_loss_is_averaged_like_the_hard_one(loss: str) -> None:
    student, teacher, labels = problem()
    task = TASK.of(labels)
    p, q = torch.softmax(teacher / 2, -1), torch.log_softmax(student / 2, -1)
    rows = {"kl": 4 * (p * (p.log() - q)).sum(-1), "ce": -(p * q).sum(-1), "mse": ((student - teacher) ** 2).sum(-1)}[loss]
    each = torch.stack([rows[:2].mean(), rows[2], rows[3:].mean()])
    assert torch.allclose(task.soft(student, teacher, 2.0, loss, "none"), each, atol=1e-5)
    assert torch.allclose(task.soft(student, teacher, 2.0, loss, "batchmean"), each.mean(), atol=1e-5)
    assert torch.allclose(task.soft(student, teacher, 2.0, loss, "elementmean"), each.mean() / 7, atol=1e-5)
    assert torch.allclose(by_example(rows, labels), each)
    with pytest.raises(ValueError, match="batch"):
        TASK.soft(student, teacher, 2.0)


def test_metrics_are_over_positions() -> None:
    logits, _, labels = problem()
    metrics = {name: TASK.metric(name) for name in TASK.metrics}
    TASK.score(metrics, logits[:2], labels[:1])
    TASK.score(metrics, logits[2:], labels[1:])
    wanted = labels[labels != NOT_PREDICTED]
    assert float(metrics["accuracy"].compute()) == pytest.approx(float((logits.argmax(-1) == wanted).float().mean()))
    assert float(metrics["loss"].compute()) == pytest.approx(float(torch.nn.functional.cross_entropy(logits, wanted)), abs=1e-5)


def test_less_loss_is_better() -> None:
    assert not higher_is_better("loss")
    assert higher_is_better("accuracy")


# -- files ---------------------------------------------------------------------------------------------------------------


def test_lines_of_a_text_file_and_columns_of_the_others_are_texts(tmp_path: Path) -> None:
    lines = [f"text {n}" for n in range(60)]
    (tmp_path / "a.txt").write_text("\n\n".join(lines) + "\n")
    (tmp_path / "a.csv").write_text("body\n" + "\n".join(lines) + "\n")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": line}) for line in lines))
    found = [TextFiles(str(tmp_path / f"a.{kind}"), ["body"]).splits() for kind in ("txt", "csv", "jsonl")]
    for splits in found:
        read = [[example.texts[0] for example in splits[name]] for name in ("train", "validation")]
        assert sorted(read[0] + read[1]) == sorted(lines)
        assert read == [[example.texts[0] for example in found[0][name]] for name in ("train", "validation")]
        assert 0 < len(read[1]) < 12


def test_limit_takes_texts_after_the_shuffle_and_examples_have_no_labels(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(f"text {n}" for n in range(60)))
    spec = typed(compose(["task=text", f"task.train={tmp_path / 'a.txt'}", "task.limit_train=7"]))
    examples = load_examples(spec.task, source_of(spec.task))
    assert len(examples.texts["train"]) == 7
    assert isinstance(examples.task, MaskedLM)
    assert set(examples.labels["train"]) == {0.0}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("a.txt", None, "does not exist"), ("a.txt", b"\xff\xfe\xfa", "not UTF-8"), ("a.csv", b"x\ny\n", "no column 'text'")],
)
def test_files_that_cannot_be_read_are_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        TextFiles(str(tmp_path / name), ["text"]).splits()


def test_an_empty_text_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n \n")
    spec = typed(compose(["task=text", f"task.train={tmp_path / 'a.txt'}"]))
    with pytest.raises(InputError, match="no examples"):
        load_examples(spec.task, source_of(spec.task))


def test_rows_carry_their_epoch() -> None:
    sampler = data().train_dataloader().batch_sampler
    sampler.set_epoch(4)
    assert {rows.epoch for rows in sampler} == {4}
    assert {rows.epoch for rows in data().loader("validation").batch_sampler} == {None}
    assert Rows([1]).epoch is None
