"""A small student, a deeper and wider teacher, a batch: what every method is tried on."""

import copy
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conftest import BAD, FILLER, GOOD, ONLY_METHOD, tiny_config, tiny_model, tiny_tokenizer
from kd.build.instantiate import bind_method, build_method
from kd.build.models import check_prefit
from kd.build.surgeries import check_aid_vocabularies, check_vocabularies, surgeries
from kd.config.cohort import students_of
from kd.config.compose import compose, conf_folder, typed
from kd.config.schema import RunSpec
from kd.data.batch import Batch
from kd.data.sampler import LengthBatches
from kd.data.tasks import Classification, Regression, Task
from kd.engines.base import Engine
from kd.engines.models import Models
from kd.engines.optimizer import OptimizerFactory
from kd.errors import InputError
from kd.forward import Needs, Outputs
from kd.forward.kinds import tensor_name
from kd.methods.base import Bound, needs_of_teachers
from kd.models import CachedTeacher, Encoder, FrozenTeacher
from kd.models.heads import HEADS
from kd.models.surgery.embeddings import SurgeryInputs
from kd.runs.run import RunInputs
from kd.runs.stages import before_config
from kd.teacher_cache.store import CachedOutputs, Entry, Share, TensorStore
from kd.training.rows import Table, TrainOccurringRows

BEFORE = "before"
METHODS = sorted(path.stem for path in (conf_folder() / "method").glob(f"{os.environ.get(ONLY_METHOD, '*')}.yaml"))
NODES = {name: OmegaConf.load(conf_folder() / "method" / f"{name}.yaml") for name in METHODS}
STAGED = [f"{name} {BEFORE}" for name in METHODS if NODES[name].get("before")]
"""The method that a method's first run has."""
COMPOSED = (
    "pkd pool=stochastic teacher=[minilm,minilm_4l]",
    "pkd pool=wkd teacher=[minilm,minilm_4l,minilm_3l]",
    "pkd cohort=mutual",
    "dml cohort.students=3 cohort.peers.target=mean cohort.peers.temperature=2",
    "p2p_mutual cohort.teacher=online",
    "p2p_mutual pool=stochastic teacher=[minilm,minilm_4l]",
    "bert_emd pool=stochastic teacher=[minilm,minilm_4l]",
    "ad_kd cohort=mutual",
    "simkd cohort=mutual",
)
"""Methods with parts of others: the contract holds for what is composed as well."""
CASES = (*METHODS, *STAGED, *(case for case in COMPOSED if case.split()[0] in METHODS))
AXES = (
    "pool=stochastic teacher=[minilm,minilm_4l]",
    "cohort=mutual",
    "surgery=[cut_vocabulary]",
    "surgery=[sps]",
    "task=stsb",
)
"""Further overrides of the generated compositions: a pool, a cohort, students with another vocabulary or shared layers, a
regression."""
GENERATED = tuple(f"{name} {axis}" for name in METHODS for axis in AXES if f"{name} {axis}" not in COMPOSED)
"""Every method with every axis: what cannot be composed is refused while planning, with a reason."""
TASK = Classification("toy", ["no", "maybe", "yes"], {}, ["accuracy"], "accuracy")
SCORES = Regression("toy scores", ["mse"], "mse")
DOMAINS = ["books", "dvd", "kitchen"]
for each in (TASK, SCORES):  # further columns, for methods that read them
    each.column_classes, each.columns = {"domain": DOMAINS}, ["domain", "transferability"]
LABELLED = {"l2a": ("method.selects=all",)}
"""Overrides for methods that leave examples with labels alone by default, and all examples here have labels."""
WAITS = {
    "bert_emd": "the flow between layers is computed on the CPU",
    "bss": "only the examples that both models classify correctly are moved, and only until all have crossed the boundary",
    "text_smoothing": "the masked language model predicts at the tokens that are words, and nowhere else",
}
"""Methods whose steps read values from the device, and why: the shapes of their tensors follow from values, or the CPU computes
a part. All others have to run on a device whose values cannot be read."""
VOCABULARY = tiny_config().vocab_size
HELD = 5
"""Examples of a held batch, which two ranks share 3 and 2."""


