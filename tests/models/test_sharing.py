"""Shared layers: a deeper student with the same parameters, its export, and a run that starts from the export."""

import copy
import itertools
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from conftest import tiny_config, tiny_tokenizer
from kd.errors import InputError
from kd.forward import Needs
from kd.forward.taps import FAMILIES
from kd.methods.base import freeze_above
from kd.models import Encoder
from kd.models.surgery.embeddings import CutVocabulary, Factorized, SurgeryInputs
from kd.models.surgery.sharing import ShuffledSharing
from whole_runs import Small, made, planned

TEXTS = ["a good film and a great story", "it was a warm and funny film", "dull"]


def student(family: str = "bert", layers: int = 2, heads: int = 4, head: str = "classifier") -> Encoder:
    """A random student whose layers, queries and keys differ enough to be told apart."""
    torch.manual_seed(0)
    kind = AutoModelForMaskedLM if head == "masked_lm" else AutoModelForSequenceClassification
    model = kind.from_config(tiny_config(family, layers=layers, heads=heads, num_labels=3)).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name.lower():
            nn.init.normal_(parameter, std=0.3)
    return Encoder(model, tiny_tokenizer())


def shared(encoder: Encoder, *surgeries: object) -> Encoder:
    """The student after surgeries, by default `sps`."""
    for surgery in surgeries or (ShuffledSharing(),):
        encoder, words = surgery(encoder, SurgeryInputs(TEXTS))
        assert words
    return encoder


def batch(encoder: Encoder) -> dict[str, torch.Tensor]:
    return dict(encoder.tokenizer(TEXTS, padding=True, return_tensors="pt"))


def unshared(encoder: Encoder, layers: list[int], *, shuffle: bool = True) -> Encoder:
    """A deeper model with copies of a student's tensors, made name by name."""
    config = copy.deepcopy(encoder.config)
    config.num_hidden_layers = encoder.depth + len(layers)
    deeper, family = type(encoder.model)(config).eval(), encoder.family
    weights = encoder.model.state_dict()
    blocks = f"{family.base}.{family.blocks}"
    for upper, lower in enumerate(layers, start=encoder.depth):
        for name in encoder.blocks[lower - 1].state_dict():
            path, _, kind = name.rpartition(".")
            swapped = {family.query: family.key, family.key: family.query} if shuffle else {}
            weights[f"{blocks}.{upper}.{name}"] = weights[f"{blocks}.{lower - 1}.{swapped.get(path, path)}.{kind}"]
    deeper.load_state_dict(weights)
    return Encoder(deeper, encoder.tokenizer)


# -- the surgery -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_student_equals_a_deeper_one_with_copied_layers(family: str, shuffle: bool) -> None:
    expected = unshared(student(family), [1, 2], shuffle=shuffle)
    found = shared(student(family), ShuffledSharing(shuffle=shuffle))
    assert found.depth == expected.depth == 4
    everything = range(5)
    needs = Needs(cls=everything, hidden=everything, attention=range(1, 5), value=range(1, 5))
    ours, theirs = found(batch(found), needs), expected(batch(found), needs)
    assert torch.equal(ours.logits, theirs.logits)
    for layer in everything:
        assert torch.equal(ours.hidden(layer), theirs.hidden(layer)), layer
        assert layer == 0 or torch.equal(ours.scores(layer), theirs.scores(layer)), layer


@pytest.mark.parametrize("layers", [1, 2, 3, 6])
def test_depth_doubles_or_grows_by_three_at_equal_parameters(layers: int) -> None:
    plain = student(layers=layers)
    found = shared(student(layers=layers))
    assert found.depth == {1: 2, 2: 4, 3: 6, 6: 9}[layers]
    assert found.parameter_count() == plain.parameter_count()
    listed = list(found.parameters())
    assert len({parameter.data_ptr() for parameter in listed}) == len(listed) == len(list(plain.parameters()))


