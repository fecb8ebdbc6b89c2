"""Small models and small data, made here: no test needs a network or a hub."""

import csv
import gc
import multiprocessing
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from kd.models import latency
from processes import fork_server, start_fork_server

GOOD = "fine good great lovely warm bright clever funny moving rich".split()
BAD = "poor bad awful dull cold bleak stupid tired boring thin".split()
FILLER = "a the film story actor scene plot and but with is was it this that of".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

ONLY_METHOD = "KD_CONFORMANCE_METHOD"
"""Environment variable with the method that the conformance suite is for, as the option `--method` sets it; unset for all."""


def tiny_tokenizer(words: list[str] | None = None) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer over a few dozen words."""
    vocabulary = {word: number for number, word in enumerate(SPECIAL + (words or FILLER + GOOD + BAD))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def tiny_config(model_type: str = "bert", layers: int = 4, width: int = 32, heads: int = 4, **more: object):
    """A configuration of any family, small enough for a test."""
    config = AutoConfig.for_model(model_type)
    config.vocab_size = len(SPECIAL + FILLER + GOOD + BAD)
    config.num_hidden_layers, config.hidden_size, config.num_attention_heads = layers, width, heads
    setattr(config, "hidden_dim" if model_type == "distilbert" else "intermediate_size", 2 * width)
    config.max_position_embeddings = 64
    config.pad_token_id = 0
    for name, value in more.items():
        setattr(config, name, value)
    return config


def tiny_model(seed: int = 0, **sizes: object):
    """A random classifier of `tiny_config`, in eval mode."""
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(tiny_config(**sizes)).eval()


def sentence(generator: random.Random, words: list[str]) -> str:
    """A few filler words around one that decides the label."""
    filler = [generator.choice(FILLER) for _ in range(generator.randint(2, 9))]
    return " ".join([*filler, generator.choice(words), generator.choice(FILLER)])


def write_csv(path: Path, count: int, seed: int = 0, labels: tuple[str, str] = ("negative", "positive")) -> Path:
    """Sentences whose label follows from one word."""
    generator = random.Random(seed)
    rows = [(sentence(generator, (BAD, GOOD)[n % 2]), labels[n % 2]) for n in range(count)]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


FAST = ("functional", "forward", "methods", "conformance", "data", "results", "test_config.py", "test_accumulation.py")
"""Parts of this folder that `make test-fast` runs: every formula, the contract of every method, data, configurations."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--method", help="of the conformance suite, this method alone and what is composed with it")


def pytest_configure(config: pytest.Config) -> None:
    """Tell the conformance suite, and the processes that it starts, which method it is for."""
    if method := config.getoption("--method"):
        os.environ[ONLY_METHOD] = method


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark as `fast` what is in these places, and in docstrings, and makes no whole run and starts no second process."""
    here = Path(__file__).parent
    for item in items:
        place = item.path.relative_to(here).parts[0] if item.path.is_relative_to(here) else ""
        # Overrides of a run are what a whole run is made from.
        whole_run = "small" in getattr(item, "fixturenames", ())
        marked = any(item.get_closest_marker(name) for name in ("slow", "ddp", "gpu", "thorough", "next"))
        if place in ("", *FAST) and not whole_run and not marked:
            item.add_marker("fast")
    if hasattr(config, "workerinput"):
        _most_work_first(items)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave modules and tests, which stay, out of collections: Python's collector would search them again and again.

    A process of a whole session starts the fork server for its tests.
    """
    gc.collect()
    gc.freeze()
    if hasattr(session.config, "workerinput"):
        os.environ["OMP_NUM_THREADS"] = "1"
        start_fork_server()


def _most_work_first(items: list[pytest.Item]) -> None:
    """Order files by the work in them: pytest-xdist gives one after the other to its workers, and the last should be short."""
    work: Counter[Path] = Counter()
    for item in items:
        if not item.get_closest_marker("fast"):
            work[item.path] += 5 if item.get_closest_marker("slow") or item.get_closest_marker("ddp") else 1
    items.sort(key=lambda item: -work[item.path])


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # The models are so small that a second thread only gets in the way. Lightning's launchers set another number where the
    # variable is missing, and sums made by two threads are rounded differently: runs would no longer be equal to the bit.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _one_call_is_timed() -> Iterator[None]:
    """Let runs record latencies of one call: no test of a run reads their values."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LATENCY_ROUNDS", "LATENCY_CALLS"):
            patch.setattr(latency, name, 1)
        yield


@pytest.fixture(autouse=True)
def _no_rank_is_left() -> Iterator[None]:
    """Fail the test that leaves this process a rank of a job: later tests, and libraries that they call, would be ranks too."""
    yield
    left = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in os.environ]
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        left.append("a process group")
    assert not left, f"this test leaves {', '.join(left)}"


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let workers of the benchmark need no import of PyTorch; those of a test without this fixture are new interpreters."""
    server = fork_server()

    def get_context(kind: str) -> ForkServerContext:
        assert kind == "spawn"
        return server

    monkeypatch.setattr(multiprocessing, "get_context", get_context)


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pre-trained-looking BERT, 4 x 32, and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "backbone"
    tiny_model(seed=1, initializer_range=0.1).save_pretrained(folder)  # large enough to be learnt from
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.csv, validation.csv and test.csv."""
    folder = tmp_path_factory.mktemp("data")
    for seed, (split, count) in enumerate({"train": 96, "validation": 32, "test": 32}.items()):
        write_csv(folder / f"{split}.csv", count, seed)
    return folder


@pytest.fixture(scope="session")
def small(backbone: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Overrides of a run that takes a second: `small("method=kd", "seed=1")`. They share a folder of runs."""
    runs = tmp_path_factory.mktemp("runs")

    def overrides(*more: str) -> list[str]:
        teacher = [f"teacher.minilm.backbone={backbone}", "teacher.minilm.run.optimizer.lr=5e-3"]
        return [
            "student=2l",
            "student.init_from=pretrained",  # of data of one's own the default is the teacher's layers, which is one run more
            "task=file",
            *(f"task.{split}={reviews / split}.csv" for split in ("train", "validation", "test")),
            *(() if any(word.startswith("teacher=") for word in more) else teacher),
            f"backbone={backbone}",
            "task.max_length=32",
            f"paths.runs={runs}",
            "trainer.progress=none",
            "trainer.keep=all",  # tests compare the last checkpoints of finished runs
            "trainer.max_epochs=2",
            "trainer.batch_size=16",
            "optimizer.lr=5e-3",
            *more,
        ]

    return overrides
