"""Several processes: they give one process's result, and what happens when one of them is in trouble."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
import torch
from wandb_files import runs_in, without_account

from conftest import tiny_tokenizer, write_csv
from kd.data import tokenized as tokens
from kd.errors import InputError
from kd.results.predictions import Predictions, read_predictions
from kd.system import distributed
from kd.training import execute, loggers
from processes import Command, free_port
from whole_runs import check_predictions, last_weights, planned, same_weights, weights

Small = Callable[..., list[str]]
Weights = dict[str, torch.Tensor]

PATIENCE = 4
"""Seconds after which ranks give each other up, where a test waits for it: a busy machine makes a healthy rank late."""

TROUBLE = """
import os, signal, subprocess, sys, time
from pathlib import Path
from kd import sweeps
from kd.training import fit
from kd import train
from kd.engines.distiller import Distiller
from kd.errors import InputError
from kd.system import watchdog

kind, folder, rank = os.environ["TROUBLE"], Path(os.environ["FOLDER"]), int(os.environ["RANK"])
(folder / f"rank{rank}").write_text(str(os.getpid()))
step = Distiller.training_step

def troubled(engine, batch, batch_idx):
    loss = step(engine, batch, batch_idx)
    if (rank, engine.current_epoch, batch_idx) == (0, 1, 4):
        (folder / "waits").touch()  # soon: its next collective is after this batch, which rank 1 does not leave
    if kind == "preflight" or (rank, engine.current_epoch, batch_idx) != (1, 1, 4):
        return loss
    while kind == "wait" and not (folder / "waits").exists():  # for the first rank, which may be late
        time.sleep(0.05)
    (folder / "troubled").touch()
    if kind == "nan":
        from kd.engines.nonfinite import NonFiniteLoss
        raise NonFiniteLoss({"task": float("nan")}, engine.global_step)
    if kind == "wait":
        time.sleep(0.5)
        os.kill(int((folder / "rank0").read_text()), signal.SIGTERM)
        time.sleep(100)
    if kind == "unplug":
        subprocess.run(["ip", "link", "set", os.environ["GLOO_SOCKET_IFNAME"], "down"], check=True)
        return loss
    os.kill(os.getpid(), getattr(signal, kind))
    return loss

def refuse(*arguments):  # on the first rank only
    raise InputError("refused by the preflight")

def unreadable(*arguments):
    raise InputError("a file that this machine lacks", "task.train")

if kind != "unplug":  # the store can be reached, if late on a busy machine, so that one rank alone prints
    watchdog.ANSWER = 20
Distiller.training_step = troubled
if kind == "preflight":
    fit.preflight = refuse
if kind == "plan" and rank == 1:
    sweeps.plan = unreadable
train.main()
"""
"""kd-train with trouble on rank 1: in the second epoch, at its fifth batch, between those of one optimiser step."""


def test_what_only_the_first_rank_does_exchanges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    exchanged: list[object] = []
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda box, src: exchanged.append(box))
    mine = torch.ones(2)

    def work() -> tuple[object, ...]:
        inner = distributed.on_rank_zero(lambda: "inner")  # what follows it is still the first rank's alone
        return inner, distributed.broadcast("a"), distributed.gather("b"), distributed.total(3), distributed.mean([mine])

    assert distributed.on_rank_zero(work) == ("inner", "a", ["b"], 3, [mine])
    assert len(exchanged) == 1
    for exchange in (lambda: distributed.mean([mine]), lambda: distributed.gather(1)):
        with pytest.raises(ValueError, match="process group"):  # there is none here
            exchange()


def test_what_is_said_is_said_by_the_first_rank_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tokens, "SAY_AFTER", -1)
    history = tmp_path / "metrics.csv"
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        history.write_bytes(b"step,loss\n1,0.5\n2,0.")
        loggers.History(history, 2)
        tokens.cut(tiny_tokenizer(), tokens.Texts.of([("a great film",)]), 8)
        store = tokens.TokenStore(tmp_path / "tokens")
        store.arrays(lambda: ["source"], lambda: {"ids": numpy.zeros(1)})
        next((tmp_path / "tokens").iterdir()).write_bytes(b"damaged")
        store.arrays(lambda: ["source"], lambda: {"ids": numpy.zeros(1)})
    out = capsys.readouterr().out
    for words in ("metrics.csv' is damaged", "tokenising texts", "the stored tokens"):
        assert out.count(words) == 1, out


def start(
    overrides: list[str], *options: str, network: str = "", trouble: tuple[str, Path] | None = None, **environment: str
) -> Command:
    """A torchrun of two ranks on this machine, or of one machine's rank with `options`."""
    what = ["-m", "kd.train"]
    if trouble is not None:
        kind, folder = trouble
        (folder / "trouble.py").write_text(TROUBLE)
        what = [str(folder / "trouble.py")]
        environment |= {"TROUBLE": kind, "FOLDER": str(folder)}
    place = options or ("--nproc-per-node=2", f"--master-port={free_port()}")
    return Command(["-m", "torch.distributed.run", *place, *what, *overrides], {**os.environ, **environment}, network)


