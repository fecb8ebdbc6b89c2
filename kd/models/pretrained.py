"""Files of transformers models: configuration, tokenizer and weights are compared with each other before training.

`from_pretrained` initialises tensors that a file lacks at random, drops those that the configuration does not use, keeps the
type that weights are stored in, and ignores settings it no longer supports. Here each of these is an input error or is
reported.
"""

import contextlib
import copy
import json
import math
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from kd.data.labels import label_text
from kd.errors import InputError, one_of
from kd.forward.taps import FAMILIES, Family, family_of
from kd.models.heads import HEADS
from kd.system.model_sources import pretrained

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files that may hold weights; the first that exists is read, as in transformers."""

STORED = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Types that weights may be stored in; they are converted to float32."""

MOST, DEEPEST = 1 << 24, 1000
"""Largest accepted size and number of layers: the model is built, without weights, before it is compared with its files."""

ROOM = 8
"""Largest ratio of a model's parameters to its file's at which transformers may initialise the missing ones."""

SHOWN = 4
"""Number of names that a message lists before it says how many more there are."""

CONFIG_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "type_vocab_size",
)
"""Names of sizes in a configuration, for the families that have them; `Family.intermediate` names one more."""

NAMED_SIZES = {
    "word_embeddings": ("vocab_size", "hidden_size"),
    "position_embeddings": ("max_position_embeddings", "hidden_size"),
    "token_type_embeddings": ("type_vocab_size", "hidden_size"),
    "relative_attention_bias": ("relative_attention_num_buckets", "num_attention_heads"),
    "predictions": ("vocab_size", "hidden_size"),
    "lm_head": ("vocab_size", "hidden_size"),
}
"""Part of a tensor's name -> names of the sizes in its shape. All other tensors have the width and the intermediate size."""


# -- configuration -------------------------------------------------------------------------------------------------------


def load_config(source: str, key: str) -> "PretrainedConfig":
    """Load and check the transformers configuration of a source, with float32 as the type of its weights.

    Raises:
        InputError: if it cannot be loaded, or describes a model that cannot be built or is not an encoder.
    """
    from transformers import AutoConfig, PretrainedConfig

    name, options = pretrained(source, key)
    with readable("the model", source, key):
        raw, _ = PretrainedConfig.get_config_dict(name, **options)
    if not isinstance(raw, Mapping):
        raise InputError(f"config.json of '{source}' must be an object, not {type(raw).__name__}", key)
    if "model_type" not in raw:
        raise InputError(f"config.json of '{source}' has no model_type; it is one of {', '.join(FAMILIES)}", key)
    if not isinstance(raw["model_type"], str):
        raise one_of(raw["model_type"], tuple(FAMILIES), key)
    family_of(raw["model_type"], key)
    _check_raw(raw, source, key)
    with readable("the model", source, key):
        config: PretrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
    config._attn_implementation = None  # a file may name a kernel on the hub, which would be fetched and executed
    config.dtype = torch.float32  # weights are used in float32 whatever type they are stored in
    numbers = {str(name): int(number) for name, number in (raw.get("label2id") or {}).items()}
    if raw.get("id2label") is None and len(set(numbers.values())) == len(numbers) > 0:
        # without id2label, transformers makes up names
        config.id2label, config.label2id = {number: name for name, number in numbers.items()}, numbers
    _check_config(config, source, key)
    return config


