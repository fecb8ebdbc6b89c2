"""State that methods keep for later runs: the run that starts from theirs inherits it, and a student of theirs reads it."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kd.build.data import build_examples
from kd.build.models import build_models
from kd.errors import InputError
from kd.methods.base import Bound, Step
from kd.methods.finetune import Finetune
from kd.methods.wrappers.ensemble import Ensemble
from kd.methods.wrappers.mutual import Mutual
from kd.runs.run import Run
from kd.training import execute
from whole_runs import broken_off, checked, last_weights, made, planned, pool, same_weights

Small = Callable[..., list[str]]


class Keeper(Finetune):
    """Fine-tuning with a learned factor and a counter that it keeps, and a bias that it does not."""

    keeps = ("factor", "count")

    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.factor, self.bias = nn.Linear(1, size, bias=False), nn.Parameter(torch.zeros(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def bind(self, bound: Bound) -> None:
        super().bind(bound)
        nn.init.constant_(self.factor.weight, 2.0)
        self.of_teachers = [dict(teacher.kept) for teacher in bound.teachers]

    def terms(self, step: Step) -> dict[str, Tensor]:
        (task,) = super().terms(step).values()
        return {"task": task + (self.factor.weight.mean() - 1) ** 2 + (self.bias - 1) ** 2}

    def after_step(self, step: Step, terms: Mapping[str, Tensor]) -> None:
        self.count += 1


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd.methods.finetune.Keeper", Keeper, raising=False)


KEEPER = "{name: finetune, _target_: kd.methods.finetune.Keeper, size: 1, weights: {task: 1.0}}"
TWO_RUNS = ["+method.size=1", f"+method.before={KEEPER}", "method._target_=kd.methods.finetune.Keeper", "teacher=[]"]


def methods_of(run: Run) -> dict[str, Any]:
    return build_models(run, build_examples(run).task, build_examples(run).texts["train"]).methods


def test_second_run_inherits_what_the_first_kept_and_no_more(small: Small) -> None:
    run, result = made(small("method=finetune", *TWO_RUNS))
    first = run.inputs.before
    kept = load_file(first.directory / "method.safetensors")
    assert set(kept) == {"factor.weight", "count"}
    assert kept["factor.weight"] != 2.0
    of_epoch = 6
    assert kept["count"] == of_epoch * first.result["selection"]["epoch"]
    (method,) = methods_of(run).values()
    assert torch.equal(method.factor.weight.detach(), kept["factor.weight"])
    assert (method.count, method.bias.detach()) == (kept["count"], 0)
    assert last_weights(run)["method.count"] == kept["count"] + 2 * of_epoch
    assert "method.safetensors" in result["files"]


def test_kept_file_is_checked_and_written_again_like_the_student(small: Small, tmp_path: Path) -> None:
    overrides = [*small("method=finetune", *TWO_RUNS), f"paths.runs={tmp_path}"]
    run, result = made(overrides)
    file = run.directory / "method.safetensors"
    before = file.read_bytes()
    file.unlink()
    shutil.rmtree(run.student)
    assert not run.is_done()
    execute.execute(planned(overrides))
    assert file.read_bytes() == before
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert "method.safetensors" in str(run.damage(result, thorough=True))


def test_teachers_show_what_their_methods_kept(small: Small, backbone: Path) -> None:
    own = "teacher.minilm.run.method"
    keeper = [f"+{own}._target_=kd.methods.finetune.Keeper", "method._target_=kd.methods.finetune.Keeper"]
    run, _ = made(small("method=finetune", *keeper))
    kept = load_file(run.inputs.teachers["minilm"].directory / "method.safetensors")
    (method,) = methods_of(run).values()
    assert method.of_teachers[0].keys() == kept.keys()
    assert all(torch.equal(method.of_teachers[0][name], tensor) for name, tensor in kept.items())


def test_methods_that_keep_nothing_write_no_file(small: Small) -> None:
    run, result = made(small("method=finetune", "teacher=[]", "trainer.max_epochs=1"))
    assert not (run.directory / "method.safetensors").exists()
    assert all("method" not in name for name in result["files"])


def test_each_student_of_a_cohort_has_a_file(small: Small) -> None:
    keeper = ["method._target_=kd.methods.finetune.Keeper", "teacher=[]", "trainer.max_epochs=1"]
    run, result = made(small("method=finetune", "cohort=mutual", *keeper))
    files = [name for name in result["files"] if name.endswith("method.safetensors")]
    assert len(files) == 2
    assert set(load_file(run.directory / files[0])) == {"factor.weight", "count"}


def test_policy_of_the_first_run_goes_on_in_the_second_and_a_stopped_run_ends_the_same(
    small: Small, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards = [f"method.{run}{option}" for run in ("", "before.") for option in ("reward=3", "holds=0.25", "baseline=ema")]
    overrides = small("method=rl_kd", *pool(backbone, "minilm", "minilm_4l"), *rewards)
    run, result = made(overrides)
    kept = load_file(run.inputs.before.directory / "method.safetensors")
    assert set(kept) == {"policy.weight", "policy.bias"}
    (method,) = methods_of(run).values()
    assert all(torch.equal(method.state_dict()[name], tensor) for name, tensor in kept.items())
    final = last_weights(run)
    assert not torch.equal(final["method.policy.weight"], kept["policy.weight"])
    assert final["method.rewards"] == 2 * result["examples"]["train"] // 16 + 2 * (result["examples"]["train"] % 16 > 0)
    again = planned([*overrides, f"paths.runs={tmp_path}", "trainer.checkpoint_minutes=0"])
    broken_off(again, 7, monkeypatch)
    assert execute.execute(again)["metrics"] == result["metrics"]
    assert same_weights(last_weights(again), final)


def test_what_does_not_fit_is_refused(small: Small, tmp_path: Path) -> None:
    overrides = [*small("method=finetune", *TWO_RUNS), f"paths.runs={tmp_path}"]
    with pytest.raises(InputError, match=r"'factor.weight' is \(2, 1\) here, .* kept it \(1, 1\)") as caught:
        checked(lambda: planned([*overrides, "method.size=2"]))
    assert caught.value.key == "method.before"
    method = Keeper()
    with pytest.raises(InputError, match=r"'count' .* not at all"):
        method.inherit({"factor.weight": torch.zeros(1, 1)})


def test_what_a_given_teacher_kept_enters_the_digest_however_its_folder_is_written(small: Small, tmp_path: Path) -> None:
    own = [*small("method=finetune", "method._target_=kd.methods.finetune.Keeper", "teacher=[]"), f"paths.runs={tmp_path}"]
    keeper, _ = made([*own, "trainer.max_epochs=1"])
    kept = load_file(keeper.directory / "method.safetensors")

    def student(folder: Path) -> Run:
        given = ["teacher=[hub]", f"teacher.hub.model={folder}", "method._target_=kd.methods.finetune.Keeper"]
        return planned([*(word for word in small("method=finetune", *given)), f"paths.runs={tmp_path}"])

    for folder in (keeper.student, keeper.directory):
        (method,) = methods_of(student(folder)).values()
        assert torch.equal(method.of_teachers[0]["factor.weight"], kept["factor.weight"])
    digest = student(keeper.student).digest
    assert student(keeper.directory).digest == digest
    with_other = tmp_path / "copy" / "student"
    shutil.copytree(keeper.student, with_other)
    assert student(with_other).digest != digest
    shutil.copy(keeper.directory / "method.safetensors", tmp_path / "copy")
    assert student(with_other).digest == digest
    (keeper.directory / "method.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="not as it was written"):
        student(keeper.student)


def test_wrappers_keep_and_inherit_the_parts_of_each_inner_method() -> None:
    one, other = (Mutual(Ensemble(Keeper(), [0.5, 0.5])) for _ in range(2))
    for number, inner in enumerate(one.inners[0].inners):
        nn.init.constant_(inner.factor.weight, float(number))
    state = one.kept()
    assert set(state) == {f"{number}.{name}" for number in (0, 1) for name in ("factor.weight", "count")}
    other.inherit(state)
    assert [float(inner.factor.weight) for inner in other.inners[0].inners] == [0.0, 1.0]


def test_file_of_another_program_has_no_effect_on_methods_that_keep_nothing(small: Small, tmp_path: Path) -> None:
    run, _ = made([*small("method=finetune", "teacher=[]", "trainer.max_epochs=1"), f"paths.runs={tmp_path}"])
    save_file({"x": torch.zeros(1)}, run.directory / "method.safetensors")
    assert run.is_done(thorough=True)
