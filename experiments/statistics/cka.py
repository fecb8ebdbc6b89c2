"""Coverage of two intervals of linear CKA, by simulation.

    python experiments/statistics/cka.py

prints the table of README.md, from a generator with seed 0. Two representations share some latent features and have noise of
their own; what an interval should cover is the mean CKA of that many examples, over the draws. `jackknife` is the interval of
`kd-probe`; `bootstrap` is the percentile interval of samples with replacement, in which a third of the examples is missing
and others are there several times. Kernels are weighted by the number of times that a sample has each example.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from kd.functional.similarity import leave_one_out_cka, linear_cka
from kd.results.statistics import ALPHA, jackknifed

Array = NDArray[np.float64]
DRAWS, SAMPLES = 300, 200
CASES = [(128, 384, 0.5), (128, 384, 2), (128, 384, 6), (128, 384, 40), (500, 384, 6), (32, 384, 6), (128, 64, 6)]
"""Examples, width, and size of the noise beside latent features of size 1."""
LATENT = 20


def weighted_cka(first: Array, second: Array, counts: Array) -> Array:
    """CKA of samples that have each example so many times, (samples,), for kernels (examples, examples)."""
    n = counts.sum(axis=1)

    def inner(one: Array, other: Array) -> Array:
        ours, theirs = counts @ one, counts @ other
        rows = (counts * (counts @ (one * other))).sum(axis=1) - 2 / n * (counts * ours * theirs).sum(axis=1)
        return rows + (counts * ours).sum(axis=1) * (counts * theirs).sum(axis=1) / n**2

    return inner(first, second) / np.sqrt(inner(first, first) * inner(second, second))


def main() -> None:
    """Print the table of coverage."""
    print("| examples | width | noise | CKA | jackknife covers | bootstrap covers | mean CKA of bootstrap samples |")
    print("|---|---|---|---|---|---|---|")
    for n, width, noise in CASES:
        rng = np.random.default_rng(0)
        mix = [rng.normal(size=(LATENT, width)) / np.arange(1, LATENT + 1)[:, None] ** 0.5 for _ in range(2)]
        values, jackknife, bootstrap, means = [], [], [], []
        for _ in range(DRAWS):
            shared = rng.normal(size=(n, LATENT))
            first, second = (shared @ own + noise * rng.normal(size=(n, width)) for own in mix)
            one, other = torch.from_numpy(first), torch.from_numpy(second)
            values.append(linear_cka(one, other))
            estimate = jackknifed(values[-1], leave_one_out_cka(one, other).numpy(), (0.0, 1.0))
            jackknife.append((estimate.low, estimate.high))
            counts = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(SAMPLES)]).astype(float)
            samples = weighted_cka(first @ first.T, second @ second.T, counts)
            bootstrap.append(tuple(np.quantile(samples, [ALPHA / 2, 1 - ALPHA / 2])))
            means.append(samples.mean())
        truth = np.mean(values)
        covered = [np.mean([low <= truth <= high for low, high in ends]) for ends in (jackknife, bootstrap)]
        shares = " | ".join(f"{100 * share:.0f}" for share in covered)
        print(f"| {n} | {width} | {noise:g} | {truth:.2f} | {shares} | {np.mean(means):.2f} |", flush=True)


if __name__ == "__main__":
    main()
