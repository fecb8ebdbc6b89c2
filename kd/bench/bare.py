"""A candidate that fine-tunes in a bare loop: the models, batches and losses of a run, without the trainer around them."""

import itertools
from contextlib import nullcontext

import torch

from kd.bench.harness import occurring_rows, prepare
from kd.bench.workers import Gate, Job
from kd.build.engine import build_engine
from kd.engines.distiller import Distiller
from kd.engines.nonfinite import clip_gradients
from kd.errors import InputError
from kd.methods.base import Progress
from kd.system.hardware import keep_memory


def train_bare(job: Job, gate: Gate) -> None:
    """Run the turns of a loop that computes a loss, its gradient, and an optimiser step, on the CPU.

    It has what changes the weights, clipping and the schedule included, and nothing else: no checks, logs, hooks or progress.
    The ratio of a run to it is the share of all these.

    Raises:
        Finished: when there are no more turns.
        InputError: for a run that cannot be built, or that does more than one update for a batch.
    """
    prepared = prepare(job)
    keep_memory()
    run = prepared.run
    trainer = run.spec.trainer
    engine = build_engine(run, prepared.models, prepared.examples.task)
    if not (isinstance(engine, Distiller) and engine.automatic_optimization) or trainer.accelerator != "cpu":
        raise InputError("the bare loop takes one optimiser step for a batch, on the CPU", "method")
    rows = occurring_rows(prepared, engine)
    rows.setup(None, engine, "fit")  # type: ignore[arg-type]
    gate.ready(prepared.facts(trainer.precision), trainer.accelerator)
    loader = prepared.data.loader("train", run.spec.seed)
    optimizer = engine.optimizer()
    optimizer.register_step_post_hook(rows.follow)
    total = (job.turns + 1) * -(-len(loader) // trainer.accumulate)
    scheduler = engine.optimizer_factory.scheduler(optimizer, total)
    autocast = torch.autocast("cpu", torch.bfloat16) if trainer.precision == "bf16-mixed" else nullcontext()
    engine.train()
    step = 0
    for epoch in itertools.count():
        gate.open()
        loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
        examples = 0
        for number, batch in enumerate(loader, start=1):
            with autocast:
                loss = engine.loss(batch, Progress(step, total, epoch)).total * batch.weight
            (loss / trainer.accumulate).backward()
            examples += len(batch)
            if number % trainer.accumulate and number < len(loader):
                continue
            for parameters in engine.trained() if trainer.clip else []:
                clip_gradients(parameters, trainer.clip or 0.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
            step += 1
        gate.close(examples)
