"""Fine-tuning without a teacher, the baseline of every comparison."""

from torch import Tensor

from kd.methods.base import ANY_TEACHERS, Bound, Method, Step


class Finetune(Method):
    """Plain fine-tuning on the labels.

    A configured teacher is never run in training. The student's shape and initialisation are still taken from it, so that the
    baseline starts as the distilled students do, and it is evaluated in the comparison at the end.

    Terms: `task`, the task's hard loss (cross entropy in nats, or mean squared error), mean over the batch.
    """

    names = ("task",)
    teachers = ANY_TEACHERS
    uses_teachers = False

    def bind(self, bound: Bound) -> None:
        """Store the number of teachers, because `needs` declares outputs for each of them."""
        self.teachers = len(bound.teachers)

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the hard loss."""
        return {"task": step.task.hard(step.student.outputs.logits, step.batch.labels)}
