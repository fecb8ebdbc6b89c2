"""Cheaper dropout is dropout."""

import pytest
import torch
from torch import nn

from conftest import tiny_model
from kd.models import Encoder
from kd.models.dropout import LEVELS, Dropout, with_cheaper_dropout


def dropped(values: torch.Tensor) -> float:
    return float((values == 0).double().mean())


@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_share_scale_and_expectation(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    found = Dropout(p)(torch.ones(1000, 1000, dtype=dtype))
    sigma = (p * (1 - p) / 1e6) ** 0.5
    assert abs(dropped(found) - p) < 4 * sigma + 1 / LEVELS
    scale = LEVELS / (LEVELS - round(p * LEVELS))
    assert found.unique().tolist() == pytest.approx([0.0, scale], rel=1e-2 if dtype is torch.bfloat16 else 1e-6)
    if dtype is torch.float64:
        assert abs(float(found.mean()) - 1) < 4 * sigma / (1 - p)


def test_elements_are_dropped_independently() -> None:
    torch.manual_seed(0)
    kept = (Dropout(0.3)(torch.ones(2000, 512)) != 0).double()
    assert float((kept.mean(dim=0) - 0.7).abs().max()) < 5 * (0.21 / 2000) ** 0.5
    for step in (1, 2, 3, 4, 8):  # four elements come from one number
        together = float((kept[:, step:] * kept[:, :-step]).mean())
        assert together == pytest.approx(0.49, abs=2e-3)


def test_gradient_is_the_mask() -> None:
    inputs = torch.randn(7, 33, requires_grad=True)
    outputs = Dropout(0.2)(inputs)
    outputs.sum().backward()
    assert torch.allclose(outputs, inputs * inputs.grad)
    assert len(inputs.grad.unique()) == 2


def test_draws_follow_from_torchs_seed_and_differ_between_calls() -> None:
    module, inputs = Dropout(0.5), torch.ones(5, 7)
    torch.manual_seed(3)
    first, second = module(inputs), module(inputs)
    torch.manual_seed(3)
    assert torch.equal(module(inputs), first)
    assert torch.equal(module(inputs), second)
    assert not torch.equal(first, second)


def test_what_is_nothing_to_draw() -> None:
    inputs = torch.randn(3, 5)
    assert Dropout(0.5).eval()(inputs) is inputs
    assert torch.equal(Dropout(0.0)(inputs), inputs)
    assert not Dropout(1.0)(inputs).any()
    assert Dropout(0.5)(torch.ones(0, 4)).shape == (0, 4)


def test_a_model_keeps_names_and_scores_and_is_exported_as_it_was() -> None:
    model = tiny_model(hidden_dropout_prob=0.3)
    names, inputs = list(model.state_dict()), {"input_ids": torch.randint(5, 30, (2, 6))}
    before = model(**inputs).logits
    encoder = Encoder(with_cheaper_dropout(model))
    assert torch.equal(model(**inputs).logits, before)
    assert list(model.state_dict()) == names
    kinds = {type(module) for module in model.modules()}
    assert Dropout in kinds
    assert nn.Dropout not in kinds
    assert Dropout not in {type(module) for module in encoder.plain().modules()}
    assert not model.training
    assert all(not module.training for module in model.modules())
    torch.manual_seed(0)
    assert not torch.equal(model.train()(**inputs).logits, before)
