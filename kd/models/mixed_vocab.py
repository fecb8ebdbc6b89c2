"""Mixed-vocabulary training: a large model reads some words in the small vocabulary of a student to come.

Source: Zhao, Gupta, Song, Zhou, "Extremely Small BERT Models from Mixed-Vocabulary Training", EACL 2021, arXiv:1909.11687v2
(v1 of the same number is another method). There is no code of the authors. Published: 4,928 WordPieces; students of 6 and 12
layers, width 256, intermediate 1024 (6,198,016 and 10,936,576 parameters); the teacher is BERT-large. Not published, hence our
choices, each an option: probability of a word's small segmentation, whether the small softmax is tied to the small embeddings,
every learning rate and number of steps, how the second stage's body begins.

Stage I (`MixedStage`): every word is cut by the teacher's vocabulary or, with some probability, by the student's. The latter's
embeddings reach the body through an affine map, `U E_s[id] + c`; a masked position is predicted over the vocabulary that cut
its word, by a softmax of its own. Stage II (`MixedVocab`): the small student begins with the vocabulary and `E_s`, and learns
masked language modelling by itself. Then the task.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from kd import distributed
from kd.data.text import MixedTokenizer
from kd.errors import InputError
from kd.models.encoder import Encoder
from kd.models.surgery import SurgeryInputs, check_special_tokens, drawn_table, whole_number, word_table
from kd.models.vocabularies import check_wordpiece, learned_tokens, set_outputs, set_vocabulary, with_vocabulary
from kd.values import number, switch

FOLDER = "vocabulary"
"""Where, inside an exported Stage I model, the small vocabulary and its embeddings are."""


class LiftedEmbedding(nn.Module):
    """Small embeddings `E_s` and the affine map `U e + c` to the width of a large model.

    Args:
        table: E_s, (small vocabulary, small width).
        width: of the large model.
    """

    def __init__(self, table: Tensor, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.lift = nn.Linear(table.shape[1], width, device=table.device)
        if table.device.type != "meta":
            nn.init.orthogonal_(self.lift.weight)  # lengths are kept where the map widens (our choice)
        nn.init.zeros_(self.lift.bias)

    def forward(self, ids: Tensor) -> Tensor:
        """Lifted embeddings (..., width) of ids (...) of the small vocabulary."""
        return self.lift(F.embedding(ids, self.table))  # type: ignore[no-any-return]

    def logits(self, states: Tensor) -> Tensor:
        """`(H U) E_s^T`, (..., small vocabulary) of states (..., width): a softmax tied to the embeddings through the map."""
        return F.linear(states @ self.lift.weight, self.table)


class MixedEmbedding(nn.Module):
    """Embeddings of two vocabularies; ids of the small one are numbered behind the large one's.

    Both tables are looked up at every position, so that each has a part in every step's graph, as DDP expects.

    Args:
        large: E_t.
        small: E_s with its map.
    """

    def __init__(self, large: nn.Embedding, small: LiftedEmbedding) -> None:
        super().__init__()
        self.large = large
        self.small = small

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings (..., width) of ids (...)."""
        shifted = ids - self.large.num_embeddings
        second = shifted >= 0
        large = self.large(ids.masked_fill(second, 0))
        return torch.where(second[..., None], self.small(shifted.clamp(min=0)).to(large.dtype), large)

    def plain(self) -> nn.Embedding:
        """The large table alone, for text of its own vocabulary."""
        return self.large


class MixedOutputs(nn.Module):
    """The outputs over both vocabularies, (..., large + small); `separate` makes two softmaxes of them.

    Args:
        large: the head's last layer.
        small: E_s with its map.
        tied: whether the small outputs are tied to E_s through the map (not published; our choice is yes).
        initial: standard deviation of a free matrix.
    """

    def __init__(self, large: nn.Linear, small: LiftedEmbedding, tied: bool = True, initial: float = 0.02) -> None:
        super().__init__()
        self.large = large
        self.small = small
        size, device = small.table.shape[0], small.table.device
        self.small_bias = nn.Parameter(torch.zeros(size, device=device))
        free = None if tied else torch.empty(size, large.in_features, device=device).normal_(std=initial)
        self.free = None if free is None else nn.Parameter(free)

    @property
    def bias(self) -> nn.Parameter:
        """Of the large outputs, which the head shares."""
        return self.large.bias

    def forward(self, states: Tensor) -> Tensor:
        """Logits (..., large + small) of states (..., width)."""
        small = self.small.logits(states) if self.free is None else F.linear(states, self.free)
        return torch.cat([self.large(states), small + self.small_bias], dim=-1)

    def plain(self) -> nn.Linear:
        """The large outputs alone."""
        return self.large


def separate(logits: Tensor, large: int, second: Tensor) -> Tensor:
    """Two softmaxes in one: each position is normalised over the vocabulary that cut its word, and over no other.

    Args:
        logits: (positions, large + small).
        large: size of the first vocabulary.
        second: (positions,), bool, True where the second vocabulary cut the word.

    Returns:
        (positions, large + small), minus infinity outside a position's own vocabulary.

    >>> separate(torch.zeros(2, 3), 2, torch.tensor([False, True]))
    tensor([[0., 0., -inf],
            [-inf, -inf, 0.]])
    """
    own = torch.arange(logits.shape[-1], device=logits.device) >= large
    return logits.masked_fill(own[None, :] != second[:, None], -torch.inf)


