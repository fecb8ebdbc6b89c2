"""Layers that the students of a cohort share (`cohort.share`)."""

from collections.abc import Mapping

from torch import nn

from kd.config.cohort import SHARED_HEAD
from kd.config.schema import RunSpec
from kd.data.tasks import Task
from kd.errors import InputError
from kd.models import Encoder
from kd.models.heads import HEADS


class HeadSharing:
    """The pooling and prediction layer of a cohort, which are those of its first student with `cohort.share=head`.

    A joint fine-tuning of teachers (MT-BERT: Wu, Wu, Huang, Findings of ACL-IJCNLP 2021, arXiv:2106.01023) shares both, so that
    the teachers' outputs are comparable. The paper does not say with which weights the shared layers start: they start as the
    first student's (our choice), the pooling with those of its backbone if that has one, the prediction layer at random.

    Args:
        spec: specification of the run; otherwise nothing is shared.
        task: task of the students.

    Raises:
        InputError: for a task without a prediction layer of its own.
    """

    def __init__(self, spec: RunSpec, task: Task) -> None:
        self.shares, self.method = spec.cohort.share == SHARED_HEAD, spec.method["name"]
        self.first: tuple[str, Encoder] | None = None
        self.layers: tuple[nn.Module, nn.Module] | None = None
        if self.shares and not HEADS[task.head].labelled:
            raise InputError(
                "cohort.share=head ties the pooling and prediction layer of classifiers, and a masked language model predicts "
                "by its word embeddings; use cohort.share=none",
                "cohort.share",
            )

    def join(self, name: str, student: Encoder) -> list[str]:
        """Let a student share the layers, before its method is bound; return a description of that, if it changes the student.

        Args:
            name: name of the student.
            student: the student after its surgeries; the first one gives its layers.

        Raises:
            InputError: for a student of another width than the first one.
        """
        if not self.shares:
            return []
        if self.first is None or self.layers is None:
            self.first, self.layers = (name, student), student.head_layers
            return []
        origin, other = self.first
        if student.width != other.width:
            raise InputError(
                f"cohort.share=head ties the pooling and prediction layer of all students, which have to have one width: "
                f"'{origin}' has {other.width}, '{name}' has {student.width}; change these, or use cohort.share=none",
                "cohort.students",
            )
        student.share_head(self.layers)
        return [f"pooling and prediction layer of {origin}"]

    def check(self, students: Mapping[str, Encoder]) -> None:
        """Check that the students still share the layers after their methods were bound.

        Args:
            students: name -> student.

        Raises:
            InputError: if a method has replaced one.
        """
        shared = {parameter for layer in self.layers or () for parameter in layer.parameters()}
        if any(not shared.issubset(student.parameters()) for student in students.values()):
            raise InputError(
                f"method={self.method} replaces the pooling or prediction layer of its student, which cohort.share=head ties; "
                "use cohort.share=none",
                "cohort.share",
            )
