"""What a task puts on top of an encoder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import transformers


@dataclass(frozen=True, slots=True)
class Head:
    """A kind of head.

    Attributes:
        loader: the class of transformers that loads a model with it.
        suffix: how the names of such models' classes end.
        pipeline: what transformers calls its use.
        labelled: whether its outputs are the task's labels.
    """

    loader: str
    suffix: str
    pipeline: str
    labelled: bool

    @property
    def auto(self) -> Any:
        """The loader itself."""
        return getattr(transformers, self.loader)

    def is_in(self, config: Any) -> bool:
        """Return whether the weights of a configuration have such a head; true where it does not say what they are."""
        return not config.architectures or any(name.endswith(self.suffix) for name in config.architectures)


HEADS: Mapping[str, Head] = {
    "classifier": Head("AutoModelForSequenceClassification", "ForSequenceClassification", "text-classification", True),
    "masked_lm": Head("AutoModelForMaskedLM", "ForMaskedLM", "fill-mask", False),
}
"""Every `Task.head`."""
