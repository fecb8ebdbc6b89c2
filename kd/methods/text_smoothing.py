"""Distillation through smoothed text."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kd.forward import Forward, Needs
from kd.functional.logits import SOFT_LOSSES
from kd.functional.smoothing import drawn_words, likely_words, mean_embedding
from kd.methods.base import ANY_TEACHERS, Bound, Method, Step
from kd.methods.options import BATCH_MEANS, schedule, temperature_schedule, whole, word
from kd.schedules import Schedule
from kd.system import hardware

TEXTS = ("smoothed", "both", "alternate")
REPLACEMENTS = ("mixed", "drawn")
POSITIONS = ("words", "all")
SOFT_LABELS = ("none", "plain", "smoothed")
CHUNK = 2**24
"""Logits that are computed at a time, positions x vocabulary: 64 MB in float32."""


class TextSmoothing(Method):
    r"""Distilling Knowledge from Pre-trained Language Models via Text Smoothing (Wu, Liu, Zhou, Yu, 2020, arXiv:2005.03848).

    A masked language model gives no labels but words: at each position the one-hot word :math:`o` is mixed with the model's
    distribution :math:`q = softmax(MLM(x) / T)` over the unmasked sentence, :math:`\tilde x = \lambda q + (1 - \lambda) o`,
    and the student is trained on the labels of these smoothed texts, whose word embeddings are :math:`\tilde x E`. Afterwards
    it reads plain text. Of the paper only abstract and introduction could be read; what the authors' later code does (text
    smoothing as augmentation, ACL 2022, arXiv:2202.13840) is marked so. The paper has no soft labels.

    Aid: `mlm`, a masked language model with the student's vocabulary. It is the pre-trained model, not the fine-tuned one. It
    runs once a step, without gradients; its distribution is cut to the `topk` most probable words, so that nothing of the size
    of the vocabulary is kept for a batch.

    Terms:
        `task`: the hard loss, over the smoothed text, or over the plain one for `texts=both`.
        `smoothed`: only with `texts=both`, the hard loss over the smoothed text.
        `logits`: only with soft labels (our addition), the soft loss of the student's outputs over the smoothed text; over the
            plain one in the plain steps of `texts=alternate`.

    Args:
        texts: `smoothed`, the smoothed texts alone (paper); `both` reads the plain text too in every step, and adds a term
            (our choice); `alternate` reads smoothed text in one optimiser step and plain text in the next. The later code takes
            both steps on every batch; so with the same number of epochs ours has half of its steps.
        rate: :math:`\lambda`, in [0, 1], of the model's distribution; a number or a schedule. 0.5 in the later code. A summary
            of the paper puts it on the one-hot word instead.
        temperature: T > 0, a number or a schedule. 1 in the later code. At an unmasked position the distribution is close to
            the word itself, so that T matters more than the rate.
        topk: number of words of the distribution, whose probabilities are scaled to add up to 1 (our choice); null keeps all,
            and needs positions x vocabulary numbers of memory.
        positions: `words`, all but special tokens and padding (our choice), or `all`, as in the later code.
        replace: `mixed` embeddings, or `drawn`: with probability `rate` a word is replaced by one drawn from the distribution,
            which has the same mean (our baseline).
        soft: teacher of the soft labels: `none`; `plain`, one teacher that reads the plain text; `smoothed`, one that reads the
            same mixture of its own word embeddings, and so runs at every step.
        soft_temperature: temperature of the soft labels > 0, a number or a schedule.
        loss: loss of the soft labels: `kl`, `ce` or `mse`.
        reduction: reduction of the soft loss: `batchmean` or `elementmean`.
    """

    def __init__(
        self,
        texts: str = "smoothed",
        rate: "float | Schedule" = 0.5,
        temperature: "float | Schedule" = 1.0,
        topk: int | None = 10,
        positions: str = "words",
        replace: str = "mixed",
        soft: str = "none",
        soft_temperature: "float | Schedule" = 1.0,
        loss: str = "kl",
        reduction: str = "batchmean",
    ) -> None:
        super().__init__()
        self.aids = {"mlm": "masked_lm"}
        self.other_words = True
        self.texts = word(texts, TEXTS, "texts")
        self.rate = schedule(rate, "rate", 0, 1)
        self.temperature = temperature_schedule(temperature)
        self.topk = None if topk is None else whole(topk, "topk", 1)
        self.positions = word(positions, POSITIONS, "positions")
        self.replacement = word(replace, REPLACEMENTS, "replace")
        self.soft = word(soft, SOFT_LABELS, "soft")
        self.soft_temperature = temperature_schedule(soft_temperature, "soft_temperature")
        self.loss = word(loss, SOFT_LOSSES, "loss")
        self.reduction = word(reduction, BATCH_MEANS, "reduction")
        self.uses_teachers = soft != "none"
        self.teachers = 1 if self.uses_teachers else ANY_TEACHERS
        self.same_vocabulary = soft == "smoothed"
        self.names = ("task", *(["smoothed"] if texts == "both" else []), *(["logits"] if self.uses_teachers else []))
        # A student that reads smoothed text differs from its teacher that reads plain text.
        self.distances = ("logits",) if soft == "smoothed" else ()
        self.depth = 0
        self.special: list[int] = []

    def bind(self, bound: Bound) -> None:
        """Read the special tokens of the student and the depth of the masked language model."""
        self.depth = bound.aids["mlm"].depth
        self.special = [] if bound.student.tokenizer is None else sorted(bound.student.tokenizer.all_special_ids)
        self.teachers = len(bound.teachers)

    def needs(self) -> tuple[Needs, Sequence[Needs]]:
        """Declare the logits; a teacher that reads smoothed text runs at every step."""
        reason = "it reads smoothed text" if self.soft == "smoothed" else None
        return Needs(), [Needs(uncacheable_reason=reason)] * (self.teachers or 0)

    def likely(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Return the likely words, (positions, words), their probabilities, and the positions, (batch, tokens), bool."""
        inputs = step.batch.student
        tokens, real = inputs["input_ids"], inputs["attention_mask"].bool()
        replaced = torch.ones_like(real)
        if self.positions == "words":
            replaced = real & ~torch.isin(
                tokens, hardware.to_device(torch.tensor(self.special, dtype=tokens.dtype), tokens.device)
            )
        mlm: Any = step.aids["mlm"].model
        # The body runs once; the head, whose outputs are large, in chunks.
        none = {**inputs, "predicted": torch.zeros_like(real)}
        states = step.aids["mlm"].run(none, Needs(hidden=[self.depth])).hidden(self.depth)[replaced]
        temperature = self.temperature(step.progress.fraction)
        rows = max(1, CHUNK // mlm.shape.config.vocab_size)
        chunks = zip(states.split(rows), tokens[replaced].split(rows), strict=True)
        parts = [likely_words(mlm.logits_of(*chunk), self.topk, temperature) for chunk in chunks]
        ids, probabilities = zip(*parts, strict=True)
        return ids[0][:1].expand(len(states), -1) if self.topk is None else torch.cat(ids), torch.cat(probabilities), replaced

    def smoothed(
        self, forward: Forward[Any], step: Step, ids: Tensor, probabilities: Tensor, replaced: Tensor
    ) -> dict[str, Tensor]:
        """Return the smoothed text as inputs of a model: mixtures of its own word embeddings, or drawn words."""
        embed = forward.model.word_embeddings
        inputs, rate = step.batch.student, self.rate(step.progress.fraction)
        tokens = inputs["input_ids"]
        if self.replacement == "drawn":
            chances, choices = (step.draws(name, tokens.shape[1])[replaced] for name in ("replaced", "word"))
            words = torch.where(chances < rate, drawn_words(ids, probabilities, choices), tokens[replaced])
            return {**inputs, "input_ids": tokens.masked_scatter(replaced, words)}
        plain = embed(tokens)
        mixed = rate * mean_embedding(embed, ids, probabilities) + (1 - rate) * plain[replaced]
        return {**inputs, "words": plain.masked_scatter(replaced.unsqueeze(-1), mixed.to(plain.dtype))}

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the loss terms listed in the class docstring."""
        labels, fraction = step.batch.labels, step.progress.fraction
        plain = self.texts == "alternate" and step.progress.step % 2 == 1
        words = None if plain else self.likely(step)

        def logits(forward: Forward[Any], *, smoothed: bool) -> Tensor:
            return (forward.run(self.smoothed(forward, step, *words)) if smoothed and words else forward.outputs).logits

        ours = logits(step.student, smoothed=True)
        if self.texts == "both":
            terms = {"task": step.task.hard(step.student.outputs.logits, labels), "smoothed": step.task.hard(ours, labels)}
        else:
            terms = {"task": step.task.hard(ours, labels)}
        if self.uses_teachers:
            theirs = logits(step.teacher, smoothed=self.soft == "smoothed")
            terms["logits"] = step.task.soft(ours, theirs, self.soft_temperature(fraction), self.loss, self.reduction)
        return terms
