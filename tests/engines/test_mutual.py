"""Students that learn together: their gradients, their turns, their clocks, and what each leaves behind."""

import copy
import csv
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conformance.bench import TASK, Bench
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import Metric
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kd.data.batch import Batch
from kd.data.tasks import Classification, Regression, headline
from kd.engines.distiller import Distiller
from kd.engines.models import Models
from kd.engines.nonfinite import NonFiniteLoss
from kd.engines.optimizer import OptimizerFactory
from kd.errors import InputError
from kd.forward import Needs
from kd.models import Encoder
from kd.results.evaluate import evaluate
from kd.results.tables import score
from kd.runs.run import Run
from kd.training import execute
from whole_runs import Small, broken_off, last_weights, made, planned, same_weights

CASES = ["dml", "dml cohort.students=3", "p2p_mutual", "p2p_mutual cohort.teacher=online", "pkd cohort=mutual"]
ONLINE = "p2p_mutual cohort.teacher=online"


# Gradients


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_of_the_sum_is_each_learners_own(case: str) -> None:
    bench = Bench(case)
    batch = bench.batch()
    loss = bench.engine.loss(batch)
    groups = [learner.parameters for learner in bench.engine.learners.values()]
    owned = [
        torch.autograd.grad(sum(bench.weights[name] * term for name, term in terms.items()), parameters, retain_graph=True)
        for parameters, (_, _, terms) in zip(groups, loss.steps, strict=True)
    ]
    loss.total.backward()
    for parameters, gradients in zip(groups, owned, strict=True):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)


def test_a_teacher_that_learns_with_its_students_learns_from_the_labels_alone() -> None:
    bench = Bench(ONLINE)
    batch = bench.batch()
    loss = bench.engine.loss(batch)
    parameters = list(bench.engine.online.parameters())
    for _, step, terms in loss.steps:
        found = torch.autograd.grad(sum(terms.values()), parameters, retain_graph=True, allow_unused=True)
        assert all(gradient is None for gradient in found)
        assert not step.teacher.outputs.logits.requires_grad
    loss.total.backward()
    alone = copy.deepcopy(bench.engine.online)
    alone.zero_grad(set_to_none=True)
    term = F.cross_entropy(alone(batch.student, Needs()).logits, batch.labels)
    term.backward()
    torch.testing.assert_close(loss.terms["teacher/task"], term)
    for one, other in zip(parameters, alone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)


def test_each_learners_gradient_is_clipped_on_its_own() -> None:
    bench = Bench("p2p_mutual cohort.teacher=online cohort.students=3")
    bench.engine.loss(bench.batch()).total.backward()
    models = [bench.engine.online, *bench.students.values()]
    for scale, model in zip((1e-3, 1.0, 5.0, 1e-2), models, strict=True):
        for parameter in model.parameters():
            parameter.grad *= scale

    def norms() -> list[float]:
        return [torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item() for model in models]

    before = norms()
    assert min(before) < 0.1 < max(before)
    bench.engine.configure_gradient_clipping(None, 0.1)
    assert norms() == pytest.approx([min(norm, 0.1) for norm in before], rel=1e-4)


# Updates: the real trainer against loops


def fitted(bench: Bench, batches: list[Batch], make: Any, clip: float | None) -> pl.Trainer:
    """Through Lightning, as `kd.training.fit` does it."""
    bench.engine.optimizer_factory = OptimizerFactory(make, lr=0.05, weight_decay=0.1, schedule="linear", warmup=0.0)
    bench.engine.clip = clip
    automatic = bench.engine.automatic_optimization
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(accelerator="cpu", max_epochs=2, gradient_clip_val=clip if automatic else None, **quiet)
    trainer.fit(bench.engine, torch.utils.data.DataLoader(batches, batch_size=None))
    return trainer


def divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    own, target = (student / temperature).log_softmax(-1), (teacher.detach() / temperature).softmax(-1)
    return F.kl_div(own, target, reduction="batchmean") * temperature**2


