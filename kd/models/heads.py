"""Heads that a task can put on top of an encoder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import transformers


@dataclass(frozen=True, slots=True)
class Head:
    """A kind of head.

    Attributes:
        loader: name of the transformers class that loads a model with this head.
        suffix: ending of the class names of models with this head.
        pipeline: name of the transformers pipeline that uses it.
        labelled: whether its outputs are the task's labels.
    """

    loader: str
    suffix: str
    pipeline: str
    labelled: bool

    @property
    def auto(self) -> Any:
        """Class that `loader` names."""
        return getattr(transformers, self.loader)

    def is_in(self, config: transformers.PretrainedConfig) -> bool:
        """Return whether the weights of a configuration have this head; True if it does not name their architecture."""
        return not config.architectures or any(name.endswith(self.suffix) for name in config.architectures)


HEADS: Mapping[str, Head] = {
    "classifier": Head("AutoModelForSequenceClassification", "ForSequenceClassification", "text-classification", True),
    "masked_lm": Head("AutoModelForMaskedLM", "ForMaskedLM", "fill-mask", False),
}
"""Allowed values of `Task.head`, and the head for each."""
