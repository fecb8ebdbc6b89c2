"""Facts about methods that their code declares, read from each method bound to models that have shapes and no weights.

Methods are built and bound as `kd-train` does it, so that a page says of a combination what the command does.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from hydra.utils import instantiate
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, BertConfig, PreTrainedTokenizerFast

import kd
from kd.build.instantiate import bind_method, build_method
from kd.build.models import check_prefit
from kd.build.surgeries import check_aid_vocabularies, check_vocabularies
from kd.config.cohort import check_cohort, students_of
from kd.config.compose import compose, conf_folder, typed
from kd.config.schema import RunSpec
from kd.data.batch import Batch
from kd.data.tasks import Classification, Regression, Task
from kd.engines.distiller import Distiller
from kd.engines.models import Models
from kd.engines.optimizer import OptimizerFactory
from kd.errors import InputError
from kd.forward import Needs
from kd.methods.base import Bound, Method, Progress, needs_of_teachers
from kd.models import Encoder, FrozenTeacher
from kd.runs.run import RunInputs
from kd.runs.stages import before_config
from kd.schedules import Schedule, extremes
from kd.system.files import atomic_write

PACKAGE = Path(kd.__file__).parent

STUDENT = {"layers": 3, "width": 384, "heads": 12}
NARROW = {"layers": 3, "width": 192, "heads": 6}
TEACHER = {"layers": 6, "width": 384, "heads": 12}
"""Shapes of the models that methods are bound to: the default student and teacher, and `student=bert_3l_192`."""

EXAMPLES, TOKENS, HELD = 32, 128, 8
"""Examples of a batch whose step is counted, tokens of each, and examples that are held for rewards."""

VALUES = {
    "backward_kd": "the map between the tables of word embeddings is solved from them",
    "bert_emd": "the transport between layers is computed on the CPU",
    "bss": "which examples are moved, and how often, depends on what the models predict",
    "pea_kd": "the medians of the teacher's confidence come before the first step",
    "text_smoothing": "the masked language model predicts at the tokens that are words",
}
"""Methods of which no step is counted, because it reads values, and models without weights have none."""

WORDS = {"hidden": "hidden states", "cls": "[CLS] states", "attention": "attention", "value": "values of attention"}
WORDS |= {"words": "word embeddings", "pooled": "input of the classifier", "derived": "derived tensors"}
"""Kinds of tensors in words; others are named as in `kd.forward.kinds.KINDS`."""


@dataclass(frozen=True)
class Facts:
    """Facts about a method with its default options; of a method in two runs, of both.

    Attributes:
        name: name of its file in `conf/method`.
        teachers: teachers that it reads: `none`, `one`, `several`.
        peers: whether it trains several students, which learn from each other.
        runs: number of its runs, 1 or 2.
        labels: use of the labels of train: `needed`, of every example; `used`, where an example has one; `none`.
        label_reason: reason why it needs every label, if it says one.
        needs_unlabelled: whether it needs training text without labels.
        student: tensors that it reads from the student besides logits.
        teacher: tensors that it reads from each teacher besides logits.
        aids: frozen models that are no teachers.
        holds: share of train that is held for rewards.
        live: reason why a teacher runs at every step; empty if its outputs are computed once.
        batch: reason why the loss of an example depends on the others of its batch; empty if it does not.
        trained: parameters that are trained beside the student's, for the shapes above.
        columns: whether it reads a column of domains.
        terms: names of its loss terms, of both runs.
        products: for each run, the first one first, floating-point operations of the matrix products of a training step: with
            cached outputs of the teachers, and with teachers that run; one number if these are equal, or the teachers always
            run. Empty for the methods of `VALUES`.
        refusals: combination -> reason of its refusal, empty if it composes; see `combinations`.
    """

    name: str
    teachers: str
    peers: bool
    runs: int
    labels: str
    label_reason: str
    needs_unlabelled: bool
    student: list[str]
    teacher: list[str]
    aids: list[str]
    holds: float
    live: str
    batch: str
    trained: int
    columns: bool
    terms: list[str]
    products: list[list[int]]
    refusals: dict[str, str]


@dataclass(frozen=True)
class Planned:
    """The part of a run that the checks of vocabularies and of prefits read."""

    spec: RunSpec
    inputs: RunInputs = field(default_factory=RunInputs)


@cache
def tokenizer(words: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of its own for each number of words."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: number for number, word in enumerate([*special, *(f"w{n}" for n in range(words))])}
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]")), **names)


@cache
def _model(layers: int, width: int, heads: int, outputs: int, masked: bool) -> Any:
    config = BertConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
    )
    config.num_labels = outputs
    with torch.device("meta"):
        return (AutoModelForMaskedLM if masked else AutoModelForSequenceClassification).from_config(config)


def encoder(shape: Mapping[str, int], outputs: int, words: int = 3) -> Encoder:
    """Return a student without weights, which its method may change."""
    return Encoder(copy.deepcopy(_model(**shape, outputs=outputs, masked=False)), tokenizer(words))


@cache
def frozen(outputs: int, masked: bool = False) -> Encoder:
    """Return a teacher or an aid without weights. It is shared: methods leave frozen models as they are."""
    return Encoder(_model(**TEACHER, outputs=outputs, masked=masked), tokenizer(3))


def task_of(regression: bool = False) -> Task:
    """Return a task of classes or of scores, with the columns that methods of several domains read."""
    task: Task = Classification("classes", ["no", "yes"], {}, ["accuracy"], "accuracy")
    if regression:
        task = Regression("scores", ["pearson"], "pearson")
    task.column_classes, task.columns = {"domain": ["books", "dvd"]}, ["domain", "transferability"]
    return task


@cache
def reference(*overrides: str) -> RunSpec:
    """Return the typed configuration of a command. It is shared: nothing changes it."""
    return typed(compose(list(overrides)))


def stages(name: str) -> list[RunSpec]:
    """Return the specifications of the runs of a method, the last one first."""
    config = compose([f"method={name}"])
    return [typed(config), *([typed(before_config(config))] if config.method.get("before") else [])]


def bound(
    spec: RunSpec,
    *,
    student: Mapping[str, int] = STUDENT,
    words: int = 3,
    regression: bool = False,
    teachers: int | None = None,
) -> Method:
    """Return the method of a specification, bound; arguments and errors as for `models_of`."""
    found = models_of(spec, student=student, words=words, regression=regression, teachers=teachers)
    return next(iter(found.methods.values()))


def models_of(
    spec: RunSpec,
    *,
    student: Mapping[str, int] = STUDENT,
    words: int = 3,
    regression: bool = False,
    teachers: int | None = None,
) -> Models:
    """Return the models of a specification, without weights, each student with its method, bound.

    Args:
        spec: the specification.
        student: shape of the student.
        words: words of the student's vocabulary; other than 3 is another one than the teacher's.
        regression: whether the task is one.
        teachers: number of teachers; None for that of the specification.

    Raises:
        InputError: if these do not fit each other.
    """
    names = list(spec.teacher) if teachers is None else [f"teacher_{n}" for n in range(teachers)]
    method, weights = build_method(spec.method, spec.pool, spec.cohort, [1 / max(len(names), 1)] * len(names))
    if method.teachers is not None and method.teachers != len(names) and teachers is not None:
        raise InputError(f"method={spec.method['name']} takes {method.teachers} teacher(s) without a pool", "teacher")
    outputs, task = 1 if regression else 2, task_of(regression)
    students = {name: encoder(student, outputs, words) for name in students_of(spec)}
    methods = {name: copy.deepcopy(method) for name in students}
    teaching = [FrozenTeacher(frozen(outputs), name) for name in names]
    nodes = list(spec.teacher.values())
    for number, teacher in enumerate(teaching if nodes else ()):
        teacher.kept = kept_by(nodes[min(number, len(nodes) - 1)].method, torch.get_default_device().type)
    aids = {name: FrozenTeacher(frozen(outputs, head == "masked_lm"), name) for name, head in method.aids.items()}
    run: Any = Planned(spec)
    for name, pupil in students.items():
        bind_method(methods[name], spec.method, Bound(pupil, teaching, task, aids))
        check_vocabularies(run, task, methods[name], pupil, [teacher.encoder for teacher in teaching])
        check_aid_vocabularies(run, pupil, aids)
        check_prefit(run, task, methods[name], online=False)
    return Models(students, methods, teaching, None, weights, aids)


@cache
def kept_by(name: str, device: str) -> dict[str, Tensor]:
    """Return the state, on a device, that the method which trains a teacher keeps for its student's method."""
    method, _ = build_method(reference(f"method={name}", "teacher=[]").method)
    if not method.keeps:
        return {}
    with torch.device(device):
        method.bind(Bound(encoder(TEACHER, 2), [], task_of()))
    return method.kept()