def _check_raw(raw: Mapping[str, Any], source: str, key: str) -> None:
    """Check settings that transformers would ignore or misread without a warning.

    Raises:
        InputError: for a model that is quantised, is not an encoder, or has an architecture that transformers dropped.
    """
    where = f"config.json of '{source}'"
    if raw.get("quantization_config") is not None:
        raise InputError(f"{where} has a quantization_config: kd trains weights in {_types()}; dequantise it first", key)
    for name in ("is_decoder", "add_cross_attention", "is_encoder_decoder"):
        if raw.get(name):
            raise InputError(f"{where} says {name}={raw[name]}: a decoder reads from left to right; kd distils encoders", key)
    if (kind := raw.get("position_embedding_type", "absolute")) not in (None, "absolute"):
        raise InputError(f"{where} says position_embedding_type={kind}; transformers 5 computes none but absolute ones", key)
    if raw.get("transformers_weights") is not None:
        raise InputError(
            f"{where} names a file of weights, transformers_weights; kd reads {WEIGHT_FILES[0]} or {WEIGHT_FILES[2]}", key
        )
    names = raw.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise InputError(f"{where}: architectures={names!r} must be a list of names of classes", key)
    for name in names or ():
        prefix, others = (_class_name(raw["model_type"]), [_class_name(kind) for kind in FAMILIES if kind != raw["model_type"]])
        if not name.startswith(prefix) and any(name.startswith(other) for other in others):
            raise InputError(f"{where} says model_type={raw['model_type']}, but architectures={names}", key)
    for name in ("id2label", "label2id"):
        if not isinstance(raw.get(name, {}), Mapping | None):
            raise InputError(f"{where}: {name} must be an object, not {type(raw[name]).__name__}", key)
    for name, numbers in (("id2label", raw.get("id2label") or {}), ("label2id", (raw.get("label2id") or {}).values())):
        texts = [str(number) for number in numbers]
        whole = all(re.fullmatch(r"[0-9]{1,9}", text) for text in texts)
        if not whole or (name == "id2label" and len(set(map(int, texts))) < len(texts)):
            raise InputError(f"{where}: {name} has the numbers {_listed(texts)}; they must be whole, each once", key)


def _check_config(config: "PretrainedConfig", source: str, key: str) -> None:
    """Check that a model can be built with the values of a configuration.

    Raises:
        InputError: for the first value that it cannot be built with.
    """
    from transformers.activations import ACT2FN

    where, family = f"config.json of '{source}'", family_of(config.model_type, key)
    for name in (*CONFIG_SIZES, family.intermediate):
        value = getattr(config, name, None)
        most = DEEPEST if name == "num_hidden_layers" else MOST
        if hasattr(config, name) and not (type(value) is int and 1 <= value <= most):
            raise InputError(f"{where} says {name}={value}; it must be a whole number from 1 to {most}", key)
    if config.hidden_size % config.num_attention_heads:
        heads, width = config.num_attention_heads, config.hidden_size
        raise InputError(f"{where} says {heads} attention heads, which do not divide the hidden size of {width}", key)
    act = getattr(config, family.activation)
    if act not in ACT2FN:
        raise InputError(f"{where} says {family.activation}={act}, which transformers does not know; gelu is usual", key)
    for name in family.dropouts:
        value = getattr(config, name, None)
        if value is not None and not (isinstance(value, int | float) and 0 <= value < 1):
            raise InputError(f"{where} says {name}={value}; it must be in [0, 1)", key)
    for name, least in (("layer_norm_eps", 1e-30), ("initializer_range", 0.0)):
        value = getattr(config, name, None)
        if value is not None and not (isinstance(value, int | float) and least <= value < math.inf):
            raise InputError(f"{where} says {name}={value}; it must be a positive number", key)
    padding = config.pad_token_id
    if padding is not None and not (type(padding) is int and 0 <= padding < config.vocab_size):
        raise InputError(f"{where} says pad_token_id={padding}, which is outside its vocabulary of {config.vocab_size}", key)


def check_head(config: "PretrainedConfig", head: str, key: str) -> None:
    """Check that models of a configuration's family can have a head.

    Raises:
        InputError: for an unknown family, or one whose masked-LM head is not a single module.
    """
    family = family_of(config.model_type, key)
    if head == "masked_lm" and family.masked_lm is None:
        able = ", ".join(name for name, entry in FAMILIES.items() if entry.masked_lm is not None)
        raise InputError(f"masked language modelling works with {able}, not with {config.model_type}", key)


