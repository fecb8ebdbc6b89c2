"""A method as a loss in training loops of others: the numbers of a run's step, gradients included."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from transformers import TrainingArguments

import kd
from conftest import tiny_model
from kd.build.engine import build_engine
from kd.build.instantiate import build_method
from kd.build.models import build_models
from kd.build.parts import examples_of
from kd.data.batch import Batch
from kd.engines.base import Engine
from kd.methods.base import Step
from kd.methods.bert_emd import BertEMD
from kd.methods.kd import KD
from kd.methods.l2a import L2A
from kd.methods.pea_kd import PeaKD
from kd.methods.pkd import PKD
from kd.methods.rl_kd import RLKD
from kd.methods.text_smoothing import TextSmoothing
from kd.methods.tinybert import TinyBERT
from kd.schedules import Linear
from whole_runs import planned

Small = Callable[..., list[str]]
LABELS = torch.tensor([0, 1, 1, 0])


def inputs(seed: int = 0, tokens: int = 7) -> dict[str, Tensor]:
    """Four sentences, as a tokenizer returns them, with labels."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(tokens) < torch.tensor([7, 4, 3, 5])[:, None]).long()
    ids = torch.randint(5, 30, (4, tokens), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids), "labels": LABELS}


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def engine_of(small: Small) -> Callable[[str], Engine]:
    """The engine of a run, as it is built for training, with a teacher that has been fine-tuned."""

    def build(words: str) -> Engine:
        chosen = [*small(*words.split()), "cache=off"]
        kd.run(*small("method=kd", "trainer.max_epochs=1"))  # brings the teacher
        run = planned(chosen)
        (examples,) = examples_of(run).values()
        return build_engine(run, build_models(run, examples.task), examples.task)

    return build


STEPS = [
    *("kd", "pkd", "fitnets", "distilbert", "bert_emd", "ckd", "at", "rkd", "alp_kd", "mlkd_bert method.before=null"),
    "pkd method.weights.hidden=3 method.normalize=false",
]


@pytest.mark.parametrize("words", [f"method={words}" for words in STEPS])
def test_a_step_is_that_of_a_run(words: str, engine_of: Callable[[str], Engine], small: Small) -> None:
    engine = engine_of(words).eval()
    (learner,) = engine.learners.values()
    (teacher,) = engine.teachers
    student, teaching = copy.deepcopy(learner.student.model), copy.deepcopy(teacher.encoder.model)
    spec = planned([*small(*words.split()), "cache=off"]).spec
    method, weights = build_method(spec.method)
    distillation = kd.Distillation(method, student, teaching, weights, total_steps=10).eval()
    distillation.method.load_state_dict(learner.method.state_dict())
    given = inputs()
    own = {name: tensor for name, tensor in given.items() if name != "labels"}
    loss = engine.loss(Batch(own, (own,), LABELS, torch.arange(4)))
    loss.total.backward()
    output = distillation(**given, progress=kd.Progress())
    output.loss.backward()
    assert torch.equal(output.loss, loss.total)
    assert output.terms.keys() == loss.terms.keys() == set(method.names)
    for name, term in output.terms.items():
        assert torch.equal(term, loss.terms[name]), name
    expected = {**gradients(learner.student), **{f"method.{name}": value for name, value in gradients(learner.method).items()}}
    found = {name.removeprefix("encoder."): value for name, value in gradients(distillation).items()}
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_the_loss_of_pkd_is_that_of_its_equations() -> None:
    """Compare with eq. 7 and 8 of PKD and the weights of its file, without the package's functions."""
    student, teacher = tiny_model(0, layers=2), tiny_model(1)
    distillation = kd.Distillation(PKD(), student, teacher).eval()
    given = inputs()
    output = distillation(**given)
    own = {name: tensor for name, tensor in given.items() if name != "labels"}
    ours, theirs = (model(**own, output_hidden_states=True) for model in (student, teacher))
    s, t = ours.hidden_states[1][:, 0], theirs.hidden_states[2][:, 0]
    hidden = ((s / s.norm(dim=1, keepdim=True) - t / t.norm(dim=1, keepdim=True)) ** 2).mean()
    soft = (t_soft := (theirs.logits / 10).softmax(-1)) * (t_soft.log() - (ours.logits / 10).log_softmax(-1))
    task = torch.nn.functional.cross_entropy(ours.logits, LABELS)
    expected = 0.5 * task + 0.5 * 100 * soft.mean() + 100 * hidden
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.logits, ours.logits)


