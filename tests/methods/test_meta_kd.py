"""Meta-KD: the weights of examples, the teacher of several domains, the losses of the layers."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from conftest import tiny_model, tiny_tokenizer
from kd.data.batch import Batch
from kd.data.tasks import Classification
from kd.errors import InputError
from kd.forward import Forward
from kd.functional.attention import score_error
from kd.functional.prototypes import content_vector, expertise, transferability
from kd.methods.base import Bound, Progress, Step
from kd.methods.meta_kd import MetaKD
from kd.methods.meta_teacher import MetaTeacher
from kd.models import Encoder, FrozenTeacher

TASK = Classification("toy", ["no", "yes"], {}, ["accuracy"], "accuracy")
TASK.column_classes, TASK.columns = {"domain": ["books", "dvd", "kitchen"]}, ["domain", "transferability"]
LENGTHS = (7, 3, 5, 6)


def encoder(seed: int, **sizes: Any) -> Encoder:
    return Encoder(tiny_model(seed, initializer_range=0.3, **sizes), tiny_tokenizer()).double()


def batch() -> Batch:
    generator = torch.Generator().manual_seed(4)
    mask = (torch.arange(7) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(5, 40, (4, 7), generator=generator) * mask
    ids[:, 0] = 2
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    columns = {"domain": torch.tensor([0, 2, 1, 0]), "transferability": torch.tensor([0.9, 0.2, 0.5, 0.7])}
    return Batch(inputs, (inputs,), torch.tensor([0, 1, 1, 0]), torch.tensor([5, 3, 9, 1]), columns=columns)


def teacher_of(seed: int = 2, **sizes: Any) -> FrozenTeacher:
    """A teacher, and the head that its method kept."""
    model = encoder(seed, **{"layers": 4, "width": 32, **sizes})
    torch.manual_seed(seed)
    method = MetaTeacher()
    method.bind(Bound(model, [], TASK))
    kept = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in method.kept().items()}
    return FrozenTeacher(model, "meta", kept=kept)


def bound(method: MetaKD, student: Encoder, teacher: FrozenTeacher) -> MetaKD:
    torch.manual_seed(6)
    method.bind(Bound(student, [teacher], TASK))
    return method.double()


def step_of(method: Any, student: Encoder, teacher: FrozenTeacher | None = None) -> Step:
    ours, theirs = method.needs()
    given = batch()
    teachers = [] if teacher is None else [Forward(teacher, given.teachers[0], theirs[0])]
    return Step(Forward(student.eval(), given.student, ours), teachers, given, TASK, Progress(3, 10), seed=1)


# -- weights of examples ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("probability", "expected"), [(1, 0.5), (0.9, 0.4975), (0.5, 0.437823), (0, 0.268941)])
def test_correctness_is_that_of_the_card(probability: float, expected: float) -> None:
    assert expertise(torch.zeros(1).double(), torch.tensor([probability]).double()).item() == pytest.approx(expected, abs=1e-6)


def test_expertise_is_that_of_the_card() -> None:
    found = expertise(torch.tensor([1.0, 0.9]).double(), torch.tensor([1.0, 0.0]).double())
    assert found.tolist() == pytest.approx([1.0, 0.510989], abs=1e-6)


def naive(
    vectors: Tensor, domains: list[int], classes: list[int] | None, own: float, others: float, across: str
) -> list[float]:
    """Loops over examples, domains and classes."""

    def cosine(one: Tensor, other: Tensor) -> float:
        return float(one @ other / (one.norm() * other.norm()))

    kinds = classes or [0] * len(domains)
    found = []
    for x, k, m in zip(vectors, domains, kinds, strict=True):
        means = {}
        for domain in sorted(set(domains)):
            members = [v for v, d, c in zip(vectors, domains, kinds, strict=True) if (d, c) == (domain, m)]
            if members:
                means[domain] = sum(members) / len(members)
        rest = [mean for domain, mean in means.items() if domain != k]
        if across == "mean_of_cosines":
            far = sum(cosine(x, mean) for mean in rest) / len(rest)
        else:
            far = cosine(x, sum(rest) / len(rest))
        found.append(own * cosine(x, means[k]) + others * far)
    return found


@pytest.mark.parametrize("across", ["mean_of_prototypes", "mean_of_cosines"])
@pytest.mark.parametrize("of_classes", [False, True])
def test_transferability_is_that_of_loops(across: str, of_classes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd.functional.prototypes.AT_ONCE", 4)
    vectors = torch.randn(14, 5, generator=torch.Generator().manual_seed(1)).double()
    domains = [0, 1, 2, 0, 1, 2, 2, 1, 0, 2, 0, 1, 1, 0]
    classes = [0, 0, 0, 1, 1, 1, 0, 1, 0, 1, 1, 0, 1, 0] if of_classes else None
    given = None if classes is None else torch.tensor(classes)
    found = transferability(vectors, torch.tensor(domains), 3, given, 0.7, 0.2, across)
    assert found.tolist() == pytest.approx(naive(vectors, domains, classes, 0.7, 0.2, across), abs=1e-12)


def test_domains_with_one_prototype_are_as_near_as_each_other() -> None:
    """Both comparisons give the cosine with it."""
    half = torch.randn(6, 4, generator=torch.Generator().manual_seed(2)).double()
    vectors, domains = torch.cat([half, half]), torch.tensor([0] * 6 + [1] * 6)
    expected = F.cosine_similarity(vectors, half.mean(dim=0).expand_as(vectors), dim=1)
    for across in ("mean_of_prototypes", "mean_of_cosines"):
        torch.testing.assert_close(transferability(vectors, domains, 2, across=across), expected)


def test_a_text_of_one_token_has_a_vector_of_zeros() -> None:
    states = torch.ones(1, 3, 2)
    assert content_vector(states, torch.tensor([[True, False, False]])).tolist() == [[0.0, 0.0]]


# -- the teacher of several domains ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["strict", "reference"])
@pytest.mark.parametrize("column", ["transferability", None])
def test_the_teachers_losses_are_weighted(padding: str, column: str | None) -> None:
    model = encoder(1, layers=2)
    torch.manual_seed(0)
    method = MetaTeacher(padding=padding, transferability=column, dropout=0.0)
    method.bind(Bound(model, [], TASK))
    method.double()
    step = step_of(method, model)
    terms = method.terms(step)
    given = batch()
    outputs = model.model(**given.student, output_hidden_states=True)
    weights = given.columns["transferability"].double() if column else torch.ones(4).double()
    task = sum(w * F.cross_entropy(z[None], y[None]) for w, z, y in zip(weights, outputs.logits, given.labels, strict=True)) / 4
    torch.testing.assert_close(terms["task"], task)
    wrong = method.wrong_domains(step)
    assert sorted(wrong.tolist()) == sorted(given.columns["domain"].tolist())  # a permutation
    total = 0.0
    for row, states in enumerate(outputs.hidden_states[-1]):
        last = LENGTHS[row] if padding == "strict" else 7
        content = sum(states[token] for token in range(1, last)) / (last - 1)
        u = method.head.dense(method.head.embedding.weight[given.columns["domain"][row]] + content).tanh()
        total += weights[row] * F.cross_entropy(method.classifier(u)[None], wrong[row][None]) / 4
    torch.testing.assert_close(terms["domain"], total)


def test_a_permutation_does_not_depend_on_the_order_of_the_batch() -> None:
    model = encoder(1, layers=2)
    method = MetaTeacher()
    method.bind(Bound(model, [], TASK))
    step, rows = step_of(method, model), torch.tensor([2, 0, 3, 1])
    turned = step.replace(batch=batch().map(lambda tensor: tensor[rows]))
    assert method.wrong_domains(turned).tolist() == method.wrong_domains(step)[rows].tolist()


def test_another_domain_is_never_the_right_one() -> None:
    method = MetaTeacher(corruption="other")
    model = encoder(1, layers=2)
    method.bind(Bound(model, [], TASK))
    step, seen = step_of(method, model), set()
    for number in range(60):
        wrong = method.wrong_domains(step.replace(progress=Progress(number, 60)))
        assert not (wrong == step.batch.columns["domain"]).any()
        seen |= {(int(right), int(other)) for right, other in zip(step.batch.columns["domain"], wrong, strict=True)}
    assert seen == {(a, b) for a in range(3) for b in range(3) if a != b}


def test_a_batch_of_one_domain_is_permuted_to_itself() -> None:
    method = MetaTeacher()
    model = encoder(1, layers=2)
    method.bind(Bound(model, [], TASK))
    step = step_of(method, model)
    same = step.replace(batch=batch().map(lambda tensor: tensor))
    same.batch.columns["domain"] = torch.full((4,), 2)
    assert method.wrong_domains(same).tolist() == [2] * 4


def test_the_head_is_kept() -> None:
    kept = teacher_of().kept
    assert {name: tuple(tensor.shape) for name, tensor in kept.items()} == {
        "head.embedding.weight": (3, 32),
        "head.dense.weight": (32, 32),
        "head.dense.bias": (32,),
        "domains": (3,),
    }


# -- the student ---------------------------------------------------------------------------------------------------------------


def expected_terms(method: MetaKD, student: Encoder, teacher: FrozenTeacher) -> tuple[dict[str, list[Tensor]], list[float]]:
    """The errors of each example, and its weight, in loops, with one map for all; those of attention scores are TinyBERT's."""
    given = batch()
    ours, theirs = (
        model.model(**given.student, output_hidden_states=True, output_attentions=True) for model in (student, teacher.encoder)
    )
    linear = method.projections["all"]
    errors: dict[str, list[Tensor]] = {name: [] for name in ("hidden", "embedding", "domain")}
    weights = []
    for row in range(4):
        real = LENGTHS[row] if method.padding == "strict" else 7

        def rep(layer: int, other: int, row: int = row, real: int = real) -> Tensor:
            return ((linear(ours.hidden_states[layer][row]) - theirs.hidden_states[other][row])[:real] ** 2).mean()

        errors["embedding"].append(rep(0, 0))
        errors["hidden"].append(rep(1, 2) + rep(2, 4))
        domain = given.columns["domain"][row]
        heads = []
        kept = {name.removeprefix("head."): tensor for name, tensor in teacher.kept.items() if name.startswith("head.")}
        for outputs, head in ((ours, method.head.state()), (theirs, kept)):
            content = outputs.hidden_states[-1][row][1:real].mean(dim=0)
            heads.append(F.linear(head["embedding.weight"][domain] + content, head["dense.weight"], head["dense.bias"]))
        errors["domain"].append(((linear(heads[0]) - heads[1]) ** 2).mean())
        p = theirs.logits[row].softmax(dim=0)[given.labels[row]]
        t = given.columns["transferability"][row].double()
        weights.append(float((1 + t) / (torch.exp((p - 1) ** 2) + 1)))
    return errors, weights