def label_names(config: "PretrainedConfig", key: str) -> list[str]:
    """Return the names of a classifier's outputs, in the order of the outputs; names that are numbers become text.

    Raises:
        InputError: for outputs not numbered 0, 1, ..., names that are empty or occur twice, or a contradicting `label2id`.
    """
    named = {int(number): name for number, name in (config.id2label or {}).items()}
    if sorted(named) != list(range(len(named))):
        expected = f"0 to {len(named) - 1}"
        raise InputError(f"id2label numbers the model's outputs {_listed(sorted(named))}; they must be {expected}", key)
    names = []
    for number, name in sorted(named.items()):
        if not isinstance(name, str | int | float) or not label_text(name):
            raise InputError(f"id2label names output {number} {name!r}; a name is a text or a number", key)
        names.append(label_text(name))
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"id2label names two of the model's outputs '{twice}': {_listed(names)}", key)
    for label, output in (config.label2id or {}).items():
        text = label_text(label)
        if text in names and names.index(text) != int(output):
            raise InputError(
                f"id2label and label2id contradict each other: output {names.index(text)} is '{text}' by the former, output "
                f"{output} by the latter",
                key,
            )
    return names


# -- tokenizer -----------------------------------------------------------------------------------------------------------


def load_tokenizer(source: str, key: str) -> "PreTrainedTokenizerFast":
    """Load the tokenizer of a source.

    Raises:
        InputError: if it cannot be loaded, has no vocabulary, or is not based on the `tokenizers` library.
    """
    from transformers import AutoTokenizer

    name, options = pretrained(source, key)
    with readable("the tokenizer", source, key):
        tokenizer = cast("PreTrainedTokenizerFast", AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options))
        empty = len(tokenizer) <= len(tokenizer.all_special_tokens)  # made up by transformers if there are no files
    if empty:
        raise InputError(f"'{source}' has no tokenizer: there is no vocabulary in it", key)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise InputError(f"the tokenizer of '{source}' is a {type(tokenizer).__name__}; kd needs one of `tokenizers`", key)
    return tokenizer


def check_tokenizer(
    tokenizer: "PreTrainedTokenizerFast", config: "PretrainedConfig", key: str, head: str = "classifier", *, pairs: bool = False
) -> None:
    """Check that the output of a tokenizer is valid input for a model.

    Args:
        tokenizer: the model's tokenizer.
        config: the model's configuration.
        key: the configuration key that names their source.
        head: a key of `kd.models.heads.HEADS`; a masked language model needs a mask token.
        pairs: whether the model will read pairs of texts.

    Raises:
        InputError: if the tokenizer has more tokens than the model has embeddings, lacks a special token, does not add them
            around a text, pads with another token than the model, or numbers more segments than the model has.
    """
    family = family_of(config.model_type, key)
    for name in ("pad_token", "unk_token", "cls_token", "sep_token", *(("mask_token",) if head == "masked_lm" else ())):
        if getattr(tokenizer, name) is None:
            has = ", ".join(tokenizer.all_special_tokens) or "none"
            raise InputError(f"the tokenizer has no {name}, which the model's input needs; its special tokens are {has}", key)
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens, numbered up to {largest}, but the model has embeddings for "
            f"{config.vocab_size} (vocab_size): tokens were added and the embeddings not resized",
            key,
        )
    ours, theirs = tokenizer.pad_token_id, config.pad_token_id
    if ours != theirs and not (theirs is None and not family.positions_skip_padding):
        raise InputError(
            f"the tokenizer pads with token {ours} ({tokenizer.pad_token}), the model's config.json has pad_token_id={theirs}",
            key,
        )
    try:
        ends = tokenizer("")["input_ids"]
        encoded = tokenizer("a ☃", "a ☃") if pairs else tokenizer("a ☃")  # a word that few vocabularies have
    except BaseException as error:
        if not _of_a_library(error):
            raise
        raise InputError(f"the tokenizer cannot read every text: {first_line(error)}", key) from error
    largest = max([*ends, *encoded["input_ids"]])
    if largest >= config.vocab_size:
        raise InputError(f"the tokenizer makes token {largest}, the model has embeddings for {config.vocab_size}", key)
    if len(ends) < 2 or ends[0] != tokenizer.cls_token_id or ends[-1] != tokenizer.sep_token_id:
        tokens = " ".join(map(str, tokenizer.convert_ids_to_tokens(ends))) or "nothing"
        raise InputError(
            f"the tokenizer does not put {tokenizer.cls_token} before a text and {tokenizer.sep_token} behind it: of an empty "
            f"text it makes {tokens}",
            key,
        )
    segments = max(encoded["token_type_ids"]) + 1 if "token_type_ids" in encoded else 1
    if "token_type_ids" in family.inputs and segments > config.type_vocab_size:
        raise InputError(
            f"the tokenizer numbers {segments} segments in a {'pair of texts' if pairs else 'text'}, but the model has "
            f"embeddings for {config.type_vocab_size} (type_vocab_size)",
            key,
        )