def test_six_layers_are_followed_by_the_top_three_in_order() -> None:
    found = shared(student(layers=6))
    lower = [block.attention.self.value.weight for block in found.blocks]
    assert all(lower[upper] is lower[below] for upper, below in ((6, 3), (7, 4), (8, 5)))
    assert found.blocks[6].attention.self.query.weight is found.blocks[3].attention.self.key.weight
    assert found.blocks[6].attention.self.key.bias is found.blocks[3].attention.self.query.bias


def test_all_layers_or_a_list_run_again_in_the_order_given() -> None:
    assert ShuffledSharing("all").layers(6) == [1, 2, 3, 4, 5, 6]
    mirrored = ShuffledSharing([2, 1])
    found, expected = shared(student(), mirrored), unshared(student(), [2, 1])
    assert torch.equal(found(batch(found), Needs()).logits, expected(batch(found), Needs()).logits)


def test_exchanged_scores_of_one_head_are_the_transpose_of_the_plain_ones() -> None:
    found = shared(student(layers=1, heads=1))
    states = torch.randn(2, 5, 32)

    def scores(block: nn.Module) -> torch.Tensor:
        own = block.attention.self
        return own.query(states) @ own.key(states).mT

    torch.testing.assert_close(scores(found.blocks[1]), scores(found.blocks[0]).mT)


def test_exchange_changes_nothing_where_queries_equal_keys_and_something_elsewhere() -> None:
    def logits(shuffle: bool, *, equal: bool) -> torch.Tensor:
        own = student()
        for block in own.blocks if equal else ():
            block.attention.self.key.load_state_dict(block.attention.self.query.state_dict())
        own = shared(own, ShuffledSharing(shuffle=shuffle))
        return own(batch(own), Needs()).logits

    assert torch.equal(logits(True, equal=True), logits(False, equal=True))
    assert not torch.allclose(logits(True, equal=False), logits(False, equal=False), atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_of_a_shared_tensor_is_the_sum_of_both_passes(family: str) -> None:
    found, copies = shared(student(family)), unshared(student(family), [1, 2])
    for model in (found, copies):
        model.double()(batch(found), Needs()).logits.square().sum().backward()
    paths = copies.family
    for lower, upper in ((0, 2), (1, 3)):
        block, other = copies.blocks[lower], copies.blocks[upper]
        for name, parameter in found.blocks[lower].named_parameters():
            path, _, kind = name.rpartition(".")
            swapped = {paths.query: paths.key, paths.key: paths.query}.get(path, path)
            total = block.get_parameter(name).grad + other.get_parameter(f"{swapped}.{kind}").grad
            torch.testing.assert_close(parameter.grad, total, rtol=1e-9, atol=1e-9)


def test_a_step_with_weight_decay_moves_a_shared_tensor_once() -> None:
    found = shared(student())
    weight = found.blocks[0].attention.self.query.weight
    before = weight.detach().clone()
    optimizer = torch.optim.SGD(found.parameters(), lr=0.5, weight_decay=0.1)
    for parameter in found.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before * 0.95)


def test_copies_pickles_states_and_dtypes_keep_layers_shared() -> None:
    found = shared(student())
    copied, pickled = copy.deepcopy(found), pickle.loads(pickle.dumps(found.model))
    other = shared(student())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(found.state_dict())
    for model in (copied, Encoder(pickled), other, copy.deepcopy(found).double()):
        assert model.parameter_count() == found.parameter_count()
        assert model.blocks[2].attention.self.query.weight is model.blocks[0].attention.self.key.weight
        torch.testing.assert_close(model(batch(found), Needs()).logits.float(), found(batch(found), Needs()).logits)


def test_frozen_upper_layers_leave_what_lower_ones_share_trainable() -> None:
    found = shared(student())
    freeze_above(found, 1)
    assert not any(parameter.requires_grad for parameter in (*found.blocks[1].parameters(), *found.blocks[3].parameters()))
    assert all(parameter.requires_grad for parameter in found.blocks[0].parameters())
    assert all(parameter.requires_grad for parameter in found.blocks[2].parameters())


