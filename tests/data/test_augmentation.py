"""Augmentation: Jiao et al., Findings of EMNLP 2020, arXiv:1909.10351, algorithm 1, and the runs that use it."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerFast

from conftest import BAD, FILLER, GOOD, tiny_config, tiny_tokenizer, write_csv
from kd.build.check import check_arguments, check_run
from kd.build.data import build_examples
from kd.build.parts import examples_of
from kd.data import augmentation
from kd.data.augmentation import STOP_WORDS, Candidates, Reader, WordReplacement, draws, word_names
from kd.data.edits import Split
from kd.data.tasks import Regression
from kd.data.texts import Texts
from kd.data.vectors import Vectors, read_vectors
from kd.errors import InputError
from kd.training import execute
from whole_runs import broken_off, last_weights, made, planned, roles, same_weights, torchrun

Small = Callable[..., list[str]]
WORDS = [*FILLER, *GOOD, *BAD, "play", "act", "##s", "##or", "##ing", "##less", "un"]
TEXTS = [
    ("the playing actor was good, it is a plot with acting",),
    ("Great story - the playless acts bored 3 actors!",),
    ("bad film",),
    ("it is the",),
    ("",),
    ("bad film",),
]


class TinyModel:
    """A random masked language model that counts its passes."""

    positions = 64

    def __init__(self, tokenizer: PreTrainedTokenizerFast | None = None) -> None:
        torch.manual_seed(5)
        self.tokenizer = tokenizer or tiny_tokenizer(WORDS)
        self.model = AutoModelForMaskedLM.from_config(
            tiny_config(layers=2, vocab_size=len(self.tokenizer), initializer_range=0.3)
        ).eval()
        self.batches: list[int] = []

    @torch.no_grad()
    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        given = dict(inputs)
        predicted = given.pop("predicted")
        assert predicted.sum(dim=1).tolist() == [1] * len(predicted)
        self.batches.append(len(predicted))
        return self.model(**given).logits[predicted]

    def embeddings(self) -> np.ndarray:
        return self.model.get_input_embeddings().weight.detach().numpy()


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return TinyModel()


def edit(**options: Any) -> WordReplacement:
    return WordReplacement(**{"max_length": 63, **options})


def derived(options: WordReplacement, rows: list[tuple[str, ...]], model: TinyModel) -> list[list[tuple[str, ...]]]:
    """The example and its copies, for each example."""
    texts, index = options.derive(Split(Texts.of(rows), [0] * len(rows)), Regression("t", ["mse"], "mse"), model)
    groups: list[list[tuple[str, ...]]] = [[] for _ in rows]
    for text, row in zip(texts, index.tolist(), strict=True):
        groups[row].append(text)
    assert index.tolist() == sorted(index.tolist())
    return groups


# A naive transcription


def naive_words(text: str) -> list[tuple[int, str]]:
    """Words as BERT's basic tokenizer cuts them, in lower case, with their starts."""
    words: list[tuple[int, str]] = []
    start = 0
    for end in range(len(text) + 1):
        if end == len(text) or not text[end].isalnum():
            if end > start:
                words.append((start, text[start:end].lower()))
            if end < len(text) and not text[end].isspace():
                words.append((end, text[end]))
            start = end + 1
    return words


def naive_pieces(word: str) -> list[str]:
    """Pieces by the longest match first."""
    pieces, start = [], 0
    while start < len(word):
        for end in range(len(word), start, -1):
            if (piece := ("##" if start else "") + word[start:end]) in WORDS:
                pieces.append(piece)
                start = end
                break
        else:
            return ["[UNK]"]
    return pieces


def naive_candidates(
    text: str, model: TinyModel, near: dict[str, list[str]], topk: int, context: str, stop: bool
) -> Candidates:
    words, result = naive_words(text), []
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    for number, (start, word) in enumerate(words):
        if not word.isalpha() or (stop and word in STOP_WORDS):
            continue
        if len(naive_pieces(word)) > 1:
            candidates = near.get(word, [])
        else:
            plain = [piece for _, other in words for piece in naive_pieces(other)]
            masked = [
                piece
                for index, (_, other) in enumerate(words)
                for piece in (["[MASK]"] if index == number else naive_pieces(other))
            ]
            first = ["[CLS]", *masked, "[SEP]"]
            second = [*plain, "[SEP]"] if context == "both" else []
            ids = torch.tensor([[vocabulary.index(piece) for piece in first + second]])
            types = torch.tensor([[0] * len(first) + [1] * len(second)])
            with torch.no_grad():
                logits = model.model(input_ids=ids, token_type_ids=types).logits[0, first.index("[MASK]")]
            best = logits.argsort(descending=True)[:topk].tolist()
            candidates = [vocabulary[token] for token in best if token > 4 and not vocabulary[token].startswith("##")]
        if candidates:
            result.append((start, start + len(word), candidates))
    return result


