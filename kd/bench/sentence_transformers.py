"""sentence-transformers 6.2.0 on the same student, teacher, pairs of sentences and batch size, set up as in its own examples.

Its `CrossEncoderTrainer` with `MSELoss` trains on scores of a teacher that are computed once and stored beside the pairs. For
a regression of pairs, such as STS-B, this is what `method=kd` does with a cached teacher, and the gradients are equal.

As in its example of this loss: the student is loaded from a folder, texts are tokenised in every step and padded to the longest
of their batch, batches are drawn at random, there is a linear schedule with warm-up, and gradients are clipped. Optimiser and
schedule are the run's, given as `optimizers`. Precision is the run's, 32-true or bf16-mixed (the example has `bf16=True`). The
second candidate has the run's batches of similar length, with the documented argument `batch_sampler`. What favours it compared
with its example: nothing is evaluated, saved, logged or shown between the turns.

Differences from the run: `kd` tokenises once, and trains the rows of the embedding table that occur in train; dropout has the
same probabilities, with the modules of torch; `kd.system.hardware.keep_memory` is not called for it, nor for TextBrewer.

Reimers and Gurevych, EMNLP 2019, arXiv:1908.10084; github.com/huggingface/sentence-transformers,
`examples/cross_encoder/training/distillation/train_cross_encoder_kd_mse.py`, and the page "Cross Encoder > Training Examples >
Distillation" of its documentation.
"""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from kd.bench import need
from kd.bench.cost import device_of
from kd.bench.harness import Prepared, prepare
from kd.bench.workers import Gate, Job
from kd.build.instantiate import build_optimizer
from kd.config.cohort import students_of
from kd.errors import InputError
from kd.forward.needs import Needs
from kd.runs.run import Run

if TYPE_CHECKING:
    from sentence_transformers.cross_encoder import CrossEncoderTrainer

MODULES = ("sentence_transformers", "datasets", "accelerate")
"""Modules that its trainer imports."""

EXTRA = "sentence-transformers"
"""Extra of this package that installs them."""

PRECISIONS = {"32-true": False, "bf16-mixed": True}
"""`trainer.precision` -> its argument `bf16`."""


def check_sentence_transformers(run: Run) -> None:
    """Check, before anything is built, that sentence-transformers supports the options of a run.

    Raises:
        InputError: for an option that it does not support.
    """
    spec = run.spec
    if spec.method["name"] != "kd":
        raise InputError(
            f"sentence-transformers is set up for kd, not for method={spec.method['name']}; leave out --peer", "--peer"
        )
    alone = spec.pool.wrapper is None and spec.cohort.peers is None and len(students_of(spec)) == 1
    if not alone or len(spec.teacher) != 1 or spec.surgery:
        raise InputError(
            "sentence-transformers is set up for one frozen teacher and one student without surgery; leave out --peer", "--peer"
        )
    if len(spec.task.text) != 2:
        raise InputError("sentence-transformers is set up for pairs of texts; leave out --peer", "task.text")
    if spec.trainer.batch_tokens is not None:
        raise InputError(
            "sentence-transformers has batches of trainer.batch_size examples only; leave out --peer", "trainer.batch_tokens"
        )
    if spec.trainer.precision not in PRECISIONS:
        choice = " or ".join(PRECISIONS)
        raise InputError(
            f"sentence-transformers is set up for {choice}, not for {spec.trainer.precision}; leave out --peer",
            "trainer.precision",
        )
    if device_of(spec.trainer.accelerator) == "cuda" and torch.cuda.device_count() > 1:
        raise InputError(
            "sentence-transformers uses every GPU that it sees, and kd-bench measures one: set CUDA_VISIBLE_DEVICES=0",
            "trainer",
        )


def score_weights(prepared: Prepared) -> dict[str, float]:
    """Return the method's weights of the label, `task`, and of the teacher's score, `logits`.

    Raises:
        InputError: if they do not sum to 1, or change during training.
    """
    schedules = prepared.models.weights
    first, *later = ({term: schedule(fraction) for term, schedule in schedules.items()} for fraction in (0.0, 0.5, 1.0))
    if not math.isclose(sum(first.values()), 1.0) or any(weights != first for weights in later):
        raise InputError(
            f"sentence-transformers has one squared error, so the weights, {first} at the start, have to be constant and sum "
            "to 1; or leave out --peer",
            "method.weights",
        )
    return first


def stored_scores(prepared: Prepared) -> list[float]:
    """Return the score of each example that a turn trains on, to which the student's squared error has the method's gradient.

    With weights a and b that sum to 1, the gradient of a (s - y)^2 + b (s - t)^2 is that of (s - (a y + b t))^2. For
    `method.weights.task=0` these are the teacher's scores, as in the example of sentence-transformers.

    Raises:
        InputError: for weights as in `score_weights`, or if a label is missing.
    """
    weights = score_weights(prepared)
    data, (teacher,) = prepared.data, prepared.models.teachers
    rows, labels = data.trained.tolist(), prepared.examples.labels["train"]
    if any(math.isnan(labels[row]) for row in rows):
        raise InputError("sentence-transformers needs a label for every example; leave out --peer", "--peer")
    device = torch.device(device_of(prepared.run.spec.trainer.accelerator))
    teacher.encoder.to(device)
    collate, size = data.collate("train"), data.eval_batch_size
    scores: list[float] = []
    for start in range(0, len(rows), size):
        batch = collate(rows[start : start + size]).to(device)
        soft = teacher(batch.teachers[0], Needs()).logits.squeeze(-1).double()
        scores += (weights["task"] * batch.labels + weights["logits"] * soft).tolist()
    return scores