def refusal(attempt: Callable[[], object]) -> str:
    """Return the reason why an attempt is refused; empty if it is not."""
    try:
        attempt()
    except InputError as error:
        return " ".join(error.message.split())
    return ""


def combinations(spec: RunSpec) -> dict[str, Callable[[], object]]:
    """Return what a method is combined with -> an attempt, which raises an `InputError` where it does not compose."""
    mutual, drawn = reference("method=kd", "cohort=mutual").cohort, reference("method=kd", "pool=stochastic").pool
    peers = replace(spec, cohort=mutual, method={**spec.method, "weights": {**spec.method["weights"], "mutual": 1.0}})

    def learn_together() -> None:
        check_cohort(peers)
        bound(peers)

    return {
        "pool=stochastic": lambda: bound(replace(spec, pool=drawn), teachers=2),
        "cohort=mutual": learn_together,
        "surgery=[cut_vocabulary]": lambda: bound(
            replace(spec, surgery=reference("surgery=[cut_vocabulary]").surgery), words=2
        ),
        "student=bert_3l_192": lambda: bound(spec, student=NARROW),
        "task=stsb": lambda: bound(spec, regression=True),
    }


def batch_of(models: Models, examples: int = EXAMPLES) -> Batch:
    """Return a batch without values, with a held one if a method holds a part of train."""
    with torch.device("meta"):
        ids, index = torch.zeros(examples, TOKENS, dtype=torch.long), torch.zeros(examples, dtype=torch.long)
        columns = {"domain": index, "transferability": torch.zeros(examples)}
    inputs = {"input_ids": ids, "attention_mask": ids, "token_type_ids": ids}
    of_teachers, of_peers = (inputs,) * len(models.teachers), (inputs,) * (len(models.students) - 1)
    holds = examples == EXAMPLES and any(method.holds for method in models.methods.values())
    held = batch_of(models, HELD) if holds else None
    return Batch(inputs, of_teachers, index, index, peers=of_peers, held=held, columns=columns)


