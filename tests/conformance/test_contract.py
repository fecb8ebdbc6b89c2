"""The contract of a plug-in (design, section 6), applied to every file in `conf/method`."""

import copy
import functools
import pickle
import re
from pathlib import Path

import pytest
import torch
from overwriting import Overwriting, overwriting
from unreadable import DEVICE, move, unreadable

from conformance.bench import (
    CASES,
    HELD,
    METHODS,
    STAGED,
    SUMS,
    WAITS,
    Bench,
    Recorded,
    close,
    configured,
    more_padding,
    refusal,
    take,
    train_occurring_rows,
    untouched,
)
from kd.config.compose import conf_folder
from kd.data.batch import Batch
from kd.errors import InputError
from kd.forward.lazy import Detached
from kd.forward.needs import Needs
from kd.methods.base import Progress, needs_of_teachers
from kd.models.compiled import GraphShapes
from kd.system import hardware
from kd.teacher_cache.cache import TeacherCache
from kd.training.graphs import encoders_of

REFUSES_GRAPHS = {"ad_kd", "bert_emd", "l2a", "tinybert", "mlkd_bert", "meta_kd"}
"""Methods that the documentation lists as refused with `trainer.compile=reduce-overhead`, some for their first run."""

every_case = pytest.mark.parametrize("name", CASES)
__all__ = ["overwriting"]


@pytest.mark.parametrize("name", [*METHODS, *STAGED])
@pytest.mark.thorough
def test_configuration_carries_the_name_of_its_file_and_refuses_unknown_keys(name: str) -> None:
    method = name.split()[0]
    found = configured(name).method.name
    assert found.startswith(f"{method}_") if name in STAGED else found == method
    with pytest.raises(InputError) as error:
        configured(name, ["method.no_such_key=1"])
    assert error.value.key == "method.no_such_key"


@every_case
@pytest.mark.thorough
def test_method_survives_pickling(name: str) -> None:
    bench = Bench(name)
    for method in bench.methods.values():
        copied = pickle.loads(pickle.dumps(method))
        assert copied.needs() == method.needs()
        assert copied.names == method.names


@every_case
def test_terms_are_finite_scalars_named_like_the_weights(name: str) -> None:
    bench = untouched(name)
    bench.engine.train()
    loss = bench.engine.loss(bench.batch())
    assert len(loss.steps) == len(bench.students)
    for _, _, own in loss.steps:
        assert set(own) == set(bench.weights)
    for term in loss.terms.values():
        assert term.shape == ()
        assert torch.isfinite(term)


@every_case
def test_every_trainable_parameter_gets_a_gradient_and_the_teacher_none(name: str) -> None:
    bench = Bench(name, dropout=0.1)
    before = [copy.deepcopy(teacher.encoder.state_dict()) for teacher in bench.teachers]
    bench.engine.loss(bench.batch()).total.backward()
    parameters = dict(bench.engine.named_parameters())
    trainable = {key for key, parameter in parameters.items() if parameter.requires_grad}
    reached = {key for key, parameter in parameters.items() if parameter.grad is not None}
    assert trainable - reached == set(), "no term reaches these parameters; freeze what is not trained"
    assert reached - trainable == set(), "frozen parameters"
    bench.engine.zero_grad(set_to_none=True)
    assert set(bench.gradients(bench.batch())) == trainable, "the turns of an update move every trainable parameter"
    for teacher, state in zip(bench.teachers, before, strict=True):
        for parameter in teacher.encoder.parameters():
            assert not parameter.requires_grad
            assert parameter.grad is None
        for key, tensor in teacher.encoder.state_dict().items():
            assert torch.equal(tensor, state[key]), key


@every_case
@pytest.mark.thorough
def test_no_step_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(name, dropout=0.1)
    batch, optimizer = bench.batch(), bench.engine.optimizer()

    def step(batch: Batch, done: int) -> None:
        bench.engine.after_step(bench.engine.update(batch, optimizer, Progress(done, 100)))

    step(batch, 0)  # the first one of an epoch may read what it keeps until the next
    move(bench.engine)
    with unreadable(monkeypatch) as waits:
        if name.split()[0] in WAITS:
            with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
                step(batch.to(DEVICE), 1)
            return
        batch = batch.map(lambda tensor: hardware.to_device(tensor, DEVICE))
        step(batch, 1)
        bench.engine.configure_gradient_clipping(optimizer, 1.0)
    assert not waits


