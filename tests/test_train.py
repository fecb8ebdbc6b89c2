"""Whole runs: what they leave behind, and that nothing is repeated or taken for done that is not."""

import csv
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from conftest import write_csv
from kd import train
from kd.data.batch import Batch
from kd.data.sources import Files
from kd.engines.distiller import Distiller
from kd.engines.nonfinite import clip_gradients
from kd.errors import InputError
from kd.results.export import TOLERANCE, model_card
from kd.runs.run import Run
from kd.training import execute
from kd.training import fit as fitting
from processes import Command
from whole_runs import broken_off, check_predictions, last_weights, made, planned, same_weights, torchrun, weights

Small = Callable[..., list[str]]


def command(overrides: list[str]) -> Command:
    return Command(["-m", "kd.train", *overrides])


@pytest.fixture(scope="module")
def finished(small: Small) -> tuple[Run, dict]:
    """The default method on the toy task."""
    return made(small())


def test_result_holds_the_contracted_fields(finished: tuple[Run, dict]) -> None:
    run, result = finished
    assert json.loads((run.directory / "result.json").read_text()) == result
    expected = {"method": "pkd", "student": "2l", "teacher": ["minilm"], "task": "file", "seed": 0, "digest": run.digest}
    assert {name: result[name] for name in expected} == expected
    assert set(result["metrics"]) == {"validation", "test"}
    assert result["selection"]["kind"] == "best"
    assert result["selection"]["by"] == "chosen by validation accuracy over 2 epoch(s)"
    assert result["seconds"]["train"] > 0
    assert result["examples_per_second"] > 0
    assert result["init"] == "first layers [1, 2] of the pre-trained backbone"
    assert {"torch", "lightning", "transformers", "kd"} <= set(result["versions"])
    assert result["hardware"]["cores"]
    assert "git" in result
    assert result["baseline"] == {"validation": {"accuracy": 0.5}, "test": {"accuracy": 0.5}}
    assert result["collapsed"] is result["students"]["student"]["collapsed"]
    assert result["latency"]["threads"] == torch.get_num_threads()
    assert set(result["latency"]["spread"]) == {"student student", "minilm"}
    for name in ("config.yaml", "metrics.csv", "checkpoints", "student/config.json", "student/model.safetensors"):
        assert (run.directory / name).exists(), name


RESULT_KEYS = {
    "": "method student teacher pool task seed digest family metrics_last metrics_teacher metrics_ensemble selection seconds "
    "resumed examples_per_second teacher_forward_examples teacher_forwards cache notes_teacher labels pipeline origin "
    "max_length limit_train examples epochs batch_size batch_tokens accumulate steps precision ranks lr weights identity "
    "inputs versions hardware git finished tuned latency baseline metrics agreement init export_difference parameters "
    "megabytes latency_ms collapsed headline students files keep checksum",
    "metrics_last": "validation",
    "metrics_teacher minilm": "validation test",
    "selection": "kind by epoch",
    "seconds": "train cache before",
    "resumed": "starts from_steps",
    "teacher_forwards minilm": "passes examples batches_used",
    "cache minilm": "used bytes seconds written live budget",
    "origin": "backbone license data columns",
    "identity": "format method engine student teachers inputs pool cohort task data optimizer trainer seed",
    "hardware": "cpu cores threads gpus",
    "latency": "measure threads spread",
    "parameters": "student exported teacher teachers",
    "megabytes": "student minilm",
    "latency_ms": "student minilm",
    "students student": "metrics agreement parameters exported latency_ms collapsed init origin folder export_difference "
    "megabytes",
}
"""Path in `result.json` -> the keys there, in their order."""


def test_result_has_these_keys_and_no_others(finished: tuple[Run, dict]) -> None:
    result = json.loads((finished[0].directory / "result.json").read_text())
    for path, keys in RESULT_KEYS.items():
        entry = result
        for name in path.split():
            entry = entry[name]
        assert list(entry) == keys.split(), path


def test_result_repeats_the_values_of_its_best_student(finished: tuple[Run, dict]) -> None:
    _, result = finished
    best = result["students"][result["headline"]]
    for name in ("metrics", "agreement", "init", "export_difference", "collapsed"):
        assert result[name] == best[name], name
    for name in ("parameters", "megabytes", "latency_ms"):
        assert result[name]["student"] == best[name], name
    assert best["megabytes"] > 0
    assert 0 <= best["export_difference"] <= TOLERANCE