def naive_copies(row: tuple[str, ...], words: list[Candidates], rate: float, copies: int, seed: int) -> list[tuple[str, ...]]:
    """The example and its copies, with a hash of the texts for the draws."""
    found = [row]
    for column, text in enumerate(row):
        key = "\0".join(["word replacement", str(seed), str(column), *row]).encode()
        places = len(words[column])
        stream = hashlib.shake_256(key).digest(16 * copies * places)
        numbers = [int.from_bytes(stream[at : at + 8], "little") // 2048 / 2**53 for at in range(0, len(stream), 8)]
        for copy in range(copies):
            changed, behind = text, 0
            for place, (start, end, candidates) in enumerate(words[column]):
                chance = numbers[copy * 2 * places + place]
                choice = numbers[copy * 2 * places + places + place]
                if chance < rate:
                    new = candidates[int(choice * len(candidates))]
                    changed = changed[: start + behind] + new + changed[end + behind :]
                    behind += len(new) - (end - start)
            if (result := (*row[:column], changed, *row[column + 1 :])) not in found:
                found.append(result)
    return found


def naive_near(texts: list[tuple[str, ...]], model: TinyModel, topk: int) -> dict[str, list[str]]:
    """Nearest words among those of the texts, by the mean embedding of their pieces."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    table = model.embeddings().astype(np.float64)
    names = sorted({word for row in texts for text in row for _, word in naive_words(text) if word.isalpha()})
    vectors = {name: np.mean([table[vocabulary.index(piece)] for piece in naive_pieces(name)], axis=0) for name in names}

    def similar(one: np.ndarray, other: np.ndarray) -> float:
        return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))

    # Words that the vocabulary lacks have one vector; they are equally near, and stay in alphabetical order.
    near = {}
    for name in names:
        others = [other for other in names if other != name]
        near[name] = sorted(others, key=lambda other: -round(similar(vectors[name], vectors[other]), 6))[:topk]
    return near


@pytest.mark.parametrize("context", ["both", "masked"])
@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("topk", [1, 4, 15])
def test_candidates_are_those_of_the_algorithm(model: TinyModel, context: str, stop: bool, topk: int) -> None:
    options = edit(context=context, stop_words=stop, topk=topk)
    reader, near = Reader(model, options), naive_near(TEXTS, model, topk)
    reader.nearest = options.nearest(Texts.of(TEXTS), model, reader)
    assert reader.nearest
    for (text,) in TEXTS:
        assert reader.candidates(text) == naive_candidates(text, model, near, topk, context, stop)


@pytest.mark.parametrize("rate", [0.1, 0.4, 1.0])
def test_copies_are_those_of_the_algorithm(model: TinyModel, rate: float) -> None:
    near = naive_near(TEXTS, model, 5)
    words = [[naive_candidates(text, model, near, 5, "both", True)] for (text,) in TEXTS]
    expected = [naive_copies(row, each, rate, 6, 3) for row, each in zip(TEXTS, words, strict=True)]
    assert derived(edit(rate=rate, topk=5, copies=6, seed=3), TEXTS, model) == expected
    assert max(map(len, expected)) == (4 if rate == 0.1 else 7)
    assert expected[3:5] == [[TEXTS[3]], [TEXTS[4]]], "texts without a word to replace have no copies"


def test_each_text_of_a_pair_has_copies_beside_the_other_text(model: TinyModel) -> None:
    rows = [(TEXTS[0][0], TEXTS[1][0]), (TEXTS[1][0], TEXTS[0][0]), (TEXTS[2][0], TEXTS[2][0])]
    near = naive_near(rows, model, 15)
    words = [[naive_candidates(text, model, near, 15, "both", True) for text in row] for row in rows]
    expected = [naive_copies(row, each, 0.4, 4, 0) for row, each in zip(rows, words, strict=True)]
    found = derived(edit(copies=4), rows, model)
    assert found == expected
    for row, group in zip(rows, found, strict=True):
        assert group[0] == row
        assert all((first == row[0]) != (second == row[1]) for first, second in group[1:])
    assert {first for first, _ in found[0]} != {second for _, second in found[1]}, "other examples have other draws"


def test_words_are_replaced_with_the_rate_by_each_candidate_alike() -> None:
    words: Candidates = [(0, 1, ["b", "c", "d"])] * 1 + [(2, 3, ["e", "f"])]
    copies = Counter(text for (text,) in edit(copies=1000, rate=0.4).copies_of(("a g",), lambda _: words))
    total = sum(copies.values())
    for index, (word, others) in enumerate([("a", "bcd"), ("g", "ef")]):
        seen = Counter({name: sum(n for text, n in copies.items() if text.split()[index] == name) for name in word + others})
        for name in others:  # binomial, so within four deviations
            share = 0.4 / len(others)
            assert abs(seen[name] - total * share) < 4 * (total * share * (1 - share)) ** 0.5
        assert seen.total() == total


# Properties


def test_a_rate_of_zero_changes_nothing_and_runs_no_model() -> None:
    model = TinyModel()
    assert derived(edit(rate=0.0), TEXTS, model) == [[row] for row in TEXTS]
    assert not model.batches


def test_a_copy_follows_from_the_text_alone(model: TinyModel, tmp_path: Path) -> None:
    options = edit(vectors=str(save_vectors(tmp_path / "v.txt")))
    whole = derived(options, TEXTS, model)
    order = [2, 0, 1]
    assert derived(options, [TEXTS[row] for row in order], model) == [whole[row] for row in order]
    assert derived(options, TEXTS[1:2], model) == whole[1:2]
    assert derived(edit(vectors=options.vectors, seed=1), TEXTS, model) != whole


def test_fewer_copies_are_the_first_and_a_higher_rate_replaces_more_alike(model: TinyModel) -> None:
    few, more = (derived(edit(copies=copies), TEXTS, model) for copies in (3, 9))
    assert all(one == other[: len(one)] for one, other in zip(few, more, strict=True))
    words: Candidates = [(place * 2, place * 2 + 1, ["b", "c", "d", "e"]) for place in range(50)]
    text = " ".join("a" * 50)
    low, high = (list(edit(rate=rate, copies=5).copies_of((text,), lambda _: words)) for rate in (0.2, 0.5))
    for (one,), (other,) in zip(low, high, strict=True):
        pairs = list(zip(one.split(), other.split(), strict=True))
        assert all(a in ("a", b) for a, b in pairs)
        assert sum(b != "a" for _, b in pairs) > sum(a != "a" for a, _ in pairs) > 0


def test_labels_and_columns_are_copied_scores_too(model: TinyModel) -> None:
    options = edit(copies=3)
    options.stored = lambda train, task: options.made(train, task, model)
    scores = [0.5, 1.25, 2.0, 3.0, 4.0, 5.0]
    train = Split(Texts.of(TEXTS), scores, {"row": np.arange(6)})
    copies = options(train, Regression("t", ["mse"], "mse"))
    assert len(copies) > len(train)
    assert [scores[row] for row in copies.columns["row"].tolist()] == copies.labels
    assert copies.texts.take(np.unique(copies.columns["row"], return_index=True)[1]) == train.texts


def test_words_behind_the_longest_input_stay(model: TinyModel) -> None:
    text = " ".join(["great", "plot"] * 20)
    for context, length, room in (("both", 23, 10), ("masked", 12, 10), ("both", 24, 10), ("masked", 13, 11)):
        assert len(Reader(model, edit(context=context, max_length=length)).candidates(text)) == room
    options = edit(context="masked", max_length=5)
    reader = Reader(model, options)
    reader.nearest = {"playing": ["x"]}
    assert [each[:2] for each in reader.candidates("good playing film")] == [(0, 4), (5, 12)]
    assert [each[:2] for each in reader.candidates("good fine playing")] == [(0, 4), (5, 9)], "the last word would be cut"


def test_versions_of_a_text_make_batches_of_their_own() -> None:
    model = TinyModel()
    text = " ".join(["great", "plot"] * 14)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augmentation, "AT_ONCE", 10)
        small = Reader(model, edit(max_length=64)).candidates(text)
    assert model.batches == [10, 10, 8]
    assert small == Reader(model, edit(max_length=64)).candidates(text)


def test_equal_texts_are_read_once() -> None:
    model = TinyModel()
    derived(edit(), [TEXTS[2]] * 5, model)
    assert len(model.batches) == 1


def test_pieces_that_continue_a_word_and_special_tokens_are_no_names() -> None:
    names = word_names(tiny_tokenizer(WORDS))
    assert sorted(names.values()) == sorted({word for word in WORDS if not word.startswith("##")})


def test_byte_pairs_mark_the_blank_before_a_word() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *"abĠ", "Ġa", "Ġb", "ab", "Ġab"]
    rules = Tokenizer(
        models.BPE({piece: row for row, piece in enumerate(pieces)}, [("Ġ", "a"), ("Ġ", "b"), ("a", "b"), ("Ġa", "b")])
    )
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.decoder = decoders.ByteLevel()
    rules.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=False, add_prefix_space=False)
    special = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=rules, **special, pad_token="<pad>", unk_token="<unk>", mask_token="<mask>"
    )
    assert sorted(word_names(tokenizer).values()) == ["a", "ab", "b"]
    model = TinyModel(tokenizer)
    found = Reader(model, edit(stop_words=False)).candidates("ab  b a")
    assert [each[:2] for each in found] == [(0, 2), (4, 5), (6, 7)]
    assert all(set(each[2]) == {"a", "ab", "b"} for each in found)


# Vectors


def save_vectors(path: Path, words: list[str] | None = None, header: str = "") -> Path:
    rng = np.random.default_rng(0)
    names = words or ["playing", "acting", "actor", "good", "playless", "dull", "scene"]
    lines = [f"{name} {' '.join(f'{number:.4f}' for number in rng.normal(size=5))}" for name in names]
    path.write_text(header + "\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_nearest_words_have_the_largest_cosine() -> None:
    rng = np.random.default_rng(1)
    names, matrix = [f"w{row:03}" for row in range(400)], rng.normal(size=(400, 6)).astype(np.float32)
    found = Vectors(names, matrix).nearest([*names[:300], "none"], 4)
    assert sorted(found) == names[:300]
    exact = matrix.astype(np.float64)
    for row, name in enumerate(names[:300]):
        cosine = [
            -2.0
            if other == row
            else float(exact[row] @ exact[other]) / np.linalg.norm(exact[row]) / np.linalg.norm(exact[other])
            for other in range(400)
        ]
        assert found[name] == [names[other] for other in np.argsort(-np.array(cosine))[:4]]
    assert Vectors(["a"], np.ones((1, 2))).nearest(["a"], 3) == {}
    assert Vectors(["a", "b"], np.array([[0.0, 0.0], [1.0, 0.0]])).nearest(["a"], 3) == {"a": ["b"]}, "a vector of zeros"


@pytest.mark.parametrize("header", ["", "7 5\n"])
def test_a_file_of_vectors_gives_the_candidates_of_words_of_several_pieces(
    model: TinyModel, tmp_path: Path, header: str
) -> None:
    path = save_vectors(tmp_path / "v.txt", header=header)
    vectors = read_vectors(str(path), "vectors")
    assert len(vectors.words) == 7
    options = edit(vectors=str(path), topk=3)
    reader = Reader(model, options)
    reader.nearest = options.nearest(Texts.of(TEXTS), model, reader)
    assert reader.nearest == vectors.nearest(["playing", "acting", "playless"], 3)
    found = {TEXTS[1][0][start:end]: others for start, end, others in reader.candidates(TEXTS[1][0])}
    assert found["playless"] == reader.nearest["playless"]
    assert "acts" not in found, "it has no vector"


def test_words_with_blanks_and_words_twice_are_read(tmp_path: Path) -> None:
    path = tmp_path / "v.txt"
    path.write_text("a 1 0\n. . 0 1\na 0 1\n")
    vectors = read_vectors(str(path), "vectors")
    assert vectors.words == ["a", ". ."]
    assert vectors.matrix.tolist() == [[1, 0], [0, 1]]


BROKEN = {
    "missing": (None, "cannot be read"),
    "empty": (b"", "has no vectors"),
    "word alone": (b"a\n", "line 1: it is not a word and some numbers"),
    "short": (b"a 1 2\nb 1\n", "line 2: it is not a word and 2 numbers"),
    "no number": (b"a 1 2\nb 1 x\n", "line 2: it is not a word and 2 numbers"),
    "not finite": (b"a 1 nan\n", "line 1: its numbers are not finite"),
    "no text": (b"\xff\xfe\x00", "no text in UTF-8"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_vectors_are_refused(case: str, tmp_path: Path) -> None:
    content, words = BROKEN[case]
    path = tmp_path / "v.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        read_vectors(str(path), "vectors")
    assert caught.value.key == "vectors"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("rate", value) for value in (-0.1, 1.1, "a", None, True)),
        *(("copies", value) for value in (0, -1, 1.5, None, 10**6)),
        *(("topk", value) for value in (0, 1.5, None)),
        ("context", "left"),
        ("stop_words", "yes"),
        ("max_length", 2),
        ("seed", -1),
    ],
)
def test_an_option_out_of_range_is_refused(option: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        edit(**{option: value})
    assert caught.value.key == option


def test_draws_are_equal_on_every_machine() -> None:
    pinned = [0.3285, 0.0538, 0.6156, 0.362, 0.1206, 0.6222, 0.476, 0.0496]
    assert np.ravel(draws(("0", "a"), 2, 2)).round(4).tolist() == pinned


# In a run


def save_masked_lm(folder: Path, **more: Any) -> Path:
    torch.manual_seed(3)
    AutoModelForMaskedLM.from_config(tiny_config(initializer_range=0.3, **more)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_masked_lm(tmp_path_factory.mktemp("models") / "mlm")


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("\n".join(" ".join((FILLER + GOOD + BAD)[n : n + 12]) for n in range(24)))
    return path


KEY = "task.edits.word_replacement"
GIVEN = ("edit=[word_replacement]", f"{KEY}.max_length=48", f"{KEY}.copies=2")


@pytest.fixture(scope="module")
def augmented(small: Small, story: Path) -> Small:
    """Overrides of a run whose masked language model a run on the story trains."""
    tasks = [f"{KEY}.run.choose.task=text", f"{KEY}.run.task.train={story}", f"{KEY}.run.task.max_length=16"]
    return lambda *more: small("method=kd", "trainer.max_epochs=1", *GIVEN, *tasks, *more)


@pytest.fixture(scope="module")
def given(small: Small, mlm: Path) -> Small:
    """Overrides of a run with a masked language model that is there."""
    return lambda *more: small("method=kd", "trainer.max_epochs=1", *GIVEN, f"{KEY}.model={mlm}", *more)


def test_the_run_of_an_edit_is_first_and_shared_and_teachers_are_those_of_before(augmented: Small, small: Small) -> None:
    run, result = made(augmented())
    needed = run.inputs.edits["word_replacement"]
    assert roles(run) == ["teacher minilm", "edit word_replacement"]
    assert (needed.spec.task.name, needed.spec.student.name, needed.spec.seed) == ("text", "full", 0)
    assert result["inputs"]["edit word_replacement"] == needed.name
    plain = planned(small("method=kd", "trainer.max_epochs=1"))
    assert run.inputs.teachers["minilm"].digest == plain.inputs.teachers["minilm"].digest
    assert "edits" not in run.inputs.teachers["minilm"].digest_inputs["task"]
    assert run.digest != plain.digest
    for other in ("seed=4", f"{KEY}.rate=0.2", "student=1l"):
        again = planned(augmented(other))
        assert again.inputs.edits["word_replacement"].digest == needed.digest
        assert again.digest != run.digest
    assert planned(augmented(f"{KEY}.run.trainer.max_epochs=2")).digest != run.digest
    assert planned(augmented("seed=4")).family == run.family
    examples = build_examples(run)
    assert len(examples.texts["train"]) > 2 * 96
    assert result["examples"]["train"] == len(examples.texts["train"])
    assert build_examples(run, planned=True).texts["train"] == build_examples(plain).texts["train"]
    assert build_examples(run.inputs.teachers["minilm"]).texts["train"] == build_examples(plain).texts["train"]
    for split in ("validation", "test"):
        assert examples.texts[split] == build_examples(plain).texts[split]


def test_given_model_takes_the_place_of_the_run_and_enters_the_digest(given: Small, mlm: Path, tmp_path: Path) -> None:
    run = planned(given())
    assert roles(run) == ["teacher minilm"]
    assert str(mlm) not in str(run.digest_inputs)
    other = save_masked_lm(tmp_path / "other", layers=2)
    assert planned([*given(), f"{KEY}.model={other}"]).digest != run.digest
    assert planned([*given(), f"{KEY}.teachers=false"]).digest == run.digest


def test_vectors_enter_the_digest_by_their_content(given: Small, tmp_path: Path) -> None:
    one, copy = (save_vectors(tmp_path / name) for name in ("a.txt", "b.txt"))
    other = save_vectors(tmp_path / "c.txt", ["a", "b"])
    digests = [planned(given(f"{KEY}.vectors={path}")).digest for path in (one, copy, other)]
    assert digests[0] == digests[1] != digests[2]


def test_teachers_see_the_copies_where_that_is_asked_for(given: Small, small: Small) -> None:
    run = planned(given(f"{KEY}.teachers=true"))
    (teacher,) = run.inputs.teachers.values()
    assert teacher.digest != planned(small("method=kd")).inputs.teachers["minilm"].digest
    assert build_examples(teacher).texts == build_examples(run).texts
    assert run.digest != planned(given()).digest
    noise = small("method=kd", "edit=[label_noise]", "+task.edits.label_noise.teachers=false")
    assert planned(noise).inputs.teachers["minilm"].digest == planned(small("method=kd")).inputs.teachers["minilm"].digest


def test_a_list_of_edits_may_have_one_that_reads_a_model(small: Small, mlm: Path) -> None:
    node = f"{{_target_: kd.data.augmentation.WordReplacement, model: {mlm}, max_length: 48, copies: 2}}"
    run = planned(small("method=kd", f"task.edits=[{{_target_: kd.data.edits.LabelNoise, rate: 0.5}},{node}]"))
    assert len(run.inputs.teachers["minilm"].digest_inputs["task"]["edits"]) == 1
    assert len(build_examples(run).edits) == 2


def test_a_stored_result_is_read_again_unless_it_is_damaged(
    given: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = planned(given(f"paths.runs={tmp_path}"))
    first = build_examples(run)
    texts = list(first.texts["train"])
    (stored,) = (tmp_path / ".edits").glob("*.npz")
    assert [path.name for path in (tmp_path / ".edits").iterdir()] == [stored.name]
    del first

    def fails(*_: object) -> None:
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr(WordReplacement, "derive", fails)
        assert list(build_examples(planned(given(f"paths.runs={tmp_path}", "seed=5", "student=1l"))).texts["train"]) == texts
        with pytest.raises(AssertionError, match="computed again"):
            build_examples(planned(given(f"paths.runs={tmp_path}", f"{KEY}.rate=0.3")))
    stored.write_bytes(stored.read_bytes()[:-40])
    assert list(build_examples(run).texts["train"]) == texts


def test_a_kill_leaves_no_half_result(given: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = planned(given(f"paths.runs={tmp_path}"))

    def killed(*_: object) -> Iterator[tuple[str, ...]]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WordReplacement, "copies_of", killed)
        with pytest.raises(KeyboardInterrupt):
            build_examples(run)
    assert not (tmp_path / ".edits").exists() or not list((tmp_path / ".edits").iterdir())


def test_run_resumed_in_mid_epoch_ends_with_the_same_weights(
    given: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken, result = made(given())
    run = planned(given(f"paths.runs={tmp_path}", "trainer.checkpoint_minutes=0"))
    broken_off(run, 7, monkeypatch)
    assert execute.execute(run)["metrics"] == result["metrics"]
    assert same_weights(last_weights(run), last_weights(unbroken))


def test_a_rate_of_zero_gives_the_run_without_the_edit(given: Small, small: Small) -> None:
    clean, _ = made(small("method=kd", "trainer.max_epochs=1"))
    run, _ = made(given(f"{KEY}.rate=0"))
    assert same_weights(last_weights(run), last_weights(clean))


@pytest.mark.parametrize(("order", "copied"), [("label_noise,word_replacement", True), ("word_replacement,label_noise", False)])
def test_edits_are_applied_in_their_order(given: Small, small: Small, order: str, copied: bool) -> None:
    originals = {text for (text,) in build_examples(planned(small("method=kd"))).texts["train"]}
    examples = build_examples(planned([*given(), f"edit=[{order}]"]))
    labels: dict[str, set[float]] = {}
    example = ""
    for (text,), label in zip(examples.texts["train"], examples.labels["train"], strict=True):
        example = text if text in originals else example
        labels.setdefault(example, set()).add(label)
    assert all(len(each) == 1 for each in labels.values()) == copied, "noise is drawn for the text of each copy"


def test_a_limit_counts_examples_not_copies(given: Small, small: Small) -> None:
    limit = "task.limit_train=20"
    plain = build_examples(planned(small("method=kd", limit)))
    examples = build_examples(planned(given(limit)))
    texts = list(examples.texts["train"])
    assert [text for text in texts if text in set(plain.texts["train"])] == list(plain.texts["train"])
    assert len(texts) > 40
    noisy = build_examples(planned([*given(limit), "edit=[imbalance,word_replacement]"]))
    few = build_examples(planned(small("method=kd", "edit=[imbalance]", limit)))
    assert [text for text in noisy.texts["train"] if text in set(few.texts["train"])] == list(few.texts["train"])


def test_text_without_labels_follows_and_has_no_copies(given: Small, tmp_path: Path) -> None:
    write_csv(tmp_path / "more.csv", 10, 9)
    labelled = build_examples(planned(given())).texts["train"]
    both = build_examples(planned(given(f"task.unlabelled={tmp_path / 'more.csv'}"))).texts["train"]
    assert both[: len(labelled)] == list(labelled)
    assert len(both) == len(labelled) + 10


REFUSED = {
    "no source": ([f"{KEY}.run=null"], f"{KEY}.model"),
    "no path": ([f"{KEY}.model=3"], f"{KEY}.model"),
    "no such folder": ([f"{KEY}.model=nowhere"], f"{KEY}.model"),
    "no masked language model": ([f"{KEY}.model=BACKBONE"], f"{KEY}.model"),
    "classifier": ([f"{KEY}.run.choose.task=file", f"{KEY}.run.task.train=TRAIN"], f"{KEY}.run"),
    "key of the run": ([f"{KEY}.run.trainer.max_epochs=0"], f"{KEY}.run.trainer.max_epochs"),
    "unknown key of the run": ([f"+{KEY}.run.trainer.epochs=1"], f"{KEY}.run.trainer.epochs"),
    "rate": ([f"{KEY}.rate=1.5"], f"{KEY}.rate"),
    "copies": ([f"{KEY}.copies=0"], f"{KEY}.copies"),
    "topk": ([f"{KEY}.topk=0"], f"{KEY}.topk"),
    "too long": ([f"{KEY}.max_length=65"], f"{KEY}.max_length"),
    "vectors missing": ([f"{KEY}.vectors=nowhere.txt"], f"{KEY}.vectors"),
    "vectors no path": ([f"{KEY}.vectors=3"], f"{KEY}.vectors"),
    "vectors broken": ([f"{KEY}.vectors=TRAIN"], f"{KEY}.vectors"),
    "unknown option": ([f"+{KEY}.ratio=3"], f"{KEY}.ratio"),
    "teachers": ([f"{KEY}.teachers=some"], f"{KEY}.teachers"),
    "run starts from itself": ([f"{KEY}.run=[method=finetune,teacher=[]]"], f"{KEY}.run"),
    "no model for an edit without one": (
        ["edit=[label_noise]", "+task.edits.label_noise.model=a"],
        "task.edits.label_noise.model",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_edit_is_refused_before_anything_is_trained(
    case: str, augmented: Small, reviews: Path, backbone: Path, tmp_path: Path
) -> None:
    more, key = REFUSED[case]
    words = [word.replace("BACKBONE", str(backbone)).replace("TRAIN", str(reviews / "train.csv")) for word in more]
    base = [word for word in augmented() if case != "no model for an edit without one" or KEY not in word]
    with pytest.raises(InputError) as caught:
        execute.execute(planned([*base, f"paths.runs={tmp_path / 'runs'}", *words]))
    assert caught.value.key == key, caught.value.message
    assert not (tmp_path / "runs").exists()


def test_arguments_are_checked_without_the_model(augmented: Small) -> None:
    run = planned(augmented())
    check_arguments(run)
    check_run(run, examples_of(run, planned=True))


@pytest.mark.ddp
def test_ranks_train_on_the_same_copies(given: Small, tmp_path: Path) -> None:
    overrides = given(f"paths.runs={tmp_path}", "teacher=[]", "method=finetune")
    torchrun(overrides)
    run = planned(overrides)
    assert run.result is not None
    assert run.result["examples"]["train"] == len(build_examples(run).texts["train"])
    assert len(list((tmp_path / ".edits").glob("*.npz"))) == 1
