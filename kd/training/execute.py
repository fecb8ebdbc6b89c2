"""Execution of a planned run: its checks, the runs that it needs, then its training."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kd.errors import InputError
from kd.results.tuned import state_tuned, tuned_of
from kd.runs.error_keys import rename_error_keys
from kd.runs.retention import with_model, write_uses
from kd.runs.run import Role, Run, keep_of
from kd.system import distributed
from kd.system.files import made_by_success, writes_to
from kd.system.hardware import git
from kd.system.startup import without_collection
from kd.training.reduce import reduce_run

if TYPE_CHECKING:
    from lightning.pytorch import Callback

    from kd.data.examples import Examples


def execute(
    run: Run, role: Role | None = None, *, first: bool = True, model: bool = True, callbacks: "Sequence[Callback]" = ()
) -> dict[str, Any]:
    """Execute a run and the runs that it needs, unless they are done; return its record.

    Args:
        run: the run to execute.
        role: its part in the run that needs it; None for the run that the command requests.
        first: True for the run that the command requests; then all runs that it needs are checked before any is executed.
        model: True if the run that needs this one reads its model. It then retains that, whatever `trainer.keep`, and is
            trained again if it has let it go.
        callbacks: Lightning callbacks of this run's training, beside its own. An error that one raises ends the run, which
            resumes from its last checkpoint.

    Raises:
        InputError: for an error that the user can correct.
    """
    if not first and model:
        trainer = replace(run.spec.trainer, keep=with_model(run.spec.trainer.keep))
        run = replace(run, spec=replace(run.spec, trainer=trainer))

    def state() -> tuple[dict[str, Any] | None, str | None]:
        """Return the record and the damage to the exports; for a run whose model another reads, digests are compared too."""
        record = run.result
        return record, None if record is None else run.damage(record, thorough=not first and model)

    purpose = run.name if role is None else f"{role}: {run.name}"
    result, damage = distributed.on_rank_zero(state)
    if result is not None and damage is None:
        distributed.print_rank_zero(f"done already: {purpose}")
        distributed.print_rank_zero(f"  {run.directory}")
        record = result
        return distributed.on_rank_zero(lambda: conclude_done(run, record, first=first, model=model))
    with without_collection(freeze=True):
        import kd.build.check
        import kd.training.fit
        import kd.training.tracking  # noqa: F401 - all that the run needs, at once
        from kd.build.parts import examples_of

    # Before any run that it needs is trained. The examples are referenced from here on, so that the runs reuse them.
    read = check_all(run) if first else []
    examples = examples_of(run, planned=True)
    del read
    with writes_to(run.spec.paths.runs), contextlib.ExitStack() as held:
        distributed.on_rank_zero(lambda: held.enter_context(run.lock()))
        if not all(distributed.gather(run.directory.is_dir())):
            raise InputError(f"'{run.spec.paths.runs}' is not a folder that all machines share", "paths.runs")
        result, damage = distributed.on_rank_zero(state)  # another process may have finished it while this one waited
        if result is not None and damage is None:
            record = result
            return distributed.on_rank_zero(lambda: conclude_done(run, record, first=first, model=model, has_lock=True))
        distributed.on_rank_zero(lambda: write_uses(run))
        git()  # of the code that this process has loaded; it is kept for the record
        for part, needed in run.inputs:
            with rename_error_keys(part, run.spec, run.config):
                execute(needed, part, first=False, model=reads_model(part))
        examples = examples_of(run)  # other ones only if an edit reads a model, which is trained now

        distributed.print_rank_zero(f"\n{purpose}\n  {run.directory}")
        record = fit_or_export(run, examples, result, damage, role, callbacks)
        return distributed.on_rank_zero(lambda: reduce_run(run, record, first=first, model=model, has_lock=True))


def conclude_done(run: Run, record: dict[str, Any], *, first: bool, model: bool, has_lock: bool = False) -> dict[str, Any]:
    """Return the record of a run that was done before, after what the command changes in it.

    These are the search that its settings came of (`tuned`), and the files that it retains. Arguments as for
    `kd.training.reduce.reduce_run`.
    """
    for entry in tuned_of(run.spec.tuned) if first else []:
        record = state_tuned(run.directory, entry, has_lock=has_lock) or record
    return reduce_run(run, record, first=first, model=model, has_lock=has_lock)


def reads_model(role: Role) -> bool:
    """Return whether a run reads the model of one that it needs in this role: of a pilot it reads the scores alone."""
    return role.kind != "pilot"


def fit_or_export(
    run: Run,
    examples: Mapping[str, "Examples"],
    result: dict[str, Any] | None,
    damage: str | None,
    role: Role | None,
    callbacks: "Sequence[Callback]" = (),
) -> dict[str, Any]:
    """Train a locked run whose inputs are done, or export its students again if that is enough; return its record.

    Args:
        run: the run.
        examples: examples of its tasks, by name.
        result: its record; None if it is not done.
        damage: description of the damage to its exports; None if there is no record.
        role: its part in the run that needs it; None for the run that the command requests.
        callbacks: Lightning callbacks of the training, beside the run's own.

    Raises:
        InputError: for an error that the user can correct, as exports that cannot be written again.
    """
    from kd.training.fit import export_again, fit

    if result is None:
        if distributed.on_rank_zero((run.directory / "result.json").exists):
            resumes = distributed.on_rank_zero((run.checkpoints / "last.ckpt").exists)
            then = "the run resumes from its last checkpoint" if resumes else "it has no checkpoint, and is trained again,"
            distributed.print_rank_zero(f"  its result.json is damaged; {then} and writes it anew")
        return fit(run, examples, role, callbacks)
    keep = keep_of(result)
    if keep == "figures":
        distributed.print_rank_zero(
            "  done, but trainer.keep=figures has let its model go, which another run needs: it is trained again"
        )
        return fit(run, examples, role, callbacks)
    distributed.print_rank_zero(f"  done, but {damage}; it is exported again")
    try:
        if keep == "student":
            raise InputError(
                f"'{run.directory}' cannot be exported again: trainer.keep=student has let its checkpoint go. Start this run "
                "again with resume=false",
                "resume",
            )
        return distributed.on_rank_zero(lambda: export_again(run, examples, result))
    except InputError as error:
        if run.spec.resume:
            raise
        distributed.print_rank_zero(f"  it cannot be exported again, so the run starts again: {error.message}")
    return fit(run, examples, role, callbacks)


def check_all(run: Run) -> list[Any]:
    """Check the run that a command requests, and all unfinished runs that it needs; return the examples that were read for it.

    A refusal leaves no folder behind: stored text without labels is removed with a folder of runs that was not there before.

    Raises:
        InputError: for settings that cannot work, naming the key of the command.
    """
    from kd.build.check import check_arguments
    from kd.build.data import store_of

    read: list[Any] = []
    with made_by_success(store_of(run)):
        check_arguments(run)
        check_needed(run, read)
    return read


def check_needed(run: Run, read: list[Any]) -> None:
    """Check a run that is not done, all but its arguments, and all unfinished runs that it needs.

    Args:
        run: the run.
        read: gets the examples that are read, which keeps them for runs that need the same ones.

    Raises:
        InputError: for settings that cannot work, naming the key of the command.
    """
    from kd.build.check import check_run
    from kd.build.parts import examples_of
    from kd.training.tracking import check_loggers

    examples = examples_of(run, planned=True)
    read.append(examples)
    check_loggers(run)
    check_run(run, examples)
    for role, needed in run.inputs:
        if not needed.has_model:
            with rename_error_keys(role, run.spec, run.config):
                check_needed(needed, read)


def deliver(run: Run) -> None:
    """Execute a run, unless it is done, and print its table."""
    result = execute(run)
    if distributed.is_rank_zero():
        from kd.results.tables import closing_table

        closing_table(result, run.directory)


def check_launch(run: Run, key: str = "trainer.batch_size") -> None:
    """Check that the number of processes fits a run and the runs that it needs.

    Several processes are started by torchrun, never by Lightning, which would start this command again in each.

    Args:
        run: the run to execute.
        key: configuration key of its batch size.

    Raises:
        InputError: if several devices are requested in one process, or the batch size is not a multiple of the number of
            ranks.
    """
    trainer = run.spec.trainer
    wanted = int(trainer.devices) if str(trainer.devices).isdigit() else 1
    if distributed.world() == 1 and wanted > 1:
        raise InputError(
            f"trainer.devices={trainer.devices} needs a process for each: "
            f"torchrun --nproc-per-node={wanted} -m kd.train trainer=ddp ...",
            "trainer.devices",
        )
    if trainer.batch_tokens is None and trainer.batch_size % distributed.world():
        raise InputError(
            f"trainer.batch_size={trainer.batch_size} is the batch over all ranks; {distributed.world()} do not divide it",
            key,
        )
    for role, needed in run.inputs:
        with rename_error_keys(role, run.spec, run.config):
            check_launch(needed, "student.run" if role.kind == "stage" else "trainer.batch_size")


def check_ranks(run: Run) -> None:
    """Check that all ranks have the same run and settings: on several machines, several commands start them.

    Raises:
        InputError: if they differ.
    """
    caches = distributed.gather(str(run.spec.cache))
    if len(set(caches)) > 1:
        raise InputError(f"the ranks do not agree on cache: {', '.join(caches)}", "cache")
    names = distributed.gather(run.name)
    for rank, name in enumerate(names):
        if name != names[0]:
            raise InputError(f"the ranks do not train the same run: rank 0 is at {names[0]}, rank {rank} at {name}")
    counts = sorted(set(distributed.gather(distributed.local_world())))
    if len(counts) > 1:
        raise InputError(f"every machine has to start as many ranks: {counts} were started; see --nproc-per-node")