@pytest.mark.parametrize("weighted", ["example", "batch"])
@pytest.mark.parametrize("domain_error", ["batch", "example"])
@pytest.mark.parametrize("padding", ["strict", "reference"])
def test_losses_are_those_of_loops(weighted: str, domain_error: str, padding: str) -> None:
    student, teacher = encoder(1, layers=2, width=16), teacher_of()
    method = bound(MetaKD(weighted=weighted, domain_error=domain_error, padding=padding), student, teacher)
    step = step_of(method, student, teacher)
    terms = method.terms(step)
    errors, weights = expected_terms(method, student, teacher)
    shown = [(step.student.outputs.scores(m), step.teacher.outputs.scores(n)) for m, n in ((1, 2), (2, 4))]
    per_layer = [score_error(a, b, step.student.outputs.mask, padding, "none") for a, b in shown]
    errors["attention"] = list(per_layer[0] + per_layer[1])
    for name in ("hidden", "embedding", "attention"):
        if weighted == "example":
            expected = sum(w * error for w, error in zip(weights, errors[name], strict=True)) / 4
        else:
            expected = sum(weights) / 4 * sum(errors[name]) / 4
        torch.testing.assert_close(terms[name], expected, msg=name)
    if weighted == domain_error == "example":
        domain = sum(w * error for w, error in zip(weights, errors["domain"], strict=True)) / 4
    else:
        domain = sum(weights) / 4 * sum(errors["domain"]) / 4
    torch.testing.assert_close(terms["domain"], domain)