@every_case
@pytest.mark.thorough
def test_no_step_reads_what_the_graphs_of_the_next_one_overwrite(name: str, overwriting: Overwriting) -> None:
    states = []
    for shapes in (None, GraphShapes(frozenset({8, HELD}), frozenset({9}))):
        bench = Bench(name, dropout=0.1)
        if any(needs.gradient or needs.inside_blocks for needs, _ in (method.needs() for method in bench.methods.values())):
            assert name.split()[0] in REFUSES_GRAPHS
            return
        for model in encoders_of(bench.engine):
            model.graphs = shapes
        for step in range(2):
            torch.manual_seed(step)
            torch.compiler.cudagraph_mark_step_begin()
            bench.update(bench.batch(seed=step))
        states.append(bench.engine.state_dict())
    assert [bool(passes) for passes in overwriting.steps] == [False, False, True, True]
    for (key, expected), found in zip(states[0].items(), states[1].values(), strict=True):
        assert torch.equal(expected, found), key


@every_case
@pytest.mark.thorough
def test_every_declared_need_is_used_and_nothing_else_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, reads = Bench(name), Recorded(monkeypatch)
    used: dict[int, set[str]] = {}
    losses = []  # kept, so that no two forwards share an address
    for done in range(12 if len(bench.teachers) > 1 else 3):  # a pool shows another teacher each time
        loss = bench.engine.loss(bench.batch(), Progress(done, 100))
        losses.append(loss)
        for _, step, _ in loss.steps:
            for forward in (step.student, *step.teachers):
                if isinstance(forward, Detached) or not forward.ran:
                    continue
                used.setdefault(id(forward.model), set()).update(reads.of(forward.outputs))
                assert sorted(forward.outputs.named()) == sorted(forward.needs.tensors)
    needs = [method.needs() for method in bench.methods.values()]
    for student, (ours, of_teachers) in zip(bench.students.values(), needs, strict=True):
        assert len(of_teachers) == bench.counts["teachers"], "needs are declared for each teacher"
        assert used.get(id(student), set()) == set(ours.tensors) - {"logits"}
    for place, teacher in enumerate(bench.teachers):
        theirs = functools.reduce(Needs.__or__, [each[place] for _, each in needs], Needs())
        assert used.get(id(teacher), set()) == set(theirs.tensors) - {"logits"}


@every_case
def test_maps_of_layers_are_those_of_the_layers_that_are_read(name: str) -> None:
    """A layer of a teacher is in a map if the method reads it; the embeddings, which meet the student's, need not be."""
    bench = Bench(name)
    for seed in range(6 if len(bench.teachers) > 1 else 1):  # a pool draws a teacher by the step
        loss = bench.engine.loss(bench.batch(seed=seed), Progress(seed, 100))
        bench.engine.after_step(loss)
    teaching = [teacher.encoder for teacher in bench.teachers] or [bench.engine.online] * bench.counts["teachers"]
    for student, method in zip(bench.students.values(), bench.methods.values(), strict=True):
        ours, of_teachers = method.needs()
        for teacher, theirs, maps in zip(teaching, of_teachers, method.layer_maps(), strict=True):
            assert all(matrix.shape == (student.depth + 1, teacher.depth + 1) for matrix in maps.values())
            assert all(matrix.isfinite().all() and (matrix >= 0).all() and matrix.any() for matrix in maps.values())
            assert set(maps) <= set(method.names), "maps have the names of terms"
            pairs = {tuple(pair) for matrix in maps.values() for pair in matrix.nonzero().tolist()}
            assert {layer for layer, _ in pairs} <= {tap.layer for tap in ours.taps}
            assert {layer for _, layer in pairs} - {0} == {tap.layer for tap in theirs.taps if isinstance(tap.layer, int)} - {0}


@every_case
def test_padding_changes_no_term(name: str) -> None:
    bench = untouched(name, double=True)
    batch = bench.batch()
    one, other = bench.terms(batch), bench.terms(more_padding(batch))
    if bench.batch_dependence() is None:
        close(one, other, SUMS)