@pytest.mark.parametrize("surgeries", list(itertools.permutations([CutVocabulary(), Factorized(4), ShuffledSharing()])))
@pytest.mark.parametrize("head", ["classifier", "masked_lm"])
def test_export_holds_copies_and_gives_the_same_logits(head: str, surgeries: tuple[object, ...], tmp_path: Path) -> None:
    if surgeries.index(next(s for s in surgeries if isinstance(s, Factorized))) < surgeries.index(
        next(s for s in surgeries if isinstance(s, CutVocabulary))
    ):
        pytest.skip("the vocabulary is cut before embeddings are factorised")
    with_letters = student(head=head)
    found = shared(with_letters, *surgeries).eval()
    found.save(tmp_path)
    kind = AutoModelForMaskedLM if head == "masked_lm" else AutoModelForSequenceClassification
    loaded = kind.from_pretrained(tmp_path).eval()
    assert loaded.config.num_hidden_layers == 4
    texts = dict(found.tokenizer(TEXTS, padding=True, return_tensors="pt"))
    torch.testing.assert_close(loaded(**texts).logits, found(texts, Needs()).logits, rtol=1e-5, atol=1e-5)
    assert found.blocks[2].output.dense.weight is found.blocks[0].output.dense.weight, "the export changes nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_exported(family: str, tmp_path: Path) -> None:
    found = shared(student(family))
    found.save(tmp_path)
    loaded = Encoder(AutoModelForSequenceClassification.from_pretrained(tmp_path).eval(), found.tokenizer)
    assert loaded.depth == 4
    assert loaded.parameter_count() > found.parameter_count()
    assert torch.equal(loaded(batch(found), Needs()).logits, found(batch(found), Needs()).logits)


def test_shape_on_the_meta_device_is_that_of_the_student() -> None:
    shape = ShuffledSharing().shape(student(layers=6).to("meta"))
    expected = shared(student(layers=6))
    assert {parameter.device.type for parameter in shape.parameters()} == {"meta"}
    assert {n: p.shape for n, p in shape.named_parameters()} == {n: p.shape for n, p in expected.named_parameters()}
    assert shape.depth == ShuffledSharing().config(student(layers=6).config).num_hidden_layers == 9


@pytest.mark.parametrize("repeat", [[], [0], [3], [1, 1], [1.0], [True], 2, None, "both"], ids=str)
def test_layers_that_a_student_does_not_have_are_refused(repeat: object) -> None:
    with pytest.raises(InputError) as caught:
        ShuffledSharing(repeat).shape(student())
    assert caught.value.key == "repeat"


def test_a_shuffle_that_is_no_switch_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        ShuffledSharing(shuffle="often")
    assert caught.value.key == "shuffle"


@pytest.mark.slow
def test_compiled_blocks_of_a_shared_student_give_the_same_logits_and_gradients() -> None:
    found, compiled = shared(student()), shared(student())
    compiled.compiled = True
    for model in (found, compiled):
        model(batch(model), Needs(cls=range(5))).logits.sum().backward()
    for ours, theirs in zip(found.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)  # the compiler adds in another order


# -- in a run --------------------------------------------------------------------------------------------------------------


def test_result_counts_shared_parameters_once_and_states_the_sharing(small: Small) -> None:
    options = ("method=finetune", "teacher=[]", "trainer.max_epochs=1")
    (_, plain), (run, result) = made(small(*options)), made(small(*options, "surgery=[sps]"))
    assert result["parameters"]["student"] == plain["parameters"]["student"]
    assert result["parameters"]["exported"] > result["parameters"]["student"]
    assert "layers [1, 2] shared" in result["init"]
    exported = AutoModelForSequenceClassification.from_pretrained(run.student)
    assert exported.config.num_hidden_layers == 4


CHAIN = ["method=annealing_kd", "method.before.run.trainer.max_epochs=1", "method.before.tau_max=1", "trainer.max_epochs=1"]


def test_layer_maps_see_the_depth_after_the_surgery(small: Small) -> None:
    from kd.build.data import build_examples
    from kd.build.models import plan_models

    run = planned(small("method=pkd", "surgery=[sps]"))
    plan = plan_models(run, build_examples(run).task)
    assert plan.shapes.student.depth == 4
    assert plan.shapes.methods["student"].pairs == ((1, 1), (2, 2), (3, 3))


