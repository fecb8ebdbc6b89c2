"""Distillation on auxiliary samples, found by gradient ascent on the divergence between teacher and student."""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from kd.errors import InputError
from kd.forward import Model, Needs
from kd.functional import ascent
from kd.functional.hidden import at_least_float32
from kd.functional.logits import SOFT_LOSSES
from kd.methods.base import Bound, Method, Step
from kd.methods.options import BATCH_MEANS, number, switch, temperature_schedule, whole, word
from kd.models import Encoder, FrozenTeacher
from kd.schedules import Schedule
from kd.system import hardware

DIRECTIONS = ("divergence", "noise", "student_loss")
REFRESHES = ("epoch", "batch")
ITERATES = ("last", "all")
TRANSFERS = ("refresh", "once")
TEACHER_WORDS = ("transferred", "shifted")
MOST_STEPS = 1000
"""Largest number of steps of the ascent; each is a pass forward and backward through both models."""
SIZES = (1e-9, 1e3)
"""Smallest and largest step and radius, in mean norms of a word embedding."""
RUNS_ON_SAMPLES = "it runs on samples that are generated in training"


class BackwardKD(Method):
    r"""Knowledge distillation with backward pass knowledge (Jafari, Rezagholizadeh, Ghodsi, 2023, arXiv:2301.12006).

    Auxiliary samples are the training samples moved to where the student differs most from its teacher, by gradient ascent on
    :math:`D(x) = \| T(x) - S(x) \|_2^2`: :math:`x^{(l+1)} = x^{(l)} + \eta \nabla_x D(x^{(l)})`. The student then learns
    :math:`(1 - \lambda) CE(y, S(x)) + \lambda KD(T(x), S(x))` from the samples and the part without labels from the auxiliary
    ones. A text is moved in the space of the student's word embeddings, :math:`z_S = W_S o`; the teacher reads
    :math:`z_T = Q z_S` with :math:`Q = W_T W_S^\top (W_S W_S^\top)^{-1}`. No code of the authors is known to us.

    Terms:
        `task`: CE, the hard loss. Weight 1 - lambda.
        `logits`: KD on the samples, T squared included for `kl`. Weight lambda.
        `auxiliary`: the loss against the teacher on the auxiliary samples; a mean over iterates if there are several. Weight
            lambda.

    Args:
        steps: number of steps l of the ascent, 1 to 1000.
        step_size: eta > 0, in mean norms of the student's word embeddings (our choice of unit).
        normalize: whether the gradient of each example is scaled first, so that the root mean square over its tokens of the
            lengths of their steps is `step_size`. False is the formula, whose steps vanish where the models agree; the default
            is our choice.
        radius: largest shift from the text, measured as a normalised step is, in the same unit; null for none. Our choice.
        iterates: whether the `last` samples of the ascent are learned from or those of `all` steps.
        direction: `divergence` (paper); for comparison `noise`, a Gaussian shift of the norm that the ascent's has, or
            `student_loss`, the gradient of the student's hard loss, which moves no example without a label.
        outputs: what D compares, `logits` or `probabilities`; our choice.
        teacher_words: `transferred`, z_T (paper), also for words that were not moved; `shifted` adds Q times the shift to the
            teacher's own embeddings of the text, so that the teacher reads the text itself where nothing is moved (our choice).
        transfer: Q is computed at each `refresh`, or `once`, from the tables at the start of training. It is the identity while
            the tables are equal.
        ridge: added to the Gram matrix of W_S before it is inverted, as a multiple of its mean eigenvalue; 0 for none. Our
            choice.
        refresh: `epoch`, samples are those of the student at the start of the epoch; `batch`, those of the student as it is,
            which costs a copy of its weights for each batch.
        epochs: with `refresh=epoch`, the number of epochs for which the same student generates: the paper alternates between
            minimisation and generation; numbers are not known to us.
        temperature: T > 0 of both soft losses, a number or a schedule.
        loss: loss of `logits`: `kl`, `ce` or `mse`.
        auxiliary_loss: loss of `auxiliary`: `kl` or `ce`, as on the samples, or `mse`, the paper's other form.
        reduction: reduction of both soft losses: `batchmean` or `elementmean`.

    A frozen copy of the student generates, with dropout off, and no gradient reaches a parameter while it does. The copy is
    part of checkpoints, so a resumed run continues with the same samples; with `refresh=epoch` the samples of an example are
    generated when its batch comes, by the copy, and are those that the start of the epoch would have given. In a pool there is
    a copy for each teacher, of the student at the first batch of the epoch with this teacher.

    [CLS], [SEP] and padding are not moved. The teacher runs on every sample, so nothing of it is cached. No term reads the
    auxiliary samples as functions of the student's parameters: they are data.
    """

    names = ("task", "logits", "auxiliary")
    other_words = True  # the map between the tables and the mean norm are of all words
    same_vocabulary = True

    def __init__(
        self,
        steps: int = 1,
        step_size: float = 0.1,
        radius: float | None = None,
        iterates: str = "last",
        direction: str = "divergence",
        outputs: str = "logits",
        teacher_words: str = "transferred",
        transfer: str = "refresh",
        ridge: float = 1e-6,
        refresh: str = "epoch",
        epochs: int = 1,
        temperature: "float | Schedule" = 4.0,
        loss: str = "kl",
        auxiliary_loss: str = "kl",
        reduction: str = "batchmean",
        *,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        self.steps = whole(steps, "steps", 1, MOST_STEPS)
        self.step_size = number(step_size, "step_size", *SIZES)
        self.normalize = switch(normalize, "normalize")
        self.radius = None if radius is None else number(radius, "radius", *SIZES)
        self.iterates = word(iterates, ITERATES, "iterates")
        self.direction = word(direction, DIRECTIONS, "direction")
        self.outputs = word(outputs, ascent.OUTPUTS, "outputs")
        self.teacher_words = word(teacher_words, TEACHER_WORDS, "teacher_words")
        self.transfer = word(transfer, TRANSFERS, "transfer")
        self.ridge = number(ridge, "ridge", 1e-12, 1.0, zero=True)
        self.refresh = word(refresh, REFRESHES, "refresh")
        self.epochs = whole(epochs, "epochs")
        if epochs != 1 and refresh == "batch":
            raise InputError(f"epochs={epochs} is a number of epochs between refreshes; use refresh=epoch", "epochs")
        self.temperature = temperature_schedule(temperature)
        self.loss = word(loss, SOFT_LOSSES, "loss")
        self.auxiliary_loss = word(auxiliary_loss, SOFT_LOSSES, "auxiliary_loss")
        self.reduction = word(reduction, BATCH_MEANS, "reduction")
        self.ends: list[int] = []
        self.last = -1
        """Epoch of the last copy, the value of the buffer `copied`; reading that one would wait for the device."""
        self.register_load_state_dict_post_hook(read_last)

    def bind(self, bound: Bound) -> None:
        """Copy the student, and read the ids of the tokens that are not moved.

        Raises:
            InputError: for a student without a classifier, or probabilities of a regression.
        """
        student, teacher = bound.student, bound.teacher
        if not student.classifies:
            raise InputError("method=backward_kd moves texts that are classified, and this student has no classifier", "method")
        if bound.task.labels is None and self.outputs == "probabilities":
            raise InputError("outputs=probabilities are of classes, and this task has scores; use outputs=logits", "outputs")
        ends = ("cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
        ids = [getattr(student.tokenizer, name, None) for name in ends]
        self.ends = sorted({index for index in ids if index is not None})
        self.copy = Encoder(copy.deepcopy(student.model), student.tokenizer).requires_grad_(False)
        self.register_buffer("matrix", torch.zeros(teacher.width, student.width))
        self.register_buffer("mean_norm", torch.zeros(()))
        self.register_buffer("copied", torch.tensor(-1))
        self.last = -1

    def needs(self) -> tuple[Needs, Sequence[Needs]]:
        """Declare logits, of a teacher that runs, with gradients unless only the student's loss is ascended."""
        return Needs(), [Needs(gradient=self.direction != "student_loss", uncacheable_reason=RUNS_ON_SAMPLES)]

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the loss terms listed in the class docstring."""
        student, teacher = step.student.outputs, step.teacher.outputs
        temperature = self.temperature(step.progress.fraction)
        losses = []
        for ours, theirs in self.samples(step):
            moved = step.student.run({**step.student.inputs, "words": ours}, Needs())
            target = step.teacher.run({**step.teacher.inputs, "words": theirs}, Needs())
            losses.append(step.task.soft(moved.logits, target.logits, temperature, self.auxiliary_loss, self.reduction))
        return {
            "task": step.task.hard(student.logits, step.batch.labels),
            "logits": step.task.soft(student.logits, teacher.logits, temperature, self.loss, self.reduction),
            "auxiliary": torch.stack(losses).mean(),
        }

    def samples(self, step: Step) -> list[tuple[Tensor, Tensor]]:
        """Return the auxiliary samples of a batch, without gradients, one for each iterate that is learned from.

        Returns:
            Word embeddings for the student and for the teacher, (batch, tokens, width of each).
        """
        self._update(step)
        with torch.no_grad():
            text = self.copy.word_embeddings(step.student.inputs["input_ids"])
        shifts = [words - at_least_float32(text) for words in self._iterates(step, text)]
        if self.iterates == "last":
            shifts = shifts[-1:]
        if self.direction == "noise":
            draws = step.draws("auxiliary", text[0].numel()).view(text.shape)
            noise, movable = ascent.gaussian(draws).to(shifts[0].dtype), self._movable(step)
            shifts = [ascent.noise_like(shift, noise, movable) for shift in shifts]
        with torch.no_grad():
            return [((text + shift).to(text.dtype), self._for_teacher(step, text, shift)) for shift in shifts]

    def _iterates(self, step: Step, text: Tensor) -> Iterator[Tensor]:
        """Yield the words after each step of the ascent, (batch, tokens, width), in float32 at least."""
        movable, unit = self._movable(step), self.get_buffer("mean_norm")
        start = at_least_float32(text)
        words = start
        for _ in range(self.steps):
            with torch.enable_grad():
                words = words.detach().requires_grad_()
                values, logits = self._ascended(step, text, words)
                gradient = ascent.gradient_by_words(values, logits, words)
            with torch.no_grad():
                words = ascent.ascend(words, gradient, movable, self.step_size * unit, normalize=self.normalize)
                if self.radius is not None:
                    words = ascent.within(words, start, movable, self.radius * unit)
            yield words

    def _ascended(self, step: Step, text: Tensor, words: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the quantity that is ascended, (batch,), and the logits that it is a function of."""
        needs = Needs(gradient=True)  # of both models, so that equal models have equal logits, rounding included
        ours = self.copy({**step.student.inputs, "words": words.to(text.dtype)}, needs).logits
        if self.direction == "student_loss":
            return step.task.hard(ours, step.batch.labels, reduction="none"), [ours]
        given = self._for_teacher(step, text, words - at_least_float32(text))
        theirs = step.teacher.run({**step.teacher.inputs, "words": given}, needs).logits
        return ascent.divergence(ours, theirs, self.outputs), [ours, theirs]

    def _for_teacher(self, step: Step, text: Tensor, shift: Tensor) -> Tensor:
        """Return the teacher's words for the student's words of a text and their shift, (batch, tokens, width)."""
        matrix = self.get_buffer("matrix").to(shift.dtype)
        own = encoder_of(step.teacher.model).word_embeddings(step.teacher.inputs["input_ids"]).detach()
        with torch.autocast(shift.device.type, enabled=False):  # in half precision words would lose what the shift adds
            moved = (text + shift) @ matrix.T if self.teacher_words == "transferred" else own + shift @ matrix.T
        return moved.to(own.dtype)

    def _movable(self, step: Step) -> Tensor:
        """Return where words are moved, (batch, tokens), bool: not at [CLS], [SEP] and padding."""
        ids = step.student.inputs["input_ids"]
        ends = hardware.to_device(torch.tensor(self.ends, dtype=ids.dtype), ids.device)
        return step.student.inputs["attention_mask"].bool() & ~torch.isin(ids, ends)

    @torch.no_grad()
    def _update(self, step: Step) -> None:
        """Copy the student's weights, at the first batch of an epoch or each batch, and compute what follows from them."""
        self.copy.eval()  # the engine's `train()` reaches it
        epoch = step.progress.epoch
        if self.refresh == "epoch" and self.last >= 0 and epoch // self.epochs == self.last // self.epochs:
            return
        student, teacher = step.student.model, encoder_of(step.teacher.model)
        for own, given in ((self.copy.parameters(), student.parameters()), (self.copy.buffers(), student.buffers())):
            for tensor, source in zip(own, given, strict=True):
                tensor.copy_(source)
        count = min(student.config.vocab_size, teacher.config.vocab_size)
        ids = torch.arange(count, device=step.student.inputs["input_ids"].device)
        table = self.copy.word_embeddings(ids)
        self.get_buffer("mean_norm").copy_(torch.linalg.vector_norm(at_least_float32(table), dim=-1).mean())
        if self.transfer == "refresh" or self.last < 0:
            self.get_buffer("matrix").copy_(ascent.transfer_matrix(table, teacher.word_embeddings(ids), self.ridge))
        self.get_buffer("copied").fill_(epoch)
        self.last = epoch

    def describe(self) -> dict[str, str]:
        """Describe the generation of samples."""
        matrix, many = self.get_buffer("matrix"), f"{self.epochs} epochs" if self.epochs > 1 else f"each {self.refresh}"
        return {
            "auxiliary samples": f"{self.steps} step(s) of {self.step_size:g} mean norms, direction {self.direction}, "
            f"by a copy of the student, new for {many}",
            "words (student->teacher)": f"{matrix.shape[1]} -> {matrix.shape[0]} by least squares, {self.teacher_words}",
        }


def read_last(method: nn.Module, _: object) -> None:
    """Read the epoch of the last copy from the state that was loaded; a hook of `load_state_dict`."""
    method.last = int(method.get_buffer("copied"))  # type: ignore[assignment]


def encoder_of(teacher: Model) -> Encoder:
    """Return the model of a teacher that is frozen, or is trained with its students."""
    if isinstance(teacher, FrozenTeacher):
        return teacher.encoder
    assert isinstance(teacher, Encoder)
    return teacher
