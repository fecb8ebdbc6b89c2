"""BERT-EMD: its terms as loops over layers, examples and tokens, what its plan is solved for, and how its masses move."""

import copy
import math
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from methods.two_models import LABELS, LENGTHS, TASK, encoder, sentences
from scipy.optimize import linprog
from torch import Tensor
from torch.nn import functional as F

from kd.data.batch import Batch
from kd.data.tasks import Regression
from kd.errors import InputError
from kd.forward import Forward, Needs
from kd.functional.transport import MASS_UPDATES, SMALLEST_SHARE, transport_plan
from kd.methods import bert_emd
from kd.methods.base import Bound, Progress, Step
from kd.methods.bert_emd import BertEMD
from kd.models import Encoder, FrozenTeacher
from kd.system import distributed
from kd.training import execute
from whole_runs import Small, broken_off, last_weights, made, planned, same_weights, torchrun

M, N = 2, 4
KINDS = ("attention", "hidden")


def step_of(method: BertEMD, student: Encoder, teacher: FrozenTeacher, rows: list[int] | None = None) -> Step:
    """A step over four sentences of which three are padded, or over some of them."""
    rows = list(range(len(LENGTHS))) if rows is None else rows
    inputs = {name: tensor[rows] for name, tensor in sentences().items()}
    ours, (theirs,) = method.needs()
    batch = Batch(inputs, (inputs,), LABELS[rows], torch.tensor(rows))
    return Step(Forward(student, inputs, ours), [Forward(teacher, inputs, theirs)], batch, TASK, Progress())


def bound(student: Encoder | None = None, teacher: Encoder | None = None, **arguments: object) -> tuple[BertEMD, Step]:
    """A method bound to a student of M and a teacher of N layers, whose projections are not the identity."""
    student, frozen = student or encoder(M, width=16, seed=1), FrozenTeacher(teacher or encoder(N))
    method = BertEMD(**arguments)
    method.bind(Bound(student, [frozen], TASK))
    return method.double(), step_of(method, student, frozen)


def uneven(method: BertEMD) -> None:
    """Masses that are all different."""
    for number, (name, buffer) in enumerate(method.named_buffers()):
        if not name.startswith("plan"):
            masses = torch.rand(buffer.shape, generator=torch.Generator().manual_seed(number)).double() + 0.2
            buffer.copy_(masses / masses.sum())


def mean_squares(ours: Tensor, theirs: Tensor) -> float:
    return sum((one - other) ** 2 for one, other in zip(ours.tolist(), theirs.tolist(), strict=True)) / len(ours)


@torch.no_grad()
def naive_costs(step: Step, method: BertEMD, strict: bool) -> dict[str, list[list[float]]]:
    """D^A and D^H by loops over layers, examples, heads and tokens."""
    student, teacher = step.student.outputs, step.teacher.outputs
    projected = {i: method.projections["all"](student.hidden(i)) for i in range(1, M + 1)}
    found: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    for i in range(1, M + 1):
        rows: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for j in range(1, N + 1):
            hidden, attention = [], []
            for example, length in enumerate(LENGTHS):
                tokens = length if strict else 6
                pairs = [(projected[i][example, t], teacher.hidden(j)[example, t]) for t in range(tokens)]
                hidden.append(sum(mean_squares(s, t) for s, t in pairs) / tokens)
                squares = []
                for head in range(4):
                    for query in range(tokens):
                        q_s, k_s = (x[example].view(6, 4, 4)[:, head] for x in (student.query(i), student.key(i)))
                        q_t, k_t = (x[example].view(6, 4, 8)[:, head] for x in (teacher.query(j), teacher.key(j)))
                        for key in range(tokens):
                            a_s = float(q_s[query] @ k_s[key]) / 4**0.5
                            a_t = float(q_t[query] @ k_t[key]) / 8**0.5
                            # the code adds -10000 to the scores of padded keys and puts what is below -100 to 0
                            squares.append((a_s - a_t) ** 2 if key < length else 0.0)
                attention.append(sum(squares) / len(squares))
            rows["hidden"].append(sum(hidden) / len(hidden))
            rows["attention"].append(sum(attention) / len(attention))
        for kind in KINDS:
            found[kind].append(rows[kind])
    return found


