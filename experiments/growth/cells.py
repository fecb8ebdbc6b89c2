"""Cost of a sweep whose cells are all done.

    python experiments/growth/cells.py FOLDER [CELLS]

makes one tiny run in FOLDER, puts a copy of it in the place of every other cell (student sizes, seeds and temperatures of one
method with one teacher), and times the command over 1 cell and over all of them.
"""

import json
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from kd.config.compose import compose
from kd.runs.plan import plan
from kd.runs.run import Run, read_record, write_record

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] good bad fine poor a the film plot was".split()


def material(folder: Path) -> list[str]:
    """A backbone of two small layers and three files; overrides that use them."""
    core = Tokenizer(models.WordPiece({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    special = {f"{word.lower()}_token": f"[{word}]" for word in ("PAD", "UNK", "CLS", "SEP", "MASK")}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder / "base")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = AutoConfig.for_model("bert", vocab_size=len(WORDS), max_position_embeddings=64, **sizes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "base")
    draw = random.Random(0)
    for split, count in {"train": 96, "validation": 32}.items():
        rows = [f"the film was {' '.join(draw.choices(WORDS[5:], k=6))},{number % 2}" for number in range(count)]
        (folder / f"{split}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    files = [f"task.{split}={folder / split}.csv" for split in ("train", "validation")]
    base = [f"teacher.minilm.backbone={folder / 'base'}", f"backbone={folder / 'base'}"]
    small = ["task.max_length=32", "trainer.max_epochs=1", "trainer.batch_size=16", "trainer.progress=none"]
    return ["method=kd", "student=2l", "task=file", f"paths.runs={folder / 'runs'}", *files, *base, *small]


def copy(done: Run, other: Run) -> None:
    """A finished run in the place of another."""
    if other.directory.exists():
        return
    shutil.copytree(done.directory, other.directory, ignore=shutil.ignore_patterns("cache", "checkpoints"))
    record = read_record(done.directory / "result.json")
    assert record is not None
    record = {name: value for name, value in record.items() if name != "checksum"}
    write_record(other.directory / "result.json", {**record, "digest": other.digest, "seed": other.spec.seed})


def main() -> None:
    """Prepare and time."""
    folder, cells = Path(sys.argv[1]).absolute(), int(sys.argv[2]) if len(sys.argv) > 2 else 60
    folder.mkdir(parents=True, exist_ok=True)
    fixed = material(folder)
    command = [sys.executable, "-m", "kd.train"]
    points = [[*fixed, f"seed={number % 10}", f"method.temperature={1 + number // 10}"] for number in range(cells)]
    subprocess.run([*command, *points[0]], check=True, capture_output=True)
    first = plan(compose(points[0]), points[0])
    for point in points[1:]:
        copy(first, plan(compose(point), point))
    temperatures = ",".join(str(1 + number) for number in range((cells + 9) // 10))
    for label, sweep in {
        1: ["seed=0", "method.temperature=1"],
        cells: ["seed=range(10)", f"method.temperature={temperatures}"],
    }.items():
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime, time.perf_counter()
        subprocess.run([*command, "--multirun", *fixed, *sweep], check=True, capture_output=True)
        used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        print(json.dumps({"cells": label, "wall_s": round(time.perf_counter() - began, 2), "cpu_s": round(used, 2)}))


if __name__ == "__main__":
    main()
