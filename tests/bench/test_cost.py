"""Useful arithmetic, the machine's rate, memory."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import tiny_model, tiny_tokenizer
from kd.bench.cost import DTYPES, linear_weights, peak_bytes, product_rate, training_flops
from kd.forward.needs import Needs
from kd.models.encoder import Encoder
from kd.system.hardware import PRECISIONS

TOKENS = 12


def counted(encoder: Encoder, examples: int) -> int:
    """Operations of a training step without padding, as torch counts them while they are made."""
    ids = torch.randint(5, 30, (examples, TOKENS))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    # The plain attention kernel: the fused ones make some products twice.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        encoder(inputs, Needs()).logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "mpnet"])
def test_useful_operations_are_those_that_torch_counts(family: str) -> None:
    encoder = Encoder(tiny_model(model_type=family, layers=3, width=16, heads=2), tiny_tokenizer())
    assert training_flops(encoder, [TOKENS] * 5) == counted(encoder, 5)


def test_operations_of_attention_grow_with_the_square_of_the_length() -> None:
    encoder = Encoder(tiny_model(layers=2, width=16, heads=2))
    once, twice = training_flops(encoder, [10]), training_flops(encoder, [20])
    of_example = 6 * linear_weights(encoder.model.bert.pooler, encoder.model.classifier)
    assert twice - of_example == 2 * (once - of_example) + 3 * 2 * 4 * 16 * (20**2 - 2 * 10**2)


def test_a_block_that_is_shared_counts_at_each_of_its_layers() -> None:
    encoder = Encoder(tiny_model(layers=3, width=16, heads=2))
    before = training_flops(encoder, [7, 9])
    layers = encoder.model.bert.encoder.layer
    layers[2] = layers[0]
    assert training_flops(encoder, [7, 9]) == before


def test_every_precision_has_a_data_type() -> None:
    assert set(DTYPES) == set(PRECISIONS) - {"auto"}
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in DTYPES.values())


def test_rate_of_matrix_products_is_that_of_a_product_timed_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd.bench.cost.MATRIX_SIZES", {"cpu": (64,)})
    clock = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    assert product_rate("float32") == 2 * 64**3  # in one second


def test_peak_is_the_programs_own_and_not_its_parents() -> None:
    ours = np.ones(400 * 2**17)  # 400 MiB, resident
    code = "from kd.bench.cost import peak_bytes as p; a = p('cpu'); b = bytearray(2**27); print(a, p('cpu'))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, after = map(int, shown.split())
    assert before < 300e6 < ours.nbytes < peak_bytes("cpu")
    assert after - before > 120e6
