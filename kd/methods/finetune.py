"""Fine-tuning without a teacher: the baseline of every table."""

from torch import Tensor

from kd.methods.base import ANY_TEACHERS, Method, Step


class Finetune(Method):
    """Plain fine-tuning on the labels.

    A configured teacher is never run in training. It still gives the student its shape and initialisation, so that the
    baseline starts where the distilled students start, and the closing comparison.

    Terms: `task`, the task's hard loss (cross entropy in nats, or mean squared error), mean over the batch.
    """

    names = ("task",)
    teachers = ANY_TEACHERS
    uses_teachers = False

    def terms(self, step: Step) -> dict[str, Tensor]:
        """The hard loss."""
        return {"task": step.task.hard(step.student.outputs.logits, step.batch.labels)}
