"""FSP: its matrices and distance as loops over what models show, its stages, and what is refused."""

import pytest
import torch
from methods.two_models import LENGTHS, TASK, bound_to, check_padding, encoder, shown
from torch import Tensor, nn

from kd.config.compose import compose
from kd.errors import InputError
from kd.functional.flow import flow_error, flow_matrix
from kd.functional.logits import kl_divergence
from kd.methods.base import Bound, Step
from kd.methods.fsp import FSP
from kd.models import Encoder, FrozenTeacher

pytestmark = pytest.mark.fast


def bound(student: Encoder, teacher: Encoder, padding: int = 0, **arguments: object) -> tuple[FSP, Step]:
    return bound_to(student, teacher, FSP(**arguments), padding)


def naive_flow(lower: Tensor, upper: Tensor, length: int) -> list[list[float]]:
    """The matrix of one example."""
    a, b = lower.tolist(), upper.tolist()
    return [
        [sum(a[token][i] * b[token][j] for token in range(length)) / length for j in range(len(b[0]))] for i in range(len(a[0]))
    ]


def naive(method: FSP, step: Step, pairs: list[tuple[int, int]]) -> tuple[float, int]:
    """The squared norms, summed over flows and averaged over examples, and the number of entries of a matrix."""
    ours, theirs = shown(step, teacher=False), shown(step, teacher=True)
    with torch.no_grad():
        ours = [project(ours[layer]) for (layer, _), project in zip(pairs, method.projections, strict=True)]
    theirs = [theirs[layer] for _, layer in pairs]
    total = 0.0
    for flow in range(len(pairs) - 1):
        for example, length in enumerate(LENGTHS):
            one, other = (naive_flow(s[flow][example], s[flow + 1][example], length) for s in (ours, theirs))
            total += sum((x - y) ** 2 for row, column in zip(one, other, strict=True) for x, y in zip(row, column, strict=True))
    return total / len(LENGTHS), theirs[0].shape[-1] ** 2


def test_flow_of_two_channels_over_two_positions_is_that_of_the_formula() -> None:
    lower, upper = torch.tensor([[[1.0, 0.0], [2.0, 1.0]]]), torch.tensor([[[1.0], [1.0]]])
    torch.testing.assert_close(flow_matrix(lower, upper, torch.ones(1, 2).bool()), torch.tensor([[[1.5], [0.5]]]))


@pytest.mark.parametrize("flows", ["all", "last"])
@pytest.mark.parametrize(
    ("layers", "width", "pairs"),
    [
        ("uniform", 32, [(0, 0), (1, 2), (2, 4)]),
        ("uniform", 8, [(0, 0), (1, 2), (2, 4)]),
        ([[1, 1], [2, 3], [2, 4]], 8, [(1, 1), (2, 3), (2, 4)]),
    ],
    ids=str,
)
def test_flow_term_equals_the_formula_written_as_loops(
    layers: object, width: int, pairs: list[tuple[int, int]], flows: str
) -> None:
    method, step = bound(encoder(2, width, seed=1), encoder(4), layers=layers, flows=flows)
    norms, entries = naive(method, step, pairs if flows == "all" else pairs[-2:])
    assert method.terms(step)["flow"].item() == pytest.approx(norms / entries, rel=1e-9)  # RepDistiller's mean
    method.hidden_reduction = "examples"  # the paper's squared norm
    assert method.terms(step)["flow"].item() == pytest.approx(norms, rel=1e-9)


def test_reductions_are_shares_of_each_other() -> None:
    torch.manual_seed(0)
    one, other = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    each = flow_error(one, other, "none")
    assert each.shape == (3,)
    torch.testing.assert_close(each[1], ((one[1] - other[1]) ** 2).sum())
    torch.testing.assert_close(each.mean(), flow_error(one, other, "examples"))
    torch.testing.assert_close(each.mean() / 20, flow_error(one, other))
    with pytest.raises(ValueError, match="not one of"):
        flow_error(one, other, "sum")
    with pytest.raises(ValueError, match="differ in shape"):
        flow_error(one, other.transpose(1, 2))
    assert not flow_error(one, other.requires_grad_()).requires_grad, "no gradient flows to the target"


def test_models_that_are_equal_have_no_distance() -> None:
    method, step = bound(encoder(3, seed=1), encoder(3, seed=1))
    assert method.terms(step)["flow"].item() == 0
    assert all(isinstance(project, nn.Identity) for project in method.projections)