@every_case
def test_a_student_that_equals_its_teachers_and_peers_is_at_every_minimum(name: str) -> None:
    bench, moved = Bench(name, same=True), Bench(name, same=True)
    for each in (bench, moved):
        each.engine.eval()
    batch, end = bench.batch(), Progress(100, 100)  # what is annealed has come to its target then
    steps = bench.engine.loss(batch, end).steps
    for place, (method, _, terms) in enumerate(steps):
        parameters = [p for p in list(bench.students.values())[place].parameters() if p.requires_grad]
        student = list(moved.students.values())[place]
        before = copy.deepcopy(student.state_dict())
        with torch.no_grad():
            for parameter in student.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
        away = moved.engine.loss(batch, end).steps[place][2]
        student.load_state_dict(before)
        distances = method.distances if method.distances is not None else [term for term in terms if term != "task"]
        assert set(distances) <= set(terms), "distances are names of terms"
        for term in distances:
            value = terms[term]
            gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            reached = [float(gradient.abs().max()) for gradient in gradients if gradient is not None]
            assert reached, f"{term} does not depend on the student; `Method.distances` lists the terms that do"
            largest = max(reached)
            assert largest < 1e-5, f"{term} is not stationary at the teacher: gradient {largest}"
            assert float(away[term].detach()) > float(value.detach()) + 1e-6, f"{term} does not rise away from the teacher"


@every_case
def test_order_of_the_batch_changes_no_term(name: str) -> None:
    bench = untouched(name, double=True)
    batch = bench.batch()
    shuffled = take(batch, torch.randperm(len(batch), generator=torch.Generator().manual_seed(1)))
    close(bench.terms(batch), bench.terms(shuffled), SUMS)


@every_case
@pytest.mark.thorough
def test_checkpoint_holds_no_frozen_teacher_and_restores_the_next_loss(name: str) -> None:
    bench = Bench(name)
    bench.update(bench.batch())
    state = copy.deepcopy(bench.engine.state_dict())
    size = sum(tensor.numel() for tensor in state.values())
    trained = [*bench.students.values(), *bench.methods.values(), *filter(None, [getattr(bench.engine, "online", None)])]
    assert size == sum(t.numel() for module in trained for t in module.state_dict().values())
    other = Bench(name, seed=5)
    for one, frozen in zip(other.teachers, bench.teachers, strict=True):
        one.encoder.load_state_dict(frozen.encoder.state_dict())
    other.engine.seed = bench.engine.seed
    other.engine.load_state_dict(state, strict=True)
    close(bench.terms(bench.batch(seed=4)), other.terms(bench.batch(seed=4)), 0.0)


@every_case
@pytest.mark.thorough
def test_dropout_is_on_in_every_pass_of_a_student_and_off_in_every_other(name: str) -> None:
    bench = Bench(name, dropout=0.5)
    calls: list[tuple[torch.nn.Module, bool, bool]] = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: calls.append((module, module.training, torch.is_grad_enabled()))
    )
    try:
        bench.update(bench.batch())
    finally:
        hook.remove()
    students = {part for student in bench.students.values() for part in student.modules()}
    frozen = {part for model in (*bench.teachers, *bench.aids.values()) for part in model.encoder.modules()}
    for method in bench.methods.values():
        for module in method.modules():
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                frozen |= set(module.modules())
    assert any(module in students for module, *_ in calls)
    # A pass without a graph trains nothing, and may be one of `Forward.evaluate`, for a reward.
    off = {type(module).__name__ for module, training, graph in calls if module in students and graph and not training}
    assert off == set(), "a pass of a student without dropout"
    on = {type(module).__name__ for module, training, _ in calls if module in frozen - students and training}
    assert on == set(), "a pass of a frozen model with dropout"


@every_case
@pytest.mark.thorough
def test_teachers_stay_in_eval_mode_and_dropout_does_not_reach_them(name: str) -> None:
    bench = Bench(name, dropout=0.5)
    for teacher in bench.teachers:
        for module in teacher.encoder.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
    bench.engine.train()
    steps, again = (bench.engine.loss(bench.batch()).steps for _ in range(2))
    assert all(student.training for student in bench.students.values())
    assert not any(module.training for teacher in bench.teachers for module in teacher.encoder.modules())
    for (_, step, _), (_, other, _) in zip(steps, again, strict=True):
        for one, two in zip(step.teachers, other.teachers, strict=True):
            if not isinstance(one, Detached):  # one that is trained with its students has dropout as they have
                assert torch.equal(one.outputs.logits, two.outputs.logits)
        assert not torch.equal(step.student.outputs.logits, other.student.outputs.logits)


