"""Checks of a planned run before anything is trained."""

import os
from collections.abc import Mapping
from dataclasses import replace

import torch

from kd.build.data import build_examples, check_held, checked_length
from kd.build.edits import build_edits, check_edits
from kd.build.engine import build_engine
from kd.build.instantiate import build_optimizer, learns_from_labels_alone, logger_makers, method_of
from kd.build.models import plan_models
from kd.build.parts import engine_of
from kd.build.surgeries import prefix_surgery_errors, surgeries
from kd.config.mixture import rename_task_error_keys, tasks_of
from kd.config.schema import GRAPHS, RunSpec
from kd.config.values import locate, one_line, subclass_of
from kd.data.examples import Examples
from kd.data.texts import FlatTexts
from kd.engines.base import Engine
from kd.engines.models import Models
from kd.errors import InputError, with_keys
from kd.methods.base import Method
from kd.models.compiled import check_compiler
from kd.models.labels import columns
from kd.runs.edits import unlabelled_sources
from kd.runs.error_keys import rename_error_keys
from kd.runs.members import members
from kd.runs.run import Run
from kd.schedules import Schedule
from kd.system import distributed


def check_optimizer_steps(spec: RunSpec) -> None:
    """Check the optimiser by a step on a temporary layer, on the device of the training.

    The device matters because some optimisers need a GPU. If the GPU of the configuration is missing, the check is skipped:
    `check_machine` reports that.

    Raises:
        InputError: for arguments that the optimiser does not accept, or that result in weights that are not finite.
    """
    key, factory = "optimizer.factory", build_optimizer(spec)
    device = distributed.device(spec.trainer.accelerator)
    if spec.trainer.accelerator == "gpu" and device.type == "cpu":
        return
    layer = torch.nn.Linear(2, 2, device=device)
    try:
        optimizer = factory.optimizer(layer)
        layer(torch.ones_like(layer.weight)).sum().backward()
        optimizer.step()
    except InputError:
        raise
    except Exception as error:  # torch raises many different exceptions for invalid arguments
        raise InputError(f"the optimiser does not work: {one_line(error)}", key) from error
    if not all(parameter.isfinite().all() for parameter in layer.parameters()):
        raise InputError("a step of the optimiser results in weights that are not finite", key)


def check_memory(spec: RunSpec, models: Models) -> None:
    """Check that weights and gradients in float32, the least that training needs, fit into the memory of the machine.

    Raises:
        InputError: if they do not fit. Other memory of training, such as the optimiser's state, is not counted.
    """
    count = sum(student.parameter_count() for student in models.students.values())
    if spec.trainer.accelerator == "gpu" and torch.cuda.is_available():
        memory, whose = torch.cuda.get_device_properties(0).total_memory, "accelerator"
    elif hasattr(os, "sysconf"):
        memory, whose = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "machine"
    else:
        return
    if 8 * count > memory:
        sizes = [name for name in ("width", "intermediate", "layers") if getattr(spec.student, name) is not None]
        key = "cohort.students" if len(models.students) > 1 else f"student.{sizes[0]}" if sizes else "student"
        raise InputError(
            f"{count:,} parameters take {8 * count / 1e9:,.0f} GB for weights and gradients alone, and the {whose} has "
            f"{memory / 1e9:,.0f}; use a smaller student",
            key,
        )


def check_machine(spec: RunSpec) -> None:
    """Check that this machine supports the accelerator, the precision and the compilation of a configuration.

    Raises:
        InputError: if there is no GPU, and one of them needs one; or for CUDA graphs in several processes.
    """
    has_gpu = torch.cuda.is_available()
    if spec.trainer.accelerator == "gpu" and not has_gpu:
        raise InputError("torch finds no usable GPU on this machine; use trainer=cpu", "trainer")
    if spec.trainer.precision == "16-mixed" and (spec.trainer.accelerator == "cpu" or not has_gpu):
        raise InputError(  # Lightning would train in bf16 and the record would not say so
            "trainer.precision=16-mixed needs a GPU; on a CPU use 32-true or bf16-mixed", "trainer.precision"
        )
    if spec.trainer.compile == GRAPHS:
        check_graph_machine(spec)


def check_graph_machine(spec: RunSpec) -> None:
    """Check that CUDA graphs can be recorded here.

    Raises:
        InputError: without CUDA, or for DDP, which reduces gradients between graphs that are recorded or replayed. That could
            not be tested, and issues of PyTorch report crashes (pytorch/pytorch 128218).
    """
    trainer, key = spec.trainer, "trainer.compile"
    if distributed.device(trainer.accelerator).type == "cpu" or torch.version.cuda is None:
        where = "trains on the CPU" if torch.version.cuda or not torch.cuda.is_available() else "has a GPU without CUDA"
        raise InputError(
            f"trainer.compile={GRAPHS} records CUDA graphs, and this run {where}; use trainer=gpu or trainer.compile=false", key
        )
    if distributed.world() > 1 or trainer.strategy != "auto":
        raise InputError(
            f"trainer.compile={GRAPHS} records CUDA graphs, which are not tested with DDP; use trainer=gpu, one process, or "
            "trainer.compile=false",
            key,
        )


