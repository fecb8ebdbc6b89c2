"""Print how much the [CLS] states of finished runs differ between examples, by layer.

    python experiments/local_bench/states.py RUN [RUN ...]

A number is the mean squared distance of the states, scaled to unit length, from their mean: 0 if all examples have one state,
1 if their directions cancel out. Layer 0 is the embeddings. The examples are 512 validation texts of the run's task.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from kd.deploy.source import student_of
from kd.results.finished import examples_of

EXAMPLES, BATCH = 512, 64


def spreads(states: Tensor) -> Tensor:
    """Return the spread of states of shape (layers, examples, width), by layer.

    >>> spreads(torch.tensor([[[2.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [-3.0, 0.0]]])).tolist()
    [0.0, 1.0]
    """
    unit = torch.nn.functional.normalize(states, dim=-1)
    return (unit - unit.mean(1, keepdim=True)).square().sum(-1).mean(1)


def states_of(folder: Path, texts: Sequence[str], max_length: int) -> Tensor:
    """Return the [CLS] states of a model for texts, cut to a number of tokens: (layers + 1, texts, width)."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    parts = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(
            texts[start : start + BATCH], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        )
        with torch.inference_mode():
            parts.append(torch.stack([layer[:, 0] for layer in model(**batch, output_hidden_states=True).hidden_states]))
    return torch.cat(parts, dim=1)


def main() -> None:
    """Print a line for each run that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="directory of a finished run")
    runs = parser.parse_args().runs
    for run in runs:
        student = student_of(run)
        texts = [pair[0] for pair in examples_of(student.run).texts["validation"][:EXAMPLES]]
        states = states_of(student.deployed.folder, texts, student.deployed.max_length)
        print(f"{run.name}: {' '.join(f'{value:.4f}' for value in spreads(states).tolist())}", flush=True)


if __name__ == "__main__":
    main()