def transcribed(bench: Bench, batches: list[Batch], make: Any, clip: float | None, sequential: bool) -> list[Encoder]:
    """Algorithm 1 of DML with a teacher, an optimiser for each, on copies: what they become."""
    students = [copy.deepcopy(student) for student in bench.students.values()]
    teachers = [copy.deepcopy(teacher.encoder) for teacher in bench.teachers] if "logits" in bench.weights else []
    online = copy.deepcopy(getattr(bench.engine, "online", None))
    learners = students if online is None else [online, *students]
    optimizers = []
    for learner in learners:
        decayed = [p for p in learner.parameters() if p.ndim >= 2]
        others = [p for p in learner.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizers.append(make(groups, lr=0.05))

    def predictions(batch: Batch) -> list[Tensor]:
        return [model(batch.student, Needs()).logits for model in (*learners, *teachers)]

    def loss(k: int, seen: list[Tensor], batch: Batch) -> Tensor:
        hard = F.cross_entropy(seen[k], batch.labels)
        if learners[k] is online:
            return hard
        first = 0 if online is None else 1
        peers = [seen[other] for other in range(first, len(learners)) if other != k]
        guide = seen[0] if online is not None else seen[-1] if teachers else None
        taught = 0.0 if guide is None else divergence(guide, seen[k], 2.0)
        return hard + taught + sum(divergence(peer, seen[k], 1.0) for peer in peers) / len(peers)

    total = 2 * len(batches)
    for done in range(total):
        batch = batches[done % len(batches)]
        stale = predictions(batch)
        for k, (learner, optimizer) in enumerate(zip(learners, optimizers, strict=True)):
            seen = predictions(batch) if sequential else stale
            gradients = torch.autograd.grad(loss(k, seen, batch), list(learner.parameters()), retain_graph=True)
            norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
            factor = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))  # torch's own 1e-6
            for parameter, gradient in zip(learner.parameters(), gradients, strict=True):
                parameter.grad = gradient * factor
            if sequential:
                rate(optimizer, 0.05 * (1 - done / total))
                optimizer.step()
        if not sequential:
            for optimizer in optimizers:
                rate(optimizer, 0.05 * (1 - done / total))
                optimizer.step()
    return learners


def rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


UPDATED = ["dml cohort.students=3", "p2p_mutual", "p2p_mutual cohort.teacher=online cohort.students=3"]


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("update", ["simultaneous", "sequential"])
@pytest.mark.parametrize("case", UPDATED)
def test_training_equals_loops_with_an_optimiser_for_each(case: str, update: str, make: Any) -> None:
    for clip in (None, 0.3):
        bench = Bench(case, more=[f"engine.update={update}"])
        bench.engine.double()
        batches = [bench.batch(seed=seed) for seed in range(2)]
        expected = transcribed(bench, batches, make, clip, update == "sequential")
        trainer = fitted(bench, batches, make, clip)
        assert trainer.global_step == 4
        online = getattr(bench.engine, "online", None)
        found = [*([] if online is None else [online]), *bench.students.values()]
        for one, other in zip(found, expected, strict=True):
            for (name, parameter), wanted in zip(one.named_parameters(), other.parameters(), strict=True):
                torch.testing.assert_close(parameter, wanted, rtol=1e-6, atol=1e-8, msg=f"{name}, clip {clip}")


def test_turns_and_one_move_for_all_differ() -> None:
    ends = []
    for update in ("simultaneous", "sequential"):
        bench = Bench("dml", more=[f"engine.update={update}"])
        fitted(bench, [bench.batch(seed=seed) for seed in range(3)], torch.optim.SGD, None)
        ends.append([student.model.classifier.weight for student in bench.students.values()])
    assert not torch.allclose(ends[0][1], ends[1][1], atol=1e-4)


def test_in_turns_a_frozen_teacher_runs_once_for_a_batch_and_nobody_is_left_with_gradients() -> None:
    bench = Bench("p2p_mutual", more=["engine.update=sequential", "cohort.students=3"])
    fitted(bench, [bench.batch(seed=seed) for seed in range(3)], torch.optim.SGD, None)
    assert bench.teachers[0].passes == 6
    assert all(parameter.grad is None for parameter in bench.engine.parameters())


def test_in_turns_a_pool_is_drawn_from_once_for_a_batch() -> None:
    bench = Bench("p2p_mutual pool=stochastic teacher=[minilm,minilm_4l]", more=["engine.update=sequential"])
    fitted(bench, [bench.batch(seed=seed) for seed in range(4)], torch.optim.SGD, None)
    drawn = [np.random.default_rng([0, step, *b"teacher"]).choice(2, p=[0.5, 0.5]) for step in range(8)]
    assert [teacher.passes for teacher in bench.teachers] == [drawn.count(0), drawn.count(1)]


def test_a_loss_that_is_no_number_stops_a_turn_before_it_moves_anything() -> None:
    bench = Bench("dml", more=["engine.update=sequential"])
    with torch.no_grad():
        bench.students["s0"].model.classifier.bias[0] = float("nan")
    before = copy.deepcopy(bench.engine.state_dict())
    with pytest.raises(NonFiniteLoss, match="s0/task"):
        fitted(bench, [bench.batch()], torch.optim.SGD, None)
    for name, tensor in bench.engine.state_dict().items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), name


# Validation


