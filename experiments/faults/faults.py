"""Damage the files of small runs, or kill the runs, and see whether anything ends differently in silence.

    python experiments/faults/faults.py flips --count 40 --seed 0
    python experiments/faults/faults.py kills --count 30 --seed 0

Needs no network and no accelerator: models of a few thousand weights over made-up sentences, in a temporary folder. The last
lines are the figures; a flip that is neither told nor harmless, or a killed run that does not end equal to the bit, ends with
status 1.
"""

import argparse
import contextlib
import csv
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before torch: a copy of a process has one thread

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

import kd.training.fit  # noqa: F401 - once, not in every copy
from kd import train

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LABELS = {"negative": ["poor", "bad", "awful", "dull"], "positive": ["fine", "good", "great", "lovely"]}
FILLER = "a the film story plot actor and but is was".split()
WORDS = [*SPECIAL, *FILLER, *LABELS["negative"], *LABELS["positive"]]
METHODS = ("finetune", "kd", "pkd", "bert_emd", "dml", "tinybert")
"""Methods whose runs are killed, in turn."""


def backbone(folder: Path) -> None:
    """A BERT of 4 layers and 16 units, random, with a tokenizer of whole words."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    config = AutoConfig.for_model("bert")
    config.vocab_size, config.num_hidden_layers, config.hidden_size = len(WORDS), 4, 16
    config.num_attention_heads, config.intermediate_size, config.max_position_embeddings = 2, 32, 32
    config.initializer_range = 0.1
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)


def sentences(path: Path, count: int, seed: int) -> None:
    """Sentences whose label follows from one word."""
    draw = random.Random(seed)
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        for number in range(count):
            label = list(LABELS)[number % 2]
            words = [draw.choice(FILLER) for _ in range(draw.randint(2, 9))]
            table.writerow([" ".join([*words, draw.choice(LABELS[label])]), label])


@dataclass
class Place:
    """A folder with a backbone, data, and runs."""

    folder: Path

    @property
    def log(self) -> Path:
        """Output of the last command."""
        return self.folder / "log"

    def make(self) -> "Place":
        """Put the backbone and the data there."""
        backbone(self.folder / "backbone")
        for seed, (name, count) in enumerate({"train": 96, "validation": 32, "test": 32}.items()):
            sentences(self.folder / f"{name}.csv", count, seed)
        return self

    def command(self, runs: str, *words: str) -> list[str]:
        """The command of a run."""
        files = [f"task.{name}={self.folder / name}.csv" for name in ("train", "validation", "test")]
        teacher = [] if "teacher=[]" in words else [f"teacher.minilm.backbone={self.folder / 'backbone'}"]
        own = ["task=file", "task.max_length=16", f"backbone={self.folder / 'backbone'}", "student=2l"]
        trainer = ["trainer.progress=none", "trainer.batch_size=16", "trainer.max_epochs=3", "optimizer.lr=5e-3"]
        trainer += ["trainer.keep=all"]  # the last checkpoints of finished runs are compared
        return [*files, *teacher, *own, *trainer, f"paths.runs={self.folder / runs}", *words]


def begin(words: Sequence[str], log: Path) -> int:
    """Start `kd-train` in a copy of this process, which has imported everything; its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with log.open("w") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        sys.argv = ["kd-train", *words]
        train.main()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - a copy must not go on with its parent's work
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def call(words: Sequence[str], log: Path) -> tuple[int, str]:
    """Status and output of a command."""
    _, status = os.waitpid(begin(words, log), 0)
    return os.waitstatus_to_exitcode(status), log.read_text()


def killed(words: Sequence[str], log: Path, seconds: float, runs: Path | None = None) -> bool | None:
    """Start a command and kill it after some seconds; false if it was done before, none if it failed.

    Args:
        words: the command.
        log: where its output goes.
        seconds: after its start; with `runs`, after it has written a checkpoint in that folder.
        runs: its folder of runs.
    """
    before = written(runs)
    child, due = begin(words, log), time.monotonic() + seconds
    waiting = runs is not None
    while waiting or time.monotonic() < due:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return None if status else False
        if waiting and written(runs) != before:
            waiting, due = False, time.monotonic() + seconds
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def written(runs: Path | None) -> dict[Path, int]:
    """When each checkpoint of a folder of runs was written, in nanoseconds."""
    found = {}
    for path in [] if runs is None else runs.glob("*/checkpoints/last.ckpt"):
        with contextlib.suppress(FileNotFoundError):  # replaced at this moment
            found[path] = path.stat().st_mtime_ns
    return found


def outcome(runs: Path) -> dict[str, str]:
    """Return what must not differ: scores, and digests of exported and final weights, of every finished run of a folder."""
    found: dict[str, str] = {}
    for path in sorted(runs.glob("*/result.json")):
        run = path.parent
        record = json.loads(path.read_text())
        told = {name: record[name] for name in ("metrics", "metrics_teacher", "selection", "agreement", "files")}
        found[f"{run.name} record"] = json.dumps(told, sort_keys=True)
        for weights in sorted(run.glob("*/**/*.safetensors")):
            found[f"{run.name} {weights.relative_to(run)}"] = hashlib.sha256(weights.read_bytes()).hexdigest()
        state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        content = b"".join(name.encode() + tensor.numpy().tobytes() for name, tensor in state.items())
        found[f"{run.name} last.ckpt"] = hashlib.sha256(content).hexdigest()
    return found