@every_case
@pytest.mark.thorough
def test_a_cached_teacher_is_as_good_as_one_that_runs(name: str, tmp_path: Path) -> None:
    live, cached, both = (Bench(name, dropout=0.1, double=True) for _ in range(3))
    needs = needs_of_teachers(live.methods.values(), len(live.teachers))
    if any(need.uncacheable_reason or need.gradient or need.words for need in needs):  # then teachers run at every step
        cache = TeacherCache(tmp_path, "weights", "32-true", "on", torch.device("cpu"), "toy")
        assert all(cache.reason_to_run(*each) for each in zip(live.teachers, needs, strict=True))
        return
    batch = live.batch()
    read, mixed = cached.use_cached(batch, tmp_path / "all"), both.use_cached(batch, tmp_path / "three", 3)
    gradients = []
    for bench, seen in ((live, batch), (cached, read), (both, mixed)):
        torch.manual_seed(0)
        bench.engine.loss(seen).total.backward()
        gradients.append({key: parameter.grad for key, parameter in bench.engine.named_parameters()})
    assert not any(teacher.passes for teacher in cached.engine.teachers)
    for teacher in both.engine.teachers:
        assert (teacher.passes > 0) == (teacher.batches_used > 0)
        assert teacher.examples <= (len(batch) - 3) * teacher.passes
    for key, gradient in gradients[0].items():
        for other in gradients[1:]:
            assert (gradient is None) == (other[key] is None), key
            if gradient is not None:
                # What is said of padding is not kept; that zeros stand there in its place may change the order of a sum alone.
                assert torch.allclose(gradient, other[key], rtol=0, atol=SUMS), key


@every_case
@pytest.mark.thorough
def test_step_in_bf16_autocast_is_finite(name: str) -> None:
    bench = untouched(name)
    bench.engine.train()
    bench.engine.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = bench.engine.loss(bench.batch())
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert all(torch.isfinite(p.grad).all() for p in bench.engine.parameters() if p.grad is not None)


@every_case
@pytest.mark.thorough
def test_one_seed_gives_one_result(name: str) -> None:
    def trained() -> dict[str, torch.Tensor]:
        bench = Bench(name, dropout=0.1)
        torch.manual_seed(11)
        bench.update(bench.batch())
        return bench.engine.state_dict()

    one, other = trained(), trained()
    assert all(torch.equal(one[key], other[key]) for key in one)


@every_case
def test_rows_that_do_not_occur_change_no_update(name: str) -> None:
    """Updates are the same with the rows of the student's table alone that its text reads, unless others are declared."""

    def trained(rows: bool) -> dict[str, torch.Tensor]:
        bench = Bench(name, dropout=0.1, double=True)
        batch = bench.batch()
        if rows:
            train_occurring_rows(bench, batch)
        torch.manual_seed(11)
        for _ in range(2):
            bench.update(batch)
        return bench.engine.state_dict()

    if any(method.other_words for method in untouched(name).methods.values()):
        with pytest.raises((InputError, RuntimeError), match=r"embedding_rows=all|size of tensor"):
            trained(rows=True)
        return
    one, other = trained(rows=False), trained(rows=True)
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[key], other[key], rtol=0, atol=SUMS) for key in one if one[key].is_floating_point())


CHECKS = (
    test_terms_are_finite_scalars_named_like_the_weights,
    test_every_trainable_parameter_gets_a_gradient_and_the_teacher_none,
    test_padding_changes_no_term,
    test_a_student_that_equals_its_teachers_and_peers_is_at_every_minimum,
    test_order_of_the_batch_changes_no_term,
    test_checkpoint_holds_no_frozen_teacher_and_restores_the_next_loss,
    test_dropout_is_on_in_every_pass_of_a_student_and_off_in_every_other,
    test_step_in_bf16_autocast_is_finite,
    test_one_seed_gives_one_result,
    test_rows_that_do_not_occur_change_no_update,
)
"""The contract of a generated composition, in one test for each composition, so that it is composed once."""


def test_documentation_says_which_methods_need_one_vocabulary() -> None:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text().split("### MPNet")[1].split("\n### ")[0]
    rows = dict(re.findall(r"^\| (works|refused) \|(.*)\|$", text, re.MULTILINE))
    said = {name: row for row, names in rows.items() for name in re.findall(r"`(\w+)`", names)}
    assert len(said) == sum(len(re.findall(r"`\w+`", names)) for names in rows.values()), "a method is listed twice"
    assert set(said) == {path.stem for path in (conf_folder() / "method").glob("*.yaml")}
    for name in METHODS:
        cases = [name, *(case for case in STAGED if case.split()[0] == name)]
        errors = [refusal(f"{case} surgery=[cut_vocabulary]") for case in cases]
        refused = any(error is not None and "a vocabulary of its own" in error.message for error in errors)
        assert said[name] == ("refused" if refused else "works"), name
