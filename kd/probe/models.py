"""Models of finished runs, loaded from where the runs exported them."""

from functools import lru_cache

from kd.errors import InputError
from kd.models import Encoder, FrozenTeacher
from kd.models.pretrained import label_names, load_config, load_model, load_tokenizer
from kd.models.teachers import match_labels
from kd.probe.result import Shape
from kd.results.finished import Finished, ModelSource

LOADED = 3
"""Number of models in memory: a student, its teacher and its control."""


def shape_of(run: Finished, student: str) -> Shape | None:
    """Return the sizes of an exported student by its `config.json`; None if its run has let it go. No weights are read."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(run.folder(student), local_files_only=True)
        return Shape(int(config.num_hidden_layers), int(config.num_attention_heads), int(config.hidden_size))
    except (OSError, ValueError, AttributeError):
        return None


@lru_cache(maxsize=LOADED)
def load(place: ModelSource, classes: tuple[str, ...] | None) -> FrozenTeacher:
    """Return a model, frozen, in float32 and eval mode, whose logits are in the order of the task's classes.

    Args:
        place: where it is.
        classes: names of the classes, which are matched with the model's outputs by name; None for scores.

    Raises:
        InputError: if it cannot be loaded, has changed since its run exported it, or has other classes.
    """
    config = load_config(place.source, place.key)
    names = list(place.labels or label_names(config, place.key))
    if classes is None and len(names) != 1:
        raise InputError(f"the task has scores, and '{place.source}' has {len(names)} outputs: {names}", place.key)
    columns = None if classes is None else match_labels(classes, names, place.key)
    model = load_model(place.source, place.key, config, head_needed=True)
    return FrozenTeacher(Encoder(model, load_tokenizer(place.source, place.key)), place.source, columns)
