"""Encoders with a masked-LM head: logits where something is predicted, and weights that go between heads."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM

from conftest import FILLER, tiny_config, tiny_tokenizer
from kd.config.schema import StudentSpec
from kd.data.batch import Batch
from kd.data.examples import Examples
from kd.data.masked_lm.datamodule import MaskedLMDataModule
from kd.data.masked_lm.task import NOT_PREDICTED, MaskedLM
from kd.engines.distiller import Distiller
from kd.engines.models import Models
from kd.engines.optimizer import OptimizerFactory
from kd.errors import InputError
from kd.forward import Needs
from kd.methods.base import Bound, Method
from kd.methods.finetune import Finetune
from kd.methods.kd import KD
from kd.models import Encoder, FrozenTeacher
from kd.models.heads import HEADS
from kd.models.pretrained import load_config, load_model
from kd.models.students import plan_student
from kd.results.export import largest_difference

TASK = MaskedLM("toy", ["loss", "accuracy"], "loss")
FAMILIES = ("bert", "roberta", "mpnet")


def masked_lm(seed: int = 0, model_type: str = "bert", **sizes: object) -> Encoder:
    torch.manual_seed(seed)
    model = AutoModelForMaskedLM.from_config(tiny_config(model_type, initializer_range=0.2, **sizes)).eval()
    return Encoder(model, tiny_tokenizer())


def batches(count: int = 8, size: int = 8, rank: int = 0, world: int = 1, teachers: int = 0) -> list[Batch]:
    texts = [(" ".join(FILLER[: 3 + n]),) for n in range(count)]
    examples = Examples(TASK, {"train": texts, "validation": texts}, {})
    tokenizers = [tiny_tokenizer()] * teachers
    data = MaskedLMDataModule(examples, [tiny_tokenizer()], tokenizers, size, size, 32, seed=0, rank=rank, world=world)
    return list(data.train_dataloader())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_whole_model_at_the_predicted_positions(family: str) -> None:
    model, inputs = masked_lm(model_type=family), batches()[0].student
    whole = model(({name: tensor for name, tensor in inputs.items() if name != "predicted"}), Needs()).logits
    found = model(inputs, Needs()).logits
    assert found.shape == (int(inputs["predicted"].sum()), model.config.vocab_size)
    assert torch.allclose(found, whole[inputs["predicted"]], atol=1e-6)


def test_taps_show_the_same_layers_as_without_a_head() -> None:
    model, inputs = masked_lm(), batches()[0].student
    found = model(inputs, Needs(hidden=[0, 4], cls=[2], attention=[1]))
    with torch.no_grad():
        known = {name: inputs[name] for name in model.family.inputs}
        states = model.model(**known, output_hidden_states=True).hidden_states
    assert torch.allclose(found.hidden(4), states[4], atol=1e-6)
    assert torch.allclose(found.cls(2), states[2][:, 0], atol=1e-6)
    assert found.attention(1).shape[1] == model.heads


@pytest.mark.parametrize(("method", "teachers"), [(Finetune(), 0), (KD(temperature=2.0), 1)])
@pytest.mark.parametrize("count", [8, 7])
def test_two_ranks_with_their_shares_have_the_gradient_of_one_with_the_whole(method: Method, teachers: int, count: int) -> None:
    def gradient(rank: int, world: int) -> dict[str, torch.Tensor]:
        student = masked_lm(seed=1, layers=2)
        weights = {name: lambda fraction: 0.5 for name in method.names}
        optimizer = OptimizerFactory(torch.optim.SGD, lr=0.1, weight_decay=0.0, schedule="constant", warmup=0.0)
        frozen = [FrozenTeacher(masked_lm(seed=2)) for _ in range(teachers)]
        own = copy.deepcopy(method)
        own.bind(Bound(student, frozen, TASK))
        engine = Distiller(Models({"student": student}, {"student": own}, frozen, None, weights), TASK, optimizer)
        batch = batches(count, count, rank, world, teachers)[0]
        (engine.loss(batch).total * batch.weight).backward()
        return {name: parameter.grad for name, parameter in student.named_parameters()}

    whole, one, two = gradient(0, 1), gradient(0, 2), gradient(1, 2)
    for name, expected in whole.items():  # DDP takes the mean over ranks
        assert torch.allclose((one[name] + two[name]) / 2, expected, atol=1e-6), name


def test_step_in_bf16_autocast_is_finite_and_near() -> None:
    model, batch = masked_lm(), batches()[0]
    exact = TASK.hard(model(batch.student, Needs()).logits, batch.labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = TASK.hard(model(batch.student, Needs()).logits, batch.labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=0.03)  # bfloat16 has 8 bits


def test_families_without_a_head_in_one_piece_are_refused(tmp_path: Path) -> None:
    tiny_config("distilbert").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="works with bert, roberta, mpnet") as caught:
        plan_student(StudentSpec(name="x", init="random"), str(tmp_path), None, None, head="masked_lm").materialise()
    assert caught.value.key == "backbone"


# -- weights between heads -------------------------------------------------------------------------------------------------


def built(backbone: Path, initial: Path, head: str, labels: list[str] | None = None, **spec: object) -> Encoder:
    torch.manual_seed(5)
    return plan_student(StudentSpec(name="x", **spec), str(backbone), labels, str(initial), head=head).materialise()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    masked_lm(seed=3).save(tmp_path / "mlm")
    return tmp_path / "mlm"


def test_head_of_a_masked_language_model_is_begun_fresh_and_tied(backbone: Path) -> None:
    model = built(backbone, backbone, "masked_lm", layers=2).model
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    source = load_model(str(backbone), "x", load_config(str(backbone), "x"), "classifier").bert
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, source.embeddings.word_embeddings.weight)


@pytest.mark.parametrize("init", ["first", "checkpoint"])
def test_masked_lm_head_goes_with_its_weights(saved: Path, init: str) -> None:
    given = {"checkpoint": str(saved)} if init == "checkpoint" else {"init_from": "pretrained"}
    found = built(saved, saved, "masked_lm", init=init, **given).model.eval()
    known = AutoModelForMaskedLM.from_pretrained(saved).state_dict()
    assert all(torch.equal(tensor, known[name]) for name, tensor in found.state_dict().items())


def test_a_classifier_begins_from_a_masked_language_model_with_a_fresh_head(saved: Path) -> None:
    found = built(saved, saved, "classifier", ["LABEL_0", "LABEL_1"], init="checkpoint", checkpoint=str(saved)).model
    known = AutoModelForMaskedLM.from_pretrained(saved).state_dict()
    base = {name: tensor for name, tensor in found.bert.state_dict().items() if not name.startswith("pooler")}
    assert all(torch.equal(tensor, known[f"bert.{name}"]) for name, tensor in base.items())
    assert found.classifier.weight.std() > 0


def test_a_masked_language_model_begins_from_a_classifier(backbone: Path) -> None:
    found = built(backbone, backbone, "masked_lm", init="checkpoint", checkpoint=str(backbone)).model
    known = HEADS["classifier"].auto.from_pretrained(backbone).state_dict()
    assert all(torch.equal(tensor, known[f"bert.{name}"]) for name, tensor in found.bert.state_dict().items())


def test_exported_masked_language_model_needs_transformers_alone(tmp_path: Path) -> None:
    model, inputs = masked_lm(seed=4), batches()[0].student
    model.save(tmp_path)
    assert largest_difference(model, tmp_path, inputs, "masked_lm") <= 1e-6
    assert (batches()[0].labels == NOT_PREDICTED).any()