def test_a_term_of_attention_is_zero_for_equal_models_alone() -> None:
    method = TinyBERT(attention="probabilities")
    student, teacher = tiny_model(0, layers=2), tiny_model(1)
    distillation = kd.Distillation(method, student, teacher).eval()
    given = inputs()
    term = distillation(**given).terms["attention"]
    assert term.requires_grad
    same = kd.Distillation(TinyBERT(attention="probabilities"), tiny_model(1), tiny_model(1)).eval()
    assert same(**given).terms["attention"].item() == pytest.approx(0, abs=1e-12)
    assert term.item() > 1e-6


def test_what_a_method_trains_is_a_parameter_and_teachers_are_not() -> None:
    student, teacher = tiny_model(0, layers=2, width=16), tiny_model(1)
    distillation = kd.Distillation(PKD(), student, teacher)
    trained = set(distillation.parameters())
    assert trained == {*student.parameters(), *distillation.method.project.parameters()}
    assert len(list(distillation.method.parameters())) == 2
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    before = [parameter.clone() for parameter in teacher.parameters()]
    distillation(**inputs()).loss.backward()
    assert distillation.method.project.weight.grad.abs().sum() > 0
    assert not teacher.training
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    distillation.double()
    assert {p.dtype for model in (distillation, *distillation.teachers) for p in model.parameters()} == {torch.float64}
    state = distillation.state_dict()
    assert {name.split(".")[0] for name in state} == {"encoder", "method"}


def train(distillation: kd.Distillation, steps: int = 30) -> list[float]:
    optimizer = torch.optim.AdamW(distillation.parameters(), lr=1e-3)
    losses = []
    distillation.train()
    for number in range(steps):
        loss = distillation(**inputs(number % 3)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_plain_loop_learns() -> None:
    torch.manual_seed(0)
    losses = train(kd.Distillation(PKD(), tiny_model(0, layers=2, width=16), tiny_model(1)))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_classes_of_a_teacher_are_matched_by_name() -> None:
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    swapped = {"id2label": {0: "YES", 1: "NO"}, "label2id": {"YES": 0, "NO": 1}}
    student, teacher = tiny_model(0, layers=2, **names), tiny_model(1)
    other = copy.deepcopy(teacher)
    for name, value in swapped.items():
        setattr(teacher.config, name, value)
    with torch.no_grad():
        for parameter in other.classifier.parameters():
            parameter.copy_(parameter.flip(0))
    for name, value in names.items():
        setattr(other.config, name, value)
    one, two = (kd.Distillation(KD(), copy.deepcopy(student), each).eval()(**inputs()).loss for each in (teacher, other))
    torch.testing.assert_close(one, two)
    with pytest.raises(kd.InputError, match="matched by name") as caught:
        kd.Distillation(KD(), student, tiny_model(1))
    assert caught.value.key == "teachers"


def test_a_regression_is_one_output() -> None:
    student, teacher = tiny_model(0, layers=2, num_labels=1), tiny_model(1, num_labels=1)
    given = {**inputs(), "labels": torch.tensor([0.0, 1.0, 2.5, -1.0])}
    output = kd.Distillation(KD(), student, teacher).eval()(**given)
    torch.testing.assert_close(output.terms["task"], ((output.logits[:, 0] - given["labels"]) ** 2).mean())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (RLKD, "turns"),
        (lambda: L2A(domain="domain"), "turns"),
        (PeaKD, "over all of train"),
        (TextSmoothing, "frozen models besides teachers"),
    ],
)
def test_a_method_that_needs_more_than_a_step_is_refused(make: Callable[[], kd.Method], reason: str) -> None:
    with pytest.raises(kd.InputError, match=reason) as caught:
        kd.Distillation(make(), tiny_model(0, layers=2), tiny_model(1))
    assert caught.value.key == "method"


class Held(KD):
    """A method that holds a part of train."""

    def __init__(self) -> None:
        super().__init__()
        self.holds = 0.1


class Unknown(KD):
    """A method without a file in conf/method."""