# -- weights -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Found:
    """Result of the check of a source's weights.

    Attributes:
        notes: remarks that affect results, for the run's record.
        asides: remarks that do not affect results.
        has_head: whether at least a part of the head is in the file.
        other_head: whether the file has a head of another shape, which is not used.
    """

    notes: tuple[str, ...] = ()
    asides: tuple[str, ...] = ()
    has_head: bool = True
    other_head: bool = False


@dataclass(frozen=True, slots=True)
class Stored:
    """Shapes and types of the tensors in files of weights, by name."""

    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, torch.dtype]


def load_model(
    source: str, key: str, config: "PretrainedConfig", head: str = "classifier", *, head_needed: bool = False
) -> nn.Module:
    """Load a model with the weights of a source, in float32.

    Args:
        source: a folder or a model on the hub.
        key: the configuration key that names the source.
        config: the model's configuration.
        head: a key of `kd.models.heads.HEADS`.
        head_needed: whether the file must contain the head; otherwise a missing head is initialised at random.

    Raises:
        InputError: if the weights cannot be loaded, a file is damaged, they do not fit the configuration, or the family has no
            such head.
    """
    weights = check_weights(source, key, config, head, head_needed=head_needed)
    name, options = pretrained(source, key)
    more = {"ignore_mismatched_sizes": True} if weights.other_head else {}
    with readable("the weights", source, key):
        model: nn.Module = HEADS[head].auto.from_pretrained(
            name, config=config, dtype=torch.float32, trust_remote_code=False, **options, **more
        )
    return model


def check_weights(
    source: str,
    key: str,
    config: "PretrainedConfig",
    head: str = "classifier",
    *,
    head_needed: bool = False,
    values: bool = True,
) -> Found:
    """Check that the weights of a source fit a configuration, without building the model in memory.

    Args:
        source: a folder or a model on the hub.
        key: the configuration key that names the source.
        config: the model's configuration.
        head: a key of `kd.models.heads.HEADS`.
        head_needed: whether the file must contain the head.
        values: whether to read the numbers too, and reject those that are not finite. Otherwise only names, shapes and types
            are read, at almost no cost; `load_model` reads the numbers in any case.

    Raises:
        InputError: if a file is missing or damaged, the weights do not fit the configuration, or the family has no such head.
    """
    check_head(config, head, key)
    paths = weight_files(source, key)
    with readable("the weights", source, key):
        files = tuple((path, Path(path).stat().st_size, Path(path).stat().st_mtime_ns) for path in paths)
        stored = _stored(files)
    text = json.dumps(config.to_dict(), sort_keys=True, default=str)
    shapes = tuple((name, shape) for name, shape in stored.shapes.items())
    with readable("the weights", source, key):
        fit = _fit(text, shapes, head, _Config(config))
    family = family_of(config.model_type, key)
    expected = {name: tuple(value.shape) for name, value in fit.model.state_dict().items()}

    def is_head(name: str) -> bool:
        return not name.startswith(f"{family.base}.")

    def is_pooler(name: str) -> bool:
        return name.startswith(f"{family.pooler}.") and not is_head(name)

    _check_types(stored, fit.unused, source, key)
    drawn = {name for name in fit.missing if is_head(name) or is_pooler(name)}
    pooler = {name for name in drawn if is_pooler(name)}
    if pooler and pooler != {name for name in expected if is_pooler(name)}:
        drawn -= pooler  # a part of it is in the file
    lacking = sorted(fit.missing if head_needed else fit.missing - drawn)
    if lacking:
        raise InputError(_lacking(source, lacking, len(expected), stored, fit.unused, family, config), key)
    for name, (theirs, ours) in sorted(fit.mismatched.items()):
        if head_needed or not is_head(name):
            raise InputError(_mismatch(source, name, theirs, ours, config, family), key)
    blocks = _blocks(stored.shapes, family)
    if len(blocks) > config.num_hidden_layers:
        raise InputError(
            f"'{source}' has weights of {len(blocks)} layers, its configuration says "
            f"num_hidden_layers={config.num_hidden_layers}: the others would be left out",
            key,
        )
    if values:
        with readable("the weights", source, key):
            broken = sorted(_broken(files) - fit.unused)
        if broken:
            raise InputError(f"'{source}' has weights that are not finite numbers in float32: {_listed(broken)}", key)
    notes, asides = _told(source, stored, fit, family, pooler)
    has_head = any(is_head(name) and name not in fit.missing for name in expected)
    if half := sorted(name for name in fit.missing if is_head(name) and has_head):
        asides = (*asides, f"the file has a part of a head, which is not used: it lacks {_listed(half)}")
    return Found(notes, asides, has_head, any(is_head(name) for name in fit.mismatched))