def exponentials(values: list[float]) -> list[float]:
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


def naive_update(transports: list[tuple[Tensor, Tensor, Tensor]], update: str, tau: float) -> Tensor:
    """The authors' update: masses of each transport after the first normalisation, their mean, and the second softmax of it."""
    firsts = []
    for flow, cost, mass in transports:
        rows, columns = range(len(mass)), range(cost.shape[1])
        unit = [sum(float(flow[i, j] * cost[i, j]) for j in columns) / float(mass[i]) for i in rows]
        inverse = [sum(unit) / each for each in unit]
        firsts.append([v / sum(inverse) for v in inverse] if update == "sum" else exponentials([v / tau for v in inverse]))
    mean = [sum(each) / len(firsts) for each in zip(*firsts, strict=True)]
    return torch.tensor(exponentials(mean) if update == "softmax2" else mean, dtype=torch.float64)


@pytest.mark.parametrize("padding", ["strict", "reference"])
def test_terms_equal_the_objective_written_as_loops(padding: str) -> None:
    method, step = bound(padding=padding, temperature=2.0)
    uneven(method)
    terms, costs = method.terms(step), naive_costs(step, method, padding == "strict")
    student, teacher = step.student.outputs, step.teacher.outputs
    for kind in KINDS:
        cost = torch.tensor(costs[kind], dtype=torch.float64)
        torch.testing.assert_close(method.solved[kind][0], cost)
        flow = transport_plan(cost, *(method.get_buffer(f"{side}_{kind}") for side in ("student", "teacher")))
        expected = sum(float(flow[i, j]) * costs[kind][i][j] for i in range(M) for j in range(N))
        assert terms[kind].item() == pytest.approx(expected, rel=1e-9), kind
    embedding, soft, hard = 0.0, 0.0, 0.0
    projected = method.projections["all"](student.hidden(0))
    for example, length in enumerate(LENGTHS):
        tokens = length if padding == "strict" else 6
        for token in range(tokens):
            embedding += mean_squares(projected[example, token], teacher.hidden(0)[example, token]) / tokens / 4
        p, q = ((outputs.logits[example] / 2).softmax(-1).tolist() for outputs in (teacher, student))
        soft -= sum(p[c] * math.log(q[c]) for c in range(2))
        hard -= float(student.logits[example].log_softmax(-1)[LABELS[example]].detach()) / 4
    assert terms["embedding"].item() == pytest.approx(embedding, rel=1e-9)
    assert terms["logits"].item() == pytest.approx(soft / (4 * 2), rel=1e-9)
    assert terms["task"].item() == pytest.approx(hard, rel=1e-9)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("update", MASS_UPDATES)
def test_masses_after_a_step_equal_cost_attention_written_as_loops(update: str, separate: bool) -> None:
    method, step = bound(update=update, tau=2.0, separate=separate)
    if separate:
        uneven(method)
    before = method.plans()
    method.after_step(step, method.terms(step))
    after, costs = method.plans(), naive_costs(step, method, True)
    moved: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {"student": [], "teacher": []}
    for kind in KINDS:
        cost = torch.tensor(costs[kind], dtype=torch.float64)
        flow = transport_plan(cost, before[f"student_{kind}"], before[f"teacher_{kind}"])
        torch.testing.assert_close(after[f"plan_{kind}"], flow)
        moved["student"].append((flow, cost, before[f"student_{kind}"]))
        moved["teacher"].append((flow.T, cost.T, before[f"teacher_{kind}"]))
    for side, transports in moved.items():
        for number, kind in enumerate(KINDS):
            expected = naive_update([transports[number]] if separate else transports, update, 2.0)
            torch.testing.assert_close(after[f"{side}_{kind}"], expected, rtol=1e-6, atol=1e-7)
            assert not torch.allclose(after[f"{side}_{kind}"], before[f"{side}_{kind}"], atol=1e-4)


