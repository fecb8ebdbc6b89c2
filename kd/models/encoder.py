"""A transformers sequence classifier or masked language model whose inner tensors can be read through hooks."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kd.data.tokenized import AnyTokenizer, save_tokenizer
from kd.forward.kinds import Layer
from kd.forward.lazy import Inputs
from kd.forward.needs import Needs
from kd.forward.outputs import Outputs
from kd.forward.taps import family_of, record
from kd.models.compiled import compiled_blocks

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
        """True if blocks run compiled. They still run uncompiled if gradients, attention or values are needed."""

    @property
    def config(self) -> "PretrainedConfig":
        """Configuration of the transformers model."""
        return self.model.config  # type: ignore[no-any-return]

    @property
    def base(self) -> nn.Module:
        """Base model, without the head."""
        return self.model.get_submodule(self.family.base)  # type: ignore[no-any-return]

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

    def forward(self, inputs: Inputs, needs: Needs) -> Outputs:
        """Run one forward pass and return the outputs that `needs` declares.

        Args:
            inputs: output of a tokenizer. Names that the family does not accept are ignored; names that it accepts and
                `inputs` lacks get the model's defaults. With `predicted`, (batch, tokens), bool, a masked language
                model computes logits at these positions only, (predicted positions, vocabulary) in row-major order: the
                logits of every token would not fit into memory. With `embedded`, (batch, tokens, width), these
                states replace the output of the embeddings, layer 0, whatever `input_ids` are.
            needs: the tensors to return.

        Raises:
            ValueError: if `needs` asks for a layer deeper than the model.
        """
        self.forwards += 1
        if needs.deepest() > self.depth:
            raise ValueError(f"needs declare layer {needs.deepest()} of a model with {self.depth} layers: {needs}")
        arguments = {name: inputs[name] for name in self.family.inputs if name in inputs}
        embedded = inputs.get("embedded")
        more: dict[str, dict[Layer, Tensor]] = {}
        with record(self.base, self.family, needs, embedded) as recorded, self._pooled_in(more, needs):
            if self.compiled and embedded is None and not (needs.gradient or needs.inside_blocks):
                with compiled_blocks(self.base.get_submodule(self.family.blocks).children()):
                    logits = self._logits(arguments, inputs.get("predicted"))
            elif needs.gradient:
                # The fused attention kernels have no second derivative; the plain one has, and its outputs are the same.
                with sdpa_kernel(SDPBackend.MATH):
                    logits = self._logits(arguments, inputs.get("predicted"))
            else:
                logits = self._logits(arguments, inputs.get("predicted"))
        if needs.derived:
            more["derived"] = {name: compute(self, inputs).detach() for name, compute in needs.derived.items()}
        score_bias = self.family.score_bias
        states = inputs["input_ids"]
        return Outputs(
            logits=logits,
            mask=inputs["attention_mask"].bool(),
            needs=needs,
            heads=self.heads,
            tensors={**recorded, **more},
            score_bias=None if score_bias is None else lambda: score_bias(self.base, states),
        )

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

    @contextlib.contextmanager
    def _pooled_in(self, seen: dict[str, dict[Layer, Tensor]], needs: Needs) -> Iterator[None]:
        if not needs.pooled:
            yield
            return

        def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen["pooled"] = {None: arguments[0]}

        hook = self.outputs.register_forward_pre_hook(keep)
        try:
            yield
        finally:
            hook.remove()

    def _logits(self, taken: Inputs, predicted: Tensor | None) -> Tensor:
        if predicted is None:
            logits: Tensor = self.model(**taken).logits
            return logits
        return self.logits_of(self.base(**taken)[0][predicted], taken["input_ids"][predicted])

    def logits_of(self, states: Tensor, ids: Tensor) -> Tensor:
        """Return masked-LM logits at some positions.

        Args:
            states: (positions, width), of the last layer.
            ids: (positions,), the input tokens at these positions.

        Returns:
            (positions, vocabulary).
        """
        logits: Tensor = self.model.get_submodule(str(self.family.masked_lm))(states)
        return logits

    def plain(self) -> "PreTrainedModel":
        """Return a copy of the model that consists of transformers and torch modules only.

        Every module that has a method `plain` is replaced by the module which that returns, one with the same outputs.
        """
        model: PreTrainedModel = copy.deepcopy(self.model)
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


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module by another wherever it occurs in a model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)
