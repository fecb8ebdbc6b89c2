"""Vocabularies: learn one from texts, reduce one to the tokens that texts use, replace a model's."""

import itertools
import json
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Tokenizer, models, trainers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kd.data.tokenized import AT_ONCE
from kd.errors import InputError

ALPHABET = 100
"""Number of characters, the most frequent ones, that a learned vocabulary contains. Latin letters, digits and punctuation fit;
each takes two entries, at the start of a word and inside it. Our choice."""


def check_wordpiece(tokenizer: PreTrainedTokenizerFast) -> None:
    """Check that a tokenizer is a WordPiece one.

    Raises:
        InputError: if it is not: byte-level and unigram vocabularies depend on merges and scores, which cannot be reduced.
    """
    kind = type(tokenizer.backend_tokenizer.model).__name__
    if kind != "WordPiece":
        raise InputError(f"it needs a WordPiece vocabulary, as BERT and MPNet have; the student's is {kind}")


def with_vocabulary(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the same rules and another vocabulary.

    Args:
        tokenizer: WordPiece; the new one has its normaliser, pre-tokeniser, post-processor and special tokens.
        tokens: the new vocabulary in the order of ids, special tokens included.
    """
    numbers = {token: number for number, token in enumerate(tokens)}
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules["padding"] = rules["truncation"] = None
    rules["model"]["vocab"] = numbers
    rules["added_tokens"] = [
        {**token, "id": numbers[token["content"]]} for token in rules["added_tokens"] if token["content"] in numbers
    ]
    processor = rules["post_processor"] or {}
    for name, entry in processor.get("special_tokens", {}).items():
        entry["ids"] = [numbers[name]]
    for end in ("sep", "cls"):  # the post-processors of BERT and RoBERTa
        if end in processor:
            processor[end][1] = numbers[processor[end][0]]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(rules)),
        model_input_names=list(tokenizer.model_input_names),
        model_max_length=tokenizer.model_max_length,
        **tokenizer.special_tokens_map,
    )


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return the special tokens in the order of their ids, which padding and positions of some families depend on."""
    return sorted(tokenizer.all_special_tokens, key=tokenizer.convert_tokens_to_ids)


def characters(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Counter[str]:
    """Count the characters of normalised texts; white space, which separates words, is not counted."""
    rules = tokenizer.backend_tokenizer.normalizer
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text if rules is None else rules.normalize_str(text))
    return Counter({character: count for character, count in counts.items() if not character.isspace()})


def used_tokens(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], least: int) -> list[str]:
    """Return the part of a vocabulary that texts use, in the order of ids.

    It consists of the special tokens, every token that occurs at least `least` times, and the single characters of the texts,
    from which words that do not occur in them can still be composed.
    """
    prefix = tokenizer.backend_tokenizer.model.continuing_subword_prefix
    vocabulary = tokenizer.get_vocab()
    counts = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    remaining = iter(texts)
    while some := list(itertools.islice(remaining, AT_ONCE)):
        for encoding in tokenizer(some, add_special_tokens=False, truncation=False, padding=False).encodings:
            np.add.at(counts, np.asarray(encoding.ids, dtype=np.int64), 1)
    used = set(special_tokens(tokenizer))
    used |= {token for token, number in vocabulary.items() if counts[number] >= least}
    used |= {piece for letter in characters(tokenizer, texts) for piece in (letter, prefix + letter) if piece in vocabulary}
    return sorted(used, key=vocabulary.__getitem__)


def learned_tokens(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], size: int) -> list[str]:
    """Learn a WordPiece vocabulary from texts, with a tokenizer's normaliser and pre-tokeniser.

    The result depends on the texts alone. `tokenizers` numbers inside-of-word characters in the order of a hash map and
    breaks ties by number, so two processes would learn different vocabularies; here the alphabet is numbered in advance.

    Raises:
        InputError: for a size that the texts do not support, or that special tokens and single characters alone fill.
    """
    rules = tokenizer.backend_tokenizer
    prefix = rules.model.continuing_subword_prefix
    counts = characters(tokenizer, texts)
    alphabet = sorted(sorted(counts, key=lambda character: (-counts[character], character))[:ALPHABET])
    start = [*special_tokens(tokenizer), *alphabet, *(prefix + character for character in alphabet)]
    if size <= len(start):
        raise InputError(
            f"size={size} leaves no room for words: special tokens and single characters alone are {len(start)}", "size"
        )
    learner = Tokenizer(models.WordPiece(unk_token=tokenizer.unk_token))
    learner.normalizer, learner.pre_tokenizer = rules.normalizer, rules.pre_tokenizer
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        special_tokens=start,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix=prefix,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learned = learner.get_vocab()
    if len(learned) < size:
        raise InputError(f"size={size} is more than the text supports: it gives {len(learned)} tokens", "size")
    return sorted(learned, key=learned.__getitem__)


def set_vocabulary(model: PreTrainedModel, table: Tensor, bias: Tensor | None, padding: int) -> None:
    """Replace a model's word embeddings and, if it is a masked language model, the output layer tied to them.

    Args:
        model: a transformers model.
        table: the new embeddings, (vocabulary, width).
        bias: (vocabulary,), bias of the output layer; None for zeros.
        padding: id of the padding token.
    """
    size, width = table.shape
    words = nn.Embedding.from_pretrained(table, freeze=False, padding_idx=padding)
    old = model.get_output_embeddings()
    model.set_input_embeddings(words)
    model.config.vocab_size, model.config.pad_token_id = size, padding
    if old is not None:
        outputs = nn.Linear(width, size, device=table.device)
        with torch.no_grad():
            outputs.bias.copy_(torch.zeros(size) if bias is None else bias)
        outputs.weight = words.weight
        set_outputs(model, outputs)


def set_outputs(model: PreTrainedModel, outputs: nn.Module) -> None:
    """Replace the last layer of a masked language model, and the head's reference to that layer's bias."""
    old = model.get_output_embeddings()
    for parent in list(model.modules()):
        if any(child is old for child in parent.children()):
            parent.decoder = outputs
            parent.bias = outputs.bias