class Constant(nn.Module):
    """A student that shows these logits, whatever it reads."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, inputs: Any, needs: Needs) -> Any:
        return type("Shown", (), {"logits": self.logits})()


def scored(task: Any, students: list[Tensor], labels: Tensor) -> Any:
    batch = Batch({}, (), labels, torch.arange(len(labels)), 1.0, ({},) * (len(students) - 1))
    models: Any = {f"s{n}": Constant(logits) for n, logits in enumerate(students)}
    return evaluate(models, [], [batch], task)


def test_the_ensemble_is_of_probabilities_not_of_logits() -> None:
    sure, others = torch.tensor([[0.999999, 1e-6]]).log(), torch.tensor([[0.05, 0.95]]).log()
    task = Classification("toy", ["no", "yes"], {}, ["accuracy"], "accuracy")
    mean = torch.stack([each.softmax(-1) for each in (sure, others, others)]).mean(0)
    torch.testing.assert_close(task.ensemble([sure, others, others]), mean.log())
    assert (sure + 2 * others).argmax() == 0
    assert scored(task, [sure, others, others], torch.tensor([1])).ensemble == {"accuracy": 1.0}


def test_the_ensemble_of_identical_students_is_the_single_student() -> None:
    logits, labels = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
    found = scored(TASK, [logits] * 3, labels)
    assert found.ensemble == found.students["s0"] == scored(TASK, [logits], labels).students["s0"]
    assert scored(TASK, [logits], labels).ensemble == {}
    scores = Regression("toy", ["mse", "pearson"], "mse")
    found = scored(scores, [logits[:, :1]] * 2, labels.float())
    assert found.ensemble == pytest.approx(found.students["s0"], rel=1e-5)


def test_the_headline_is_the_best_by_what_is_monitored() -> None:
    figures = {"a": {"accuracy": 0.7, "mse": 0.3}, "b": {"accuracy": 0.9, "mse": 0.5}, "c": {"accuracy": 0.9, "mse": 0.2}}
    assert headline(TASK, figures) == "b"  # the first of equal ones
    assert headline(Regression("toy", ["mse"], "mse"), figures) == "c"
    assert headline(Regression("toy", ["mse"], "mse"), {"a": {"mse": None}, "b": {"mse": 9.0}}) == "b"


def test_validation_scores_every_student_and_their_ensemble() -> None:
    bench = Bench("dml")
    assert bench.engine.evaluated == ["s0", "s1", "ensemble"]
    batches = [bench.batch(seed=seed) for seed in range(3)]
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.validate(bench.engine, DataLoader(batches, batch_size=None), verbose=False)
    logged = trainer.callback_metrics
    bench.engine.eval()
    labels = torch.cat([batch.labels for batch in batches])
    with torch.no_grad():
        logits = [
            torch.cat([student(batch.student, Needs()).logits for batch in batches]) for student in bench.students.values()
        ]
    expected = {f"s{n}": (each.argmax(-1) == labels).float().mean().item() for n, each in enumerate(logits)}
    mean = torch.stack([each.softmax(-1) for each in logits]).mean(0)
    expected["ensemble"] = (mean.argmax(-1) == labels).float().mean().item()
    for name, value in expected.items():
        assert float(logged[f"validation/{name}/accuracy"]) == pytest.approx(value)
    assert float(logged["validation/accuracy"]) == pytest.approx(max(expected["s0"], expected["s1"]))
    assert {name: found["accuracy"] for name, found in bench.engine.validation.items()} == pytest.approx(expected)
    assert not [m for m in bench.engine.state_dict() if "metrics" in m], "metrics are no part of a checkpoint"
    assert isinstance(bench.engine.metrics["of-s0"]["accuracy"], Metric)


# What cannot be


def test_an_unknown_update_is_refused() -> None:
    bench = Bench("dml")
    with pytest.raises(InputError, match="simultaneous, sequential") as update:
        Distiller(Models(bench.students, {}, [], None, {}), TASK, bench.engine.optimizer_factory, update="random")
    assert update.value.key == "update"


# Whole runs

LEARNERS = ["method=p2p_mutual", "cohort.teacher=online", "cohort.students=[2l,3l]"]
COHORT = [*LEARNERS, "engine.update=sequential", "seed=4", "optimizer.lr=2e-3"]


@pytest.fixture(scope="module")
def cohort(small: Small) -> tuple[Run, dict]:
    """Students of two and three blocks, and a teacher that learns with them."""
    return made(small(*COHORT))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_every_student_is_exported_and_scores_what_the_record_says(cohort: tuple[Run, dict], reviews: Path) -> None:
    run, result = cohort
    assert list(result["students"]) == ["2l", "3l"]
    assert result["headline"] in result["students"]
    folders = {name: each["folder"] for name, each in result["students"].items()}
    assert folders == {name: "student" if name == result["headline"] else f"peers/{name}" for name in folders}
    for split in ("validation", "test"):
        examples = rows(reviews / f"{split}.csv")
        shares = []
        for name, each in result["students"].items():
            model = AutoModelForSequenceClassification.from_pretrained(run.directory / each["folder"]).eval()
            tokenizer = AutoTokenizer.from_pretrained(run.directory / each["folder"])
            assert model.config.num_hidden_layers == {"2l": 2, "3l": 3}[name]
            assert each["parameters"] == sum(p.numel() for p in model.parameters())
            with torch.no_grad():
                inputs = tokenizer([row["text"] for row in examples], padding=True, return_tensors="pt")
                shares.append(model(**inputs).logits.softmax(-1))
            gold = torch.tensor([model.config.label2id[row["label"]] for row in examples])
            found = (shares[-1].argmax(-1) == gold).float().mean().item()
            assert each["metrics"][split]["accuracy"] == pytest.approx(found)
        mean = (torch.stack(shares).mean(0).argmax(-1) == gold).float().mean().item()
        assert result["metrics_ensemble"][split]["accuracy"] == pytest.approx(mean)


def test_the_record_is_of_the_best_student_on_validation(cohort: tuple[Run, dict]) -> None:
    run, result = cohort
    chosen = result["students"][result["headline"]]
    assert chosen["metrics"]["validation"]["accuracy"] == max(
        each["metrics"]["validation"]["accuracy"] for each in result["students"].values()
    )
    assert result["student"] == result["headline"]
    assert result["metrics"] == chosen["metrics"]
    assert result["parameters"]["student"] == chosen["parameters"]
    assert json.loads((run.directory / "result.json").read_text()) == result


def test_every_model_card_has_its_own_students_figures(cohort: tuple[Run, dict]) -> None:
    run, result = cohort
    for name, each in result["students"].items():
        card = (run.directory / each["folder"] / "README.md").read_text()
        assert f"# {name} student of minilm, p2p_mutual" in card
        assert f"Parameters: {each['parameters']:,}" in card
        for split in ("validation", "test"):
            accuracy, agreement = each["metrics"][split]["accuracy"], each["agreement"][split]["minilm"]
            assert f"| {split} | accuracy | {score('accuracy', accuracy, ' %')} |" in card
            assert f"| {split} | agreement with minilm | {score('accuracy', agreement, ' %')} |" in card


def test_a_teacher_that_learned_with_its_students_is_scored_like_any_other(cohort: tuple[Run, dict]) -> None:
    run, result = cohort
    assert not run.inputs
    assert set(result["metrics_teacher"]["minilm"]) == {"validation", "test"}
    assert result["teacher_forwards"] == {}
    assert result["parameters"]["teacher"] > max(each["parameters"] for each in result["students"].values())
    steps = [row for row in rows(run.directory / "metrics.csv") if row.get("train/teacher/task")]
    assert steps


def test_a_cohort_that_takes_turns_resumes_to_the_weights_of_an_unbroken_one(
    cohort: tuple[Run, dict], tmp_path: Path, small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken, result = cohort
    run = planned(small(*COHORT, f"paths.runs={tmp_path}"))
    broken_off(run, 8, monkeypatch)
    again = execute.execute(run)
    assert same_weights(last_weights(run), last_weights(unbroken))
    assert (again["students"].keys(), again["metrics"]) == (result["students"].keys(), result["metrics"])
    saved = torch.load(run.checkpoints / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 12, "one step to a batch, however many learners took turns"


def test_the_first_student_of_a_cohort_without_exchange_ends_as_a_lone_student(small: Small) -> None:
    cohort, _ = made(small("method=dml", "teacher=[]", "method.weights.mutual=0", "seed=5"))
    alone, _ = made(small("method=finetune", "teacher=[]", "seed=5"))
    first, lone = last_weights(cohort, "student-2l."), last_weights(alone, "student.")
    assert same_weights(first, lone)


def test_a_cohort_that_takes_turns_keeps_checkpoints_inside_an_epoch(
    cohort: tuple[Run, dict], tmp_path: Path, small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken, _ = cohort
    run = planned(small(*COHORT, f"paths.runs={tmp_path}", "trainer.checkpoint_minutes=0"))
    broken_off(run, 8, monkeypatch)
    assert torch.load(run.checkpoints / "last.ckpt", weights_only=True)["global_step"] in (7, 8)
    execute.execute(run)
    assert same_weights(last_weights(run), last_weights(unbroken))


def test_preflight_shows_the_online_teachers_loss_with_the_weight_it_has(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(small(*LEARNERS, "method.weights.task=0", "trainer.max_epochs=1", f"paths.runs={tmp_path}"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "weighted terms at the start" in line]
    assert "2l/task 0," in line
    assert not line.endswith("teacher/task 0"), "no weight of the students' applies to it"
