"""TextBrewer 0.2.1.post1 on the same student, teacher, examples and batch size, set up as in TextBrewer's own examples.

As in its SST-2 notebook: a shuffled `DataLoader`, AdamW with its defaults, a linear schedule with a tenth of warm-up, a
teacher that runs at every step, hidden states of every layer from both models, no logging to tensorboard. TextBrewer
computes in float32, because its mixed precision needs apex. One thing favours it compared with its examples: texts are
tokenised, and padded to the maximum length, before the timed turns. It clips gradients as the run does, although its default
is not to clip (`trainer.clip=null` compares both without). `kd.system.hardware.keep_memory`, which `kd` calls for a run, is
not called for TextBrewer; the variables MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ have the same effect for all
candidates.

Yang et al., ACL 2020 demonstrations, arXiv:2002.12620; github.com/airaria/TextBrewer, `examples/notebook_examples/sst2.ipynb`.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kd.bench.cost import device_of
from kd.bench.harness import Prepared, prepare
from kd.bench.workers import Gate, Job
from kd.config.cohort import students_of
from kd.data.datamodule import RowIndices
from kd.errors import InputError
from kd.methods.kd import KD
from kd.methods.pkd import PKD
from kd.runs.run import Run

if TYPE_CHECKING:
    from textbrewer import GeneralDistiller
    from transformers.modeling_outputs import SequenceClassifierOutput

PRECISION = "32-true"


def soft_terms(method: KD | PKD, weight: float, classes: int) -> dict[str, Any]:
    """Return the TextBrewer options whose gradient equals that of our soft loss.

    TextBrewer's `ce` is the cross entropy at a temperature T, summed over classes and averaged over the batch. Our `kl`
    differs from it by T squared and by the teacher's entropy, which has no gradient. TextBrewer's `mse` is of logits divided
    by T.
    """
    temperature = method.temperature(0.0)
    square = temperature**2
    scale = {"kl": square, "ce": 1.0, "mse": square}[method.loss]
    if method.loss == "mse":
        scale *= classes if method.reduction == "batchmean" else 1.0
    else:
        scale /= classes if method.reduction == "elementmean" else 1.0
    return {
        "temperature": temperature,
        "kd_loss_type": "mse" if method.loss == "mse" else "ce",
        "kd_loss_weight": weight * scale,
    }


def no_matches(method: KD, weights: Mapping[str, float], widths: tuple[int, int]) -> list[dict[str, Any]]:
    """Return no matches of hidden states."""
    return []


def patience_matches(method: PKD, weights: Mapping[str, float], widths: tuple[int, int]) -> list[dict[str, Any]]:
    """Return one match with TextBrewer's `pkd` loss for each pair of layers.

    That loss is the squared distance of [CLS] states of unit length for one pair, summed over the width and averaged over the
    batch; ours is its mean over pairs and, depending on `hidden_reduction`, over the width. TextBrewer has no loss of states
    that are not normalised, so `normalize=false` gets the same loss, at the same cost. If widths differ, TextBrewer learns a
    linear map for each pair and applies it to every token.
    """
    count, width = len(method.pairs), widths[1]
    share = {"elements": 1 / (count * width), "vectors": 1 / count, "examples": 1.0}[method.hidden_reduction]
    match = {"feature": "hidden", "loss": "pkd", "weight": weights["hidden"] * share}
    if widths[0] != widths[1]:
        match["proj"] = ["linear", *widths]
    return [{"layer_S": ours, "layer_T": theirs, **match} for ours, theirs in method.pairs]


MATCHES: Mapping[str, Callable[[Any, Mapping[str, float], tuple[int, int]], list[dict[str, Any]]]] = {
    "kd": no_matches,
    "pkd": patience_matches,
}
"""Methods of `conf/method` that TextBrewer supports -> function that returns its `intermediate_matches`."""


def check_textbrewer(run: Run) -> None:
    """Check, before anything is built, that TextBrewer supports the options of a run.

    Raises:
        InputError: for an option that it does not support.
    """
    spec = run.spec
    if spec.method["name"] not in MATCHES:
        methods = ", ".join(MATCHES)
        raise InputError(
            f"TextBrewer is set up for {methods}, not for method={spec.method['name']}; leave out --peer", "--peer"
        )
    alone = spec.pool.wrapper is None and spec.cohort.peers is None and len(students_of(spec)) == 1
    if not alone or len(spec.teacher) != 1:
        raise InputError("TextBrewer is set up for one frozen teacher and one student; leave out --peer", "--peer")
    if spec.trainer.batch_tokens is not None:
        raise InputError("TextBrewer has batches of trainer.batch_size examples only; leave out --peer", "trainer.batch_tokens")


def distillation(prepared: Prepared) -> dict[str, Any]:
    """Return the `DistillationConfig` arguments nearest to our method.

    Gradients are equal, except as `soft_terms` and `patience_matches` say.
    """
    models, name = prepared.models, prepared.run.spec.method["name"]
    (method,), (teacher,) = models.methods.values(), models.teachers
    assert isinstance(method, KD | PKD)  # `check_textbrewer` refuses every other
    classes = len(prepared.examples.task.labels or ())
    weights = {term: schedule(0.0) for term, schedule in models.weights.items()}
    return {
        **soft_terms(method, weights["logits"], classes),
        "hard_label_weight": weights["task"],
        "intermediate_matches": MATCHES[name](method, weights, (models.student.width, teacher.width)),
    }


class TextBrewerCollate:
    """Collate function from rows of a turn's examples to the inputs of both models.

    Args:
        prepared: the run whose student's tokens are read.
        length: number of tokens to pad every batch to; None pads each batch to its longest example.
    """

    def __init__(self, prepared: Prepared, length: int | None) -> None:
        data = prepared.data
        family = prepared.models.student.family
        self.tokens = data.tokens["train"][data.student_key]
        self.labels = prepared.examples.task.label_tensor(prepared.examples.labels["train"])
        self.whole: dict[str, Tensor] | None = None
        self.names = [name for name in family.inputs if name == "attention_mask" or name in self.tokens.columns]
        if length is not None:
            inputs = self.tokens.pad(range(len(self.labels)))
            spare = length - inputs["attention_mask"].shape[1]
            fill = {**self.tokens.fill, "attention_mask": 0}
            self.whole = {name: torch.nn.functional.pad(inputs[name], (0, spare), value=fill[name]) for name in self.names}

    def __call__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return inputs, each (batch, tokens), and labels, (batch,)."""
        indices = torch.as_tensor(rows)
        if self.whole is None:
            padded = self.tokens.pad(rows)
            inputs = {name: padded[name] for name in self.names}
        else:
            inputs = {name: values[indices] for name, values in self.whole.items()}
        return {**inputs, "labels": self.labels[indices]}