def test_next_plan_is_solved_with_the_new_masses() -> None:
    method, step = bound(update="sum")
    method.after_step(step, method.terms(step))
    masses = method.plans()
    method.after_step(step, method.terms(step))
    flow = method.plans()["plan_hidden"]
    torch.testing.assert_close(flow.sum(1), masses["student_hidden"])
    torch.testing.assert_close(flow.sum(0), masses["teacher_hidden"])
    assert not torch.allclose(flow.sum(0), torch.full((N,), 1 / N).double(), atol=1e-3)


def cheapest(cost: list[list[float]], source: Tensor, target: Tensor) -> float:
    """The least cost of moving one distribution into the other, as a linear program."""
    rows, columns = len(source), len(target)
    sums = [[float(pair // columns == row) for pair in range(rows * columns)] for row in range(rows)]
    sums += [[float(pair % columns == column) for pair in range(rows * columns)] for column in range(columns)]
    solved = linprog([each for row in cost for each in row], A_eq=sums, b_eq=[*source.tolist(), *target.tolist()])
    return float(solved.fun)


def test_map_of_layers_is_a_plan_of_least_cost_and_then_the_mean_of_the_epochs_plans() -> None:
    method, step = bound(update="sum")
    uneven(method)
    costs, plans = naive_costs(step, method, strict=True), []
    masses = {
        f"{side}_{kind}": method.get_buffer(f"{side}_{kind}").clone() for side in ("student", "teacher") for kind in KINDS
    }
    for _ in range(3):
        method.after_step(step, method.terms(step))
        plans.append({kind: method.get_buffer(f"plan_{kind}").clone() for kind in KINDS})
        if len(plans) == 1:
            (first,) = method.layer_maps()
    for kind in KINDS:
        source, target = (masses[f"{side}_{kind}"] for side in ("student", "teacher"))
        flow, least = first[kind][1:, 1:], cheapest(costs[kind], source, target)
        assert float((flow * torch.tensor(costs[kind])).sum()) == pytest.approx(least, rel=1e-6)  # HiGHS: 1e-7
        torch.testing.assert_close(flow.sum(dim=1), source)
        torch.testing.assert_close(flow.sum(dim=0), target)
        assert float(first[kind].sum()) == pytest.approx(float(flow.sum())), "no mass moves from or to the embeddings"
        mean = torch.stack([plan[kind] for plan in plans]).mean(dim=0)
        assert not torch.allclose(mean, plans[-1][kind], atol=1e-3), "plans that are all equal show no mean"
        torch.testing.assert_close(method.layer_maps()[0][kind][1:, 1:], mean)


def test_map_of_layers_of_a_fixed_map_is_that_map() -> None:
    method, step = bound(mapping=[[1, 4], [2, 1]])
    method.after_step(step, method.terms(step))
    for matrix in method.layer_maps()[0].values():
        assert {tuple(pair): float(matrix[tuple(pair)]) for pair in matrix.nonzero().tolist()} == {(1, 4): 0.5, (2, 1): 0.5}


def test_without_an_update_masses_stay_even_and_the_plan_is_kept() -> None:
    method, step = bound(update="none")
    assert not method.plans()["plan_hidden"].any()
    method.after_step(step, method.terms(step))
    for kind in KINDS:
        torch.testing.assert_close(method.plans()[f"student_{kind}"], torch.full((M,), 1 / M).double())
        torch.testing.assert_close(method.plans()[f"teacher_{kind}"], torch.full((N,), 1 / N).double())
        assert method.plans()[f"plan_{kind}"].sum() == pytest.approx(1)


def test_terms_change_no_state_and_say_the_same_twice() -> None:
    method, step = bound()
    before = copy.deepcopy(method.state_dict())
    one, other = method.terms(step), method.terms(step)
    assert all(torch.equal(one[name], other[name]) for name in method.names)
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())
    method.after_step(step, one)
    after = copy.deepcopy(method.state_dict())
    method.after_step(step, one)  # there is nothing new
    assert all(torch.equal(tensor, after[name]) for name, tensor in method.state_dict().items())


def test_gradient_flows_through_costs_and_not_through_the_plan() -> None:
    method, step = bound(share_projection=False)
    uneven(method)
    terms = method.terms(step)
    flow = method.solved["hidden"][1]
    student, teacher = step.student.outputs, step.teacher.outputs
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(M):
        for j in range(N):
            mask = student.mask[..., None]
            squares = ((method.projections[str(i + 1)](student.hidden(i + 1)) - teacher.hidden(j + 1)) ** 2 * mask).mean(-1)
            expected = expected + flow[i, j] * (squares.sum(1) / student.mask.sum(1)).mean()
    parameters = [p for n, p in method.named_parameters() if "projections.0" not in n]
    parameters.append(step.student.model.base.embeddings.word_embeddings.weight)
    ours = torch.autograd.grad(terms["hidden"], parameters, retain_graph=True)
    for one, other in zip(ours, torch.autograd.grad(expected, parameters), strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other)


def test_only_pairs_that_mass_moves_between_are_compared_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    method, step = bound()
    with_gradient = dict.fromkeys(KINDS, 0)
    for kind in KINDS:
        original = bert_emd.ERRORS[kind]

        def counted(*arguments: object, original=original, kind=kind) -> Tensor:
            with_gradient[kind] += torch.is_grad_enabled()
            return original(*arguments)

        monkeypatch.setitem(bert_emd.ERRORS, kind, counted)
    terms = method.terms(step)
    for kind in KINDS:
        assert with_gradient[kind] == int((method.solved[kind][1] > 0).sum()) <= M + N - 1
        assert terms[kind].requires_grad


def test_copy_of_the_teacher_costs_nothing_and_its_masses_stay_finite() -> None:
    for update in MASS_UPDATES:
        method, step = bound(encoder(3), encoder(3), update=update)
        for _ in range(3):
            terms = method.terms(step)
            for kind in (*KINDS, "embedding"):
                assert terms[kind].item() == pytest.approx(0, abs=1e-12)
            method.after_step(step, terms)
            for name, buffer in method.plans().items():
                assert buffer.isfinite().all(), (update, name)
                assert buffer.sum() == pytest.approx(1)
                assert name.startswith("plan") or (buffer >= 0.9 * SMALLEST_SHARE).all()
        p = (step.teacher.outputs.logits).softmax(-1)
        assert terms["logits"].item() == pytest.approx(float(-(p * p.log()).mean()))
        gradients = torch.autograd.grad(terms["logits"], list(step.student.model.parameters()), allow_unused=True)
        assert max(float(g.abs().max()) for g in gradients if g is not None) < 1e-12


def test_plan_of_a_diagonal_matching_is_the_fixed_map() -> None:
    teacher = encoder(M)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    moved, fixed = (bound(student, teacher, mapping=mapping) for mapping in ("emd", "uniform"))
    torch.testing.assert_close(moved[0].terms(moved[1]), fixed[0].terms(fixed[1]))
    torch.testing.assert_close(moved[0].solved["hidden"][1], torch.eye(M).double() / M)
    assert fixed[0].solved == {}


def test_fixed_map_compares_its_pairs_alone_and_moves_no_mass() -> None:
    method, step = bound(mapping="uniform")
    assert method.needs() == (Needs(hidden=[0, 1, 2], attention=[1, 2]), [Needs(hidden=[0, 2, 4], attention=[2, 4])])
    student, teacher = step.student.outputs, step.teacher.outputs
    terms, mask = method.terms(step), student.mask
    pairs = [bert_emd.token_error(method.projections["all"](student.hidden(i)), teacher.hidden(2 * i), mask) for i in (1, 2)]
    torch.testing.assert_close(terms["hidden"], torch.stack(pairs).mean())
    before = method.plans()
    assert before["plan_attention"].nonzero().tolist() == [[0, 1], [1, 3]]
    method.after_step(step, terms)
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.plans().items())
    assert method.describe() == {"layer map (student<-teacher)": "1<-2, 2<-4"}
    assert method.batch_dependence() is None


def test_shares_of_two_ranks_give_the_plan_the_masses_and_the_loss_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    method, step = bound(update="sum")
    frozen = step.teacher.model
    whole = copy.deepcopy(method)
    expected = whole.terms(step)
    whole.after_step(step, expected)
    shares = [([0, 1, 2], 1.5), ([3], 0.5)]  # what a rank's loss counts for is its examples times ranks over all examples
    ranks = [copy.deepcopy(method) for _ in shares]
    parts = [step_of(method, step.student.model, frozen, rows) for rows, _ in shares]
    parts = [part.replace(batch=replace(part.batch, weight=weight)) for part, (_, weight) in zip(parts, shares, strict=True)]
    sent: list[list[Tensor]] = []
    monkeypatch.setattr(distributed, "mean", lambda tensors: sent.append(list(tensors)) or list(tensors))
    for rank, part in zip(ranks, parts, strict=True):
        rank.terms(part)
    assert len(sent) == 2  # one exchange for each rank
    average = [torch.stack(each).mean(0) for each in zip(*sent, strict=True)]
    monkeypatch.setattr(distributed, "mean", lambda _: average)
    found = []
    for rank, part in zip(ranks, parts, strict=True):
        found.append(rank.terms(part))
        rank.after_step(part, found[-1])
        for name, buffer in rank.plans().items():
            torch.testing.assert_close(buffer, whole.plans()[name], rtol=1e-9, atol=1e-9)
    for name in ("hidden", "attention", "embedding"):
        mean = sum(weight * terms[name] for terms, (_, weight) in zip(found, shares, strict=True)) / 2
        torch.testing.assert_close(mean, expected[name])


def test_resumed_method_goes_on_exactly() -> None:
    method, step = bound(update="sum")
    method.after_step(step, method.terms(step))
    state = pickle.loads(pickle.dumps(method.state_dict()))
    assert {f"{side}_{kind}" for side in ("student", "teacher", "plan") for kind in KINDS} < set(state)
    restored, _ = bound(update="sum")
    restored.load_state_dict(state, strict=True)
    for other in (restored, copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        one = copy.deepcopy(method)
        for _ in range(2):
            terms = [each.terms(step) for each in (one, other)]
            assert torch.equal(terms[0]["hidden"], terms[1]["hidden"])
            one.after_step(step, terms[0])
            other.after_step(step, terms[1])
        assert all(torch.equal(one.state_dict()[name], tensor) for name, tensor in other.state_dict().items())
    assert not torch.equal(one.state_dict()["teacher_hidden"], state["teacher_hidden"])


def test_costs_that_are_not_finite_make_the_terms_so_and_touch_no_mass() -> None:
    method, step = bound()
    before = method.plans()
    with torch.no_grad():
        step.student.model.base.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    terms = method.terms(step)
    assert terms["hidden"].isnan()
    method.after_step(step, terms)
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.plans().items())


@pytest.mark.parametrize(("share", "shapes"), [(True, ["all"]), (False, ["0", "1", "2"])])
@pytest.mark.parametrize("width", [16, 32])
def test_states_are_projected_whatever_the_widths(share: bool, shapes: list[str], width: int) -> None:
    method, step = bound(encoder(M, width=width, seed=1), share_projection=share)
    assert {name: tuple(p.weight.shape) for name, p in method.projections.items()} == dict.fromkeys(shapes, (32, width))
    terms = method.terms(step)
    (terms["hidden"] + terms["embedding"]).backward()
    assert all(parameter.grad is not None for parameter in method.parameters())
    if width == 32:
        torch.testing.assert_close(method.projections[shapes[0]].weight.detach(), torch.eye(32).double())


def test_scores_are_soft_targets_of_a_regression() -> None:
    student, teacher = encoder(M, width=16, seed=1, outputs=1), encoder(N, outputs=1)
    method, step = bound(student, teacher, temperature=3.0)
    step.task = Regression("toy", ["pearson"], "pearson")
    terms = method.terms(step)
    torch.testing.assert_close(terms["logits"], F.mse_loss(step.student.outputs.logits, step.teacher.outputs.logits))


def test_needs_are_every_layer() -> None:
    method, _ = bound()
    ours, theirs = Needs(hidden=range(M + 1), attention=range(1, M + 1)), Needs(hidden=range(N + 1), attention=range(1, N + 1))
    assert method.needs() == (ours, [theirs])
    assert method.describe() == {
        "layer map (student<-teacher)": "2 x 4 pairs by transport, masses by cost attention (softmax2, tau 1)"
    }
    assert "transport plan" in method.batch_dependence()
    assert "padding" in bound(padding="reference")[0].batch_dependence()


def test_other_heads_than_the_teachers_are_refused() -> None:
    with pytest.raises(InputError, match=r"set student.heads=4") as caught:
        BertEMD().bind(Bound(encoder(M, width=16, heads=2), [FrozenTeacher(encoder(N))], TASK))
    assert caught.value.key == "student.heads"


@pytest.mark.parametrize("mapping", [[[0, 1], [1, 2]], [], [[1, 9]], "skip"], ids=str)
def test_fixed_map_without_pairs_of_layers_is_refused(mapping: object) -> None:
    with pytest.raises(InputError) as caught:
        BertEMD(mapping=mapping).bind(Bound(encoder(1), [FrozenTeacher(encoder(N))], TASK))
    assert caught.value.key == "mapping"


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"update": "mean"}, "update"),
        ({"tau": 0}, "tau"),
        ({"tau": "one"}, "tau"),
        ({"tau": True}, "tau"),
        ({"tau": float("nan")}, "tau"),
        ({"separate": "both"}, "separate"),
        ({"share_projection": 1}, "share_projection"),
        ({"mapping": "pkd"}, "mapping"),
        ({"padding": "none"}, "padding"),
        ({"temperature": 0}, "temperature"),
        ({"loss": "l1"}, "loss"),
        ({"reduction": "sum"}, "reduction"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused_by_their_key(arguments: dict[str, object], key: str) -> None:
    with pytest.raises(InputError) as caught:
        BertEMD(**arguments)
    assert caught.value.key == key


RUN = ("method=bert_emd", "method.update=sum")


def test_run_that_was_stopped_goes_on_with_its_masses_and_its_plan_is_in_the_best_checkpoint(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken, result = made(small(*RUN))
    run = planned(small(*RUN, f"paths.runs={tmp_path}", "trainer.checkpoint_minutes=0"))
    for _, needed in unbroken.inputs:
        (tmp_path / needed.name).symlink_to(needed.directory)
    broken_off(run, 8, monkeypatch)
    assert execute.execute(run)["metrics"] == result["metrics"]
    assert same_weights(last_weights(run), last_weights(unbroken))
    counted = [torch.load(each.checkpoints / "last.ckpt", weights_only=True)["kd"]["examples"] for each in (run, unbroken)]
    assert counted == [2 * 96, 2 * 96]
    state = torch.load(run.checkpoints / "best.ckpt", weights_only=True)["state_dict"]
    for kind in KINDS:
        flow, masses = state[f"method.plan_{kind}"], state[f"method.teacher_{kind}"]
        assert flow.shape == (2, 4)
        assert float(flow.sum()) == pytest.approx(1, abs=1e-6)
        assert float(masses.sum()) == pytest.approx(1, abs=1e-6)
        assert not torch.allclose(masses, torch.full((4,), 0.25), atol=1e-3)


@pytest.mark.slow
@pytest.mark.ddp
def test_run_of_two_ranks_has_the_plan_and_the_masses_of_one(small: Small, tmp_path: Path) -> None:
    more = (*RUN, "student.dropout=0", "trainer.batch_size=14")  # the last batch of an epoch is shared unevenly
    one, _ = made(small(*more))
    for _, needed in one.inputs:
        shutil.copytree(needed.directory, tmp_path / needed.name, ignore=shutil.ignore_patterns("cache"))
    arguments = small(*more, f"paths.runs={tmp_path}", "trainer=ddp", "trainer.accelerator=cpu")
    torchrun(arguments)
    ours, theirs = (last_weights(run, "method.") for run in (planned(arguments), one))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
