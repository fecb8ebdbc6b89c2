"""The configuration of a run that another run needs: the defaults, the keys that it inherits, and keys of its own.

Nothing else of the command enters it, so that a sweep over the command's other keys shares the needed run.
"""

from collections.abc import Iterable, Mapping, Sequence

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from kd.config import compose as composition
from kd.config.values import one_line
from kd.errors import InputError
from kd.runs.identity import MACHINE_KEYS, NOT_IN_DIGEST

EVERY_RUN_INHERITS = (
    *("paths", "logger", "cache", "preflight", "resume"),
    *(f"trainer.{key}" for key in (*NOT_IN_DIGEST, *MACHINE_KEYS)),
)
"""Keys that every needed run inherits: where runs and data are, and how this machine computes."""


def inherit(
    parent: DictConfig,
    choose: Mapping[str, str | Sequence[str]],
    inherits: Iterable[str],
    own: Mapping[str, object],
    where: str,
) -> DictConfig:
    """Return the configuration of a needed run.

    Args:
        parent: configuration of the run that needs it.
        choose: group -> name, or names, of the files that are chosen in place of the defaults.
        inherits: keys whose values in `parent` are inherited, besides `EVERY_RUN_INHERITS`.
        own: nested mapping of values that are merged over the result.
        where: configuration key of `own`, for error messages.

    Raises:
        InputError: for a group, a key or a value that no run has.
    """
    words = {group: name if isinstance(name, str) else f"[{','.join(name)}]" for group, name in choose.items()}
    config = composition.compose([f"{group}={word}" for group, word in words.items()])
    with open_dict(config):
        for key in (*EVERY_RUN_INHERITS, *inherits):
            value = OmegaConf.select(parent, key, default=parent)
            if value is not parent:  # which stands for a key that the parent does not set
                plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
                OmegaConf.update(config, key, plain, merge=False)
    return laid_over(config, own, where)


def laid_over(config: DictConfig, keys: Mapping[str, object], where: str) -> DictConfig:
    """Merge some keys over a run's configuration, and return it.

    Args:
        config: configuration of the run, which is changed, because a copy takes longer than the merge. It gets no keys that it
            does not have.
        keys: nested mapping of values.
        where: configuration key of that mapping, for error messages.

    Raises:
        InputError: for a key that no run has, or an invalid value.
    """
    OmegaConf.set_struct(config, True)
    try:
        config.merge_with(keys)
    except OmegaConfBaseException as error:
        explained = composition.explain(error)
        key = f"{where}.{explained.key}" if explained.key else where
        raise InputError(f"{where} does not fit a run's configuration: {explained.message} ({explained.key})", key) from error
    except (TypeError, ValueError) as error:
        raise InputError(f"{where} does not fit a run's configuration: {one_line(error)}", where) from error
    return config