class MixedEncoder(Encoder):
    """A masked language model over two vocabularies."""

    def logits_of(self, states: Tensor, ids: Tensor) -> Tensor:
        """Logits of some positions, over the vocabulary of the token that was read there.

        It says which one is meant: mask tokens and replacements are of the vocabulary that cut the word.
        """
        large = self.config.vocab_size
        return separate(super().logits_of(states, ids), large, ids >= large)

    def save(self, folder: Path) -> None:
        """Write the plain large model, and beside it the small vocabulary with its embeddings and their map."""
        super().save(folder)
        words: MixedEmbedding = self.model.get_input_embeddings()
        lift = words.small.lift
        table = words.small.table.detach().clone()
        # In the first stage the special tokens around a text were the large model's; they are mapped once, to the small
        # embeddings whose images are nearest (our choice).
        for name in ("cls_token_id", "sep_token_id"):
            wanted = words.large.weight[getattr(self.tokenizer.first, name)].detach() - lift.bias.detach()
            found = torch.linalg.lstsq(lift.weight.detach().cpu(), wanted.cpu()[:, None]).solution[:, 0]
            table[getattr(self.tokenizer.second, name)] = found.to(table)
        table[self.tokenizer.second.pad_token_id] = 0
        tensors = {"embeddings": table, "lift": lift.weight.detach(), "offset": lift.bias.detach()}
        kept = {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}
        save_file(kept, Path(folder) / FOLDER / "embeddings.safetensors")


class MixedStage:
    """Stage I: a masked language model learns to read, and to predict, a second and smaller vocabulary.

    Args:
        size: tokens of the small vocabulary, learned from the training texts (4,928 in the paper).
        width: of its embeddings; None for the model's (256 in the paper).
        probability: of a word to be cut by the small vocabulary, in [0, 1]. Not published; 0.5 is our choice.
        tied: whether the small softmax is tied to the small embeddings. Not published; our choice.
    """

    changes_vocabulary = True

    def __init__(self, size: int, width: int | None = None, probability: float = 0.5, tied: bool = True) -> None:
        self.size = whole_number(size, 1, "surgery.mixed_stage.size")
        self.width = None if width is None else whole_number(width, 1, "surgery.mixed_stage.width")
        self.probability = number(probability, "surgery.mixed_stage.probability", 0, 1)
        self.tied = switch(tied, "surgery.mixed_stage.tied")

    def dry_run(self, tokenizer: Any, texts: Sequence[str]) -> None:
        """Learn the vocabulary and forget it, to see whether the texts support it before anything is trained."""
        learned_tokens(tokenizer, texts, self.size, "surgery.mixed_stage.size")

    def __call__(self, student: Encoder, inputs: SurgeryInputs) -> tuple[Encoder, str]:
        """The model with two vocabularies."""
        table, outputs = word_table(student, "mixed_stage"), student.model.get_output_embeddings()
        if outputs is None:
            raise InputError("mixed_stage trains a masked language model: use task=imdb_text or task=text", "surgery")
        tokenizer = student.tokenizer
        check_wordpiece(tokenizer, "surgery.mixed_stage")
        check_special_tokens(tokenizer, "surgery.mixed_stage")
        if inputs.texts is None:
            return student, ""
        learned = learned_tokens(tokenizer, inputs.texts, self.size, "surgery.mixed_stage.size")
        small = with_vocabulary(tokenizer, distributed.broadcast(learned))
        width = self.width or student.width
        lifted = LiftedEmbedding(drawn_table(len(small), width, student.config), student.width)
        set_outputs(student.model, MixedOutputs(outputs, lifted, self.tied, student.config.initializer_range))
        student.model.set_input_embeddings(MixedEmbedding(table, lifted))
        mixed = MixedTokenizer(tokenizer, small, table.num_embeddings, self.probability)
        words = f"a second vocabulary of {len(small)} tokens, width {width}, for {self.probability:.0%} of the words"
        return MixedEncoder(student.model, mixed), words


class MixedVocab:
    """Stage II: the student begins with the vocabulary and the embeddings that Stage I has learned.

    The run that makes them is `surgery.mixed_vocab.run`.
    """

    changes_vocabulary = True

    def __call__(self, student: Encoder, inputs: SurgeryInputs) -> tuple[Encoder, str]:
        """The student with the learned vocabulary."""
        word_table(student, "mixed_vocab")
        if inputs.texts is None:
            return student, ""
        path = None if inputs.folder is None else inputs.folder / FOLDER
        if path is None or not (path / "embeddings.safetensors").is_file():
            raise InputError("surgery.mixed_vocab.run made no vocabulary: it must be a run with surgery=[mixed_stage]", KEY)
        table = load_file(path / "embeddings.safetensors")["embeddings"]
        if table.shape[1] != student.width:
            raise InputError(
                f"the embeddings that Stage I learned have width {table.shape[1]}, the student has {student.width}; "
                "set surgery.mixed_stage.width in its overrides",
                KEY,
            )
        student.tokenizer = load_tokenizer_of(path)
        set_vocabulary(student.model, table, None, student.tokenizer.pad_token_id)
        return student, f"vocabulary of {len(table)} tokens and its embeddings from mixed-vocabulary training"


KEY = "surgery.mixed_vocab.run"


def load_tokenizer_of(folder: Path) -> Any:
    """The tokenizer in a folder that holds no model."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)
