"""A method as a loss in training loops of others: the numbers of a run's step, gradients included."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from api.two_ranks import METHODS as IN_TWO_RANKS
from api.two_ranks import save_steps, steps
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainingArguments

import kd
from conftest import tiny_model
from kd.build.engine import build_engine
from kd.build.instantiate import build_method
from kd.build.models import build_models
from kd.build.parts import examples_of
from kd.config.compose import compose, conf_folder, typed
from kd.config.schema import RunSpec
from kd.data.batch import Batch
from kd.engines.base import Engine
from kd.methods.base import Step
from kd.methods.bert_emd import BertEMD
from kd.methods.kd import KD
from kd.methods.l2a import L2A
from kd.methods.mlkd_bert import MLKDBERT
from kd.methods.one import ONE
from kd.methods.pea_kd import PeaKD
from kd.methods.pkd import PKD
from kd.methods.rl_kd import RLKD
from kd.methods.simkd import SimKD
from kd.methods.text_smoothing import TextSmoothing
from kd.methods.tinybert import TinyBERT
from kd.runs.stages import before_config
from kd.schedules import Linear
from kd.system import distributed
from processes import fork_server, free_port
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
def engine_of(small: Small) -> Callable[[str], tuple[Engine, RunSpec]]:
    """The engine of a run, as it is built for training, with a teacher that has been fine-tuned, and its specification."""
    kd.run(*small("method=kd", "trainer.max_epochs=1"))  # brings the teacher

    def build(words: str) -> tuple[Engine, RunSpec]:
        chosen = [*small(*words.split()), "cache=off"]
        run = planned(chosen)
        (examples,) = examples_of(run).values()
        return build_engine(run, build_models(run, examples.task), examples.task), run.spec

    return build


STEPS = [
    *("kd", "pkd", "fitnets", "distilbert", "bert_emd", "ckd", "at", "rkd", "alp_kd", "mlkd_bert method.before=null"),
    "pkd method.weights.hidden=3 method.normalize=false",
]


@pytest.mark.parametrize("words", [f"method={words}" for words in STEPS])
def test_a_step_is_that_of_a_run(words: str, engine_of: Callable[[str], tuple[Engine, RunSpec]]) -> None:
    engine, spec = engine_of(words)
    engine.eval()
    (learner,) = engine.learners.values()
    (teacher,) = engine.teachers
    student, teaching = copy.deepcopy(learner.student.model), copy.deepcopy(teacher.encoder.model)
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
    assert {name.split(".")[0] for name in state} == {"encoder", "method", "_extra_state"}


def test_a_student_is_trained_with_dropout_and_a_teacher_runs_without() -> None:
    """`from_pretrained` returns models in eval mode, and a loop of somebody's own may call `train()` of any of them."""
    student, teacher = tiny_model(0, layers=2), tiny_model(1).train()
    distillation = kd.Distillation(KD(), student, teacher)
    assert student.training
    assert not teacher.training
    teacher.train()
    given = inputs()
    outputs = [distillation(**given) for _ in range(2)]
    assert not torch.equal(outputs[0].logits, outputs[1].logits)
    with torch.no_grad():
        expected = teacher.eval()(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
    soft = (t := (expected / 4).softmax(-1)) * (t.log() - (outputs[0].logits / 4).log_softmax(-1))
    torch.testing.assert_close(outputs[0].terms["logits"], 16 * soft.sum() / 4)
    assert torch.equal(distillation.eval()(**given).logits, distillation(**given).logits)


def test_no_gradient_reaches_a_teacher() -> None:
    teacher = tiny_model(1)
    distillation = kd.Distillation(PKD(), tiny_model(0, layers=2, width=16), teacher)
    distillation(**inputs()).loss.backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in distillation.method.parameters())


def test_a_student_made_of_layers_of_its_teacher_is_refused() -> None:
    """Its layers would be frozen with the teacher's, and nothing would say so."""
    student, teacher = tiny_model(0, layers=2), tiny_model(1)
    student.bert.encoder.layer[0] = teacher.bert.encoder.layer[0]
    for given in (student, teacher):
        with pytest.raises(kd.InputError, match="of the student's parameters, the first of them bert") as caught:
            kd.Distillation(KD(), given, teacher)
        assert caught.value.key == "teachers"
    student.bert.encoder.layer[0] = copy.deepcopy(teacher.bert.encoder.layer[0])
    kd.Distillation(KD(), student, teacher)


