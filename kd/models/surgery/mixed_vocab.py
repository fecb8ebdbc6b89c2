"""Mixed-vocabulary training: a large model reads some words in the small vocabulary that a later student will use.

Source: Zhao, Gupta, Song, Zhou, "Extremely Small BERT Models from Mixed-Vocabulary Training", EACL 2021, arXiv:1909.11687v2
(v1 under the same number is another method). The authors published no code. Published: 4,928 WordPieces; students of 6 and 12
layers, width 256, intermediate 1024 (6,198,016 and 10,936,576 parameters); the teacher is BERT-large. Not published, hence our
choices, each an option: probability of a word's small segmentation, whether the small softmax is tied to the small embeddings,
every learning rate and number of steps, the initialisation of the second stage's body.

Stage I (`MixedStage`): every word is segmented with the teacher's vocabulary or, with some probability, with the student's. The
student's embeddings enter the body through an affine map, `U E_s[id] + c`; a masked position is predicted over the vocabulary
that segmented its word, with a separate softmax for each vocabulary. Stage II (`MixedVocab`): the small student is initialised
with the vocabulary and `E_s`, and trained on masked language modelling without the large model. It is then trained on the task.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from kd.config.values import number, switch, whole
from kd.data.masked_lm.tokenized import MixedTokenizer
from kd.errors import InputError
from kd.models.encoder import Encoder
from kd.models.surgery.embeddings import SurgeryInputs, check_special_tokens, drawn_table, word_table
from kd.models.surgery.wordpiece import check_wordpiece, learned_tokens, set_outputs, set_vocabulary, with_vocabulary
from kd.system import distributed

FOLDER = "vocabulary"
"""Subfolder of an exported Stage I model that holds the small vocabulary and its embeddings."""


class LiftedEmbedding(nn.Module):
    """Small embeddings `E_s` and the affine map `U e + c` to the width of a large model.

    Args:
        table: E_s, (small vocabulary, small width).
        width: width of the large model.
    """

    def __init__(self, table: Tensor, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.lift = nn.Linear(table.shape[1], width, device=table.device)
        nn.init.orthogonal_(self.lift.weight)  # preserves lengths if the map widens (our choice)
        nn.init.zeros_(self.lift.bias)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings of ids (...) of the small vocabulary, mapped to the width of the large model, (..., width)."""
        return self.lift(F.embedding(ids, self.table))  # type: ignore[no-any-return]

    def logits(self, states: Tensor) -> Tensor:
        """Return `(H U) E_s^T`, (..., small vocabulary), for states H (..., width): logits tied to the embeddings by U."""
        return F.linear(states @ self.lift.weight, self.table)