def configured(case: str, more: Sequence[str] = ()) -> DictConfig:
    """The configuration of a case: a name of `conf/method` and overrides after it, or `before` for its first run's."""
    name, *overrides = case.split()
    config = compose([f"method={name}", *LABELLED.get(name, ()), *(word for word in overrides if word != BEFORE), *more])
    return before_config(config) if BEFORE in overrides else config


SPECIFICATIONS: dict[tuple[str, tuple[str, ...]], RunSpec] = {}
"""Typed configurations by case and further overrides: composing takes longer than a step, and ranks get those of their test."""


def specification(case: str, more: tuple[str, ...] = ()) -> RunSpec:
    """The typed configuration of a case. It is shared: nothing changes it."""
    if (case, more) not in SPECIFICATIONS:
        SPECIFICATIONS[case, more] = typed(configured(case, more))
    return SPECIFICATIONS[case, more]


@functools.cache
def shared_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of all models here, which nothing changes; a surgery makes another one."""
    return tiny_tokenizer()


def encoder(seed: int, outputs: int = 3, **sizes: Any) -> Encoder:
    """A random model for `TASK` or `SCORES`, with weights large enough that its layers and classes differ.

    It is a copy of one that is initialised once, and leaves the generator of random numbers where initialisation does.
    """
    model, state = initialised(seed, outputs, tuple(sizes.items()))
    torch.set_rng_state(state)
    return Encoder(copy.deepcopy(model), shared_tokenizer())


@functools.cache
def initialised(seed: int, outputs: int, sizes: tuple[tuple[str, Any], ...]) -> tuple[PreTrainedModel, torch.Tensor]:
    """The model of `encoder`, and the state of the generator of random numbers after its initialisation."""
    model = tiny_model(seed, num_labels=outputs, **dict(sizes))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
            if "word_embeddings" in name:
                parameter.data[0] = 0
    return model, torch.get_rng_state()


def aid(seed: int, head: str | None) -> Encoder:
    """A random model that is no teacher, with one of the heads."""
    torch.manual_seed(90 + seed)
    config = tiny_config(initializer_range=0.2)
    return Encoder(HEADS[head or "classifier"].auto.from_config(config).eval(), shared_tokenizer())


@functools.cache
def method_of_teacher(name: str) -> dict[str, Any]:
    """The node of a method that trains a teacher."""
    return typed(compose([f"method={name}", "teacher=[]"])).method


def batch_of(count: int = 8, tokens: int = 9, seed: int = 0, teachers: int = 1, students: int = 1) -> Batch:
    """Random sentences of different lengths, padded."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, tokens + 1, (count,), generator=generator)
    lengths[0] = tokens
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    ids = torch.randint(5, VOCABULARY, (count, tokens), generator=generator) * mask
    ids[:, 0] = 2
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    labels = torch.randint(0, 3, (count,), generator=generator)
    domains = torch.randint(0, len(DOMAINS), (count,), generator=generator)
    columns = {"domain": domains, "transferability": torch.rand(count, generator=generator)}
    index = torch.arange(count)
    return Batch(inputs, (inputs,) * teachers, labels, index, 1.0, (inputs,) * (students - 1), columns=columns)


SUMS = 1e-9
"""Beyond rounding in float64: terms are of a size of 1 to 1e3, sums of 1e4 products at most; 1e3 * 1e4 * 1e-16 is 1e-9."""


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for term in one:
        assert float((one[term] - other[term]).abs()) <= tolerance, f"{term}: {one[term]} and {other[term]}"


def take(batch: Batch, rows: torch.Tensor) -> Batch:
    """Some examples of a batch, in this order."""
    return replace(replace(batch, held=None).map(lambda tensor: tensor[rows]), held=batch.held)


def more_padding(batch: Batch, tokens: int = 4) -> Batch:
    """The same batch with further padding, filled with a token that would show if it were read."""
    fill = {"input_ids": 7, "attention_mask": 0, "token_type_ids": 0}

    def padded(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: torch.nn.functional.pad(t, (0, tokens), value=fill[n]) for n, t in inputs.items()}

    teachers, peers = (tuple(padded(inputs) for inputs in each) for each in (batch.teachers, batch.peers))
    held = None if batch.held is None else more_padding(batch.held, tokens)
    return replace(batch, student=padded(batch.student), teachers=teachers, peers=peers, held=held)