def test_a_heavier_example_changes_its_own_part_alone() -> None:
    """In the port, where means are multiplied, it changes the part of every example."""
    student, teacher = encoder(1, layers=2, width=16), teacher_of()
    for weighted, alone in (("example", True), ("batch", False)):
        method = bound(MetaKD(weighted=weighted, weighting="transferability"), student, teacher)
        step = step_of(method, student, teacher)
        before = method.terms(step)["hidden"]
        heavier = step.replace(batch=batch())
        heavier.batch.columns["transferability"] = heavier.batch.columns["transferability"].clone()
        heavier.batch.columns["transferability"][1] = 2 * 1.2 - 1  # 1 + t is twice as large
        gained = method.terms(heavier)["hidden"] - before
        none = bound(MetaKD(weighting="none"), student, teacher)
        rows = step.replace(batch=batch())
        blocks = none.map_at(rows.progress)
        losses = sum(none._hidden(rows.student.outputs, rows.teacher.outputs, *block, "none") for block in blocks)
        assert torch.isclose(gained, 1.2 * losses[1] / 4).item() is alone


@pytest.mark.parametrize(("weighting", "expected"), [("none", [1.0] * 4), ("transferability", [1.9, 1.2, 1.5, 1.7])])
def test_weights_without_expertise(weighting: str, expected: list[float]) -> None:
    student, teacher = encoder(1, layers=2, width=16), teacher_of()
    method = bound(MetaKD(weighting=weighting), student, teacher)
    assert method.weights(step_of(method, student, teacher)).tolist() == pytest.approx(expected)
    plain = bound(MetaKD(weighting=weighting, transferability=None), student, teacher)
    assert plain.weights(step_of(plain, student, teacher)).tolist() == [1.0] * 4