def flip(path: Path, draw: random.Random) -> str:
    """Change one bit of a file; which."""
    content = bytearray(path.read_bytes())
    place, bit = draw.randrange(len(content)), draw.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {place} of {len(content)}"


TOLD = ("damaged", "cannot be used", "exported again", "not as it was written", "differs from")
"""Words that say that something was noticed."""


def flips(place: Place, count: int, seed: int) -> int:
    """Flip bits of checkpoints, exports, caches and tokens; how many changed something in silence."""
    draw, words = random.Random(seed), ("method=pkd", "teacher.minilm.run.trainer.max_epochs=1")
    status, text = call(place.command("whole", *words), place.log)
    assert status == 0, text
    whole = outcome(place.folder / "whole")
    kinds = {
        "last.ckpt": "pkd-*/checkpoints/last.ckpt",
        "best.ckpt": "pkd-*/checkpoints/best.ckpt",
        "a teacher's best.ckpt": "finetune-*/checkpoints/best.ckpt",
        "the student's export": "pkd-*/student/model.safetensors",
        "a teacher's export": "finetune-*/student/model.safetensors",
        "a cache": "finetune-*/cache/*/*",
        "tokens": ".tokens/*.npz",
        "result.json": "pkd-*/result.json",
    }
    ends: Counter[tuple[str, str]] = Counter()
    silent = 0
    for number in range(count):
        kind = list(kinds)[number % len(kinds)]
        runs = place.folder / "spoilt"
        shutil.rmtree(runs, ignore_errors=True)
        shutil.copytree(place.folder / "whole", runs)
        (student,) = runs.glob("pkd-*")
        (teacher,) = runs.glob("finetune-*")
        where = flip(draw.choice(sorted(runs.glob(kinds[kind]))), draw)
        # Each kind where it is read: the run goes on from what it has; exports and caches are used by a run that begins.
        more: tuple[str, ...] = ()
        if kind in ("last.ckpt", "best.ckpt"):
            (student / "result.json").unlink()
        elif kind == "a teacher's best.ckpt":
            shutil.rmtree(teacher / "student")
            shutil.rmtree(student)
        elif kind in ("a teacher's export", "a cache", "tokens"):
            shutil.rmtree(student)
        elif kind == "the student's export":
            more = (f"student.checkpoint={student}", "student.init=checkpoint")
        status, text = call(place.command("spoilt", *words, *more), place.log)
        told = any(word in text for word in TOLD)
        if "Traceback" in text or status not in (0, 2):
            end = "traceback"
        elif status == 2:
            end = "refused with a message" if told else "refused"
        else:
            same = {name: value for name, value in outcome(runs).items() if name in whole} == whole
            end = f"{'told and ' if told else ''}{'equal' if same else 'another result'}"
        bad = end in ("traceback", "another result", "told and another result", "refused")
        silent += bad
        ends[kind, end] += 1
        print(f"{number + 1:3} {kind}: {where}: {end}", flush=True)
        if bad:
            print(text[-2000:], flush=True)
    for (kind, end), times in sorted(ends.items()):
        print(f"{times:4} {kind}: {end}")
    print(f"{count} flips, {silent} bad")
    return silent


def kills(place: Place, count: int, seed: int) -> int:
    """Kill runs of several methods at random moments and start them again; how many did not end as an undisturbed run."""
    draw, bad, done, runs = random.Random(seed), 0, 0, 0
    small = ("trainer.checkpoint_minutes=0", "trainer.max_epochs=6")
    for method in METHODS:
        alone = ["teacher=[]"] if method in ("finetune", "dml") else ["teacher.minilm.run.trainer.max_epochs=1"]
        words = (f"method={method}", *alone, *small)
        began = time.perf_counter()
        status, text = call(place.command(f"{method}-whole", *words), place.log)
        assert status == 0, text
        seconds = time.perf_counter() - began
        whole = outcome(place.folder / f"{method}-whole")
        left = (count - done) // (len(METHODS) - METHODS.index(method))
        runs += 1
        fell = 0
        while fell < left:
            folder = place.folder / f"{method}-killed"
            if fell % 3:  # two of three while it trains; starting takes most of the time of runs as small as these
                ended = killed(place.command(folder.name, *words), place.log, draw.uniform(0, 0.3), folder)
            else:
                ended = killed(place.command(folder.name, *words), place.log, seconds * draw.uniform(0.05, 0.95))
            if ended is None:
                break
            fell += ended
            if not ended:  # it was done before it fell: from the beginning
                shutil.rmtree(place.folder / f"{method}-killed")
        done += fell
        status, text = call(place.command(f"{method}-killed", *words), place.log)
        ended = outcome(place.folder / f"{method}-killed") if status == 0 else {}
        apart = [name for name in whole if ended.get(name) != whole[name]]
        bad += bool(apart) or status != 0
        starts = [json.loads(p.read_text())["resumed"] for p in (place.folder / f"{method}-killed").glob("*/result.json")]
        print(f"{method}: {fell} kills, starts {starts}: {apart or 'equal to the bit'}", flush=True)
        if status:
            print(text[-2000:], flush=True)
    print(f"{done} kills of {runs} runs, {bad} ended otherwise")
    return bad


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Damage the files of small runs, or kill the runs.")
    parser.add_argument("what", choices=("flips", "kills"))
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder)).make()
        bad = {"flips": flips, "kills": kills}[arguments.what](place, arguments.count, arguments.seed)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