def test_training_learns_what_the_labels_say(small: Small, tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", 384)
    longer = ("trainer.max_epochs=12", "optimizer.lr=2e-3", f"task.train={tmp_path / 'train.csv'}")
    _, result = made(small("method=finetune", "teacher=[]", *longer))
    assert result["metrics"]["validation"]["accuracy"] > 0.85
    assert result["metrics"]["test"]["accuracy"] > 0.75


def test_parameter_counts_include_embeddings(finished: tuple[Run, dict], backbone: Path) -> None:
    run, result = finished
    student = AutoModelForSequenceClassification.from_pretrained(run.student)
    teacher = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=2)
    assert result["parameters"]["student"] == sum(p.numel() for p in student.parameters())
    assert result["parameters"]["teacher"] == sum(p.numel() for p in teacher.parameters())


def test_a_teacher_that_is_not_cached_runs_once_for_each_example_and_epoch_and_not_for_validation(small: Small) -> None:
    assert made(small("seed=9", "cache=off"))[1]["teacher_forward_examples"] == 2 * 96


def test_student_trains_with_dropout_and_its_teacher_without(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = Distiller.training_step

    def step(engine: Distiller, batch: Batch, batch_idx: int) -> torch.Tensor:
        modes = [{module.training for module in engine.student.modules()}]
        modes += [{module.training for module in teacher.encoder.modules()} for teacher in engine.teachers]
        seen.append((engine.current_epoch, modes))
        return original(engine, batch, batch_idx)

    monkeypatch.setattr(Distiller, "training_step", step)
    made(small("method=kd", "seed=6", "cache=off"))
    assert {0, 1} <= {epoch for epoch, _ in seen}
    assert all(modes in ([{True}], [{True}, {False}]) for _, modes in seen)


def test_baseline_never_runs_the_teacher(small: Small) -> None:
    _, result = made(small("method=finetune"))
    assert result["teacher_forward_examples"] == 0
    assert result["teacher"] == ["minilm"]


def test_exported_student_needs_transformers_alone(finished: tuple[Run, dict], reviews: Path) -> None:
    run, result = finished
    model = AutoModelForSequenceClassification.from_pretrained(run.student).eval()
    tokenizer = AutoTokenizer.from_pretrained(run.student)
    examples = Files(str(reviews / "train.csv"), ["text"], "label", test=str(reviews / "test.csv")).splits()["test"]
    texts, labels = [example.texts[0] for example in examples], [example.label for example in examples]
    with torch.no_grad():
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    found = [model.config.id2label[int(number)] for number in logits.argmax(-1)]
    accuracy = sum(one == other for one, other in zip(found, labels, strict=True)) / len(labels)
    assert accuracy == pytest.approx(result["metrics"]["test"]["accuracy"])
    classify = pipeline("text-classification", model=str(run.student))
    assert [answer["label"] for answer in classify(texts)] == found
    assert result["export_difference"] <= 1e-5


def test_model_card_states_lineage_and_protocol(finished: tuple[Run, dict]) -> None:
    run, result = finished
    card = (run.student / "README.md").read_text()
    lineage = result["inputs"]["teacher minilm"]
    for words in (run.digest, lineage, "first layers [1, 2]", "chosen by validation accuracy", "seed 0"):
        assert words in card
    for split in ("validation", "test"):
        assert f"| this model | {split} | accuracy | {100 * result['metrics'][split]['accuracy']:.1f} % |" in card
        teacher = result["metrics_teacher"]["minilm"][split]["accuracy"]
        assert f"| teacher minilm | {split} | accuracy | {100 * teacher:.1f} % |" in card
    for words in (
        "| epochs | 2 |",
        "| peak learning rate | 0.005 |",
        "| method.temperature | ",
        "96 train",
        "Licence: unknown",
    ):
        assert words in card


def test_model_card_has_metadata_as_the_hub_reads_it(finished: tuple[Run, dict]) -> None:
    run, result = finished
    about = ModelCard.load(run.student / "README.md").data
    assert (about.license, about.pipeline_tag, about.library_name) == ("unknown", "text-classification", "transformers")
    assert (about.base_model, about.datasets, about.metrics) == ("backbone", ["file"], ["accuracy"])
    assert {figure.dataset_split: figure.metric_value for figure in about.eval_results} == {
        split: values["accuracy"] for split, values in result["metrics"].items()
    }
    assert str(run.directory.parent) not in (run.student / "README.md").read_text(), "no place on this machine"


def test_snippet_of_a_model_card_takes_a_text_of_any_length(finished: tuple[Run, dict]) -> None:
    run, result = finished
    for record in (result, {**result, "origin": {**result["origin"], "columns": 2}}):
        card = model_card({**record, **record["students"]["student"], "parameters": record["parameters"]})
        code = card.partition("```python\n")[2].partition("```")[0].replace("path/to/this/folder", str(run.student))
        code = code.replace('"a text"', repr("fine " * 900)).replace('"a first text"', repr("fine " * 900))
        names: dict = {}
        exec(code.replace("\nuse(", "\nfound = use("), names)
        found = names["found"][0] if isinstance(names["found"], list) else names["found"]
        assert found["label"] in ("negative", "positive")


def test_history_has_terms_and_validation_of_every_epoch(finished: tuple[Run, dict]) -> None:
    with (finished[0].directory / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"train/task", "train/logits", "train/hidden", "train/loss", "validation/accuracy"} <= set(rows[0])
    assert sum(bool(row["validation/accuracy"]) for row in rows) == 2


def test_finished_run_is_not_repeated_and_its_teacher_is_shared(
    finished: tuple[Run, dict], small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    original = fitting.fit
    monkeypatch.setattr(fitting, "fit", lambda run, *more: trained.append(run.name) or original(run, *more))
    _, again = made(small())
    assert again == finished[1]
    assert trained == []
    made(small("method=kd", "seed=3", "trainer.max_epochs=1"))
    assert len(trained) == 1


def test_run_in_bfloat16_is_another_run_and_clips_gradients(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []

    def clip(parameters: list[torch.Tensor], largest: float) -> torch.Tensor:
        found = clip_gradients(parameters, largest)
        norms.append(float(torch.stack([p.grad.norm() for p in parameters]).norm()))
        return found

    monkeypatch.setattr("kd.engines.base.clip_gradients", clip)
    run, result = made(small("method=finetune", "teacher=[]", "trainer.precision=bf16-mixed", "trainer.clip=0.01"))
    assert result["precision"] == "bf16-mixed"
    assert len(norms) == 12
    assert max(norms) <= 0.01 + 1e-6
    assert run.digest != planned(small("method=finetune", "teacher=[]", "trainer.clip=0.01")).digest


def test_closing_table_shows_student_and_teacher(finished: tuple[Run, dict], capsys: pytest.CaptureFixture[str]) -> None:
    from kd.results.tables import closing_table

    closing_table(finished[1], finished[0].directory)
    shown = capsys.readouterr().out
    for words in ("student 2l", "teacher minilm", "parameters", "MB", "validation accuracy", "agreement", "latency ms"):
        assert words in shown


def test_stage_with_another_method_leaves_this_ones_keys_behind(small: Small) -> None:
    command = small("student.init=run", "student.run=['method=kd','student.init=first']", "method.layers=last", "seed=4")
    stage = planned(command).inputs.stage
    assert stage.spec.method["name"] == "kd"
    assert stage.spec.seed == 4


def test_student_begun_from_a_run_builds_that_run_first(small: Small) -> None:
    stage = small(
        "method=kd",
        "student.init=run",
        "student.run=['method=finetune','student.init=every','seed=7','optimizer.lr=5e-3']",
        "optimizer.lr=1e-9",
    )
    run, result = made(stage)
    first = run.inputs.stage
    assert first.spec.seed == 7
    assert first.result is not None
    begun = weights(first)
    assert all(torch.allclose(tensor, begun[name], atol=1e-5) for name, tensor in weights(run).items())
    assert result["inputs"]["stage"] == first.name


# An epoch has 6 batches; a checkpoint is written at the end of each and, with checkpoint_minutes=0, after every batch.
@pytest.mark.parametrize(
    ("minutes", "batches", "steps"),
    [(5, 4, []), (5, 8, [6]), (0, 4, [4]), (0, 6, [5]), (0, 7, [7]), (0, 11, [11]), (0, 12, [11])],
)
def test_stopped_run_ends_with_the_weights_of_an_unbroken_one(
    finished: tuple[Run, dict],
    small: Small,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    minutes: int,
    batches: int,
    steps: list[int],
) -> None:
    unbroken, result = finished
    teacher = unbroken.inputs.teachers["minilm"].directory
    shutil.copytree(teacher, tmp_path / teacher.name, ignore=shutil.ignore_patterns("cache"))
    overrides = small(f"paths.runs={tmp_path}", f"trainer.checkpoint_minutes={minutes}")
    run = planned(overrides)
    broken_off(run, batches, monkeypatch)
    again = execute.execute(run)
    assert same_weights(weights(run), weights(unbroken))
    assert same_weights(last_weights(run), last_weights(unbroken))
    assert again["metrics"] == result["metrics"]
    assert again["selection"] == result["selection"]
    assert again["teacher_forward_examples"] == 96  # the pass of the run that was stopped
    looks = result["teacher_forwards"]["minilm"]["batches_used"]  # the unbroken run may have found the teacher's outputs
    assert again["teacher_forwards"] == {"minilm": {"passes": 1, "examples": 96, "batches_used": looks}}
    assert "train" in again["cache"]["minilm"]["written"]
    assert again["seconds"]["cache"] > 0
    assert again["resumed"] == {"starts": 2, "from_steps": steps}
    rate, seconds = again["examples_per_second"], again["seconds"]["train"]
    assert rate * seconds == pytest.approx(192, abs=0.0005 * (rate + seconds + 1))  # both are rounded to three decimals
    with (run.directory / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == sorted(set(steps))


def test_run_stopped_between_the_batches_of_one_step_ends_like_an_unbroken_one(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = small("method=finetune", "teacher=[]", "trainer.accumulate=4", "trainer.checkpoint_minutes=0")
    unbroken, _ = made(overrides)
    run = planned([*overrides, f"paths.runs={tmp_path}"])
    broken_off(run, 9, monkeypatch)  # 6 batches an epoch: inside the window of an optimiser step
    execute.execute(run)
    assert same_weights(last_weights(run), last_weights(unbroken))


def test_best_checkpoint_is_cached_when_the_runs_have_moved(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = [0.9, 0.5, 0.6, 0.4]
    overrides = small("method=finetune", "teacher=[]", "trainer.max_epochs=4", "seed=2")

    def compute(engine: Distiller, split: str) -> dict[str, torch.Tensor]:
        return {"accuracy": torch.tensor(scores[engine.current_epoch])}

    monkeypatch.setattr(Distiller, "compute_metrics", compute)
    here, there = (planned([*overrides, f"paths.runs={tmp_path / place}"]) for place in ("here", "there"))
    broken_off(here, 14, monkeypatch)
    (tmp_path / "here").rename(tmp_path / "there")
    result = execute.execute(there)
    assert result["selection"]["epoch"] == 1
    assert result["metrics_last"]["validation"]["accuracy"] == pytest.approx(0.4)


def test_interruption_is_reported_and_leaves_nothing_that_looks_done(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = planned(small("method=finetune", "teacher=[]", f"paths.runs={tmp_path}"))
    broken_off(run, 8, monkeypatch, KeyboardInterrupt)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning leaves it ignored
    assert (run.checkpoints / "last.ckpt").is_file()
    assert execute.execute(run)["metrics"]


@pytest.mark.slow
def test_killed_process_goes_on(small: Small, tmp_path: Path) -> None:
    overrides = small("method=finetune", "teacher=[]", "trainer.max_epochs=20", "optimizer.lr=1e-4", f"paths.runs={tmp_path}")
    run = planned(overrides)
    with command(overrides) as process:
        while process.poll() is None and not (run.checkpoints / "last.ckpt").is_file():
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert run.result is None
    step = torch.load(run.checkpoints / "last.ckpt", weights_only=True)["global_step"]
    with command(overrides) as process:
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert f"resuming from step {step}\n" in output
    assert run.result is not None
    assert run.result["resumed"] == {"starts": 2, "from_steps": [step]}


@pytest.mark.slow
def test_two_processes_train_a_shared_teacher_once(small: Small, tmp_path: Path) -> None:
    commands = [command(small(f"method={method}", f"paths.runs={tmp_path}")) for method in ("kd", "pkd")]
    outputs = [process.communicate(timeout=240)[0] for process in commands]
    assert [process.returncode for process in commands] == [0, 0], outputs
    teacher = planned(small(f"paths.runs={tmp_path}")).inputs.teachers["minilm"]
    assert sum(f"{teacher.directory}\n  ok" in output for output in outputs) == 1


@pytest.mark.slow
@pytest.mark.ddp
def test_torchrun_on_two_ranks_gives_the_result_of_one(finished: tuple[Run, dict], small: Small, tmp_path: Path) -> None:
    teacher = finished[0].inputs.teachers["minilm"].directory
    shutil.copytree(teacher, tmp_path / teacher.name, ignore=shutil.ignore_patterns("cache"))
    more = ("student.dropout=0", "trainer.eval_batch_size=5")
    _, one = made(small(*more))
    arguments = small(*more, f"paths.runs={tmp_path}", "trainer=ddp", "trainer.accelerator=cpu")
    torchrun(arguments, interpreters=True)
    run = planned(arguments)
    assert run.digest == one["digest"]
    two = run.result
    assert two is not None
    assert two["ranks"] == 2
    for split, metrics in two["metrics"].items():
        assert metrics == pytest.approx(one["metrics"][split])
    check_predictions(run, two)
    assert two["teacher_forward_examples"] == 96  # the pass over train, shared by the ranks
    ours, theirs = weights(run), weights(planned(small(*more)))
    # Keys' biases change no attention, so their gradients are rounding alone, which AdamW scales up to its step.
    apart = {name: float((ours[name] - theirs[name]).abs().max()) for name in ours if not name.endswith("self.key.bias")}
    assert max(apart.values()) < 1e-5, apart


@pytest.mark.slow
@pytest.mark.ddp
def test_torchrun_with_a_ready_teacher_passes_the_preflight(finished: tuple[Run, dict], small: Small, tmp_path: Path) -> None:
    ready = ("teacher=[hub]", f"teacher.hub.model={finished[0].inputs.teachers['minilm'].student}", "method=kd")
    arguments = small(*ready, f"paths.runs={tmp_path}", "trainer=ddp", "trainer.accelerator=cpu", "trainer.max_epochs=1")
    torchrun(arguments)
    assert planned(arguments).result is not None


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kd.data.tasks import Classification

    run = planned(small("method=finetune", "teacher=[]", f"paths.runs={tmp_path}"))
    calls = []
    original = Classification.hard

    def hard(task: Classification, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return original(task, logits, labels) * (float("nan") if len(calls) == 10 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(Classification, "hard", hard)
        with pytest.raises(InputError, match=r"not finite at step 8: term 'task'"):
            execute.execute(run)
    assert run.result is None
    kept = torch.load(run.checkpoints / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 6
    assert all(torch.isfinite(tensor).all() for tensor in kept["state_dict"].values())
    assert execute.execute(run)["metrics"]


def test_truncated_checkpoint_is_refused_until_told_to_begin_again(small: Small, tmp_path: Path) -> None:
    overrides = small("method=finetune", "teacher=[]", f"paths.runs={tmp_path}")
    run = planned(overrides)
    execute.execute(run)
    (run.directory / "result.json").unlink()
    last = run.checkpoints / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(InputError, match="truncated") as error:
        execute.execute(run)
    assert error.value.key == "resume"
    assert execute.execute(planned([*overrides, "resume=false"]))["metrics"]


def test_full_disk_leaves_the_previous_checkpoint_whole(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = small("method=finetune", "teacher=[]", f"paths.runs={tmp_path}")
    run = planned(overrides)
    original = torch.save

    def save(found: dict, file: object) -> None:
        if found["global_step"] == 12:  # the second epoch's
            file.write(b"half of")
            try:
                raise OSError(28, "No space left on device")
            finally:
                raise RuntimeError("[enforce fail at inline_container.cc] . unexpected pos")  # as torch's writer does
        original(found, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        patch.setattr(sys, "argv", ["kd-train", *overrides])
        with pytest.raises(SystemExit) as stopped:
            train.main()
    assert stopped.value.code == 2
    assert "the disk is full" in capsys.readouterr().err
    assert torch.load(run.checkpoints / "last.ckpt", weights_only=True)["global_step"] == 6
    assert not list(run.checkpoints.glob("*.part"))
    assert execute.execute(run)["metrics"]


BAD = {
    "three text columns": (["task.text=[text,label,text]"], "task.text", "one column, or two"),
    "text that is no list": (["task.text=text"], "task.text", "takes a list"),
    "negative seed": (["seed=-1"], "seed", "not be negative"),
    "init that is no word": (["student.init=3"], "student.init", "'3' is not one of"),
    "weight that is not finite": (["method.weights.hidden=nan"], "method.weights.hidden", "not finite"),
    "schedule of words": (
        ["method.weights.hidden={_target_: kd.schedules.Linear, start: a, end: 0}"],
        "method.weights.hidden",
        "schedule",
    ),
    "optimiser with other arguments": (["optimizer.factory._target_=torch.optim.SGD"], "optimizer.factory.betas", "betas"),
    "method that is none": (["method._target_=builtins.dict"], "method._target_", "is not a Method"),
    "normalize that is no truth": (["method.normalize=maybe"], "method.normalize", "true, false"),
    "no metric": (["task.metrics=[]"], "task.metrics", "needs a metric"),
    "limit that leaves one class": (["task.limit_train=1"], "task.limit_train", "two or more"),
    "name that is a path": (["task.name=a/b"], "task.name", "part of a folder"),
    "unknown accelerator": (["trainer.accelerator=foo"], "trainer.accelerator", "cpu, gpu, auto"),
    "no devices": (["trainer.devices=0"], "trainer.devices", "number from 1"),
    "half precision without a GPU": (["trainer.precision=16-mixed"], "trainer.precision", "needs a GPU"),
    "no GPU, and what suits none": (["trainer=gpu", "trainer.precision=16-mixed"], "trainer", "no usable GPU"),
    "key of another method": (["method=kd", "method.layers=last"], "method.layers", "chosen method has no key"),
    "unknown method": (["method=pdk"], "method", "Did you mean 'pkd'"),
    "unknown student": (["student=33l"], "student", "there is no student '33l'"),
    "unknown teacher": (["teacher=[minlm]"], "teacher", "Did you mean 'minilm'"),
    "unknown task": (["task=sst"], "task", "Did you mean 'sst2'"),
    "misspelt key": (["method.temprature=3"], "method.temprature", "Did you mean 'method.temperature'"),
    "wrong type": (["optimizer.lr=fast"], "optimizer.lr", "fast"),
    "weight without a term": (["+method.weights.attention=1"], "method.weights.attention", "has no term"),
    "layer map too deep": (["method.layers=[[1,9]]"], "method.layers", "layer 9 of the teacher"),
    "heads that do not divide": (["student.heads=5", "student.init=random"], "student.heads", "5 heads do not divide"),
    "too many layers to copy": (["student.layers=9"], "student.init", "takes 9 layers from a model that has 4"),
    "no teacher": (["method=kd", "teacher=[]"], "teacher", "takes 1 teacher"),
    "missing file": (["task.train=nowhere.csv"], "task.train", "does not exist"),
    "no such text column": (["task.text=[sentence]"], "task.text", "no column 'sentence'"),
    "no such label column": (["task.label=class"], "task.label", "no column 'class'"),
    "unknown label": (["task.labels=[bad,good]"], "task.labels", "unknown label 'negative'"),
    "unknown metric": (["task.metrics=[acuracy]"], "task.metrics", "Did you mean 'accuracy'"),
    "no model in the folder": (["teacher.minilm.backbone=nowhere"], "teacher.minilm.backbone", "holds no model"),
    "negative rate": (["optimizer.lr=-1"], "optimizer.lr", "must be positive"),
    "zero temperature": (["method.temperature=0"], "method.temperature", "must be positive"),
    "no epochs": (["trainer.max_epochs=0"], "trainer.max_epochs", "at least 1"),
    "too long": (["task.max_length=512"], "task.max_length", "positions of the model"),
    "unwritable runs": (["paths.runs=/proc/nowhere"], "paths.runs", "cannot make"),
    "several devices in one process": (["trainer.devices=2"], "trainer.devices", "torchrun"),
    "noise beyond one": (["edit=[label_noise]", "task.edits.label_noise.rate=1.5"], "task.edits.label_noise.rate", "at most 1"),
    "ratio below one": (["edit=[imbalance]", "task.edits.imbalance.ratio=0.5"], "task.edits.imbalance.ratio", "at least 1"),
    "no model of an edit": (
        ["edit=[word_replacement]", "task.edits.word_replacement.run=null"],
        "task.edits.word_replacement.model",
        "needs `model`",
    ),
    "column that the file lacks": (["task.extra={domain: classes}"], "task.extra", "no column 'domain'"),
    "buckets that do not fit": (["method=alp_kd", "method.layers=[[1,[9]]]"], "method.layers", "layer 9 of the teacher"),
    "policy of one teacher": (["method=rl_kd", "~teacher.minilm_4l"], "method.selection", "two or more"),
    "held share that leaves nothing": (
        ["method=rl_kd", "method.before=null", "method.reward=3", "method.holds=0.999"],
        "method.holds",
        "leaves 0 to train on",
    ),
    "weights of other teachers": (
        [
            "method=rl_kd",
            "method.before=null",
            "method.selection=fixed",
            "method.teacher_weights=[1]",
            "~method.weights.policy",
        ],
        "method.teacher_weights",
        "there are 2 teachers",
    ),
    "no model of an aid": (["method=text_smoothing", "method.aids.mlm.run=null"], "method.aids.mlm.model", "needs `model`"),
    "misspelt key of a teacher's run": (
        ["+teacher.minilm.run.optimizer.rate=1"],
        "teacher.minilm.run.optimizer.rate",
        "optimizer.rate",
    ),
}


def fails(overrides: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "argv", ["kd-train", *overrides])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2, error
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize("case", BAD)
def test_bad_input_exits_with_2_and_names_the_key(
    case: str, small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong, key, words = BAD[case]
    error = fails(small(f"paths.runs={tmp_path}", *wrong), capsys, monkeypatch)
    assert words in error
    assert f"change: {key}\n" in error
    assert not list(tmp_path.iterdir()), "a refused command leaves nothing behind"


BROKEN_FILES = {
    "empty": ("", "is empty", "task.train"),
    "header only": ("text,label\n", "no examples", "task.train"),
    "one class only": ("text,label\na film,negative\nthe film,negative\n", "two or more", "task.label"),
    "broken line": ("text,label\na film,negative\nthe, film,positive\n", "line 3", "task.train"),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_broken_file_exits_with_2_and_names_the_key(
    case: str, small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content, words, key = BROKEN_FILES[case]
    (tmp_path / "a.csv").write_text(content)
    error = fails(small(f"task.train={tmp_path / 'a.csv'}", f"paths.runs={tmp_path / 'runs'}"), capsys, monkeypatch)
    assert words in error
    assert f"change: {key}\n" in error
    assert not (tmp_path / "runs").exists()


def test_ready_teacher_with_other_labels_is_refused_and_one_with_other_order_is_not(
    finished: tuple[Run, dict],
    small: Small,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = finished[0].inputs.teachers["minilm"]
    folder = tmp_path / "ready"
    shutil.copytree(source.student, folder)
    config = json.loads((folder / "config.json").read_text())
    ready = ["teacher=[hub]", f"teacher.hub.model={folder}", f"paths.runs={tmp_path}", "method=kd", "student.init=random"]
    without = [word for word in small() if not word.startswith("teacher.minilm")]

    def relabel(names: list[str]) -> None:
        config["id2label"] = {str(number): name for number, name in enumerate(names)}
        config["label2id"] = {name: number for number, name in enumerate(names)}
        (folder / "config.json").write_text(json.dumps(config))

    relabel(["spam", "ham"])
    error = fails([*without, *ready], capsys, monkeypatch)
    assert "matched by name" in error
    assert "change: teacher.hub.labels" in error

    # The same model with its two outputs swapped, names and all, teaches the same.
    model = AutoModelForSequenceClassification.from_pretrained(source.student)
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight.flip(0))
        model.classifier.bias.copy_(model.classifier.bias.flip(0))
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    relabel(["POSITIVE", "NEGATIVE"])
    _, result = made([*without, *ready])
    for split, metrics in result["metrics_teacher"]["hub"].items():
        assert metrics == pytest.approx(finished[1]["metrics_teacher"]["minilm"][split])
