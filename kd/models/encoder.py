"""A transformers sequence classifier or masked language model whose inner tensors can be read through hooks."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kd.config.schema import GRAPHS
from kd.data.tokenized import AnyTokenizer, save_tokenizer
from kd.forward.inputs import Inputs, start_of, tensors_of
from kd.forward.kinds import Layer
from kd.forward.needs import Needs
from kd.forward.outputs import Outputs
from kd.forward.taps import LeftOut, blocks_above, differentiable, family_of, leave_out, record
from kd.models.compiled import GraphShapes, compiled_blocks
from kd.models.masks import expanded_mask
from kd.system import hardware

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class Encoder(nn.Module):
    """A BERT-style classifier, regressor or masked language model whose inner tensors can be read without editing it.

    Args:
        model: a transformers `...ForSequenceClassification` or `...ForMaskedLM` of a family in `kd.forward.taps.FAMILIES`.
        tokenizer: the tokenizer of its inputs; None if it reads no text (tests, shape checks).
    """

    def __init__(self, model: nn.Module, tokenizer: "AnyTokenizer | None" = None) -> None:
        super().__init__()
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        self.family = family_of(model.config.model_type)  # type: ignore[union-attr,arg-type]
        self.forwards = 0
        """Number of forward passes so far."""
        self.notes: list[str] = []
        """Remarks on the initial weights that affect results, for the run's record; their source is recorded separately."""
        self.asides: list[str] = []
        """Remarks on the initial weights that do not affect results."""
        self.compiled = False
        """True if blocks run compiled. With gradients, attention or values, or without a part, they still run uncompiled."""
        self.graphs: GraphShapes | None = None
        """Shapes of the passes whose blocks run as CUDA graphs, with the same exceptions; None if none do. It is set for the
        steps of training alone (`kd.training.graphs`)."""
        self.left_out = LeftOut()
        """Heads and layers that passes are made without; `without` sets them."""

    @property
    def config(self) -> "PretrainedConfig":
        """Configuration of the transformers model."""
        return self.model.config  # type: ignore[no-any-return]

    @property
    def base(self) -> nn.Module:
        """Base model, without the head."""
        return self.model.get_submodule(self.family.base)  # type: ignore[no-any-return]

    @property
    def blocks(self) -> nn.ModuleList:
        """Transformer blocks, which may share parameters."""
        return self.base.get_submodule(self.family.blocks)  # type: ignore[return-value]

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return int(self.config.num_hidden_layers)

    @property
    def width(self) -> int:
        """Size of a hidden state."""
        return int(self.config.hidden_size)

    @property
    def heads(self) -> int:
        """Number of attention heads in a block."""
        return int(self.config.num_attention_heads)

    @property
    def positions(self) -> int:
        """Largest number of tokens of an input."""
        # RoBERTa and MPNet number positions from the padding index plus one.
        table: Any = self.base.get_submodule("embeddings.position_embeddings")
        taken = 0 if table.padding_idx is None else table.padding_idx + 1
        return int(self.config.max_position_embeddings) - taken

    @property
    def word_embeddings(self) -> nn.Module:
        """Module that looks up word embeddings: (batch, tokens) -> (batch, tokens, width)."""
        return self.model.get_input_embeddings()  # type: ignore[no-any-return]

    def forward(self, inputs: Inputs, needs: Needs) -> Outputs:
        """Run one forward pass and return the outputs that `needs` declares.

        Args:
            inputs: text, word embeddings or states to start at (`kd.forward.inputs.Inputs`). Names that the family does not
                accept are ignored; names that it accepts and `inputs` lacks get the model's defaults. With `predicted`, a
                masked language model computes logits at these positions only, (predicted positions, vocabulary) in row-major
                order: the logits of every token would not fit into memory.
            needs: the tensors to return.

        Raises:
            ValueError: if `needs` asks for a layer deeper than the model, or below the one that the pass starts at, or if
                `words` or `embedded` do not have the shape of hidden states.
        """
        self.forwards += 1
        start, given = self._check(inputs, needs), tensors_of(inputs)
        layer, embedded = start or 0, given.get("embedded")
        more: dict[str, dict[Layer, Tensor]] = {}
        if needs.words:
            words = given["words"] if "words" in given else self.word_embeddings(given["input_ids"])
            given["words"] = differentiable(words) if needs.gradient else words
            more["words"] = {None: given["words"]}
        with (
            blocks_above(self.base, self.family, layer),
            leave_out(self.base, self.family, self.left_out, self.heads, layer),
            record(self.base, self.family, needs, embedded, layer) as recorded,
            self._pooled_in(more, needs),
        ):
            graphs = self.graphs is not None and given["attention_mask"].shape in self.graphs
            if (self.compiled or graphs) and not (needs.gradient or needs.inside_blocks or self.left_out):
                with compiled_blocks(self.blocks, GRAPHS if graphs else None):
                    logits = self._logits(given)
            elif needs.gradient:
                # The fused attention kernels have no second derivative; the plain one has, and its outputs are the same.
                with sdpa_kernel(SDPBackend.MATH):
                    logits = self._logits(given)
            else:
                logits = self._logits(given)
        if needs.derived:
            more["derived"] = {name: compute(self, tensors_of(inputs)).detach() for name, compute in needs.derived.items()}
        score_bias = self.family.score_bias
        mask = given["attention_mask"]
        return Outputs(
            logits=logits,
            mask=mask.bool(),
            needs=needs,
            heads=self.heads,
            tensors={**recorded, **more},
            score_bias=None if score_bias is None else lambda: score_bias(self.base, mask),
            start=start,
        )

    @contextlib.contextmanager
    def without(self, *, head: tuple[int, int] | None = None, layer: int | None = None) -> Iterator["Encoder"]:
        """Leave out a head or a layer in the passes of this encoder inside this context; no module or parameter is changed.

        Of a head, what it adds to the projection of all heads is zero: the sum goes on without it, as in Michel, Levy and
        Neubig, Are Sixteen Heads Really Better than One?, NeurIPS 2019, arXiv:1905.10650. Of a layer, the output is
        its input. Contexts in one another leave out all that they name, and without an argument nothing is left out: the
        logits are then equal bit for bit.

        Args:
            head: layer, from 1 to the depth, and head, from 0.
            layer: layer, from 1 to the depth.

        Raises:
            ValueError: for a layer or head that the model does not have.
        """
        layers = [number for number in (layer, None if head is None else head[0]) if number is not None]
        if any(not 1 <= number <= self.depth for number in layers):
            raise ValueError(f"layer {layers[0]} cannot be left out of a model with layers 1 to {self.depth}")
        if head is not None and not 0 <= head[1] < self.heads:
            raise ValueError(f"head {head[1]} cannot be left out of a layer with heads 0 to {self.heads - 1}")
        before = self.left_out
        more = LeftOut(frozenset() if head is None else frozenset({head}), frozenset() if layer is None else frozenset({layer}))
        self.left_out = before | more
        try:
            yield self
        finally:
            self.left_out = before

    def _check(self, inputs: Inputs, needs: Needs) -> int | None:
        """Return the layer at whose states a pass starts; None if it starts at text or word embeddings."""
        start = start_of(inputs)
        for what, layer in (("needs declare", needs.deepest()), ("the pass starts at", start or 0)):
            if layer > self.depth:
                raise ValueError(f"{what} layer {layer} of a model with {self.depth} layers: {needs}")
        if needs.available_from(start) != needs:
            raise ValueError(
                f"a pass that starts at the states of layer {start} does not have all of the needs {needs}; it has "
                f"{needs.available_from(start)}"
            )
        tensors = tensors_of(inputs)
        expected = (*tensors["attention_mask"].shape, self.width)
        for name in ("words", "embedded"):
            if name in tensors and tensors[name].shape != expected:
                raise ValueError(f"'{name}' is {tuple(tensors[name].shape)}, not (batch, tokens, width), which is {expected}")
        return start

    @property
    def outputs(self) -> nn.Module:
        """Last linear layer of the classifier."""
        return self.model.get_submodule(self.family.outputs)  # type: ignore[no-any-return]

    @property
    def classifies(self) -> bool:
        """True if the head classifies a whole text or predicts its score; False for a masked language model."""
        return self.family.outputs in dict(self.model.named_modules())

    def replace_submodule(self, path: str, module: nn.Module) -> None:
        """Replace the module at a path of the classifier."""
        parent, _, name = path.rpartition(".")
        owner = self.model.get_submodule(parent)
        owner.get_submodule(name)  # raises if there is no such module
        setattr(owner, name, module)

    def share_body(self, other: "Encoder") -> None:
        """Replace the base model by that of another encoder, of the same shape, so that both have one body and two heads.

        A pooler is part of the base model, a further layer before the classifier is not.
        """
        self.replace_submodule(self.family.base, other.base)
        self.tokenizer = other.tokenizer

    @property
    def head_layers(self) -> "tuple[nn.Module, nn.Module]":
        """Linear layers of a classifier behind its blocks: that of the pooling, and the last one, which predicts."""
        pooler, outputs = (self.model.get_submodule(path) for path in (self.family.pooler, self.family.outputs))
        return pooler, outputs

    def share_head(self, layers: "tuple[nn.Module, nn.Module]") -> None:
        """Replace the pooling and the prediction layer by those of another classifier of the same width and outputs.

        The activation and the dropout between the two stay those of this classifier's family.

        Args:
            layers: the other classifier's `head_layers`.
        """
        for path, layer in zip((self.family.pooler, self.family.outputs), layers, strict=True):
            self.replace_submodule(path, layer)

    @contextlib.contextmanager
    def _pooled_in(self, seen: dict[str, dict[Layer, Tensor]], needs: Needs) -> Iterator[None]:
        if not needs.pooled:
            yield
            return

        def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
            # A frozen model's graph starts here, unless it starts at its embeddings.
            pooled = differentiable(arguments[0]) if needs.gradient else arguments[0]
            seen["pooled"] = {None: pooled}
            return (pooled,)

        hook = self.outputs.register_forward_pre_hook(keep)
        try:
            yield
        finally:
            hook.remove()

    def _logits(self, given: Mapping[str, Tensor]) -> Tensor:
        arguments = self._arguments(given)
        if "predicted" not in given:
            logits: Tensor = self.model(**arguments).logits
            return logits
        predicted, ids = given["predicted"], given.get("input_ids")
        return self.logits_of(self.base(**arguments)[0][predicted], None if ids is None else ids[predicted])

    def _arguments(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the arguments of the transformers model."""
        arguments = {name: given[name] for name in self.family.inputs if name in given}
        words = given.get("words")
        if hardware.is_asynchronous(given["attention_mask"]):
            arguments["attention_mask"] = expanded_mask(self.model, given["attention_mask"])
        if words is None and "input_ids" not in given:
            words = given.get("embedded")  # the embeddings run on something of this shape, and a hook replaces their output
        if words is not None:
            arguments.pop("input_ids", None)
            arguments["inputs_embeds"] = words
            if self.family.positions_skip_padding:
                arguments["position_ids"] = self._positions(given)
        return arguments

    def _positions(self, given: Mapping[str, Tensor]) -> Tensor:
        """Return the positions that a family whose positions skip padding counts for ids, (batch, tokens)."""
        padding: Any = self.base.get_submodule(self.family.embeddings).padding_idx
        real = given["input_ids"] != padding if "input_ids" in given else given["attention_mask"].bool()
        positions: Tensor = real.long().cumsum(dim=1) * real + padding
        return positions

    def logits_of(self, states: Tensor, ids: Tensor | None) -> Tensor:
        """Return masked-LM logits at some positions.

        Args:
            states: (positions, width), of the last layer.
            ids: (positions,), the input tokens at these positions; None if the pass was not given any.

        Returns:
            (positions, vocabulary).
        """
        logits: Tensor = self.model.get_submodule(str(self.family.masked_lm))(states)
        return logits

    def plain(self) -> "PreTrainedModel":
        """Return a copy of the model that consists of transformers and torch modules only.

        Every module that has a method `plain` is replaced by the module which that returns, one with the same outputs. Blocks
        that share parameters get copies of them.
        """
        model: PreTrainedModel = copy.deepcopy(self.model)
        copy_shared(model.get_submodule(f"{self.family.base}.{self.family.blocks}"))  # type: ignore[arg-type]
        replaced = [module for module in model.modules() if hasattr(module, "plain")]
        for module in replaced:
            replace_module(model, module, module.plain())  # type: ignore[operator]
        if replaced:
            model.tie_weights()
        return model

    def save(self, folder: Path) -> None:
        """Write model and tokenizer in the format of transformers."""
        self.plain().save_pretrained(folder)
        save_tokenizer(self.tokenizer, folder)

    def parameter_count(self) -> int:
        """Return the number of parameters, embeddings included, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


def copy_shared(blocks: nn.ModuleList) -> None:
    """Replace blocks that share parameters with earlier ones by copies which do not."""
    seen: set[nn.Parameter] = set()
    for index, block in enumerate(blocks):
        if not seen.isdisjoint(block.parameters()):
            blocks[index] = copy.deepcopy(block)
        seen.update(block.parameters())


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module by another wherever it occurs in a model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)