def test_a_student_that_is_its_teacher_has_no_loss() -> None:
    teacher = teacher_of()
    student = encoder(2, layers=4, width=32)
    method = bound(MetaKD(), student, teacher)
    state = {name.removeprefix("head."): tensor for name, tensor in teacher.kept.items() if name.startswith("head.")}
    method.head.load_state_dict(state)
    assert {name: float(term) for name, term in method.terms(step_of(method, student, teacher)).items()} == pytest.approx(
        dict.fromkeys(MetaKD.names, 0.0), abs=1e-20
    )


def test_the_teachers_head_is_a_constant() -> None:
    student, teacher = encoder(1, layers=2, width=16), teacher_of()
    method = bound(MetaKD(), student, teacher)
    sum(method.terms(step_of(method, student, teacher)).values()).backward()
    assert all(parameter.grad is not None for parameter in method.head.dense.parameters())
    assert not any(name.startswith("teachers") for name in (*dict(method.named_parameters()), *method.state_dict()))
    assert len(list(method.buffers())) == 3


@pytest.mark.parametrize("kept", [{}, {"head.embedding.weight": torch.zeros(4, 32)}])
def test_a_teacher_without_a_head_of_these_domains_is_refused(kept: dict[str, Tensor]) -> None:
    teacher = FrozenTeacher(encoder(2, layers=4, width=32), "meta", kept=kept)
    with pytest.raises(InputError, match=r"teacher\.meta\.method=meta_teacher") as refusal:
        MetaKD().bind(Bound(encoder(1, layers=2, width=16), [teacher], TASK))
    assert refusal.value.key == "teacher"


def test_a_head_of_the_same_domains_in_another_order_is_refused() -> None:
    teacher, student = teacher_of(), encoder(1, layers=2, width=16)
    turned = Classification("toy", ["no", "yes"], {}, ["accuracy"], "accuracy")
    turned.column_classes, turned.columns = {"domain": ["dvd", "books", "kitchen"]}, TASK.columns
    with pytest.raises(InputError, match="other domains"):
        MetaKD().bind(Bound(student, [teacher], turned))


def test_a_map_without_the_last_layer_is_refused() -> None:
    with pytest.raises(InputError, match="last layer") as refusal:
        MetaKD(layers=[[1, 2]]).bind(Bound(encoder(1, layers=2, width=16), [teacher_of()], TASK))
    assert refusal.value.key == "layers"


def test_weights_that_are_not_read_need_no_column() -> None:
    plain = Classification("toy", ["no", "yes"], {}, ["accuracy"], "accuracy")
    plain.column_classes, plain.columns = TASK.column_classes, ["domain"]
    MetaKD(weighting="none").bind(Bound(encoder(1, layers=2, width=16), [teacher_of()], plain))


@pytest.mark.parametrize(
    ("method", "words", "across"),
    [
        (MetaTeacher(), "permutes", True),
        (MetaTeacher(corruption="other"), None, False),
        (MetaTeacher(padding="reference"), "padding", False),
        (MetaTeacher(corruption="other", padding="reference"), "padding", False),
        (MetaKD(), "mean error", False),
        (MetaKD(domain_error="example"), None, False),
        (MetaKD(weighted="batch"), "mean loss", False),
        (MetaKD(domain_error="example", padding="reference"), "padding", False),
    ],
)
def test_what_depends_on_the_batch_is_said(method: MetaTeacher | MetaKD, words: str | None, across: bool) -> None:
    assert method.across_ranks is across
    assert (words is None) == (method.batch_dependence() is None)
    assert words is None or words in str(method.batch_dependence())


@pytest.mark.parametrize("build", [MetaTeacher, MetaKD])
def test_tasks_without_the_columns_are_refused(build: Any) -> None:
    plain = Classification("toy", ["no", "yes"], {}, ["accuracy"], "accuracy")
    teachers = [] if build is MetaTeacher else [teacher_of()]
    with pytest.raises(InputError, match="two domains") as refusal:
        build().bind(Bound(encoder(1, layers=2), teachers, plain))
    assert refusal.value.key == "domain"
    plain.column_classes, plain.columns = TASK.column_classes, ["domain"]
    with pytest.raises(InputError, match="prototype_weights") as refusal:
        build().bind(Bound(encoder(1, layers=2), teachers, plain))
    assert refusal.value.key == "transferability"
