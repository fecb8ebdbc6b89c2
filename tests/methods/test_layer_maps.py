"""Maps of layers that methods tell: those of the configuration, for each of their teachers."""

import pytest
import torch
from methods.two_models import TASK, encoder
from torch import Tensor

from kd.methods.ad_kd import ADKD
from kd.methods.at import AT
from kd.methods.base import Bound, Method
from kd.methods.ckd import CKD
from kd.methods.distilbert import DistilBERT
from kd.methods.fitnets import FitNets
from kd.methods.fsp import FSP
from kd.methods.kd import KD
from kd.methods.mlkd_bert import MLKDBERT
from kd.methods.mt_bert import MTBERT
from kd.methods.pkd import PKD
from kd.methods.rkd import RKD
from kd.methods.simkd import SimKD
from kd.methods.sp import SP
from kd.methods.tinybert import TinyBERT
from kd.methods.wrappers.ensemble import Ensemble
from kd.methods.wrappers.mutual import Mutual
from kd.models import Encoder, FrozenTeacher

M, N = 2, 6
Pairs = dict[tuple[int, int], float]


@pytest.fixture(scope="module")
def models() -> tuple[Encoder, FrozenTeacher, FrozenTeacher]:
    return encoder(M), FrozenTeacher(encoder(N), "a"), FrozenTeacher(encoder(3), "b")


def entries(matrix: Tensor) -> Pairs:
    """The positive entries, by student and teacher layer."""
    return {(row, column): round(float(matrix[row, column]), 6) for row, column in matrix.nonzero().tolist()}


GIVEN = {(0, 1): 1.0, (2, 5): 1.0}
LISTED = [[0, 1], [2, 5]]
SAME_LAST = {(M, N): 1.0}
UNIFORM = {(1, 3): 1.0, (2, 6): 1.0}
EMBEDDINGS = {(0, 0): 1.0}
CASES: list[tuple[Method, dict[str, Pairs]]] = [
    (KD(), {}),
    (PKD(), {"hidden": {(1, 3): 1.0}}),
    (PKD(layers="last"), {"hidden": {(1, 5): 1.0}}),
    (PKD(layers=LISTED), {"hidden": GIVEN}),
    (AT(layers=LISTED), {"activation": GIVEN}),
    (FitNets(layers=LISTED), {"hidden": GIVEN}),
    (FSP(layers=LISTED), {"flow": GIVEN}),
    (FSP(flows="last"), {"flow": UNIFORM}),
    (SP(layers=LISTED), {"similarity": GIVEN}),
    (SP("pooled"), {}),
    (RKD("mean"), {"distance": SAME_LAST, "angle": SAME_LAST}),
    (DistilBERT(), {"cosine": SAME_LAST}),
    (ADKD(layers=[1, 4]), {"attribution": {(1, 4): 1.0}}),
    (MTBERT(layers=LISTED), {"hidden": GIVEN}),
    (CKD(), {"hidden": {(n, k): 0.333333 for n in (1, 2) for k in range(3 * n - 2, 3 * n + 1)}}),
    (
        CKD(layers=[[1, [2]], [2, [1, 6]]], attention=True),
        {name: {(1, 2): 1.0, (2, 1): 0.5, (2, 6): 0.5} for name in ("hidden", "attention")},
    ),
    (TinyBERT(), {"attention": UNIFORM, "hidden": UNIFORM | EMBEDDINGS}),
    (TinyBERT(layers=[[2, 5]]), {"attention": {(2, 5): 1.0}, "hidden": {(2, 5): 1.0} | EMBEDDINGS}),
    (MLKDBERT("representation"), {"attention": UNIFORM, "hidden": UNIFORM | EMBEDDINGS}),
    (MLKDBERT("representation", embedding_output=False), {"attention": UNIFORM, "hidden": UNIFORM}),
    (MLKDBERT(), {"similarity": SAME_LAST, "contrast": SAME_LAST}),
    (SimKD("tokens"), {"feature": SAME_LAST}),
    (SimKD(), {}),
    (Mutual(PKD()), {"hidden": {(1, 3): 1.0}}),
]


@pytest.mark.parametrize(("method", "expected"), CASES, ids=lambda value: type(value).__name__)
def test_fixed_maps_are_those_of_the_configuration(
    method: Method, expected: dict[str, Pairs], models: tuple[Encoder, FrozenTeacher, FrozenTeacher]
) -> None:
    _, teacher, _ = models
    method.bind(Bound(encoder(M), [teacher], TASK))  # a student of its own: some methods change it
    (maps,) = method.layer_maps()
    assert {name: entries(matrix) for name, matrix in maps.items()} == expected
    assert all(matrix.shape == (M + 1, N + 1) for matrix in maps.values())


def test_blocks_of_a_mean_share_a_row() -> None:
    method = TinyBERT(layers="mean")
    method.bind(Bound(encoder(M), [FrozenTeacher(encoder(N))], TASK))
    ((attention, hidden),) = (maps.values() for maps in method.layer_maps())
    torch.testing.assert_close(attention.sum(dim=1), torch.tensor([0.0, 1.0, 1.0]))
    torch.testing.assert_close(hidden.sum(dim=1), torch.ones(3))


@pytest.mark.parametrize("method", [Ensemble(PKD(layers="uniform"), [0.5, 0.5]), MTBERT(layers="uniform")], ids=str)
def test_each_teacher_has_maps_of_its_own_depth(method: Method, models: tuple[Encoder, FrozenTeacher, FrozenTeacher]) -> None:
    student, *teachers = models
    method.bind(Bound(student, teachers, TASK))
    one, other = (entries(maps["hidden"]) for maps in method.layer_maps())
    first = {} if isinstance(method, MTBERT) else EMBEDDINGS
    assert one == first | UNIFORM
    assert other == first | {(1, 1): 1.0, (2, 3): 1.0}
    assert [maps["hidden"].shape for maps in method.layer_maps()] == [(M + 1, N + 1), (M + 1, 4)]
