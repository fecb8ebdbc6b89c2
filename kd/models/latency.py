"""Latency of models, which are called alternately."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from kd.forward import Needs, Outputs
from kd.models import Encoder, FrozenTeacher
from kd.models.pretrained import quiet
from kd.models.students import empty_model

LATENCY_TOKENS = 32
"""Tokens of the sentence that is timed."""
LATENCY_ROUNDS, LATENCY_CALLS = 3, 10
"""Number of rounds, and of calls of each model per round."""
LATENCY_SPREAD = 0.2
"""Largest relative difference between the minima of two rounds at which a latency is reported. Our choice."""
FILLER = 0.02
"""Value of every weight of a model that is timed without its weights in memory: the standard deviation of BERT's
initialisation. Zeros or denormal numbers, with which the processor has another speed, would change the time."""
LATENCY_MEASURE = (
    f"least of {LATENCY_ROUNDS * LATENCY_CALLS} calls, the run's models in turn, one sentence of {LATENCY_TOKENS} tokens, "
    f"float32, CPU, tokenizer excluded; left out where rounds differ by more than {LATENCY_SPREAD:.0%}"
)


@dataclass(frozen=True)
class Latency:
    """Latency of a model for one sentence.

    Attributes:
        milliseconds: minimum over all calls; None if the rounds differ by more than `LATENCY_SPREAD`.
        spread: relative difference between the largest and the smallest minimum of a round, a fraction of the latter.
    """

    milliseconds: float | None
    spread: float


@torch.no_grad()
def latencies(models: Mapping[str, Encoder], tokens: int = LATENCY_TOKENS) -> dict[str, Latency]:
    """Time one sentence on this machine's CPU: batch size 1, float32, tokenizer excluded, after a warm-up.

    The models are called in turn, so that a temporary slowdown affects all of them, and the minimum of each model's times is
    taken, because other load on the machine only adds time. If the machine is too busy, even the minima of rounds differ.
    """
    calls: dict[str, Callable[[], Outputs]] = {}
    for name, model in models.items():
        model.to("cpu").eval()
        ids = torch.randint(5, int(model.config.vocab_size), (1, tokens), generator=torch.Generator().manual_seed(0))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        calls[name] = lambda model=model, inputs=inputs: model(inputs, Needs())  # type: ignore[misc]
    for call in [*calls.values()] * 5:
        call()
    least: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(LATENCY_ROUNDS):
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(LATENCY_CALLS):
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - began)
        for name, taken in times.items():
            least[name].append(min(taken))
    return {name: _latency(minima) for name, minima in least.items()}


def _latency(least: Sequence[float]) -> Latency:
    """Return the latency of a model, given the minimum time of each round in seconds."""
    spread = max(least) / min(least) - 1
    return Latency(round(1000 * min(least), 3) if spread <= LATENCY_SPREAD else None, round(spread, 3))


def to_time(teacher: FrozenTeacher, head: str) -> Encoder:
    """Return a teacher's model to be timed; for one whose weights are not in memory, a model of its shape.

    The time does not depend on the weights as long as they are ordinary numbers: all are `FILLER`. No random numbers are drawn.
    """
    if teacher.runs:
        return teacher.encoder
    shape = empty_model(teacher.shape.config, head)
    # from_pretrained initialises buffers and ties weights, as it does for a model that is read from a file.
    numbers = {name: torch.full((), FILLER).expand(parameter.shape) for name, parameter in shape.named_parameters()}
    with torch.random.fork_rng(devices=[]), quiet():
        model: PreTrainedModel = type(shape).from_pretrained(  # type: ignore[attr-defined]
            None, config=copy.deepcopy(teacher.shape.config), state_dict=numbers, dtype=torch.float32
        )
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # an expanded number would be read from memory faster than real weights
    return Encoder(model, teacher.tokenizer)