def test_a_factor_of_all_states_is_a_power_of_four_in_the_distance() -> None:
    torch.manual_seed(0)
    lower, upper, other = torch.randn(3, 2, 6, 4).double().unbind()
    mask = torch.ones(2, 6).bool()

    def distance(factor: float) -> Tensor:
        return flow_error(*(flow_matrix(factor * lower, factor * states, mask) for states in (upper, other)))

    torch.testing.assert_close(distance(3.0), 81 * distance(1.0))


def test_padding_changes_no_term_whatever_stands_there() -> None:
    models = encoder(2, 8, seed=1).eval(), encoder(4)
    check_padding(lambda padding: bound(*models, padding), 1e-12)
    states = torch.randn(2, 3, 4)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    broken = states.masked_fill(~mask[..., None], torch.nan)
    torch.testing.assert_close(flow_matrix(broken, broken, mask), flow_matrix(states, states, mask))


def test_autocast_does_not_round_the_matrices() -> None:
    torch.manual_seed(0)
    states, mask = torch.randn(2, 6, 4), torch.ones(2, 6).bool()
    exact = flow_matrix(states, states, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(flow_matrix(states, states, mask), exact)
        assert flow_matrix(states.bfloat16(), states, mask).dtype == torch.float32


def test_student_and_maps_get_gradients_and_the_teacher_none() -> None:
    student, teacher = encoder(2, 8, seed=1), encoder(4)
    method, step = bound(student, teacher)
    method.terms(step)["flow"].backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in method.parameters())
    assert student.base.embeddings.word_embeddings.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_soft_and_hard_losses_are_those_of_distillation() -> None:
    method, step = bound(encoder(2, seed=1), encoder(4), temperature=3.0)
    s, t = step.student.outputs.logits, step.teacher.outputs.logits
    torch.testing.assert_close(method.terms(step)["logits"], kl_divergence(s, t, 3.0))
    torch.testing.assert_close(method.terms(step)["task"], nn.functional.cross_entropy(s, step.batch.labels))


def test_first_stage_has_the_flow_alone_and_trains_what_it_reaches() -> None:
    student = encoder(2, seed=1)
    method, step = bound(student, encoder(4), stage="flow", layers=[[0, 0], [1, 2]])
    assert method.names == ("flow",)
    terms = method.terms(step)
    assert set(terms) == {"flow"}
    terms["flow"].backward()
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert not any("layer.1." in name or "classifier" in name or "pooler" in name for name in trained)
    assert any("layer.0." in name for name in trained)


def test_stages_of_the_paper_are_a_run_before() -> None:
    before = (
        "{name: fsp_flow, _target_: kd.methods.fsp.FSP, stage: flow, weights: {flow: 1.0}, run: {trainer: {max_epochs: 10}}}"
    )
    config = compose(["method=fsp", "method.weights.flow=0", f"method.before={before}"])
    assert config.method.before.stage == "flow"
    assert compose(["method=fsp"]).method.before is None


def test_map_is_described() -> None:
    method, _ = bound(encoder(2, seed=1), encoder(4))
    assert method.describe() == {"layer map (student<-teacher)": "0<-0, 1<-2, 2<-4"}


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"flows": "first"}, "flows"),
        ({"project": "teacher"}, "project"),
        ({"hidden_reduction": "vectors"}, "hidden_reduction"),
        ({"hidden_reduction": "none"}, "hidden_reduction"),
        ({"stage": "task"}, "stage"),
        ({"temperature": 0}, "temperature"),
        ({"loss": "l1"}, "loss"),
        ({"reduction": "sum"}, "reduction"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused_by_their_key(arguments: dict[str, object], key: str) -> None:
    with pytest.raises(InputError) as caught:
        FSP(**arguments)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("arguments", "key", "message"),
    [
        ({"layers": "skip"}, "layers", "two entries"),
        ({"layers": [[1, 1]]}, "layers", "two entries"),
        ({"layers": "middle"}, "layers", "middle"),
        ({"layers": [[0, 0], [3, 4]]}, "layers", "layer 3 of the student"),
        ({"project": "none"}, "project", "use project=student"),
    ],
    ids=str,
)
def test_models_that_do_not_fit_are_refused_while_binding(arguments: dict[str, object], key: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        FSP(**arguments).bind(Bound(encoder(2, 8), [FrozenTeacher(encoder(4))], TASK))
    assert caught.value.key == key


def test_equal_widths_need_no_maps() -> None:
    method, _ = bound(encoder(2, seed=1), encoder(4), project="none")
    assert not list(method.parameters())