def test_arguments_that_do_not_fit_are_refused() -> None:
    student, teacher = tiny_model(0, layers=2), tiny_model(1)
    for arguments, key, message in (
        ((Held(), student, teacher, {"task": 1, "logits": 1}), "method", "held out"),
        ((Unknown(), student, teacher), "weights", "has no file in conf/method"),
        ((KD(), student), "teachers", "takes 1 teacher"),
        ((KD(), student, [teacher, teacher]), "teachers", "2 are given"),
        ((KD(), student, teacher, {"task": 1}), "method.weights.logits", "no weight"),
        ((KD(), student, teacher, {"task": 1, "logits": -1}), "weights.logits", "-1"),
        ((KD(), student, teacher, {"task": 1, "logits": Linear(1, 0)}), "total_steps", "is a schedule"),
        ((KD(Linear(4, 1)), student, teacher), "total_steps", "temperature is a schedule"),
        ((PKD(layers=[[1, 9]]), student, teacher), "layers", "layer 9"),
        ((KD(), student.bert, teacher), "student", "ForSequenceClassification"),
    ):
        with pytest.raises(kd.InputError, match=message) as caught:
            kd.Distillation(*arguments)
        assert caught.value.key == key, message


def test_a_teacher_with_another_vocabulary_needs_inputs_of_its_own() -> None:
    student, teacher = tiny_model(0, layers=2), tiny_model(1, vocab_size=50)
    distillation = kd.Distillation(KD(), student, teacher).eval()
    given = inputs()
    with pytest.raises(kd.InputError, match="has 50 tokens") as caught:
        distillation(**given)
    assert caught.value.key == "teacher_inputs"
    own = {name: tensor for name, tensor in inputs(1, tokens=9).items() if name != "labels"}
    theirs = teacher(**own).logits
    output = distillation(**given, teacher_inputs=[own])
    soft = (t := (theirs / 4).softmax(-1)) * (t.log() - (output.logits / 4).log_softmax(-1))
    torch.testing.assert_close(output.terms["logits"], 16 * soft.sum() / 4)
    tokens = kd.Distillation(TinyBERT(), tiny_model(0, layers=2), tiny_model(1)).eval()
    with pytest.raises(kd.InputError, match="read the student's tokens"):
        tokens(**given, teacher_inputs=[own])


def test_schedules_follow_the_steps() -> None:
    weights = {"task": 1.0, "logits": Linear(1.0, 0.0)}
    distillation = kd.Distillation(KD(), tiny_model(0, layers=2), tiny_model(1), weights, total_steps=4)
    for module in distillation.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for step in range(4):
        output = distillation(**inputs())
        expected = output.terms["task"] + (1 - step / 4) * output.terms["logits"]
        torch.testing.assert_close(output.loss, expected)
    assert distillation.step == 4
    distillation.eval()(**inputs())
    assert distillation.step == 4


