"""Students: exactly the right weights, sizes and labels, and a clear error for everything that does not fit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from conftest import tiny_config, tiny_model, tiny_tokenizer
from kd.build.data import checked_length
from kd.config.schema import StudentSpec
from kd.errors import InputError
from kd.forward import Needs
from kd.forward.taps import FAMILIES, family_of
from kd.models.heads import HEADS
from kd.models.students import chosen_layers, describe_init, empty_model, plan_student

LABELS = ["negative", "positive"]
DEPTH = 4

families = pytest.mark.parametrize("family", FAMILIES)
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A folder with a random classifier of any size, made once: `make(labels=[...], model_type="mpnet", layers=2)`."""
    made: dict[str, Path] = {}

    def folder(labels: list[str] | None = None, **sizes: object) -> Path:
        key = repr((labels, sorted(sizes.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("source")
            names = {} if labels is None else {"id2label": dict(enumerate(labels)), "num_labels": len(labels)}
            tiny_model(seed=len(made), **sizes, **names).save_pretrained(made[key])
            tiny_tokenizer().save_pretrained(made[key])
        return made[key]

    return folder


def student(backbone: Path, initial: Path | None = None, labels: list[str] | None = LABELS, seed: int = 0, **spec: object):
    """A student of a backbone; `initial` is where weights come from."""
    torch.manual_seed(seed)
    spec.setdefault("init", "random" if initial is None else "first")
    return plan_student(
        StudentSpec(name="x", **spec), str(backbone), labels, None if initial is None else str(initial)
    ).materialise()


def weights(folder: Path) -> dict[str, Tensor]:
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def batch(tokens: int = 7) -> dict[str, Tensor]:
    ids = torch.randint(5, 30, (2, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@contextmanager
def refused(key: str, message: str | None = None) -> Iterator[None]:
    with pytest.raises(InputError, match=message) as caught:
        yield
    assert caught.value.key == key


# -- initialisation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("init", "layers"), [("first", [1, 2]), ("every", [2, 4]), ("last", [3, 4]), ([4, 1], [4, 1]), ([3, 3], [3, 3])], ids=str
)
@families
def test_init_copies_exactly_the_chosen_blocks_and_all_around_them(
    make: Make, family: str, init: object, layers: list[int]
) -> None:
    source = make(model_type=family)
    built, theirs, tap = student(source, source, init=init, layers=2), weights(source), family_of(family)
    blocks, compared = f"{tap.base}.{tap.blocks}.", 0
    for name, tensor in built.model.state_dict().items():
        if name.startswith(blocks):
            ours, _, rest = name.removeprefix(blocks).partition(".")
            assert torch.equal(tensor, theirs[f"{blocks}{layers[int(ours)] - 1}.{rest}"]), name
            compared += 1
        elif name.startswith(f"{tap.base}."):  # embeddings, pooler, relative positions
            assert torch.equal(tensor, theirs[name]), name
            compared += 1
        elif tensor.ndim == 2:
            assert not torch.equal(tensor, theirs[name]), f"{name} of the backbone's head was copied"
    assert compared == sum(name.startswith(f"{tap.base}.") for name in built.model.state_dict())
    assert built.depth == 2


@pytest.mark.parametrize(
    ("init", "student_layers", "source", "expected"),
    [
        ("first", 6, 12, [1, 2, 3, 4, 5, 6]),
        ("every", 6, 12, [2, 4, 6, 8, 10, 12]),
        ("every", 4, 6, [1, 3, 4, 6]),
        ("last", 3, 12, [10, 11, 12]),
        ("first", 4, 4, [1, 2, 3, 4]),
    ],
)
def test_named_inits_choose_these_layers(init: str, student_layers: int, source: int, expected: list[int]) -> None:
    assert chosen_layers(init, student_layers, source) == expected


def test_the_right_block_is_copied_where_numbers_have_two_digits(make: Make) -> None:
    source = make(layers=12)
    built, theirs = student(source, source, init="last", layers=11).model.state_dict(), weights(source)
    for layer in range(11):
        name = "bert.encoder.layer.{}.attention.self.query.weight"
        assert torch.equal(built[name.format(layer)], theirs[name.format(layer + 1)])


def test_full_depth_copy_is_the_teacher(make: Make) -> None:
    teacher = make(LABELS)
    built = student(make(), teacher, init_from="teacher").eval()
    expected = AutoModelForSequenceClassification.from_pretrained(teacher).eval()(**batch()).logits
    torch.testing.assert_close(built(batch(), Needs()).logits, expected)
    told = {
        "teacher": student(make(), teacher, init_from="teacher").asides,
        "part of it": student(make(), teacher, init_from="teacher", layers=2).asides,
        "backbone": student(make(), make(), init_from="pretrained").asides,
    }
    whole = "all layers of the fine-tuned teacher"
    assert [whose for whose, asides in told.items() if any(whole in text for text in asides)] == ["teacher"]


@pytest.mark.parametrize(
    ("init_from", "labels", "copied"),
    [
        ("teacher", LABELS, True),
        ("pretrained", LABELS, False),
        ("teacher", ["a", "b", "c"], False),
    ],
    ids=["teacher", "pretrained", "other labels"],
)
@families
def test_classifier_is_copied_only_from_a_teacher_with_the_same_labels(
    make: Make, family: str, init_from: str, labels: list[str], copied: bool
) -> None:
    source = make(labels, model_type=family)
    built, theirs = student(make(model_type=family), source, init_from=init_from, layers=2), weights(source)
    head = [name for name in theirs if not name.startswith(f"{family}.") and name.endswith("weight")]
    assert head
    for name in head:
        assert torch.equal(built.model.state_dict()[name], theirs[name]) is copied, name
    assert {value.shape[0] for name, value in built.model.state_dict().items() if name.endswith("bias")} >= {2}


@families
def test_classifier_of_a_teacher_with_its_labels_in_another_order_is_reordered(make: Make, family: str) -> None:
    source = make(LABELS[::-1], model_type=family)
    built = student(source, source, init_from="teacher", layers=4)
    theirs = AutoModelForSequenceClassification.from_pretrained(source).eval()(**batch()).logits
    torch.testing.assert_close(built.eval()(batch(), Needs()).logits, theirs.flip(-1))


@pytest.mark.parametrize("labels", [["no", "maybe", "yes"], None], ids=str)
def test_a_backbone_that_classifies_something_else_still_gives_its_encoder(make: Make, labels: list[str] | None) -> None:
    source = make(LABELS)  # such as an NLI model, where two labels make three or a score
    built = student(source, source, labels=labels, layers=2)
    assert built(batch(), Needs()).logits.shape == (2, 3 if labels else 1)
    assert torch.equal(built.base.pooler.dense.weight, weights(source)["bert.pooler.dense.weight"])


def test_random_init_takes_nothing_from_the_backbone(make: Make) -> None:
    source = make()
    built, theirs = student(source).model.state_dict(), weights(source)
    assert built.keys() == theirs.keys()
    assert not any(torch.equal(tensor, theirs[name]) for name, tensor in built.items() if tensor.ndim == 2)


@pytest.mark.parametrize("init", ["random", "first"])
def test_the_same_seed_gives_the_same_student(make: Make, init: str) -> None:
    source = make()
    initial = None if init == "random" else source
    one, same, other = (student(source, initial, seed=seed, layers=2).model.state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["classifier.weight"], other["classifier.weight"])


def test_two_students_share_no_weights_with_their_source(make: Make) -> None:
    built = student(make(), make(), init=[1, 1], layers=2)
    first, second = (block.attention.self.query.weight for block in built.base.encoder.layer)
    assert first.data_ptr() != second.data_ptr()
    assert built.parameter_count() == sum(tensor.numel() for tensor in built.model.state_dict().values())


@pytest.mark.parametrize("init", ["checkpoint", "run"])
def test_checkpoint_gives_all_weights_the_head_too(make: Make, init: str) -> None:
    checkpoint = make(LABELS, layers=2)
    built, theirs = student(make(), checkpoint, init=init, layers=2).model.state_dict(), weights(checkpoint)
    assert built.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in built.items())


def test_checkpoint_with_labels_in_another_order_is_not_taken_by_position(make: Make) -> None:
    checkpoint = make(LABELS[::-1], layers=2)
    built = student(make(), checkpoint, init="checkpoint", layers=2).eval()
    found = dict(zip(built.config.id2label.values(), built(batch(), Needs()).logits.T, strict=True))
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    for number, column in enumerate(model(**batch()).logits.T):
        torch.testing.assert_close(found[model.config.id2label[number]], column)


def test_head_that_a_checkpoint_lacks_is_drawn_afresh(make: Make, tmp_path: Path) -> None:
    tiny_model(layers=2).bert.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    built = student(make(), tmp_path, labels=["a", "b", "c"], init="checkpoint", layers=2)
    assert built.model.classifier.weight.shape == (3, 32)
    assert built.model.classifier.weight.std() > 0
    assert torch.equal(
        built.base.embeddings.word_embeddings.weight, tiny_model(layers=2).bert.embeddings.word_embeddings.weight
    )


@pytest.mark.parametrize(
    ("spec", "depth", "words"),
    [
        ({"init": "random"}, None, "random"),
        ({"init": "every"}, 4, "every layers [2, 4] of the pre-trained backbone"),
        ({"init": "every", "heads": 2}, 4, "every layers [2, 4] of the pre-trained backbone, 2 heads in place of 4"),
        ({"init": [1, 4], "init_from": "teacher"}, 4, "explicit layers [1, 4] of the fine-tuned backbone"),
        ({"init": "checkpoint", "checkpoint": "runs/x"}, 2, "checkpoint runs/x"),
        ({"init": "run", "run": ["method=kd", "seed=1"]}, 2, "run method=kd seed=1"),
    ],
    ids=str,
)
def test_initialisation_is_stated_in_words(spec: dict[str, object], depth: int | None, words: str) -> None:
    source = None if depth is None else tiny_config(layers=depth)
    assert describe_init(StudentSpec(name="x", **spec), tiny_config(layers=2, heads=spec.get("heads", 4)), source) == words


def test_layers_are_copied_whatever_the_number_of_heads_unless_a_bias_belongs_to_each(make: Make) -> None:
    source = make()
    built = student(source, source, layers=2, heads=2)
    assert built.heads == 2
    found, expected = built.base.encoder.layer[1].state_dict(), weights(source)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[f"bert.encoder.layer.1.{name}"]), name
    source = make(model_type="mpnet")
    with refused("init", "same num_attention_heads: the student has 2"):
        student(source, source, layers=2, heads=2)
    source = make(LABELS, layers=2)
    with refused("checkpoint", "same num_attention_heads: the student has 2"):
        student(source, source, layers=2, heads=2, init="checkpoint")


# -- shape ---------------------------------------------------------------------------------------------------------------


@families
def test_sizes_are_those_asked_for(make: Make, family: str) -> None:
    built = student(make(model_type=family), layers=2, width=24, heads=3, intermediate=40)
    assert (built.depth, built.width, built.heads) == (2, 24, 3)
    outputs = built(batch(), Needs(hidden=[2], attention=[1]))
    assert outputs.hidden(2).shape == (2, 7, 24)
    assert outputs.attention(1).shape == (2, 3, 7, 7)
    shapes = {tuple(parameter.shape) for parameter in built.base.parameters()}
    assert {(40, 24), (24, 40)} <= shapes


@families
def test_sizes_not_asked_for_are_the_backbones(make: Make, family: str) -> None:
    built = student(make(model_type=family))
    assert (built.depth, built.width, built.heads) == (DEPTH, 32, 4)
    assert built.parameter_count() == sum(tensor.numel() for tensor in weights(make(model_type=family)).values())


@families
def test_a_width_brings_four_times_itself_as_intermediate(make: Make, family: str) -> None:
    built = student(make(model_type=family), width=16)
    assert getattr(built.config, family_of(family).intermediate) == 64


@families
def test_dropout_reaches_every_dropout_module(make: Make, family: str) -> None:
    built = student(make(model_type=family), dropout=0.37)
    assert {module.p for module in built.modules() if isinstance(module, nn.Dropout)} == {0.37}
    if family == "bert":
        assert student(make(model_type=family), dropout=0.0).train()(batch(), Needs()).logits.isfinite().all()


@families
def test_dropout_left_alone_is_the_backbones(make: Make, family: str) -> None:
    source = make(model_type=family)
    theirs = AutoModelForSequenceClassification.from_pretrained(source)
    expected = sorted(module.p for module in theirs.modules() if isinstance(module, nn.Dropout))
    assert sorted(module.p for module in student(source).modules() if isinstance(module, nn.Dropout)) == expected


@pytest.mark.parametrize("labels", [["no", "maybe", "yes"], ["b", "a"]], ids=str)
def test_configuration_names_the_labels_in_the_tasks_order(make: Make, labels: list[str]) -> None:
    for initial in (None, make([f"LABEL_{number}" for number in range(len(labels))])):
        config = student(make(), initial, labels=labels, layers=2).config
        assert config.id2label == dict(enumerate(labels))
        assert config.label2id == {name: number for number, name in enumerate(labels)}
        assert config.num_labels == len(labels)
        assert config.problem_type == "single_label_classification"


def test_regression_has_one_output(make: Make) -> None:
    built = student(make(), make(["LABEL_0"]), labels=None, layers=2)
    assert built(batch(), Needs()).logits.shape == (2, 1)
    assert built.config.problem_type == "regression"


@families
def test_a_student_of_another_family_takes_every_length_that_is_allowed(make: Make, family: str) -> None:
    built = student(make(), family=family).eval()
    assert built.config.model_type == family
    assert (built.depth, built.width, built.heads) == (DEPTH, 32, 4)
    assert built.config.pad_token_id == 0

    def allowed(tokens: int) -> bool:
        try:
            checked_length(
                SimpleNamespace(task=SimpleNamespace(max_length=tokens)),
                SimpleNamespace(students={"student": built}, teaching=[], aids={}),
            )
        except InputError:
            return False
        return True

    longest = max(tokens for tokens in range(3, 80) if allowed(tokens))
    assert longest >= 60
    assert built(batch(longest), Needs()).logits.isfinite().all()


def test_a_student_on_the_meta_device_has_shapes_and_no_weights(make: Make) -> None:
    built = plan_student(StudentSpec(name="x", layers=2, init="every"), str(make()), LABELS, str(make())).shape()
    real = student(make(), make(), init="every", layers=2)
    assert {parameter.device.type for parameter in built.parameters()} == {"meta"}
    assert {name: value.shape for name, value in built.named_parameters()} == {
        name: value.shape for name, value in real.named_parameters()
    }


@families
def test_saved_and_reloaded_student_gives_equal_logits(make: Make, family: str, tmp_path: Path) -> None:
    built = student(make(model_type=family), make(model_type=family), layers=2, init="every").eval()
    built.model.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(model(**batch()).logits, built(batch(), Needs()).logits)
    assert list(model.config.id2label.values()) == LABELS


# -- what does not fit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "key", "message"),
    [
        ({"heads": 5}, "heads", "5 heads do not divide a width of 32"),
        ({"width": 30}, "heads", "4 heads do not divide a width of 30"),
        ({"layers": 0}, "layers", "must be at least 1"),
        ({"width": -8}, "width", "must be at least 1"),
        ({"heads": 0}, "heads", "must be at least 1"),
        ({"intermediate": 0}, "intermediate", "must be at least 1"),
        ({"dropout": 1.0}, "dropout", r"in \[0, 1\)"),
        ({"dropout": -0.1}, "dropout", r"in \[0, 1\)"),
        ({"family": "electra"}, "family", "'electra' is not one of bert"),
    ],
    ids=str,
)
def test_sizes_that_cannot_be_are_refused_by_their_key(make: Make, spec: dict[str, object], key: str, message: str) -> None:
    with refused(key, message):
        student(make(), **spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"layers": 5}, "takes 5 layers from a model that has 4"),
        ({"layers": 5, "init": "every"}, "takes 5 layers from a model that has 4"),
        ({"layers": 2, "init": [1, 5]}, "each from 1 to 4"),
        ({"layers": 2, "init": [0, 1]}, "each from 1 to 4"),
        ({"layers": 2, "init": [1, 2, 3]}, "must list 2 layers"),
        ({"init": "frist"}, "Did you mean 'first'"),
        ({"width": 16}, "same hidden_size: the student has 16"),
        ({"intermediate": 48}, "same intermediate_size"),
        ({"family": "roberta"}, "same model_type"),
    ],
    ids=str,
)
def test_copies_that_do_not_fit_are_refused(make: Make, spec: dict[str, object], message: str) -> None:
    with refused("init", message):
        student(make(), make(), **spec)