def shortest(batch: Batch) -> Batch:
    """The same batch without padding that all its examples have."""
    longest = int(batch.student["attention_mask"].sum(dim=1).max())
    cut = replace(batch, held=None).map(lambda tensor: tensor[:, :longest] if tensor.ndim == 2 else tensor)
    return replace(cut, held=batch.held)


SHAPES = (
    {"layers": 2, "width": 24, "heads": 4},
    {"layers": 3, "width": 16, "heads": 4},
    {"layers": 2, "width": 16, "heads": 4},
)
"""Shapes of the students of a cohort."""


class PlainTokens:
    """Inputs of a batch, from which some examples are taken as from `kd.data.tokenized.Tokens`."""

    def __init__(self, inputs: dict[str, torch.Tensor]) -> None:
        self.inputs = inputs
        self.lengths = inputs["attention_mask"].sum(dim=1).numpy()

    def mask(self, rows: Sequence[int]) -> np.ndarray:
        """Padded to the longest."""
        lengths = self.lengths[list(rows)]
        return np.arange(lengths.max()) < lengths[:, None]

    def pad(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Padded to the longest."""
        return {name: tensor[list(rows), : self.mask(rows).shape[1]] for name, tensor in self.inputs.items()}


class Bench:
    """One method bound to models, in its engine.

    Args:
        case: a name of `conf/method`, and overrides after it.
        same: teachers and peers are copies of the student.
        dropout: of the students.
        seed: of the weights.
        more: further overrides.
        double: everything in float64, so that two ways to compute one thing, whose sums have another order, agree to far
            below any mistake, whatever a machine's instructions and libraries.
    """

    def __init__(
        self,
        case: str,
        same: bool = False,
        dropout: float = 0.0,
        seed: int = 0,
        more: Sequence[str] = (),
        double: bool = False,
    ) -> None:
        spec = specification(case, tuple(more))
        count = len(students_of(spec))
        self.weights = spec.method["weights"]
        self.task: Task = SCORES if spec.task.kind == "regression" else TASK
        self.outputs = 1 if self.task is SCORES else len(TASK.names)
        names, online = list(spec.teacher), spec.cohort.teacher == "online"
        torch.manual_seed(seed)
        chances = [1 / len(names)] * len(names)
        method, weights = build_method(spec.method, spec.pool, spec.cohort, chances)
        shape = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        places = [f"s{place}" for place in range(count)]
        first = encoder(seed + 1, self.outputs, **SHAPES[0], **shape)
        others = [
            copy.deepcopy(first) if same else encoder(seed + 10 * n, self.outputs, **SHAPES[n], **shape)
            for n in range(1, count)
        ]
        if same:  # a teacher keeps its own vocabulary, in which a student whose vocabulary is cut still equals it
            cut = any(surgery.changes_vocabulary for surgery in surgeries(spec).values())
            equal = first if cut else operated(copy.deepcopy(first), spec)
            teaching = [copy.deepcopy(equal) for _ in names]
        else:
            sizes = {"width": 32, "heads": 4, **(shape if online else {})}
            teaching = [encoder(seed + 2 + n, self.outputs, layers=4 + n, **sizes) for n in range(len(names))]
        self.students = {place: operated(student, spec) for place, student in zip(places, (first, *others), strict=True)}
        self.teachers = [] if online else [FrozenTeacher(one, name) for one, name in zip(teaching, names, strict=True)]
        for teacher in self.teachers:
            teacher.kept = self.kept_by(spec, teacher)
        self.methods = {place: copy.deepcopy(method) for place in places}
        self.aids = {name: FrozenTeacher(aid(n, head), name) for n, (name, head) in enumerate(method.aids.items())}
        for place, own in self.methods.items():
            bound = Bound(self.students[place], teaching if online else self.teachers, self.task, self.aids)
            bind_method(own, spec.method, bound)  # which puts the method's key before that of an error
            check_aid_vocabularies(Planned(spec), self.students[place], self.aids)  # type: ignore[arg-type]
            check_vocabularies(Planned(spec), self.task, own, self.students[place], teaching)  # type: ignore[arg-type]
            check_prefit(Planned(spec), self.task, own, online=online)  # type: ignore[arg-type]
            if own.prefits:
                whole = batch_of(64, teachers=0)
                outputs = [teacher.run(whole.student, Needs()).logits.detach() for teacher in self.teachers]
                own.prefit(outputs, whole.labels)
        optimizer = OptimizerFactory(torch.optim.SGD, lr=0.1, weight_decay=0.0, schedule="constant", warmup=0.0)
        self.engine: Engine = instantiate(dict(spec.engine), _partial_=True)(
            models=Models(self.students, self.methods, self.teachers, teaching[0] if online else None, weights, self.aids),
            task=self.task,
            optimizer=optimizer,
        )
        if double:
            self.engine.double()  # which takes its frozen teachers along
        self.engine.train()
        self.counts = {"teachers": len(names), "students": count}

    def kept_by(self, spec: RunSpec, teacher: FrozenTeacher) -> dict[str, torch.Tensor]:
        """Return the state that the method which trains a teacher keeps."""
        method, _ = build_method(method_of_teacher(spec.teacher[teacher.name].method))
        if method.keeps:
            with torch.random.fork_rng():
                torch.manual_seed(5)
                method.bind(Bound(teacher.encoder, [], self.task))
        return {part: tensor.clone() for part, tensor in method.kept().items()}

    def batch(self, count: int = 8, seed: int = 0) -> Batch:
        """A batch for these models, with a held one if a method holds a part of train."""
        batch = Bench.plain_batch(self, count, seed)
        if any(learner.method.holds for learner in self.engine.learners.values()):
            held = Bench.plain_batch(self, HELD, seed + 100)
            batch = replace(batch, held=replace(held, index=held.index + count))
        return batch

    def plain_batch(self, count: int, seed: int) -> Batch:
        """A batch for these models without a held one."""
        batch = batch_of(count, seed=seed, **self.counts)
        if self.task is SCORES:
            batch = replace(batch, labels=torch.rand(count, generator=torch.Generator().manual_seed(seed)).double())
        tokenizer = next(iter(self.students.values())).tokenizer
        if len(tokenizer) == VOCABULARY:
            return batch
        whole, of_word = shared_tokenizer().get_vocab(), tokenizer.get_vocab()
        words = sorted(whole, key=whole.get)
        kept = torch.tensor([index for index, word in enumerate(words) if word in of_word])
        ids = torch.tensor([of_word.get(word, -1) for word in words])

        def shown(inputs: dict[str, torch.Tensor], cut: bool) -> dict[str, torch.Tensor]:
            given = inputs["input_ids"]
            known = torch.where(given < 5, given, kept[5 + given % (len(kept) - 5)])
            return {**inputs, "input_ids": ids[known] if cut else known}

        of_teachers, peers = (
            tuple(shown(inputs, cut) for inputs in each) for each, cut in ((batch.teachers, False), (batch.peers, True))
        )
        return replace(batch, student=shown(batch.student, cut=True), teachers=of_teachers, peers=peers)

    def use_cached(self, batch: Batch, folder: Path, count: int | None = None) -> Batch:
        """Replace the frozen teachers by what they say of a batch, written to disk and read again; the batch that reads it.

        With a count, so many of the examples are read, from the last one back in steps of two, and teachers run on the others.
        """
        needs, teachers = needs_of_teachers(self.methods.values(), len(self.teachers)), list(self.teachers)

        def cached(batch: Batch, folder: Path) -> Batch:
            found = []
            for place, teacher in enumerate(teachers):  # one that is trained with the students is not among them
                rows = range(len(batch))[::-1]
                order = [*rows[::2], *rows[1::2]]  # that of the store
                inputs = {name: tensor[order] for name, tensor in batch.teachers[place].items()}
                tokens = PlainTokens(inputs)
                offsets = np.concatenate([[0], tokens.lengths.cumsum()])
                store, said = TensorStore(folder / str(place), offsets), teacher.run(inputs, needs[place]).named()
                store.folder.mkdir(parents=True)
                stored = (0, len(batch) if count is None else min(count, len(batch)))
                for name in needs[place].tensors:
                    kind = str(said[name].dtype).removeprefix("torch.")
                    entry = Entry((store.rows(name, stored), said[name].shape[-1]), kind, kind)
                    share = Share(store, name, entry, stored, 0)
                    assert share.write(range(stored[1]), said[name][: stored[1]])
                    share.close()
                    store.commit(name, entry, 1, stored)
                outputs = CachedOutputs(store, tuple(needs[place].tensors), tokens, stored[1])
                found.append(outputs.pad(np.argsort(order).tolist()))
            return replace(batch, teachers=tuple(found) or batch.teachers)

        held = None if batch.held is None else cached(batch.held, folder / "held")
        batch = replace(cached(batch, folder), held=held)
        for place, teacher in enumerate(teachers):
            self.engine.teachers[place] = CachedTeacher(teacher, runs=count is not None)
        return batch

    def terms(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Unweighted terms, dropout off."""
        self.engine.eval()
        return {name: term.detach() for name, term in self.engine.loss(batch).terms.items()}

    def batch_dependence(self) -> str | None:
        """The reason that a method declares why an example's loss depends on the others of its batch."""
        return next((why for method in self.methods.values() if (why := method.batch_dependence()) is not None), None)

    def split_matters(self) -> bool:
        """True if a method declares that a split of the batch over ranks changes its loss."""
        return any(m.batch_dependence() is not None and not m.across_ranks for m in self.methods.values())

    def gradients(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Gradients that the optimiser saw in one update: parameter -> gradient of its turn."""
        names, seen = {parameter: name for name, parameter in self.engine.named_parameters()}, {}
        optimizer = self.engine.optimizer()

        def record(*_: object) -> None:
            for group in optimizer.param_groups:
                seen.update({names[p]: p.grad.clone() for p in group["params"] if p.grad is not None})

        optimizer.register_step_pre_hook(record)
        self.engine.after_step(self.engine.update(batch, optimizer))
        return seen

    def update(self, batch: Batch) -> None:
        """One update, with the engine's own steps."""
        self.engine.after_step(self.engine.update(batch, self.engine.optimizer()))


def train_occurring_rows(bench: Bench, batch: Batch) -> None:
    """Let the students, and an online teacher, train the rows of their embeddings that a batch reads, and no others."""
    models = {**bench.students, **({} if bench.engine.online is None else {"teacher": bench.engine.online})}
    readers = zip(models.items(), (*batch.students, batch.teachers[0] if batch.teachers else {}), strict=False)
    words: dict[torch.nn.Module, list[torch.Tensor]] = {}
    for (_, model), inputs in readers:
        read = [inputs["input_ids"], *([] if batch.held is None else [batch.held.student["input_ids"]])]
        words.setdefault(model.word_embeddings, []).extend(read)
    tables = [
        Table([module], [str(n)], torch.cat([ids.flatten() for ids in read]).unique())
        for n, (module, read) in enumerate(words.items())
        if type(module) is torch.nn.Embedding
    ]
    TrainOccurringRows(tables).setup(None, bench.engine, "fit")  # type: ignore[arg-type]


KEPT = [*FILLER[::2], *GOOD[::2], *BAD[::2]]
"""Words of the training text of a student whose vocabulary is cut."""


@dataclass
class Planned:
    """The part of a run that the check of vocabularies reads."""

    spec: RunSpec
    inputs: RunInputs = field(default_factory=RunInputs)


def operated(student: Encoder, spec: RunSpec) -> Encoder:
    """A student after the surgeries of a configuration."""
    for surgery in surgeries(spec).values():
        student, _ = surgery(student, SurgeryInputs([" ".join(KEPT)]))
    return student


class Recorded:
    """Every read of an `Outputs`, by object."""

    def __init__(self, monkeypatch: Any) -> None:
        self.reads: list[tuple[Outputs, str]] = []  # outputs are kept, so that no two share an address
        monkeypatch.setattr(Outputs, "read", self.reader(Outputs.read))

    def reader(self, original: Any) -> Any:
        """`Outputs.read`, which every accessor calls, noting what it reads."""

        def read(outputs: Outputs, tensor: str, layer: int | str | None = None) -> torch.Tensor:
            self.reads.append((outputs, tensor_name(tensor, layer)))
            return original(outputs, tensor, layer)

        return read

    def of(self, outputs: Outputs) -> set[str]:
        """Names of the tensors, as in `Needs.tensors`, that were read of one forward's outputs."""
        return {name for owner, name in self.reads if owner is outputs}


OPTIONS = {
    "reduction": ("batchmean", "elementmean"),
    "hidden_reduction": ("elements", "vectors", "examples"),
    "padding": ("strict", "reference"),
}
"""Options that decide what a term is averaged over: two ranks must equal one with each of their values, or the method declares
that its loss depends on the batch."""


@functools.lru_cache(maxsize=len(CASES) * 2)
def untouched(case: str, double: bool = False) -> Bench:
    """A bench that is built once for all checks which leave it as it is: they compute terms, and update nothing."""
    return Bench(case, double=double)


@functools.cache
def refusal(case: str, *more: str) -> InputError | None:
    """The error with which a composition, or an option, is refused; None if it can be built."""
    try:
        Bench(case, more=more) if more else untouched(case)
    except InputError as error:
        return error
    return None


@functools.cache
def option_cases() -> list[tuple[str, str]]:
    """Every method and first run, with each value of `OPTIONS` that it offers, refused or not: (case, override)."""
    cases = []
    for name in (*METHODS, *STAGED):
        node, place = NODES[name.split()[0]], "method"
        if name in STAGED:
            node, place = node.before, "method.before"
        choices = [f"{place}.{option}={value}" for option, values in OPTIONS.items() if option in node for value in values]
        cases += [(name, choice) for choice in choices]
    return cases


@functools.cache
def two_rank_cases() -> list[tuple[str, tuple[str, ...], int]]:
    """Every method, with every reduction it offers, on a batch that two ranks share unevenly, and every composition.

    Uneven shares are weighted, and else there is no difference: of each method one case is shared evenly.
    """
    cases: list[tuple[str, tuple[str, ...], int]] = []
    for name in CASES:
        choices = [(choice,) for case, choice in option_cases() if case == name and refusal(name, choice) is None] or [()]
        cases += [(name, choices[0], 8), *((name, more, 7) for more in choices)]
    return [*cases, *((name, (), 7) for name in GENERATED if refusal(name) is None)]


def case_name(name: str, more: tuple[str, ...], count: int) -> str:
    """A word for one case."""
    return " ".join([name, *more, f"{count} examples"])


class Collated:
    """Rows of a batch, weighted as the loader weighs them, with a rank's share of the held batch if there is one."""

    def __init__(self, whole: Batch, rank: int = 0, world: int = 1) -> None:
        self.whole, self.rank, self.world = whole, rank, world

    def __call__(self, rows: Any) -> Batch:
        part = take(self.whole, torch.tensor(rows))
        part.weight = rows.weight
        if (held := self.whole.held) is not None:
            mine = torch.arange(self.rank, len(held), self.world)
            part.held = replace(take(held, mine), weight=len(mine) * self.world / len(held))
        return part


def save_two_rank_updates(
    rank: int,
    world: int,
    port: int,
    folder: Path,
    cases: Sequence[tuple[str, tuple[str, ...], int]],
    specifications: dict[tuple[str, tuple[str, ...]], RunSpec],
) -> None:
    """One rank of a two-rank step of every case; each writes what the parameters became."""
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    SPECIFICATIONS.update(specifications)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)

    class Stepper(nn.Module):
        def __init__(self, engine: Engine) -> None:
            super().__init__()
            self.engine = engine

        def forward(self, batch: Batch) -> torch.Tensor:
            self.last = self.engine.loss(batch)
            return self.last.total

    found = {}
    for name, more, count in cases:
        bench = Bench(name, more=more, double=True)
        optimizer = bench.engine.optimizer()
        whole, sampler = bench.batch(count), LengthBatches([9] * count, count, None, rank, world)
        mine = Collated(whole, rank, world)(next(iter(sampler)))
        if bench.engine.automatic_optimization:  # Lightning wraps the engine and steps the optimiser
            wrapped = DistributedDataParallel(Stepper(bench.engine))
            (wrapped(mine) * mine.weight).backward()
            optimizer.step()
            loss = wrapped.module.last
        else:
            loss = bench.engine.update(mine, optimizer)
        bench.engine.after_step(loss)
        found[case_name(name, more, count)] = bench.engine.state_dict()
    torch.save(found, folder / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