class Counted(KD):
    """A method that counts what comes after its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.after: list[int] = []

    def after_step(self, step: Step, terms: Mapping[str, Tensor]) -> None:
        assert not any(term.requires_grad for term in terms.values())
        self.after.append(step.progress.step)


def test_a_method_is_told_that_a_step_is_over_once() -> None:
    method = Counted()
    distillation = kd.Distillation(method, tiny_model(0, layers=2), tiny_model(1), {"task": 1.0, "logits": 1.0})
    distillation(**inputs())
    assert method.after == []
    distillation.eval()(**inputs())
    assert method.after == []
    distillation.train()(**inputs())
    assert method.after == [0]
    distillation.after_step()
    distillation.after_step()
    assert method.after == [0, 1]


def test_running_statistics_of_bert_emd_are_those_of_a_run(engine_of: Callable[[str], Engine]) -> None:
    engine = engine_of("method=bert_emd").eval()
    (learner,) = engine.learners.values()
    (teacher,) = engine.teachers
    twin = BertEMD()
    distillation = kd.Distillation(twin, copy.deepcopy(learner.student.model), copy.deepcopy(teacher.encoder.model))
    twin.load_state_dict(learner.method.state_dict())
    for module in distillation.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for seed in range(2):
        given = inputs(seed)
        own = {name: tensor for name, tensor in given.items() if name != "labels"}
        engine.after_step(engine.loss(Batch(own, (own,), LABELS, torch.arange(4))))
        distillation(**given, progress=kd.Progress())
    distillation.after_step()
    for name, value in learner.method.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], value, rtol=0, atol=1e-7, msg=name)


class Student(pl.LightningModule):
    """A LightningModule of somebody's own."""

    def __init__(self, distillation: kd.Distillation) -> None:
        super().__init__()
        self.distillation = distillation

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        output = self.distillation(**batch)
        self.log_dict(output.terms)
        return output.loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def test_it_trains_in_a_lightning_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    distillation = kd.Distillation(PKD(), tiny_model(0, layers=2, width=16), tiny_model(1))
    before = distillation.eval()(**inputs()).loss.item()
    trainer = pl.Trainer(
        max_steps=30, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Student(distillation.train()), torch.utils.data.DataLoader([inputs(n) for n in range(3)], batch_size=None))
    assert distillation.step == 30
    assert distillation.eval()(**inputs()).loss.item() < 0.7 * before


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    given = {"per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 0}
    return TrainingArguments(str(folder), **{**given, "save_strategy": "no", "logging_steps": 5, **more})


def rows() -> list[dict[str, Tensor]]:
    given = inputs()
    return [{name: tensor[n] for name, tensor in given.items()} for n in range(4)]


def test_it_trains_with_the_trainer_of_transformers(tmp_path: Path) -> None:
    distillation = kd.Distillation(PKD(), tiny_model(0, layers=2, width=16), tiny_model(1))
    before = distillation.eval()(**inputs()).loss.item()
    trainer = kd.DistillationTrainer(
        distillation,
        arguments(tmp_path, max_steps=30, learning_rate=1e-3),
        train_dataset=rows(),
        eval_dataset=rows(),
        compute_metrics=lambda given: {"accuracy": float((given.predictions.argmax(-1) == given.label_ids).mean())},
    )
    trainer.train()
    assert distillation.eval()(**inputs()).loss.item() < 0.7 * before
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all({"task", "logits", "hidden"} <= entry.keys() for entry in logged)
    entry = logged[-1]
    assert entry["loss"] == pytest.approx(0.5 * entry["task"] + 0.5 * entry["logits"] + 100 * entry["hidden"], rel=1e-4)
    assert {"eval_loss", "eval_accuracy"} <= trainer.evaluate().keys()
    trainer.distillation.student.save_pretrained(tmp_path / "student")
    again = type(distillation.student).from_pretrained(tmp_path / "student").eval()
    own = {name: tensor for name, tensor in inputs().items() if name != "labels"}
    torch.testing.assert_close(again(**own).logits, distillation.student(**own).logits)


def test_accumulated_batches_of_the_trainer_have_the_gradient_of_their_mean(tmp_path: Path) -> None:
    def weights(size: int, accumulate: int) -> Tensor:
        distillation = kd.Distillation(KD(), tiny_model(0, layers=2, hidden_dropout_prob=0.0), tiny_model(1))
        for module in distillation.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate, "max_steps": 3}
        more = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
        kd.DistillationTrainer(distillation, arguments(tmp_path, **options, **more), train_dataset=rows()).train()
        return torch.cat([parameter.detach().flatten() for parameter in distillation.parameters()])

    torch.testing.assert_close(weights(4, 1), weights(2, 2), rtol=0, atol=1e-6)


def test_the_trainer_resumes_with_what_the_method_trains(tmp_path: Path) -> None:
    def trained(steps: int, resume: bool = False) -> kd.Distillation:
        distillation = kd.Distillation(PKD(), tiny_model(0, layers=2, width=16), tiny_model(1))
        options = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=steps, lr_scheduler_type="constant")
        trainer = kd.DistillationTrainer(distillation, options, train_dataset=rows())
        trainer.train(resume_from_checkpoint=resume or None)
        return distillation

    saved = trained(4)
    again = trained(4, resume=True)
    assert torch.equal(saved.method.project.weight, again.method.project.weight)


def test_a_trainer_with_another_loss_is_refused(tmp_path: Path) -> None:
    distillation = kd.Distillation(KD(), tiny_model(0, layers=2), tiny_model(1))
    with pytest.raises(kd.InputError, match="label_smoothing_factor"):
        kd.DistillationTrainer(distillation, arguments(tmp_path, label_smoothing_factor=0.1))
    with pytest.raises(kd.InputError, match="compute_loss_func"):
        kd.DistillationTrainer(distillation, arguments(tmp_path), compute_loss_func=lambda *_: 0)