def end_all(processes: list[Command], folder: Path) -> None:
    """Kill what is left of a launch with trouble."""
    for process in processes:
        process.kill()
    for file in folder.glob("rank?"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(file.read_text()), signal.SIGKILL)
    for process in processes:
        process.wait(timeout=10)


def output_of(process: Command, timeout: float = 120) -> str:
    try:
        return process.communicate(timeout=timeout)[0]
    finally:
        process.kill()


def far(one: Weights, other: Weights) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def uneven(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], list[str]]:
    """A run in a folder: two ranks divide neither its batches of 15 nor its splits; it clips, and accumulates 4 and 2."""
    data = tmp_path_factory.mktemp("uneven")
    for seed, (split, count) in enumerate({"train": 90, "validation": 31, "test": 33}.items()):
        write_csv(data / f"{split}.csv", count, seed, labels=("0.5", "4"))

    def overrides(runs: Path) -> list[str]:
        return small(
            "method=finetune",
            "teacher=[]",
            "student.dropout=0",
            "task.kind=regression",
            "task.metrics=[mse]",  # every example tells in it, also while the model is poor
            "task.monitor=mse",
            *(f"task.{split}={data / split}.csv" for split in ("train", "validation", "test")),
            "trainer=ddp",
            "trainer.accelerator=cpu",
            "trainer.accumulate=4",
            "trainer.clip=0.1",
            "trainer.eval_batch_size=5",
            "trainer.checkpoint_minutes=0",
            f"paths.runs={runs}",
        )

    return overrides