class Products(TorchDispatchMode):
    """Counts the floating-point operations of matrix products, backward passes and further derivatives included.

    `FlopCounterMode` of torch, whose formulas these are, follows modules too, which `torch.autograd.grad` of leaves does not
    support.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operator and count it."""
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.operations += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def operations(call: Callable[[], object]) -> int:
    """Return the operations of a call. Attention is two products and a softmax: fused kernels compute scores twice."""
    autocast: Any = torch.autocast
    counter = Products()
    with (
        patch.object(torch, "autocast", lambda _, **more: autocast("cpu", **more)),  # the meta device has none, and it is off
        counter,
        sdpa_kernel(SDPBackend.MATH),
    ):
        call()
    return counter.operations


def operations_of_step(spec: RunSpec) -> tuple[int, int]:
    """Return the operations of the first training step of a run, and how many of them are passes of its frozen teachers."""
    sgd = OptimizerFactory(torch.optim.SGD, lr=0.1, weight_decay=0.0, schedule="constant", warmup=0.0)
    with torch.device("meta"):
        models = models_of(spec)
        engine: Distiller = instantiate(dict(spec.engine), _partial_=True)(models=models, task=task_of(), optimizer=sgd)
        engine.train()
        batch, optimizer = batch_of(models), engine.optimizer()
        step = operations(lambda: engine.update(batch, optimizer, Progress(0, 100)))
        needs, passes = needs_of_teachers(models.methods.values(), len(models.teachers)), 0
        for teacher, own in zip(models.teachers, needs, strict=True):
            if used := teacher.batches_used:
                passes += used * operations(partial(teacher.run, batch.student, own))
    return step, passes


def products(name: str, runs: Sequence[RunSpec]) -> list[list[int]]:
    """Return `Facts.products`.

    Args:
        name: name of the method.
        runs: specifications of its runs, the last one first, as `stages` returns them.
    """
    if name in VALUES:
        return []
    found = []
    for spec in reversed(runs):
        step, passes = operations_of_step(spec)
        live = any(needs.reason_to_run for needs in bound(spec).needs()[1])
        found.append([step] if live or not passes else [step - passes, step])
    return found