@pytest.mark.parametrize("sizes", [{"max_position_embeddings": 48}, {"type_vocab_size": 1}, {"vocab_size": 99}], ids=str)
def test_copy_from_other_embedding_tables_is_refused_not_broadcast(make: Make, sizes: dict[str, int]) -> None:
    with refused("init"):
        student(make(), make(LABELS, **sizes), layers=2, init_from="teacher")


@pytest.mark.parametrize(
    ("sizes", "key"),
    [
        ({"layers": 3}, "checkpoint"),
        ({"width": 16}, "checkpoint"),
        ({"intermediate_size": 48}, "checkpoint"),
    ],
    ids=str,
)
def test_checkpoint_of_another_shape_is_refused(make: Make, sizes: dict[str, int], key: str) -> None:
    with refused(key):
        student(make(), make(LABELS, **{"layers": 2, **sizes}), layers=2, init="checkpoint")


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
@pytest.mark.parametrize(("init", "key"), [("first", "init_from"), ("checkpoint", "checkpoint")])
def test_truncated_weights_are_refused(make: Make, tmp_path: Path, init: str, key: str, kept: float) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    with refused(key, "truncated or damaged"):
        student(make(), tmp_path, init=init)


def test_folder_without_weights_is_refused(make: Make, tmp_path: Path) -> None:
    tiny_model().config.save_pretrained(tmp_path)
    with refused("init_from", "has no weights"):
        student(make(), tmp_path)