def check_compilation(spec: RunSpec) -> None:
    """Check that torch.compile works on this machine, if blocks are compiled.

    Raises:
        InputError: if it fails.
    """
    if spec.trainer.compile:
        check_compiler(distributed.device(spec.trainer.accelerator).type, GRAPHS if spec.trainer.compile == GRAPHS else None)


def check_arguments(run: Run) -> None:
    """Check all that needs neither data nor models: methods, schedules, surgeries, edits, optimisers, loggers.

    Raises:
        InputError: for an invalid argument; its key is named.
    """
    spec = run.spec
    check_machine(spec)  # first, because other errors do not matter on a machine that cannot run this
    method, weights = method_of(spec)
    for name, task in tasks_of(spec.task).items():
        with rename_task_error_keys(spec.task, name):
            check_unlabelled(replace(spec, task=task), method, weights)
            build_edits(task)
    surgeries(spec)
    locate(spec.engine, "engine", subclass_of(Engine), "an engine: a class of kd.engines.base.Engine")
    check_optimizer_steps(spec)
    logger_makers(spec)
    for role, needed in run.inputs:
        if not needed.has_model:
            with rename_error_keys(role, run.spec, run.config):
                check_arguments(needed)


def check_unlabelled(spec: RunSpec, method: Method, weights: Mapping[str, Schedule]) -> None:
    """Check that a method can do with training text without labels, if the task or an edit has some, or else without it.

    Raises:
        InputError: for a method that needs labels for other terms than the loss against them; or one that needs text without
            labels where there is none.
    """
    name = spec.method["name"]
    sources = unlabelled_sources(spec.task)
    if not sources:
        if (why := method.unlabelled_dependence()) is not None:
            raise InputError(
                f"method={name} needs training examples without labels: {with_keys(why, 'method', spec.method)}; add "
                "edit=[hidden_labels], edit=[denoising_chain] or task.unlabelled",
                "task.unlabelled",
            )
        return
    if learns_from_labels_alone(weights):  # examples without a label are left out
        return
    key, without = next(iter(sources.items()))
    if (why := method.label_dependence()) is not None:
        reason = with_keys(why, "method", spec.method)
        raise InputError(f"method={name} needs the label of every example: {reason}; use {without}", key)


def check_run(run: Run, examples: Mapping[str, Examples]) -> None:
    """Plan the models of a run and build the rest with their shapes, to find errors before anything is trained.

    Args:
        run: the planned run.
        examples: the examples of each of its tasks, by name.

    Raises:
        InputError: for parts of the run that do not fit each other, or the machine.
    """
    check_machine(run.spec)
    engines = {}
    for name, one in members(run).items():
        with rename_task_error_keys(run.spec.task, name):
            engines[name] = check_member(one, examples[name])
    engine_of(run, engines, examples)


def check_head(run: Run, examples: Examples) -> None:
    """Check that the head of a task of a mixture has the labels that it had in the mixture which the student starts from.

    Outside mixtures, a head with other labels is drawn afresh, and the record says so.

    Raises:
        InputError: if it has others.
    """
    needed = run.inputs.init
    if run.member is None or needed is None or needed.member is None:
        return
    ours, theirs = examples.task.labels, build_examples(needed, planned=True).task.labels
    if (ours is None) != (theirs is None) or (ours is not None and theirs is not None and columns(ours, theirs) is None):
        raise InputError(
            f"the head of '{run.member}' has the labels {theirs} in the run that the student starts from, and {ours} here",
            "task.labels",
        )


def check_member(run: Run, examples: Examples) -> Engine:
    """Check one task of a run, see `check_run`; return an engine without weights."""
    for role, needed in run.inputs:
        if role.kind == "pilot":  # all pilots hold out the same examples
            with rename_error_keys(role, run.spec, run.config):
                build_examples(needed, planned=True)
            break
    check_edits(run, examples.task)
    check_head(run, examples)
    models = plan_models(run, examples.task).shapes
    checked_length(run.spec, models)
    check_held(run, examples, models)
    for name, surgery in surgeries(run.spec).items():
        if hasattr(surgery, "dry_run"):
            with prefix_surgery_errors(run.spec, name):
                surgery.dry_run(models.student.tokenizer, FlatTexts(examples.texts["train"]))
    check_memory(run.spec, models)
    check_compilation(run.spec)
    return build_engine(run, models, examples.task)
