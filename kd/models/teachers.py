"""Frozen teachers: models that run in training, and teachers of which outputs were cached."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from kd.errors import InputError
from kd.forward.inputs import LIVE, ORDER, Inputs, tensors_of
from kd.forward.kinds import by_token
from kd.forward.needs import Needs
from kd.forward.outputs import Outputs, UndeclaredRead
from kd.models.encoder import Encoder
from kd.models.labels import columns, reordered

if TYPE_CHECKING:
    from kd.data.tokenized import AnyTokenizer


def match_labels(task: Sequence[str], teacher: Sequence[str], key: str) -> list[int]:
    """Return, for each label of the task, its column in the teacher's logits; see `kd.models.labels.columns`.

    Raises:
        InputError: if the names differ as sets; labels are never matched by position.

    >>> match_labels(["negative", "positive"], ["POSITIVE", "NEGATIVE"], "teacher.x.labels")
    [1, 0]
    """
    matched = columns(task, teacher)
    if matched is None:
        hint = f"If the teacher's configuration names them badly, list its labels in the order of its outputs: {key}=[...]"
        if any(re.fullmatch(r"LABEL_\d+", name) for name in teacher):
            hint = f"The teacher's outputs have no names but numbers; list the task's labels in their order: {key}=[...]"
        raise InputError(
            f"the task's labels are {list(task)}, the teacher's are {list(teacher)}; they are matched by name, and these "
            f"do not match. {hint}",
            key,
        )
    return matched


class FrozenTeacher:
    """A teacher that is not trained: in eval mode, and not part of `parameters()`, checkpoints or DDP.

    Only a forward pass with `Needs.dropout` runs in training mode. The class is not an `nn.Module`, so that an engine does not
    register it as a submodule; the engine moves it between devices.

    Args:
        encoder: the fine-tuned model; if `load` is given, a model of the same shape on the meta device.
        name: its name in messages and results.
        columns: for each label of the task, its column in this teacher's logits; None keeps their order.
        load: function that loads the model with its weights, called when they are first needed.
        kept: what the method that trained it kept (`Method.keeps`), by name; empty while the teacher is only planned.
    """

    runs = True
    """True if the model runs; False if all outputs that are read were cached, and its weights are not in memory."""

    def __init__(
        self,
        encoder: Encoder,
        name: str = "teacher",
        columns: Sequence[int] | None = None,
        load: Callable[[], nn.Module] | None = None,
        kept: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.shape = encoder.eval().requires_grad_(False)
        """Model that has the shape and configuration, but may have no weights."""
        self.load = load
        self.kept = dict(kept or {})
        self.loaded = encoder if load is None else None
        self.name = name
        self.columns = None if columns is None or list(columns) == sorted(columns) else list(columns)
        self.passes = 0
        """Number of forward passes so far, on this rank."""
        self.examples = 0
        """Number of examples in these passes, on this rank."""
        self.batches_used = 0
        """Number of batches so far in which a method read its outputs, on this rank."""

    @property
    def work(self) -> dict[str, int]:
        """Counts of forward passes, examples and batches used so far, on this rank."""
        return {"passes": self.passes, "examples": self.examples, "batches_used": self.batches_used}

    @work.setter
    def work(self, counts: Mapping[str, int]) -> None:
        self.passes, self.examples, self.batches_used = (counts.get(name, 0) for name in ("passes", "examples", "batches_used"))

    @property
    def encoder(self) -> Encoder:
        """Model with its weights, which are loaded when this property is first read."""
        if self.loaded is None:
            assert self.load is not None
            with torch.random.fork_rng(devices=[]):  # loading must not change the state of the random generator
                self.loaded = Encoder(self.load(), self.shape.tokenizer).eval().requires_grad_(False)
        self.loaded.compiled = self.shape.compiled
        return self.loaded

    def release(self) -> None:
        """Free the weights if they can be loaded again, which happens when they are next needed."""
        if self.load is not None:
            self.loaded = None

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.shape.depth

    @property
    def width(self) -> int:
        """Size of a hidden state."""
        return self.shape.width

    @property
    def heads(self) -> int:
        """Number of attention heads in a block."""
        return self.shape.heads

    @property
    def word_embeddings(self) -> nn.Module:
        """Module that looks up word embeddings: (batch, tokens) -> (batch, tokens, width)."""
        return self.encoder.word_embeddings

    @property
    def tokenizer(self) -> "AnyTokenizer":
        """Tokenizer of its inputs."""
        return self.shape.tokenizer  # type: ignore[no-any-return]

    def __call__(self, inputs: Inputs, needs: Needs) -> Outputs:
        """Run one forward pass, without gradients unless `needs.gradient`; logits are in the task's label order."""
        self.batches_used += 1
        return self.in_order(self.run_counted(inputs, needs))

    def run_counted(self, inputs: Inputs, needs: Needs) -> Outputs:
        """Run one forward pass and count it, with logits in the teacher's label order."""
        before = self.encoder.forwards
        outputs = self.run(inputs, needs)
        passes = self.encoder.forwards - before  # more than one if `needs.derived` runs further passes
        self.passes += passes
        self.examples += passes * len(tensors_of(inputs)["attention_mask"])
        return outputs

    def run(self, inputs: Inputs, needs: Needs) -> Outputs:
        """Run one forward pass that is not counted, with logits in the teacher's label order."""
        encoder = self.encoder.train(needs.dropout)
        with torch.set_grad_enabled(needs.gradient):
            outputs: Outputs = encoder(inputs, needs)
        encoder.eval()
        return outputs

    @torch.no_grad()
    def logits_of(self, states: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return masked-LM logits at some positions, (positions, vocabulary); arguments as for `Encoder.logits_of`."""
        return self.encoder.logits_of(states, ids)

    def in_order(self, outputs: Outputs) -> Outputs:
        """Return outputs with the logits reordered to the task's label order."""
        return outputs if self.columns is None else outputs.with_logits(reordered(outputs.logits, self.columns))

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Move or convert every tensor, as `nn.Module._apply` does for modules."""
        self.encoder._apply(function)


class CachedTeacher(FrozenTeacher):
    """A frozen teacher whose inputs are the outputs that it had for the examples (`kd.teacher_cache.cache`).

    It does not run, or only on the examples that are not cached.

    Args:
        teacher: the teacher whose outputs were cached.
        passes: number of forward passes that filled the cache, in this run and on this rank.
        examples: number of examples in these passes, training examples only.
        runs: whether some examples are not cached; of a teacher that does not run, only its `shape` is referenced.
    """

    def __init__(self, teacher: FrozenTeacher, passes: int = 0, examples: int = 0, *, runs: bool = False) -> None:
        super().__init__(teacher.shape, teacher.name, teacher.columns, teacher.load if runs else None, teacher.kept)
        if runs:
            self.loaded = teacher.loaded
        self.runs = runs
        self.passes, self.examples = passes, examples

    def __call__(self, inputs: Inputs, needs: Needs) -> Outputs:
        """Return the outputs for a batch, with logits in the task's label order; the examples that are not cached are run.

        Args:
            inputs: those that a `kd.teacher_cache.store.CachedOutputs` returns.
            needs: the tensors to return.

        Raises:
            UndeclaredRead: for other inputs, or needs that were not declared when the cache was filled.
        """
        given = tensors_of(inputs)
        live = {name.removeprefix(LIVE): tensor for name, tensor in given.items() if name.startswith(LIVE)}
        if not ("logits" in given or (live and self.runs)) or not given.keys().isdisjoint(("input_ids", "words", "embedded")):
            raise UndeclaredRead(
                f"the teacher '{self.name}' is cached and cannot read other text, words or states; a method whose teachers "
                "have to run declares Needs(uncacheable_reason='the reason') for them"
            )
        self.batches_used += 1
        mask = given["attention_mask"].bool()
        own = ("attention_mask", ORDER)
        cached = {name: tensor for name, tensor in given.items() if not name.startswith(LIVE) and name not in own}
        if cached:  # also of a batch whose examples all run, so that needs that are not declared are refused in any batch
            outputs = Outputs.from_named(cached, mask, needs, self.heads)
        if live:
            named = cleared(self.run_counted(live, needs).named(), live["attention_mask"], mask.shape[1])
            parts = {name: [cached[name], named[name]] if cached else [named[name]] for name in needs.tensors}
            joined = {name: torch.cat(part).index_select(0, given[ORDER]) for name, part in parts.items()}
            outputs = Outputs.from_named(joined, mask, needs, self.heads)
        return self.in_order(outputs)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Move or convert the model if it runs; cached outputs are moved with the batch."""
        if self.runs:
            super().apply(function)


def cleared(named: Mapping[str, Tensor], mask: Tensor, length: int) -> dict[str, Tensor]:
    """Return tensors with zeros on padding, as cached ones have them, and with padding up to a length.

    Args:
        named: tensors by their names in `Needs.tensors`, (batch, width) or (batch, tokens, width).
        mask: (batch, tokens), 1 for tokens that are not padding.
        length: number of tokens of the result, at least that of `mask`.
    """
    padding, more = (mask == 0)[:, :, None], (0, 0, 0, length - mask.shape[1])
    return {
        name: functional.pad(tensor.masked_fill(padding, 0.0), more) if by_token(name) else tensor
        for name, tensor in named.items()
    }