def test_backbone_without_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    with refused("backbone", "tokenizer"):
        student(tmp_path)


def test_backbone_of_an_unknown_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with refused("backbone", "'gpt2' is not one of"):
        student(tmp_path)


@families
@pytest.mark.parametrize("head", HEADS)
def test_an_empty_model_is_the_one_that_transformers_makes_without_memory(family: str, head: str) -> None:
    def described(model: nn.Module) -> tuple[object, ...]:
        tied: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            tied.setdefault(id(parameter), []).append(name)
        tensors = (*model.named_parameters(), *model.named_buffers())
        shapes = {name: (tensor.shape, tensor.dtype, tensor.device.type, tensor.requires_grad) for name, tensor in tensors}
        return type(model), shapes, sorted(tied.values()), model.training, model.config.to_dict(), model.all_tied_weights_keys

    state = torch.get_rng_state()
    empty = empty_model(tiny_config(family), head)
    assert torch.equal(torch.get_rng_state(), state), "no random number is drawn"
    with torch.device("meta"):
        plain = HEADS[head].auto.from_config(tiny_config(family))
    assert described(empty) == described(plain)
    assert all(tensor.is_meta for tensor in empty.parameters())
    linear = nn.Linear(2, 2)
    assert float(linear.weight.abs().max()) > 0, "modules that are made later are initialised"