def facts_of(name: str) -> Facts:
    """Return the facts about a method."""
    runs = stages(name)
    methods = [bound(spec) for spec in runs]
    teacher = [needs for method in methods if method.uses_teachers for needs in method.needs()[1]]
    counting = [build_method(spec.method, spec.pool, spec.cohort, _chances(spec))[1] for spec in runs]
    reasons = [why for method in methods if (why := method.label_dependence()) is not None]
    last = set(_counting(counting[0]))
    labels = (
        "needed" if reasons or last == {"task"} else "used" if any("task" in _counting(one) for one in counting) else "none"
    )
    several = max((len(spec.teacher) for spec in runs), default=0) > 1
    reads = any(method.uses_teachers and method.teachers for method in methods)
    refusals: dict[str, str] = {}
    for spec in runs:
        for combination, attempt in combinations(spec).items():
            refusals[combination] = refusals.get(combination) or refusal(attempt)
    if len(students_of(runs[0])) > 1:
        refusals["cohort=mutual"] = ""
    return Facts(
        name=name,
        teachers="none" if not reads else "several" if several else "one",
        peers=len(students_of(runs[0])) > 1,
        runs=len(runs),
        labels=labels,
        label_reason=reasons[0] if reasons else "",
        needs_unlabelled=any(method.unlabelled_dependence() is not None for method in methods),
        student=tensors([method.needs()[0] for method in methods]),
        teacher=tensors(teacher),
        aids=sorted({aid for method in methods for aid in method.aids}),
        holds=max(method.holds for method in methods),
        live="; ".join(dict.fromkeys(needs.reason_to_run for needs in teacher if needs.reason_to_run)),
        batch="; ".join(dict.fromkeys(why for method in methods if (why := method.batch_dependence()))),
        trained=sum(parameter.numel() for method in methods for parameter in method.parameters() if parameter.requires_grad),
        columns=any("domain" in spec.method and spec.method["domain"] for spec in runs),
        terms=list(dict.fromkeys(term for method in methods[::-1] for term in method.names)),
        products=products(name, runs),
        refusals=refusals,
    )


def _chances(spec: RunSpec) -> list[float]:
    return [1 / max(len(spec.teacher), 1)] * len(spec.teacher)


def _counting(weights: Mapping[str, Schedule]) -> list[str]:
    """Return the terms whose weight is ever above zero."""
    return [name for name, weight in weights.items() if any(extremes(weight))]


def tensors(needs: Sequence[Needs]) -> list[str]:
    """Return the tensors that are declared, in words, with their layers."""
    layers: dict[str, set[int]] = {}
    names: dict[str, set[str]] = {}
    for tap in (tap for need in needs for tap in need.taps):
        layers.setdefault(tap.kind, set()).update([tap.layer] if isinstance(tap.layer, int) else [])
        names.setdefault(tap.kind, set()).update([tap.layer] if isinstance(tap.layer, str) else [])
    found = []
    for kind, at in sorted(layers.items()):
        where = f"layer{'s' if len(at) > 1 else ''} {', '.join(map(str, sorted(at)))}" if at else ", ".join(sorted(names[kind]))
        found.append(WORDS.get(kind, kind.replace("_", " ")) + (f" ({where})" if where else ""))
    return found


def method_names() -> list[str]:
    """Return the names of all methods."""
    return sorted(path.stem for path in (conf_folder() / "method").glob("*.yaml"))


CACHE = Path(__file__).resolve().parent.parent.parent / "build"
"""Folder of the facts of earlier builds, which hold while neither the code nor the configuration changes."""


@cache
def all_facts() -> Mapping[str, Facts]:
    """Return the facts about all methods; those of the same sources are read from an earlier build."""
    digest = hashlib.sha256(f"{torch.__version__} {transformers.__version__}".encode())
    for files in (PACKAGE.rglob("*.py"), conf_folder().rglob("*.yaml"), Path(__file__).parent.glob("*.py")):
        for path in sorted(files):
            digest.update(path.read_bytes())
    file = CACHE / f"facts-{digest.hexdigest()[:16]}.json"
    if file.is_file():
        return {name: Facts(**found) for name, found in json.loads(file.read_text(encoding="utf-8")).items()}
    facts = {name: facts_of(name) for name in method_names()}
    CACHE.mkdir(exist_ok=True)
    for old in CACHE.glob("facts-*.json"):
        old.unlink()
    with atomic_write(file) as opened:
        json.dump({name: asdict(one) for name, one in facts.items()}, opened)
    return facts
