"""State of the process that calls `kd.run`: what a run changes in it is put back."""

import contextlib
import gc
import logging
import os
import random
import warnings
from collections.abc import Iterator

from kd.config.compose import conf_folder

LOGGERS = ("lightning.pytorch", "lightning.fabric")
"""Loggers whose level a run changes (`kd.training.trainer.quieten`)."""


@contextlib.contextmanager
def own_hydra() -> Iterator[None]:
    """Let configurations be composed from the files of kd alone, also inside an application of Hydra, which is put back."""
    from hydra import initialize_config_dir, version
    from hydra.core.global_hydra import GlobalHydra

    base, instance = version.getbase(), GlobalHydra.instance()
    application = instance.hydra
    instance.clear()  # it can be initialised once
    try:
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            yield
    finally:
        GlobalHydra.set_instance(instance)
        instance.hydra = application
        if hasattr(base, "release"):  # otherwise nothing of Hydra has set one yet
            version.VersionBase.instance().setbase(base)  # type: ignore[arg-type]


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Put back what a run changes in its process.

    That is the environment, the random states of Python, NumPy and PyTorch, warnings' filters, the levels of the loggers of
    Lightning and transformers, settings of PyTorch (threads, determinism, cuDNN), and objects that were frozen for Python's
    garbage collector. Two things stay: modules are imported, and glibc keeps freed memory for the process
    (`kd.system.hardware.keep_memory`).
    """
    environment, frozen = dict(os.environ), gc.get_freeze_count()  # first, because imports change it
    import lightning.pytorch  # noqa: F401 - its import sets levels of loggers, before they are noted
    import numpy as np
    import torch
    import transformers

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    verbosity = transformers.logging.get_verbosity()
    bar = transformers.utils.logging.is_progress_bar_enabled()  # type: ignore[attr-defined]
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn.benchmark
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        transformers.logging.set_verbosity(verbosity)
        if bar:
            transformers.utils.logging.enable_progress_bar()  # type: ignore[attr-defined]
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = cudnn
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        if not frozen and gc.get_freeze_count():
            gc.unfreeze()
