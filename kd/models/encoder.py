"""A transformers sequence classifier or masked language model with taps."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kd.data.tokens import save_tokenizer
from kd.forward.lazy import Inputs
from kd.forward.needs import Needs
from kd.forward.outputs import Outputs
from kd.forward.taps import family_of, record
from kd.models.compiled import compiled_blocks


class Encoder(nn.Module):
    """A BERT-style classifier, regressor or masked language model whose insides can be read without editing it.

    Args:
        model: a transformers `...ForSequenceClassification` or `...ForMaskedLM` of a family in `kd.forward.taps.FAMILIES`.
        tokenizer: the tokenizer that makes its inputs; None where no text is read (tests, shape checks).
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None) -> None:
        super().__init__()
        self.model: Any = model
        self.tokenizer = tokenizer
        self.family = family_of(model.config.model_type)  # type: ignore[union-attr,arg-type]
        self.forwards = 0
        """Passes so far."""
        self.notes: list[str] = []
        """What the record says of the weights that it was begun with, beside where they are from."""
        self.asides: list[str] = []
        """What is good to know of them."""
        self.compiled = False
        """Whether blocks run compiled; where gradients, attention or values are needed they run as they are all the same."""

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.model.config

    @property
    def base(self) -> nn.Module:
        """The model without its head."""
        return self.model.get_submodule(self.family.base)  # type: ignore[no-any-return]

    @property
    def depth(self) -> int:
        """Blocks."""
        return int(self.config.num_hidden_layers)

    @property
    def width(self) -> int:
        """Size of a hidden state."""
        return int(self.config.hidden_size)

    @property
    def heads(self) -> int:
        """Attention heads of a block."""
        return int(self.config.num_attention_heads)

    def forward(self, inputs: Inputs, needs: Needs) -> Outputs:
        """One pass.

        Args:
            inputs: what a tokenizer made; names that this family does not take are left out, names it takes and the
                tokenizer did not make get the model's defaults. With `predicted`, (batch, tokens), bool, a masked language
                model computes its logits at these positions alone, (predicted positions, vocabulary) in row-major order: a
                vocabulary's worth of numbers for every token would not fit. With `embedded`, (batch, tokens, width), these
                states take the place of the embeddings' output, layer 0, whatever `input_ids` are.
            needs: what to keep.

        Raises:
            ValueError: if `needs` asks for a layer deeper than the model.
        """
        self.forwards += 1
        if needs.deepest() > self.depth:
            raise ValueError(f"needs declare layer {needs.deepest()} of a model with {self.depth} layers: {needs}")
        taken = {name: inputs[name] for name in self.family.inputs if name in inputs}
        embedded = inputs.get("embedded")
        more: dict[str, dict[int | str, Tensor]] = {}
        with record(self.base, self.family, needs, embedded) as seen, self._pooled_in(more, needs):
            if self.compiled and embedded is None and not (needs.gradient or needs.attention or needs.value):
                with compiled_blocks(self.base.get_submodule(self.family.blocks).children()):
                    logits = self._logits(taken, inputs.get("predicted"))
            elif needs.gradient:
                # The fused kernels have no second derivative; the plain one does, and gives the same numbers.
                with sdpa_kernel(SDPBackend.MATH):
                    logits = self._logits(taken, inputs.get("predicted"))
            else:
                logits = self._logits(taken, inputs.get("predicted"))
        if needs.derived:
            more["derived"] = {name: compute(self, inputs).detach() for name, compute in needs.derived.items()}
        score_bias = self.family.score_bias
        states = inputs["input_ids"]
        return Outputs(
            logits=logits,
            mask=inputs["attention_mask"].bool(),
            needs=needs,
            heads=self.heads,
            tensors={**seen, **more},
            score_bias=None if score_bias is None else lambda: score_bias(self.base, states),
        )

    @property
    def outputs(self) -> nn.Module:
        """The last linear layer."""
        return self.model.get_submodule(self.family.outputs)  # type: ignore[no-any-return]

    @property
    def classifies(self) -> bool:
        """Return whether it ends in a classifier, or a regression, of a whole text; a masked language model does not."""
        return self.family.outputs in dict(self.model.named_modules())

    def replace_submodule(self, path: str, module: nn.Module) -> None:
        """Put a module in the place of the one at a path of the classifier."""
        parent, _, name = path.rpartition(".")
        owner = self.model.get_submodule(parent)
        owner.get_submodule(name)  # or an error: what is not there is not replaced
        setattr(owner, name, module)

    @contextlib.contextmanager
    def _pooled_in(self, seen: dict[str, dict[int | str, Tensor]], needs: Needs) -> Iterator[None]:
        if not needs.pooled:
            yield
            return

        def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen["pooled"] = {"": arguments[0]}

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
        """Masked-LM logits of some positions.

        Args:
            states: (positions, width), of the last layer.
            ids: (positions,), the tokens that were read there.

        Returns:
            (positions, vocabulary).
        """
        logits: Tensor = self.model.get_submodule(str(self.family.masked_lm))(states)
        return logits

    def plain(self) -> Any:
        """The transformers model alone: a part that transformers does not know is replaced by what it amounts to.

        Such a part has a method `plain` that gives a module of transformers or torch with the same outputs.
        """
        model = copy.deepcopy(self.model)
        found = [module for module in model.modules() if hasattr(module, "plain")]
        for module in found:
            replace_module(model, module, module.plain())
        if found:
            model.tie_weights()
        return model

    def save(self, folder: Path) -> None:
        """Write model and tokenizer as transformers reads them."""
        self.plain().save_pretrained(folder)
        save_tokenizer(self.tokenizer, folder)

    def parameter_count(self) -> int:
        """All parameters, embeddings included, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place, or the places, of another."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)