def test_the_second_run_of_a_method_shares_the_layers_of_the_first_again(small: Small) -> None:
    run, result = made(small(*CHAIN, "surgery=[sps]"))
    first = run.inputs.before.result
    assert result["parameters"] == first["parameters"]
    assert AutoModelForSequenceClassification.from_pretrained(run.student).config.num_hidden_layers == 4


SHARED_STAGE = 'student.run=["method=finetune","teacher=[]","trainer.max_epochs=1",%s]'


@pytest.mark.parametrize(
    ("stage", "own", "depth"),
    [
        ("surgery=[sps]", ["surgery=[sps]"], 4),
        ("surgery=[]", ["surgery=[sps]"], 4),
        ("surgery=[sps]", ["surgery=[]", "student=4l"], 4),
    ],
    ids=["folded", "shared anew", "continued without sharing"],
)
def test_a_run_starts_from_a_stage_with_or_without_shared_layers(small: Small, stage: str, own: list[str], depth: int) -> None:
    before = SHARED_STAGE % f'"student=2l","{stage}"'
    run, result = made(small("method=finetune", "teacher=[]", *own, "student.init=run", before, "seed=3"))
    assert AutoModelForSequenceClassification.from_pretrained(run.student).config.num_hidden_layers == depth
    counts = result["parameters"]
    assert (counts["student"] < counts["exported"]) is ("surgery=[sps]" in own)


def test_weights_that_do_not_fold_are_refused(small: Small, tmp_path: Path) -> None:
    from kd.build.data import build_examples
    from kd.build.models import build_models

    def build(model: Encoder, **more: object) -> None:
        model.save(tmp_path)
        options = ("method=finetune", "teacher=[]", "surgery=[sps]", "student.init=checkpoint")
        run = planned(small(*options, f"student.checkpoint={tmp_path}", *(f"{k}={v}" for k, v in more.items())))
        examples = build_examples(run)
        build_models(run, examples.task, texts=examples.texts["train"])

    own = shared(student())
    build(own)
    with pytest.raises(InputError, match="layer 3 of the model that the student begins from") as caught:
        build(own, **{"surgery.sps.shuffle": "false"})
    assert caught.value.key == "student.checkpoint"
    with torch.no_grad():
        moved = Encoder(own.plain(), own.tokenizer)
        moved.blocks[3].output.dense.bias += 1e-6
    with pytest.raises(InputError, match="layer 4 of the model"):
        build(moved)
    with pytest.raises(InputError, match="the student has 2 layers, 4 after its surgeries, the model it begins from 3"):
        build(student(layers=3))


def test_a_stage_of_another_depth_is_refused_before_it_is_trained(small: Small) -> None:
    from kd.training.execute import check_all

    kind = SHARED_STAGE % '"student=3l","surgery=[sps]"'
    with pytest.raises(InputError, match="4 after its surgeries, the model it begins from 6"):
        check_all(planned(small("method=finetune", "teacher=[]", "surgery=[sps]", "student.init=run", kind)))


def test_a_stage_whose_layers_other_surgeries_made_is_refused_before_it_is_trained(small: Small) -> None:
    from kd.training.execute import check_all

    for stage in ('"surgery.sps.shuffle=false"', '"surgery=[]","student.layers=4"'):
        overrides = small("method=finetune", "teacher=[]", "surgery=[sps]", "student.init=run", SHARED_STAGE % stage)
        with pytest.raises(InputError, match="other surgeries") as caught:
            check_all(planned(overrides))
        assert caught.value.key == "student.run"


def test_a_layer_that_the_student_lacks_is_named_by_its_key(small: Small) -> None:
    from kd.training.execute import check_all

    with pytest.raises(InputError) as caught:
        check_all(planned(small("method=finetune", "teacher=[]", "surgery=[sps]", "surgery.sps.repeat=[7]")))
    assert caught.value.key == "surgery.sps.repeat"