def batches_of_run(prepared: Prepared) -> Callable[..., Any]:
    """Return an argument `batch_sampler` that gives the batches that the run has, of texts with similar lengths."""
    from sentence_transformers.base.sampler import DefaultBatchSampler

    ours = prepared.data.sampler("train", prepared.run.spec.seed)

    class SimilarLengths(DefaultBatchSampler):
        """Batches of examples with similar lengths."""

        def __iter__(self) -> Iterator[list[int]]:
            ours.set_epoch(self.epoch)
            return iter([list(rows) for rows in ours])

        def __len__(self) -> int:
            return len(ours)

    return SimilarLengths


class TurnsOfTrainer(TrainerCallback):
    """Callback that makes every epoch one turn.

    Args:
        gate: waits for the parent process and measures the turn.
    """

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.examples = 0

    def count(self, loss: torch.nn.Module, arguments: Sequence[Any]) -> None:
        """Count the examples of a batch: a forward pre-hook of the loss, whose second argument is the scores."""
        self.examples += len(arguments[1])

    def on_epoch_begin(self, *arguments: Any, **options: Any) -> None:
        """Wait for the next turn."""
        self.examples = 0
        self.gate.open()

    def on_epoch_end(self, *arguments: Any, **options: Any) -> None:
        """Report the turn to the parent process."""
        self.gate.close(self.examples)


def build_trainer(prepared: Prepared, folder: Path, turns: int, *, by_length: bool) -> "CrossEncoderTrainer":
    """Build the `CrossEncoderTrainer` with the student and the stored scores of a run.

    Args:
        prepared: the run.
        folder: folder for the student that it loads.
        turns: number of epochs; there is one more, which is never begun, as in the run's own trainer.
        by_length: whether it has the run's batches of similar length; else it draws its own.

    Raises:
        InputError: for a run that it does not support, or if it is not installed.
    """
    for module in MODULES:
        need(module, "--peer", EXTRA)
    from datasets import Dataset
    from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import MSELoss

    spec = prepared.run.spec
    scores = stored_scores(prepared)
    texts = [prepared.examples.texts["train"][row] for row in prepared.data.trained.tolist()]
    first, second = zip(*texts, strict=True)
    pairs = Dataset.from_dict({"sentence1": list(first), "sentence2": list(second), "score": scores})
    prepared.models.student.save(folder / "student")
    device = device_of(spec.trainer.accelerator)
    model = CrossEncoder(str(folder / "student"), device=device, max_length=spec.task.max_length, local_files_only=True)
    loss = MSELoss(model)
    batches = math.ceil(len(texts) / spec.trainer.batch_size)
    factory = build_optimizer(spec)
    optimizer = factory.optimizer(loss)
    arguments = CrossEncoderTrainingArguments(
        output_dir=str(folder / "trainer"),
        num_train_epochs=turns + 1,
        per_device_train_batch_size=spec.trainer.batch_size,
        gradient_accumulation_steps=spec.trainer.accumulate,
        max_grad_norm=spec.trainer.clip or 0.0,
        bf16=PRECISIONS[spec.trainer.precision],
        use_cpu=device == "cpu",
        dataloader_num_workers=spec.trainer.num_workers,
        seed=spec.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **({"batch_sampler": batches_of_run(prepared)} if by_length else {}),
    )
    steps = math.ceil(batches / spec.trainer.accumulate) * (turns + 1)
    optimizers = (optimizer, factory.scheduler(optimizer, steps))
    return CrossEncoderTrainer(model=model, args=arguments, train_dataset=pairs, loss=loss, optimizers=optimizers)


def train_sentence_transformers(job: Job, gate: Gate) -> None:
    """Run the turns of sentence-transformers.

    Raises:
        Finished: when there are no more turns.
        InputError: for a run that cannot be built, or that sentence-transformers does not support.
    """
    prepared = prepare(job)
    spec = prepared.run.spec
    trainer = build_trainer(prepared, prepared.run.directory, job.turns, by_length=job.candidate.by_length)
    turns = TurnsOfTrainer(gate)
    trainer.add_callback(turns)
    trainer.loss.register_forward_pre_hook(turns.count)
    facts = {**prepared.facts(spec.trainer.precision), "losses": {"loss": "MSELoss", "score": score_weights(prepared)}}
    del prepared  # the teacher is not needed any more, and the student has been copied
    gc.collect()
    gate.ready(facts, spec.trainer.accelerator)
    trainer.train()