def test_the_export_of_a_student_with_layers_of_its_method_is_plain(tmp_path: Path) -> None:
    student = tiny_model(0, layers=2, width=16)
    distillation = kd.Distillation(SimKD(), student, tiny_model(1)).eval()
    distillation.export().save_pretrained(tmp_path)
    again, info = type(student).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    given = inputs()
    logits = again.eval()(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
    torch.testing.assert_close(logits, distillation(**given).logits)


RUNS = [*(path.stem for path in sorted((conf_folder() / "method").glob("*.yaml")))]
REFUSED = {
    "dml": "other students",
    "l2a": "turns",
    "meta_kd before": "not a column of two domains",
    "meta_teacher": "not a column of two domains",
    "p2p_mutual": "other students",
    "pea_kd before": "over all of train",
    "rl_kd": "turns",
    "rl_kd before": "turns",
    "text_smoothing": "frozen models besides teachers",
}
"""Methods that are more than the loss of a step, first runs included."""


@pytest.mark.parametrize("name", RUNS)
def test_every_method_has_a_step_or_is_refused(name: str) -> None:
    """A step moves the student and whatever the method trains, also of a method's first run."""
    config = compose([f"method={name}"])
    stages = {name: typed(config)}
    if config.method.get("before"):
        stages[f"{name} before"] = typed(before_config(config))
    for stage, spec in stages.items():
        count = len(spec.teacher)
        method, weights = build_method(spec.method, spec.pool, spec.cohort, [1 / max(count, 1)] * count)
        count = count if method.teachers is None else method.teachers
        student, teachers = tiny_model(0, layers=2), [tiny_model(1 + n) for n in range(count)]
        if stage in REFUSED:
            with pytest.raises(kd.InputError, match=REFUSED[stage]):
                kd.Distillation(method, student, teachers, weights, total_steps=4)
            continue
        distillation = kd.Distillation(method, student, teachers, weights, total_steps=4)
        output = distillation(**inputs())
        output.loss.backward()
        assert output.loss.isfinite()
        moved = gradients(distillation)
        assert any(name.startswith("encoder.") for name in moved)
        lacking = [name for name, parameter in distillation.named_parameters() if parameter.requires_grad and name not in moved]
        assert not lacking, stage


def test_weights_are_those_of_the_run_that_has_the_terms() -> None:
    """A file may have two runs of one class, and weights that are schedules."""
    student, teacher = tiny_model(0, layers=2), tiny_model(1)
    first = kd.Distillation(MLKDBERT(stage="representation"), copy.deepcopy(student), teacher)
    assert set(first(**inputs()).terms) == {"embedding", "attention", "hidden"}
    second = kd.Distillation(MLKDBERT(stage="prediction"), copy.deepcopy(student), teacher)
    assert set(second(**inputs()).terms) == {"task", "logits", "similarity", "contrast"}
    with pytest.raises(kd.InputError, match="number of optimiser steps"):
        kd.Distillation(ONE(), copy.deepcopy(student))
    one = kd.Distillation(ONE(), student, total_steps=100)
    assert one(**inputs()).terms.keys() == set(one.method.names)


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


@pytest.mark.parametrize("labels", [torch.zeros(4, 1), torch.zeros(3), torch.zeros(4, 2)])
def test_labels_that_are_not_one_for_each_example_are_refused(labels: Tensor) -> None:
    """A column of scores would be compared with every prediction of the batch."""
    distillation = kd.Distillation(KD(), tiny_model(0, layers=2, num_labels=1), tiny_model(1, num_labels=1))
    with pytest.raises(kd.InputError, match="one label for each of 4 examples") as caught:
        distillation(**{**inputs(), "labels": labels})
    assert caught.value.key == "labels"


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
        ((Unknown(), student, teacher), "weights", "conf/method has no weights of Unknown for the terms task, logits"),
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


def test_a_schedule_goes_on_where_the_state_was_saved() -> None:
    def made() -> kd.Distillation:
        weights = {"task": 1.0, "logits": Linear(1.0, 0.0)}
        return kd.Distillation(KD(), tiny_model(0, layers=2), tiny_model(1), weights, total_steps=4)

    first, again = made(), made()
    for _ in range(3):
        first(**inputs())
    again.load_state_dict(first.state_dict())
    assert again.step == 3
    output = again(**inputs())
    torch.testing.assert_close(output.loss, output.terms["task"] + 0.25 * output.terms["logits"])


class Counted(KD):
    """A method that counts what comes after its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.after: list[int] = []
        self.seen: list[tuple[int, int, int]] = []

    def terms(self, step: Step) -> dict[str, Tensor]:
        self.seen.append((step.progress.step, step.progress.total, step.progress.epoch))
        return super().terms(step)

    def after_step(self, step: Step, terms: Mapping[str, Tensor]) -> None:
        assert not any(term.requires_grad for term in terms.values())
        self.count += 1
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
    distillation(**inputs())
    assert distillation.state_dict()["method.count"] == 3, "a checkpoint has what follows from the last step"
    assert method.after == [0, 1, 2]


def test_running_statistics_of_bert_emd_are_those_of_a_run(engine_of: Callable[[str], tuple[Engine, RunSpec]]) -> None:
    engine, _ = engine_of("method=bert_emd")
    engine.eval()
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
    trainer.distillation.export().save_pretrained(tmp_path / "student")
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


def test_the_trainer_counts_optimiser_steps_and_finishes_each_batch(tmp_path: Path) -> None:
    """With two accumulated batches of two examples there are two optimiser steps in an epoch of eight rows."""
    method = Counted()
    distillation = kd.Distillation(method, tiny_model(0, layers=2), tiny_model(1), {"task": 1.0, "logits": 1.0})
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
    given = arguments(tmp_path, **options, save_strategy="steps", save_steps=3)
    kd.DistillationTrainer(distillation, given, train_dataset=[*rows(), *rows()]).train()
    assert method.seen == [(step, 4, step // 2) for step in range(4) for _ in range(2)]
    assert method.after == [step for step, _, _ in method.seen]
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert saved["method.count"] == 6, "a checkpoint has what follows from its last batch"
    kd.DistillationTrainer(distillation, arguments(tmp_path, max_steps=1), train_dataset=rows()).train()
    assert len(method.after) == 9, "also the last batch, without a checkpoint"


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


def test_several_gpus_in_one_process_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without arguments, which the Trainer then makes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    distillation = kd.Distillation(KD(), tiny_model(0, layers=2), tiny_model(1))
    for given in (None, arguments(tmp_path)):
        with pytest.raises(kd.InputError, match="a process each"):
            kd.DistillationTrainer(distillation, given)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """Return what each of two processes has, whose group a script made."""
    folder, port, server = tmp_path_factory.mktemp("ranks"), free_port(), fork_server()
    ranks = [server.Process(target=save_steps, args=(rank, port, folder)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
        process.kill()  # one that waits for the other for good
    assert [process.exitcode for process in ranks] == [0, 0]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.ddp
@pytest.mark.parametrize("name", IN_TWO_RANKS)
def test_two_processes_have_the_steps_of_one_with_the_whole_batch(name: str, two_ranks: list) -> None:
    whole, (one, other) = steps(name), (rank[name] for rank in two_ranks)
    assert any(key.startswith("gradient of encoder") for key in whole)
    for key, value in whole.items():
        assert torch.equal(one[key], other[key]), f"{key}: the ranks drifted apart"
        torch.testing.assert_close(one[key], value, rtol=0, atol=1e-9, msg=key)  # sums of float64 in another order


def test_ranks_are_those_of_the_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's launcher sets no RANK, and processes that a script starts have none of torchrun's variables."""
    assert (distributed.rank(), distributed.world()) == (0, 1)
    for name, value in {"is_initialized": True, "get_rank": 1, "get_world_size": 3}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    assert (distributed.rank(), distributed.world()) == (1, 3)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distributed.world() == 2