def weight_files(source: str, key: str) -> list[str]:
    """Return the paths of the files with the weights of a source; files on the hub are downloaded.

    Raises:
        InputError: if there are none, or one of several is missing.
    """
    from transformers.utils.hub import cached_file

    name, options = pretrained(source, key)
    folder = Path(name) if not source.startswith("hf:") else None

    def find(file: str) -> str | None:
        if folder is not None:
            return str(folder / file) if (folder / file).is_file() else None
        with readable("the weights", source, key):
            return cached_file(name, file, _raise_exceptions_for_missing_entries=False, **options)  # type: ignore[no-any-return]

    if folder is not None and (folder / "adapter_config.json").is_file():
        raise InputError(f"'{source}' has an adapter (adapter_config.json); merge it into the model's weights first", key)
    for file in WEIGHT_FILES:
        path = find(file)
        if path is None:
            continue
        if not file.endswith(".index.json"):
            return [path]
        try:
            parts = sorted(set(json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"].values()))
            paths = {part: find(part) for part in parts if Path(part).name == part}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{file} of '{source}' is damaged: it has no weight_map of names and files", key) from error
        absent = [part for part in parts if paths.get(part) is None]
        if absent or not parts:
            raise InputError(f"{file} of '{source}' names {len(parts)} files, of which are missing: {_listed(absent)}", key)
        return [path for path in paths.values() if path is not None]
    there = "" if folder is None else f"; there are {_listed(sorted(path.name for path in folder.iterdir()), 12)}"
    raise InputError(f"'{source}' has no weights: neither {WEIGHT_FILES[0]} nor {WEIGHT_FILES[2]}{there}", key)


@lru_cache(maxsize=64)
def _stored(files: tuple[tuple[str, int, int], ...]) -> Stored:
    """Return shapes and types of the tensors in files, given with size and time so that a changed file is read again."""
    shapes: dict[str, tuple[int, ...]] = {}
    types: dict[str, torch.dtype] = {}
    for path, _, _ in files:
        for name, shape, tensor in _headers(path):
            shapes[name], types[name] = shape, tensor.dtype
    return Stored(shapes, types)


@lru_cache(maxsize=64)
def _broken(files: tuple[tuple[str, int, int], ...]) -> frozenset[str]:
    """Return the names of tensors with a number that is not finite in float32; reads the files completely."""
    return frozenset(
        name
        for path, _, _ in files
        for name, tensor in _tensors(path)
        if tensor.dtype in STORED and not is_finite(tensor.float())
    )


def is_finite(values: Tensor) -> bool:
    """Return whether all numbers of a tensor are finite.

    A sum is four times as fast as a test of each number, and is not finite if one of them is not. It may overflow, so that only
    then each is tested.
    """
    return bool(values.sum().isfinite()) or bool(torch.isfinite(values).all())


def _headers(path: str) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """Yield name, shape and a tensor of the same type for each tensor in a file, without reading the numbers."""
    from safetensors import safe_open

    if not path.endswith(".safetensors"):  # mapped into memory, so that numbers are read only when used
        yield from ((name, tuple(tensor.shape), tensor) for name, tensor in _tensors(path))
        return
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            part = file.get_slice(name)
            shape = tuple(part.get_shape())
            yield name, shape, part[:0] if shape else file.get_tensor(name)


def _tensors(path: str) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    if path.endswith(".safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                yield name, file.get_tensor(name)
        return
    try:
        state = _unpickled(path, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        state = _unpickled(path)  # files written before torch 1.6
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{Path(path).name} holds something else than tensors by name, as a training checkpoint does")
    yield from state.items()


def _unpickled(path: str, **options: Any) -> object:
    """Load a pickled file that holds only tensors and plain values; no code in it is executed.

    Raises:
        ValueError: if it holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, **options)
    except pickle.UnpicklingError as error:  # its message suggests to execute code in the file
        raise ValueError(f"{Path(path).name} holds more than tensors, which is not read; use safetensors") from error


class _Config:
    """Wrapper of a configuration that equals every other, so that it is not part of the key of a cache."""

    def __init__(self, config: "PretrainedConfig") -> None:
        self.config = config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Config)

    def __hash__(self) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class _Fit:
    model: nn.Module
    missing: frozenset[str]
    unused: frozenset[str]
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]


@lru_cache(maxsize=64)
def _fit(text: str, shapes: tuple[tuple[str, tuple[int, ...]], ...], head: str, config: _Config) -> _Fit:
    """Match stored shapes to a model with transformers' own rules for prefixes, ties and older names."""
    copied = copy.deepcopy(config.config)
    with torch.device("meta"):
        model = HEADS[head].auto.from_config(copied)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if sum(map(math.prod, expected.values())) > ROOM * sum(math.prod(shape) for _, shape in shapes) + ROOM * 1e6:
        return _fit_by_name(model, expected, dict(shapes), family_of(copied.model_type))
    # A single number expanded to each shape: memory is allocated only for tensors that the file lacks.
    tensors = {name: torch.zeros(()).expand(shape) for name, shape in shapes}
    with torch.random.fork_rng(devices=[]), quiet():
        _, info = type(model).from_pretrained(
            None, config=copied, state_dict=tensors, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    mismatched = {name: (tuple(theirs), tuple(ours)) for name, theirs, ours in info["mismatched_keys"]}
    return _Fit(model, frozenset(info["missing_keys"]), frozenset(info["unexpected_keys"]), mismatched)


def _fit_by_name(
    model: nn.Module, expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]], family: Family
) -> _Fit:
    """Match shapes by names alone, for a model so much larger than its file that the rest must not be initialised."""
    names = {name: name if name in stored else name.removeprefix(f"{family.base}.") for name in expected}
    missing = {name for name, theirs in names.items() if theirs not in stored}
    mismatched = {
        name: (stored[theirs], expected[name])
        for name, theirs in names.items()
        if name not in missing and stored[theirs] != expected[name]
    }
    return _Fit(model, frozenset(missing), frozenset(stored) - set(names.values()), mismatched)


def _check_types(stored: Stored, unused: frozenset[str], source: str, key: str) -> None:
    for name in sorted(set(stored.types) - unused):
        kind = stored.types[name]
        if kind not in STORED and not name.endswith("position_ids"):
            raise InputError(
                f"the weights of '{source}' are stored in {_type(kind)} ({name}); kd reads {_types()}; dequantise them",
                key,
            )


def _lacking(
    source: str,
    missing: Sequence[str],
    total: int,
    stored: Stored,
    unused: frozenset[str],
    family: Family,
    config: "PretrainedConfig",
) -> str:
    text = f"'{source}' lacks {len(missing)} of the {total} tensors of its model: {_listed(missing)}"
    first = {name.partition(".")[0] for name in stored.shapes}
    blocks = sorted(_blocks(stored.shapes, family))
    if len(first) == 1 and len(stored.shapes) > 1 and first != {family.base}:
        text += f". Every name in the file begins with '{next(iter(first))}.', a wrapper's prefix: save the model inside it"
    elif unused:
        text += f". The file has others in their place: {_listed(sorted(unused))}"
    elif blocks != list(range(config.num_hidden_layers)):
        text += f". num_hidden_layers={config.num_hidden_layers}, and the file has layers {_listed(list(map(str, blocks)), 24)}"
    return f"{text}. They would be drawn at random"


def _mismatch(
    source: str, name: str, theirs: tuple[int, ...], ours: tuple[int, ...], config: "PretrainedConfig", family: Family
) -> str:
    sizes = next((named for part, named in NAMED_SIZES.items() if part in name), ("hidden_size", family.intermediate))
    if name.startswith(f"{family.outputs}."):
        sizes = ("num_labels", "hidden_size")
    reasons = []
    for there, here in zip(theirs, ours, strict=False):
        if there != here:
            settings = [f"{size}={here}" for size in sizes if getattr(config, size, None) == here]
            reasons += [setting.replace("num_labels=", "labels in id2label: ") for setting in settings]
    why = f" ({', '.join(dict.fromkeys(reasons))})" if reasons else ""
    return (
        f"the weights of '{source}' do not fit its configuration: {name} is {list(theirs)} in the file, "
        f"{list(ours)} by config.json{why}"
    )


def _told(source: str, stored: Stored, fit: _Fit, family: Family, pooler: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    notes, asides = [], []
    kinds = sorted({_type(kind) for name, kind in stored.types.items() if name not in fit.unused and kind in STORED})
    if kinds != ["float32"]:
        notes.append(f"weights stored in {' and '.join(kinds)}, used in float32")
    if pooler:
        notes.append("pooler drawn afresh")
    parts = (family.embeddings, family.blocks)
    inside = (*(f"{part}." for part in parts), *(f"{family.base}.{part}." for part in parts))
    body = sorted(name for name in fit.unused if name.startswith(inside))
    if body:
        notes.append(f"{len(body)} tensors of the file not used: {_listed(body)}")
    heads = sorted({name.removeprefix(f"{family.base}.").partition(".")[0] for name in fit.unused - set(body)})
    if heads:
        asides.append(f"not used of the file: {_listed(heads)}")
    if not source.startswith("hf:"):
        folder = Path(pretrained(source, "")[0])
        present = [file for file in WEIGHT_FILES if (folder / file).is_file()]
        if len(present) > 1:
            asides.append(f"{present[0]} is read, not {_listed(present[1:])} beside it")
    return tuple(notes), tuple(asides)


def _blocks(names: Iterable[str], family: Family) -> set[int]:
    matches = (re.match(rf"(?:{family.base}\.)?{re.escape(family.blocks)}\.(\d+)\.", name) for name in names)
    return {int(match[1]) for match in matches if match is not None}


# -- messages ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def readable(what: str, source: str, key: str) -> Iterator[None]:
    """Turn a library's error about missing or damaged files into an input error.

    Raises:
        InputError: with the first line of the library's error.
    """
    try:
        with quiet():
            yield
    except InputError:
        raise
    except BaseException as error:
        if not _of_a_library(error):
            raise
        kind = "are truncated or damaged" if "Safetensor" in type(error).__name__ else "cannot be loaded"
        verb = kind if what.endswith("s") else "cannot be loaded"
        raise InputError(f"{what} of '{source}' {verb}: {first_line(error)}", key) from error


def _of_a_library(error: BaseException) -> bool:
    """Return whether a library can raise an error for a damaged file: any `Exception`, or a panic of a Rust library."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' log messages and progress bars inside this context: kd reports the same facts itself."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _listed(names: Sequence[object], most: int = SHOWN) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(str(name) for name in names[:most]) + more


def _type(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def _types() -> str:
    return ", ".join(_type(kind) for kind in STORED)


def _class_name(model_type: str) -> str:
    from transformers import CONFIG_MAPPING

    return str(CONFIG_MAPPING[model_type].__name__).removesuffix("Config")