class TakingTurns:
    """Loader that makes every epoch one turn: the training loop asks for the next epoch after its last step of this one.

    Args:
        loader: the batches of one epoch.
        gate: waits for the parent process and measures the turn.
    """

    def __init__(self, loader: "DataLoader[Any]", gate: Gate) -> None:
        self.loader, self.gate = loader, gate
        self.examples: int | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self.examples is not None:
            self.gate.close(self.examples)
        self.gate.open()
        self.examples = 0
        for batch in self.loader:
            self.examples += len(batch["labels"])
            yield batch


def build_distiller(prepared: Prepared, folder: str, turns: int) -> "GeneralDistiller":
    """Build TextBrewer's `GeneralDistiller` with the student and the teacher of a run.

    Raises:
        InputError: if student and teacher have different tokenizers.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # it compares words with `is`
        from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig

    if not prepared.data.shared_tokenizer:
        raise InputError("TextBrewer is set up for one tokenizer of student and teacher; leave out --peer", "--peer")
    spec, (teacher,) = prepared.run.spec, prepared.models.teachers
    device = device_of(spec.trainer.accelerator)
    options = distillation(prepared)
    models = [encoder.model.to(device) for encoder in (teacher.encoder, prepared.models.student)]
    for model in models:
        model.config.output_hidden_states = bool(options["intermediate_matches"])
    columns = teacher.columns

    def seen(batch: object, outputs: "SequenceClassifierOutput") -> dict[str, Any]:
        return {"logits": outputs.logits, "hidden": outputs.hidden_states, "losses": outputs.loss}

    def seen_of_teacher(batch: object, outputs: "SequenceClassifierOutput") -> dict[str, Any]:
        logits = outputs.logits if columns is None else outputs.logits[:, columns]  # type: ignore[index]
        return {"logits": logits, "hidden": outputs.hidden_states}

    training = TrainingConfig(
        gradient_accumulation_steps=spec.trainer.accumulate,
        ckpt_epoch_frequency=turns + 2,  # more than its epochs, the last of which is never finished: it saves nothing
        output_dir=folder,
        device=device,
    )
    return GeneralDistiller(training, DistillationConfig(**options), *models, seen_of_teacher, seen)


def train_textbrewer(job: Job, gate: Gate) -> None:
    """Run TextBrewer's turns.

    Raises:
        Finished: when there are no more turns.
        InputError: for a run that cannot be built, or that TextBrewer does not support.
    """
    from transformers import get_linear_schedule_with_warmup

    prepared = prepare(job)
    spec = prepared.run.spec
    distiller = build_distiller(prepared, str(prepared.run.directory), job.turns)
    collate = TextBrewerCollate(prepared, spec.task.max_length if job.candidate.padded else None)
    torch.manual_seed(spec.seed)
    rows: Any = RowIndices(len(prepared.lengths))
    loader = DataLoader(rows, spec.trainer.batch_size, shuffle=True, collate_fn=collate, num_workers=spec.trainer.num_workers)
    optimizer = torch.optim.AdamW(distiller.model_S.parameters(), lr=spec.optimizer.lr)
    steps = len(loader) // spec.trainer.accumulate * job.turns
    facts = {**prepared.facts(PRECISION), "losses": distillation(prepared)}
    gate.ready(facts, spec.trainer.accelerator)
    with distiller:
        distiller.train(
            optimizer,
            TakingTurns(loader, gate),
            num_epochs=job.turns + 1,
            scheduler_class=get_linear_schedule_with_warmup,
            scheduler_args={"num_warmup_steps": int(0.1 * steps), "num_training_steps": steps},
            max_grad_norm=spec.trainer.clip or -1.0,
            callback=None,
        )