class MixedEmbedding(nn.Module):
    """Embeddings of two vocabularies; ids of the small one follow those of the large one.

    Both tables are looked up at every position, so that both are part of every step's graph, as DDP expects.

    Args:
        large: embeddings E_t of the large vocabulary.
        small: embeddings E_s of the small vocabulary, with their map.
    """

    def __init__(self, large: nn.Embedding, small: LiftedEmbedding) -> None:
        super().__init__()
        self.large = large
        self.small = small

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings (..., width) of ids (...)."""
        shifted = ids - self.large.num_embeddings
        second = shifted >= 0
        large = self.large(ids.masked_fill(second, 0))
        return torch.where(second[..., None], self.small(shifted.clamp(min=0)).to(large.dtype), large)

    def plain(self) -> nn.Embedding:
        """Return the large table alone, for text segmented with the large vocabulary."""
        return self.large


class MixedOutputs(nn.Module):
    """Output layer over both vocabularies, (..., large + small); `separate` splits its logits into two softmaxes.

    Args:
        large: the head's last layer.
        small: embeddings E_s of the small vocabulary, with their map.
        tied: whether the small outputs are tied to E_s through the map (not published; our choice is yes).
        initial: standard deviation of the initial small output matrix, if it is not tied.
    """

    def __init__(self, large: nn.Linear, small: LiftedEmbedding, *, tied: bool = True, initial: float = 0.02) -> None:
        super().__init__()
        self.large = large
        self.small = small
        size, device = small.table.shape[0], small.table.device
        self.small_bias = nn.Parameter(torch.zeros(size, device=device))
        free = None if tied else torch.empty(size, large.in_features, device=device).normal_(std=initial)
        self.free = None if free is None else nn.Parameter(free)

    @property
    def bias(self) -> nn.Parameter:
        """Bias of the large outputs, which the head shares."""
        return self.large.bias

    def forward(self, states: Tensor) -> Tensor:
        """Return the logits (..., large + small) of states (..., width)."""
        small = self.small.logits(states) if self.free is None else F.linear(states, self.free)
        return torch.cat([self.large(states), small + self.small_bias], dim=-1)

    def plain(self) -> nn.Linear:
        """Return the large output layer alone."""
        return self.large


def separate(logits: Tensor, large: int, second: Tensor) -> Tensor:
    """Mask logits so that a softmax normalises each position over the vocabulary that segmented its word, and no other.

    Args:
        logits: (positions, large + small).
        large: size of the large vocabulary.
        second: (positions,), bool, True where the small vocabulary segmented the word.

    Returns:
        (positions, large + small), minus infinity for tokens of the vocabulary that did not segment the position's word.

    >>> separate(torch.zeros(2, 3), 2, torch.tensor([False, True]))
    tensor([[0., 0., -inf],
            [-inf, -inf, 0.]])
    """
    small = torch.arange(logits.shape[-1], device=logits.device) >= large
    return logits.masked_fill(small[None, :] != second[:, None], -torch.inf)


class MixedEncoder(Encoder):
    """A masked language model over two vocabularies."""

    def logits_of(self, states: Tensor, ids: Tensor | None) -> Tensor:
        """Return logits at some positions, each over the vocabulary of its input token.

        The input token identifies the vocabulary: mask tokens and random replacements come from the
        vocabulary that segmented the word.

        Raises:
            ValueError: if the pass was given word embeddings or states without `input_ids`.
        """
        if ids is None:
            raise ValueError("a model with two vocabularies needs 'input_ids' beside 'words' or 'embedded' to tell them apart")
        large = self.config.vocab_size
        return separate(super().logits_of(states, ids), large, ids >= large)

    def save(self, folder: Path) -> None:
        """Write the plain large model and, in a subfolder, the small vocabulary with its embeddings and their map."""
        super().save(folder)
        words: MixedEmbedding = self.model.get_input_embeddings()
        lift = words.small.lift
        table = words.small.table.detach().clone()
        # Stage I reads the large vocabulary's [CLS] and [SEP], so the small ones are untrained. They are set to the small
        # embeddings whose images under the map are nearest to the large ones (our choice).
        for name in ("cls_token_id", "sep_token_id"):
            target = words.large.weight[getattr(self.tokenizer.first, name)].detach() - lift.bias.detach()
            solution = torch.linalg.lstsq(lift.weight.detach().cpu(), target.cpu()[:, None]).solution[:, 0]
            table[getattr(self.tokenizer.second, name)] = solution.to(table)
        table[self.tokenizer.second.pad_token_id] = 0
        tensors = {"embeddings": table, "lift": lift.weight.detach(), "offset": lift.bias.detach()}
        contiguous = {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}
        save_file(contiguous, Path(folder) / FOLDER / "embeddings.safetensors")


class MixedStage:
    """Stage I: a surgery that gives a masked language model a second, smaller vocabulary as input and output.

    Args:
        size: number of tokens in the small vocabulary, learned from the training texts (4,928 in the paper).
        width: width of its embeddings; None for the model's width (256 in the paper).
        probability: probability that a word is segmented with the small vocabulary, in [0, 1]. Not published; 0.5 is our
            choice.
        tied: whether the small softmax is tied to the small embeddings. Not published; our choice.
    """

    changes_vocabulary = True

    def __init__(self, size: int, width: int | None = None, probability: float = 0.5, *, tied: bool = True) -> None:
        self.size = whole(size, "size")
        self.width = None if width is None else whole(width, "width")
        self.probability = number(probability, "probability", 0, 1)
        self.tied = switch(tied, "tied")

    def dry_run(self, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> None:
        """Check, before anything is trained, that the texts support the vocabulary: learn it and discard it."""
        learned_tokens(tokenizer, texts, self.size)

    def shape(self, student: Encoder) -> Encoder:
        """Check that a second vocabulary can be added; return the student unchanged."""
        word_table(student, "mixed_stage")
        if student.model.get_output_embeddings() is None:
            raise InputError("mixed_stage trains a masked language model: use task=imdb_text or task=text", "surgery")
        check_wordpiece(student.tokenizer)
        check_special_tokens(student.tokenizer)
        return student

    def __call__(self, student: Encoder, inputs: SurgeryInputs) -> tuple[Encoder, str]:
        """Return the model with two vocabularies, and a description of the change."""
        self.shape(student)
        table, outputs = word_table(student, "mixed_stage"), student.model.get_output_embeddings()
        tokenizer = student.tokenizer
        learned = learned_tokens(tokenizer, inputs.texts, self.size)
        small = with_vocabulary(tokenizer, distributed.broadcast(learned))
        width = self.width or student.width
        lifted = LiftedEmbedding(drawn_table(len(small), width, student.config), student.width)
        set_outputs(student.model, MixedOutputs(outputs, lifted, tied=self.tied, initial=student.config.initializer_range))
        student.model.set_input_embeddings(MixedEmbedding(table, lifted))
        mixed = MixedTokenizer(tokenizer, small, table.num_embeddings, self.probability)
        words = f"a second vocabulary of {len(small)} tokens, width {width}, for {self.probability:.0%} of the words"
        return MixedEncoder(student.model, mixed), words


class MixedVocab:
    """Stage II: a surgery that initialises the student with the vocabulary and embeddings learned in Stage I.

    `surgery.mixed_vocab.run` configures the Stage I run that learns them.
    """

    changes_vocabulary = True

    def shape(self, student: Encoder) -> Encoder:
        """Check that the vocabulary can be replaced; return the student unchanged, because Stage I may not be trained yet."""
        word_table(student, "mixed_vocab")
        return student

    def __call__(self, student: Encoder, inputs: SurgeryInputs) -> tuple[Encoder, str]:
        """Return the student with the learned vocabulary, and a description of the change."""
        self.shape(student)
        path = None if inputs.folder is None else inputs.folder / FOLDER
        if path is None or not (path / "embeddings.safetensors").is_file():
            raise InputError("run made no vocabulary: it must be a run with surgery=[mixed_stage]", "run")
        table = load_file(path / "embeddings.safetensors")["embeddings"]
        if table.shape[1] != student.width:
            raise InputError(
                f"the embeddings that Stage I learned have width {table.shape[1]}, the student has {student.width}; "
                "set surgery.mixed_stage.width in its overrides",
                "run",
            )
        student.tokenizer = load_tokenizer_of(path)
        set_vocabulary(student.model, table, None, student.tokenizer.pad_token_id)
        return student, f"vocabulary of {len(table)} tokens and its embeddings from mixed-vocabulary training"


def load_tokenizer_of(folder: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer from a folder that holds no model."""
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer
