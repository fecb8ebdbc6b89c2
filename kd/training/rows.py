"""Training of the rows of embedding tables that occur in training text, and of no others."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from kd.config.schema import TrainerSpec
from kd.data.datamodule import KDDataModule
from kd.engines.base import Engine
from kd.engines.models import Models
from kd.methods.base import Method
from kd.models import Encoder
from kd.models.occurring_rows import OccurringRows

EXACT_WITHOUT_DECAY = (AdamW, Adam, SGD)
"""Optimisers for which a row whose gradient is always zero stays as it is, if there is no weight decay. With it, AdamW alone
multiplies such a row by a factor that does not depend on the row's other values."""

EXACT_PRECISIONS = ("32-true", "bf16-mixed", "64-true")
"""Precisions in which weights are float32 or wider, so that a weight decay does not vanish in rounding, and whose steps are
never left out, as those of a gradient scaler are."""


@dataclass(frozen=True)
class Table:
    """Word-embedding table that one or more models read, and how its rows are trained.

    Attributes:
        modules: the modules that hold it, most often one.
        names: names of the models, for messages.
        ids: words that occur in training, (rows,), increasing, int64; None if all rows are trained.
        reason: why all rows are trained; None if they are not.
    """

    modules: Sequence[nn.Module]
    names: Sequence[str]
    ids: Tensor | None = None
    reason: str | None = None

    @property
    def line(self) -> str:
        """Description for the preflight."""
        whose = " and ".join(self.names)
        if self.ids is None:
            return f"{whose}: all rows of the embedding table are trained, because {self.reason}"
        words: Any = self.modules[0]
        return (
            f"{whose}: {len(self.ids):,} of {words.num_embeddings:,} rows of the embedding table occur in train; the others "
            "have no gradient and are left out (trainer.embedding_rows)"
        )


@dataclass(frozen=True)
class Reader:
    """Model that is trained, with the words that it reads.

    Attributes:
        name: its name.
        encoder: the model.
        methods: methods that may run it.
        changes: reason why its training text differs between epochs; None if it does not.
        later: reason why not all of its training text has tokens before the training; None if it has.
        words: returns the ids of the words of its training text, padding included, (words,).
    """

    name: str
    encoder: Encoder
    methods: Sequence[Method]
    changes: str | None
    later: str | None
    words: Callable[[], np.ndarray]


def readers_of(models: Models, data: KDDataModule) -> list[Reader]:
    """Return the models that are trained on data, students and an online teacher."""
    trained = [*models.students.items()] + ([] if models.online is None else [("teacher", models.online)])
    methods = list(models.methods.values())
    return [
        Reader(name, model, methods, data.changes, data.later, partial(data.words, key))
        for (name, model), key in zip(trained, [*data.student_keys, *data.teacher_keys], strict=False)
    ]


def plan_tables(trained: Sequence[Reader], engine: Engine, trainer: TrainerSpec) -> list[Table]:
    """Return the word-embedding tables of the models that a run trains, each once, with the rows to train.

    Args:
        trained: the models, once for each text that they read.
        engine: engine of the run.
        trainer: specification of its trainer.
    """
    if trainer.embedding_rows == "all":
        return []
    readers: dict[Any, list[Reader]] = {}
    for reader in trained:
        module: Any = reader.encoder.word_embeddings
        if any(parameter.requires_grad for parameter in module.parameters()):
            readers.setdefault(getattr(module, "weight", module), []).append(reader)
    return [plan_table(weight, own, engine, trainer) for weight, own in readers.items()]


def plan_table(weight: Any, readers: Sequence[Reader], engine: Engine, trainer: TrainerSpec) -> Table:
    """Return the table that some models read; arguments as for `why_all`."""
    modules = list(dict.fromkeys(reader.encoder.word_embeddings for reader in readers))
    names = list(dict.fromkeys(reader.name for reader in readers))
    if (reason := why_all(weight, readers, modules, engine, trainer)) is not None:
        return Table(modules, names, reason=reason)
    words = np.concatenate([reader.words() for reader in readers])
    ids = torch.from_numpy(np.unique(words).astype(np.int64))
    return Table(modules, names, reason="they all occur in train") if len(ids) == len(weight) else Table(modules, names, ids)


def why_all(
    weight: Any, readers: Sequence[Reader], modules: Sequence[nn.Module], engine: Engine, trainer: TrainerSpec
) -> str | None:
    """Return the reason why all rows of a table have to be trained; None if those that occur are enough.

    Args:
        weight: the table, a parameter; the module, if it has no such parameter.
        readers: the models that read it.
        modules: the modules that hold it in these.
        engine: engine of the run.
        trainer: specification of its trainer.
    """
    for module in modules:
        if type(module) is not nn.Embedding:
            return f"it is a {type(module).__name__}"
        if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            return "its module changes norms or gradients"
    holders = {module for module in engine.modules() if any(own is weight for own in module.parameters(recurse=False))}
    if others := holders - set(modules):
        return f"a {type(next(iter(others))).__name__} has the same weights, as the decoder of a masked language model does"
    for reader in readers:
        if reader.changes is not None:
            return f"the text differs between epochs: {reader.changes}"
        if reader.later is not None:
            return reader.later
        for method in reader.methods:
            if method.other_words:
                return f"steps of {type(method).__name__} read words that train does not have"
    if trainer.precision not in EXACT_PRECISIONS:
        return f"trainer.precision={trainer.precision}"
    optimizer = engine.optimizer()
    decay = (group_of(optimizer, weight) or {}).get("weight_decay")
    if not (type(optimizer) is AdamW or (type(optimizer) in EXACT_WITHOUT_DECAY and decay == 0)):
        return f"{type(optimizer).__name__} with weight_decay={decay} is not known to multiply all other rows by one factor"
    return None


def group_of(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any] | None:
    """Return the group of an optimiser that has a parameter; None if there is none."""
    return next((group for group in optimizer.param_groups if any(own is parameter for own in group["params"])), None)


class TrainOccurringRows(pl.Callback):
    """Callback that trains only the rows of embedding tables that occur in training text.

    While it trains, the models have `OccurringRows` in place of their word embeddings. Checkpoints have whole tables and whole
    optimiser states, as if all rows were trained: a run may resume with or without them.

    Args:
        tables: tables of the models; those without `ids` stay as they are.
    """

    def __init__(self, tables: Sequence[Table]) -> None:
        self.tables = {", ".join(table.names): table for table in tables if table.ids is not None}
        self.rows: dict[str, OccurringRows] = {}
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []
        """Modules with the parents that they were submodules of, and their names there."""
        self._starts: dict[str, Tensor] = {}
        """Whole tables of the start, until training goes on."""
        self._loaded: dict[str, Any] = {}
        """Checkpoint that training resumes from, until the optimisers have read it."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Replace the modules, before the weights of a checkpoint are loaded and DDP sees the parameters."""
        for name, table in self.tables.items():
            first: Any = table.modules[0]
            assert table.ids is not None
            self.rows[name] = OccurringRows(first, table.ids)
            for parent in list(pl_module.modules()):
                for attribute, module in list(parent.named_children()):
                    if module in table.modules:
                        self._replaced.append((parent, attribute, module))
                        setattr(parent, attribute, self.rows[name])
        self._starts = {name: rows.table for name, rows in self.rows.items()}

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note the checkpoint: the optimisers, which its state is converted for, are created later."""
        self._loaded = checkpoint

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the factors of a checkpoint."""
        for name, rows in self.rows.items():
            if name in state_dict["factors"]:
                rows.restart(self._starts[name], state_dict["factors"][name])

    def state_dict(self) -> dict[str, Any]:
        """Return the factors."""
        return {"factors": {name: rows.factor for name, rows in self.rows.items()}}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let every step of an optimiser change the factors, and convert the state that it resumes from."""
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(self.follow)
        for rows in self.rows.values():
            convert(self._loaded, trainer.optimizers, rows.weight, rows.selected)
        self._starts, self._loaded = {}, {}

    def follow(self, optimizer: Optimizer, *_: object) -> None:
        """Multiply the factors as a step has multiplied rows without a gradient."""
        for rows in self.rows.values():
            # Without a gradient, the optimiser leaves the table out.
            if rows.weight.grad is not None and (group := group_of(optimizer, rows.weight)) is not None:
                rows.factor *= 1 - float(group["lr"]) * group["weight_decay"]

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the states of the optimisers as those of whole tables."""
        for rows in self.rows.values():
            convert(checkpoint, trainer.optimizers, rows.weight, rows.expanded)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the models their whole tables back."""
        for rows in self.rows.values():
            rows.restore()
        for parent, attribute, module in self._replaced:
            setattr(parent, attribute, module)
        self.rows, self._replaced = {}, []


def convert(
    checkpoint: Mapping[str, Any],
    optimizers: Sequence[Optimizer],
    weight: nn.Parameter,
    change: Callable[[Tensor], Tensor],
) -> None:
    """Change the values that a checkpoint has of a parameter in states of optimisers, one for each row of it.

    Args:
        checkpoint: the checkpoint; the optimisers' own states are not changed.
        optimizers: the optimisers, in its order.
        weight: the parameter.
        change: returns the new values.
    """
    for optimizer, state in zip(optimizers, checkpoint.get("optimizer_states", []), strict=False):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        index = next((index for index, parameter in enumerate(parameters) if parameter is weight), None)
        if index in state["state"]:
            values = state["state"][index]
            state["state"][index] = {
                name: change(value) if isinstance(value, Tensor) and value.ndim else value for name, value in values.items()
            }