@pytest.fixture(scope="module")
def of_one(uneven: Callable[[Path], list[str]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Weights, dict, Predictions]:
    """Train in one process; return the exported weights, the record and the predictions."""
    run = planned(uneven(tmp_path_factory.mktemp("one")))
    result = execute.execute(run)
    check_predictions(run, result)
    return weights(run), result, read_predictions(run.directory)


@pytest.fixture(scope="module")
def of_two(uneven: Callable[[Path], list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on two ranks of one machine, with environment variables of SLURM that contradict it; return the folder of runs.

    Weights & Biases logs it, offline.
    """
    runs = tmp_path_factory.mktemp("two")
    offline = without_account(tmp_path_factory.mktemp("home"))
    slurm = {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}
    process = start([*uneven(runs), "logger=wandb"], SLURM_NODEID="0", SLURM_JOB_NAME="kd", **slurm, **offline)
    output = output_of(process)
    assert process.returncode == 0, output
    return runs


def check_equal(overrides: list[str], of_one: tuple[Weights, dict, Predictions]) -> None:
    theirs, one, predictions = of_one
    run = planned(overrides)
    two = run.result
    assert two is not None
    assert (two["ranks"], two["digest"]) == (2, one["digest"])
    for part in ("metrics", "metrics_last"):
        for split, found in two[part].items():
            assert found == pytest.approx(one[part][split], rel=1e-5), (part, split)
    assert far(weights(run), theirs) < 1e-4  # AdamW over 4 steps
    check_predictions(run, two)
    for name, split in read_predictions(run.directory).splits.items():
        expected = predictions.splits[name]
        assert (split.texts, split.labels.tolist()) == (expected.texts, expected.labels.tolist())
        numpy.testing.assert_allclose(split.students["student"], expected.students["student"], atol=1e-3)  # other weights


@pytest.mark.slow
@pytest.mark.ddp
def test_two_ranks_of_half_a_batch_equal_one_of_a_whole_batch_and_torchrun_beats_slurm(
    of_two: Path, of_one: tuple[Weights, dict, Predictions], uneven: Callable[[Path], list[str]]
) -> None:
    check_equal(uneven(of_two), of_one)


@pytest.mark.slow
@pytest.mark.ddp
def test_only_rank_zero_logs_to_wandb(of_two: Path, uneven: Callable[[Path], list[str]]) -> None:
    run = planned(uneven(of_two))
    (logged,) = runs_in(run.directory)
    with (run.directory / "metrics.csv").open() as file:
        steps = {int(line.partition(",")[0]) for line in list(file)[1:]}
    assert {row["trainer/global_step"] for row in logged.history} == steps
    assert (logged.run.run_id, logged.exit_code) == (run.digest, 0)


@pytest.mark.slow
@pytest.mark.ddp
def test_killed_rank_ends_the_other_and_the_next_start_ends_with_the_same_weights(
    of_two: Path, uneven: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    overrides = uneven(tmp_path)
    unbroken, run = planned(uneven(of_two)), planned(overrides)
    process = start(overrides, trouble=("SIGKILL", tmp_path))
    output = output_of(process)
    assert process.returncode != 0
    assert time.time() - (tmp_path / "troubled").stat().st_mtime < 25  # torchrun kills after 30, whatever the ranks do
    assert output.count("resume from the last checkpoint") == 1, output
    assert "another rank has ended" in output or "stopped by SIGTERM" in output
    assert output.count("Traceback") == 1, output  # torchrun's own
    assert run.result is None
    process = start(overrides)
    output = output_of(process)
    assert process.returncode == 0, output
    assert "resuming from step 3" in output
    assert same_weights(weights(run), weights(unbroken))
    assert same_weights(last_weights(run), last_weights(unbroken))
    assert (run.result or {})["metrics"] == (unbroken.result or {})["metrics"]


@pytest.mark.slow
@pytest.mark.ddp
def test_rank_that_does_not_answer_is_given_up(uneven: Callable[[Path], list[str]], tmp_path: Path) -> None:
    process = start(uneven(tmp_path), trouble=("SIGSTOP", tmp_path), KD_PATIENCE=str(PATIENCE))
    try:
        said = process.line_with("kd-train:")
        assert said.startswith("kd-train: no answer from rank 1 (")
        assert said.endswith(f"for {PATIENCE} s; this rank stops too. Run the same command to resume from the last checkpoint")
    finally:
        end_all([process], tmp_path)


@pytest.mark.slow
@pytest.mark.ddp
def test_sigterm_ends_a_rank_that_waits_in_a_collective(uneven: Callable[[Path], list[str]], tmp_path: Path) -> None:
    process = start(uneven(tmp_path), trouble=("wait", tmp_path))
    until = time.monotonic() + 300
    while process.poll() is None and not (tmp_path / "troubled").exists() and time.monotonic() < until:
        time.sleep(0.05)
    output = output_of(process, 25)  # torchrun kills after 30
    assert output.count("kd-train: stopped by SIGTERM") == 1, output
    assert output.count("exitcode  : 143") == 2, output
    assert output.count("Traceback") == 1, output


@pytest.mark.slow
@pytest.mark.ddp
def test_point_that_fails_on_every_rank_leaves_the_rest_of_a_sweep_alone(
    uneven: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    overrides = uneven(tmp_path)
    sweep = ["--multirun", "student.layers=9,2", "preflight=true,false"]
    process = start([*sweep, *overrides], trouble=("preflight", tmp_path))
    output = output_of(process)
    assert planned(overrides).result is not None, output
    assert output.count("kd-train: 1 done, 3 failed:") == 1, output
    told, _, listed = output.partition("kd-train: 1 done, 3 failed:")
    for words, count in {"takes 9 layers from a model that has 4": 2, "refused by the preflight": 1}.items():
        assert (told.count(words), listed.count(words)) == (count, count), output
    assert "Traceback" not in told
    assert "exitcode  : 2" in output


@pytest.mark.slow
@pytest.mark.ddp
def test_point_that_fails_on_one_rank_ends_the_sweep(uneven: Callable[[Path], list[str]], tmp_path: Path) -> None:
    overrides = [*uneven(tmp_path), "preflight=false"]
    process = start(["--multirun", "seed=1,2", *overrides], trouble=("nan", tmp_path), KD_PATIENCE=str(PATIENCE))
    output = output_of(process)
    assert process.returncode != 0
    assert output.count("the loss is not finite at step 3") == 1, output
    assert output.count("Traceback") == 1, output
    assert not planned([*overrides, "seed=2"]).directory.exists()


@pytest.mark.slow
@pytest.mark.ddp
def test_point_that_one_rank_cannot_plan_ends_the_sweep_with_its_reason(
    uneven: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    overrides = uneven(tmp_path)
    # torchrun ends all ranks once it has seen one end, so it looks seldom: each has the time to end by itself.
    place = ("--nproc-per-node=2", f"--master-port={free_port()}", "--monitor-interval=10")
    process = start(["--multirun", "seed=1,2", *overrides], *place, trouble=("plan", tmp_path))
    output = output_of(process)
    assert output.count("point 1 of 2: seed=1:\n  rank 1 fails: a file that this machine lacks\n  rank 0 plans ") == 1, output
    assert output.count("change: task.train") == 1
    assert output.count("exitcode  : 2") == 2, output  # the rank that has nothing to make waits for no other
    assert not planned([*overrides, "seed=1"]).directory.exists()


@pytest.mark.slow
@pytest.mark.ddp
def test_two_ranks_export_a_done_run_again_whose_vocabulary_was_cut(small: Small, tmp_path: Path) -> None:
    settings = ("method=finetune", "teacher=[]", "surgery=[cut_vocabulary]", "trainer=ddp", "trainer.accelerator=cpu")
    overrides = small(*settings, "trainer.max_epochs=1", f"paths.runs={tmp_path}")
    run = planned(overrides)
    record = execute.execute(run)
    weights_before = (run.student / "model.safetensors").read_bytes()
    shutil.rmtree(run.student)
    process = start(overrides)
    output = output_of(process)
    assert process.returncode == 0, output
    assert output.count("it is exported again") == 1
    assert (run.student / "model.safetensors").read_bytes() == weights_before
    assert planned(overrides).result == record


@pytest.mark.ddp
def test_input_error_of_every_rank_is_printed_once(small: Small, tmp_path: Path) -> None:
    process = start(small("trainer.batch_size=15", f"paths.runs={tmp_path}"))
    output = output_of(process)
    assert output.count("trainer.batch_size=15 is the batch over all ranks; 2 do not divide it") == 1, output
    assert "exitcode  : 2" in output


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize(
    ("second", "message"),
    [("paths.runs={folder}/b", "is not a folder that all machines share"), ("seed=2", "do not train the same run")],
)
def test_machines_that_do_not_do_the_same_are_told(
    second: str, message: str, uneven: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    place = ("--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}")
    own = ([], [second.format(folder=tmp_path)])
    processes = [start([*uneven(tmp_path), *more], *place, f"--node-rank={rank}") for rank, more in enumerate(own)]
    outputs = [output_of(process) for process in processes]
    assert any(message in output for output in outputs), outputs
    assert all(process.returncode for process in processes)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """Two network namespaces, 10.213.7.1 and 10.213.7.2, joined by a veth pair; their ends have the namespaces' names."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need the command `ip` and root")
    names = [f"kd{os.getpid() % 100000}{end}" for end in "ab"]

    def ip(*words: str) -> None:
        made = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"network namespaces cannot be made here: ip {' '.join(words)}: {made.stderr.strip()}")

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.213.7.{number}/24", "dev", name)
            for device in ("lo", name):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def start_on(
    hosts: list[str], overrides: list[str], trouble: tuple[str, Path] | None = None, **environment: str
) -> list[Command]:
    place = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-endpoint=10.213.7.1:29500")
    return [
        start(
            overrides,
            *place,
            f"--node-rank={rank}",
            network=name,
            trouble=trouble,
            GLOO_SOCKET_IFNAME=name,
            **environment,
        )
        for rank, name in enumerate(hosts)
    ]


@pytest.mark.slow
@pytest.mark.ddp
def test_two_hosts_equal_one_process(
    hosts: list[str], of_one: tuple[Weights, dict, Predictions], uneven: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    processes = start_on(hosts, uneven(tmp_path))
    outputs = [output_of(process) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    check_equal(uneven(tmp_path), of_one)


@pytest.mark.slow
@pytest.mark.ddp
def test_hosts_that_lose_each_other_both_end(hosts: list[str], uneven: Callable[[Path], list[str]], tmp_path: Path) -> None:
    processes = start_on(hosts, uneven(tmp_path), ("unplug", tmp_path), KD_PATIENCE=str(PATIENCE))
    try:
        for process in processes:
            assert "no answer from" in process.line_with("kd-train:")
    finally:
        subprocess.run(["ip", "-n", hosts[1], "link", "set", hosts[1], "up"], check=False)
        end_all(processes, tmp_path)


def test_one_process_inside_a_slurm_job_is_alone(
    uneven: Callable[[Path], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "kd", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert execute.execute(planned(uneven(tmp_path)))["ranks"] == 1


NEEDED = {
    "its own": (["trainer.batch_size=15"], "trainer.batch_size"),
    "its teacher's": (["+teacher.minilm.run.trainer.batch_size=15"], "teacher.minilm.run.trainer.batch_size"),
    "its stage's": (["student.init=run", "student.run=['student.init=first','trainer.batch_size=15']"], "student.run"),
}


@pytest.mark.parametrize("case", NEEDED)
def test_batch_that_the_ranks_do_not_divide_is_refused(case: str, small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, key = NEEDED[case]
    monkeypatch.setenv("WORLD_SIZE", "2")
    execute.check_launch(planned(small()))
    with pytest.raises(InputError, match="batch_size=15 is the batch over all ranks") as error:
        execute.check_launch(planned(small(*wrong)))
    assert error.value.key == key


@pytest.mark.parametrize(
    ("trouble", "status"),
    [
        ("os.close(2)", 3),
        (
            "os.kill(os.getpid(), signal.SIGTERM)",
            128 + signal.SIGTERM,
        ),  # the status says so, although a collective failed first
    ],
    ids=["nobody listens", "SIGTERM"],
)
def test_rank_ends_with_the_status_of_its_reason(trouble: str, status: int) -> None:
    lines = (
        "import os, signal",
        "from kd.system.watchdog import Watchdog",
        "watchdog = Watchdog(0, 1)",
        trouble,
        "watchdog.end('rank 1 is gone', 3)",
    )
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANK": "0", "WORLD_SIZE": "1"}
    assert subprocess.run([sys.executable, "-c", "\n".join(lines)], env=environment, check=False).returncode == status


GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:4567. This is typical"


def test_only_errors_of_a_connection_say_that_a_rank_is_gone() -> None:
    assert distributed.lost_peer(RuntimeError(GLOO)) == "Connection closed by peer [10.0.0.2]:4567"
    outer = ValueError("while it was handled")
    outer.__context__ = RuntimeError(GLOO)
    assert distributed.lost_peer(outer)
    nccl = torch.distributed.DistBackendError
    assert distributed.lost_peer(nccl("NCCL error: remote process exited or there was a network error"))
    assert distributed.lost_peer(nccl("NCCL error: invalid usage")) is None
    assert distributed.lost_peer(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")) is None
