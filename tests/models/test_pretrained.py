"""Model folders whose configuration, tokenizer and weights contradict each other: refused before training, or told."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from conftest import tiny_config, tiny_model, tiny_tokenizer
from kd.build.data import build_examples
from kd.build.models import build_models
from kd.config.schema import StudentSpec
from kd.data.tokenized import Tokens
from kd.errors import InputError
from kd.forward.taps import FAMILIES
from kd.models import pretrained
from kd.models.labels import columns
from kd.models.pretrained import check_weights, label_names, load_config, load_model
from kd.models.students import plan_student
from kd.runs.run import Run
from kd.system.model_sources import fingerprint
from whole_runs import over

Damage = Callable[[Path], object]
Plans = dict[str, Callable[..., Run]]
WEIGHTS = "model.safetensors"
NAMES = {"0": "negative", "1": "positive"}


@pytest.mark.parametrize(
    ("values", "finite"),
    [
        ([], True),
        ([1.0, -2.0], True),
        ([3e38, 3e38], True),  # whose sum is infinite
        ([float("inf"), float("-inf")], False),  # whose sum is not a number
        ([3e38, 3e38, float("nan")], False),
        ([1.0, float("inf")], False),
    ],
)
def test_numbers_are_finite_if_each_is(values: list[float], finite: bool) -> None:
    assert pretrained.is_finite(torch.tensor(values)) == finite


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a classifier of the toy task in which everything agrees."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    tiny_model(id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1}).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture(scope="module")
def plans(reviews: Path, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Plans:
    """Runs that begin from a folder in one role: `plans["backbone"](folder)`."""
    data = [f"task.{split}={reviews / split}.csv" for split in ("train", "validation")]
    runs = f"paths.runs={tmp_path_factory.mktemp('runs')}"
    base = ["student=2l", "task=file", *data, "task.max_length=32", runs, "trainer.batch_size=16"]
    finetune, kd = ["method=finetune", "teacher=[]"], ["method=kd", "teacher=[hub]"]
    mixed = ["method=kd", "teacher=[minilm]", f"teacher.minilm.backbone={whole}", "student.init=random"]
    given = {  # role -> the configuration, and the key that names the folder
        "backbone": ([*finetune], "backbone"),
        "student": ([*finetune, f"backbone={whole}"], "student.backbone"),
        "checkpoint": ([*finetune, f"backbone={whole}", "student.init=checkpoint", "student.layers=4"], "student.checkpoint"),
        "teacher": ([*kd, f"student.backbone={whole}", "student.init_from=pretrained"], "teacher.hub.model"),
        "start": ([*kd, "student.init_from=teacher"], "teacher.hub.model"),
        "made": ([*mixed, f"student.backbone={whole}"], "teacher.minilm.backbone"),
    }

    def plan_of(words: list[str], key: str) -> Callable[..., Run]:
        made: list[Callable[..., Run]] = []

        def planned(path: Path, *more: str) -> Run:
            if not made:
                made.append(over([*base, *words]))
            return made[0](f"{key}={path}", *more)

        return planned

    return {role: plan_of(words, key) for role, (words, key) in given.items()}


def examined(run: Run) -> None:
    """Check a run and the runs that it needs, as the command does before anything is trained."""
    from kd.training.execute import check_all

    check_all(run)


def config(**changes: object) -> Damage:
    """Set values of config.json; None removes one."""

    def damage(folder: Path) -> None:
        path = folder / "config.json"
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))

    return damage


def text(name: str, content: str | None) -> Damage:
    """Put text in the place of a file; None removes it."""

    def damage(folder: Path) -> None:
        (folder / name).unlink() if content is None else (folder / name).write_text(content)

    return damage


def weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], name: str = WEIGHTS) -> Damage:
    """Change the tensors, and write them under a name."""

    def damage(folder: Path) -> None:
        tensors = change(load_file(folder / WEIGHTS))
        (folder / WEIGHTS).unlink()
        if name.endswith(".bin"):
            torch.save(tensors, folder / name)
        else:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name, {"format": "pt"})

    return damage


def renamed(old: str, new: str) -> Damage:
    """Rename tensors."""
    return weights(lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()})


def without(*parts: str) -> Damage:
    """Leave out tensors."""
    return weights(lambda found: {name: tensor for name, tensor in found.items() if not any(part in name for part in parts)})


def entry(name: str, row: tuple[int, ...], value: float, kind: torch.dtype = torch.float32) -> Damage:
    """Set one number of a tensor."""

    def change(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {key: tensor.to(kind) for key, tensor in found.items()}
        found[name][row] = value
        return found

    return weights(change)


def shape(name: str, *sizes: int) -> Damage:
    """Give a tensor another shape."""
    return weights(lambda found: found | {name: torch.zeros(*sizes)})


def sharded(left: int) -> Damage:
    """Cut the weights into two files with an index, of which so many are there."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        halves = [dict(list(tensors.items())[start::2]) for start in range(2)]
        for number, half in enumerate(halves[:left]):
            save_file(half, folder / f"part{number}.safetensors", {"format": "pt"})
        names = {name: f"part{number}.safetensors" for number, half in enumerate(halves) for name in half}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))

    return damage


def tokens(change: Callable[[object], object]) -> Damage:
    """Change the tokenizer and write it."""

    def damage(folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        change(tokenizer)
        tokenizer.save_pretrained(folder)

    return damage


def no_token(name: str) -> Damage:
    """Forget a special token."""

    def damage(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != name}))

    return damage


def rules(change: Callable[[dict], object]) -> Damage:
    """Change tokenizer.json."""

    def damage(folder: Path) -> None:
        path = folder / "tokenizer.json"
        found = json.loads(path.read_text())
        change(found)
        path.write_text(json.dumps(found))

    return damage


def both(*damages: Damage) -> Damage:
    """One after the other."""
    return lambda folder: [damage(folder) for damage in damages]


QUERY = "bert.encoder.layer.1.attention.self.query.weight"
LACKS = r"lacks \d+ of the 73 tensors of its model: "

EVERYWHERE = {
    # -- weights
    "wrapper's prefix": (
        weights(lambda t: {f"module.{n}": v for n, v in t.items()}),
        r"lacks 69 of the 73 tensors.*bert\.embeddings.*begins with 'module\.'",
    ),
    "one block missing": (without("layer.2."), LACKS + r".*layer\.2\..*file has layers 0, 1, 3"),
    "a renamed tensor": (renamed(QUERY, QUERY.replace("query", "q")), LACKS + QUERY + ".*in their place: .*self.q.weight"),
    "a bias missing": (without("layer.1.output.dense.bias"), LACKS + "bert.encoder.layer.1.output.dense.bias"),
    "half a pooler": (without("pooler.dense.bias"), LACKS + "bert.pooler.dense.bias"),
    "more layers configured": (
        config(num_hidden_layers=6),
        r"lacks 32 of.*=6, and the file has layers 0, 1, 2, 3",
    ),
    "fewer layers configured": (config(num_hidden_layers=3), "weights of 4 layers, its configuration says num_hidden_layers=3"),
    "another vocabulary": (
        config(vocab_size=50),
        r"is \[41, 32\] in the file, \[50, 32\].*\(vocab_size=50\)",
    ),
    "another width": (config(hidden_size=64), r"is \[32\] in the file, \[64\] by config.json \(hidden_size=64"),
    "other positions": (
        config(max_position_embeddings=128),
        r"\[64, 32\] in the file, \[128, 32\].*\(max_position_.*=128\)",
    ),
    "other segments": (config(type_vocab_size=4), r"\[2, 32\] in the file, \[4, 32\].*type_vocab_size=4"),
    "other intermediate": (config(intermediate_size=48), r"\[64\] in the file, \[48\].*intermediate_size=48"),
    "not a number": (entry(QUERY, (3, 4), float("nan")), f"not finite.*{QUERY}"),
    "infinite": (entry(QUERY, (3, 4), float("-inf"), torch.float16), f"not finite.*{QUERY}"),
    "beyond float32": (entry(QUERY, (3, 4), 1e300, torch.float64), f"not finite numbers in float32: {QUERY}"),
    "whole numbers": (
        weights(lambda t: t | {QUERY: torch.ones(32, 32, dtype=torch.int8)}),
        f"stored in int8 .{QUERY}",
    ),
    "a shard missing": (sharded(1), "names 2 files, of which are missing: part1.safetensors"),
    "an index of nothing": (both(sharded(2), text(f"{WEIGHTS}.index.json", "[]")), "damaged: it has no weight_map"),
    "an index that leads outside": (
        both(sharded(2), text(f"{WEIGHTS}.index.json", '{"weight_map": {"a": "../part0.safetensors"}}')),
        r"names 1 files, of which are missing: \.\./part0",
    ),
    "no weights": (text(WEIGHTS, None), "no weights: neither model.safetensors nor pytorch_model.bin"),
    "no safetensors": (text(WEIGHTS, "x"), "truncated or damaged"),
    "no tensors": (weights(lambda t: {"state_dict": t}, "pytorch_model.bin"), "something else than tensors by name"),
    "a damaged bin": (both(text(WEIGHTS, None), text("pytorch_model.bin", "x")), "weights of .* truncated|cannot be loaded"),
    "an adapter": (text("adapter_config.json", "{}"), "has an adapter"),
    # -- configuration
    "no JSON": (text("config.json", "{"), "cannot be loaded"),
    "an array": (text("config.json", "[]"), "cannot be loaded|must be an object"),
    "no model_type": (config(model_type=None), "has no model_type; it is one of bert"),
    "another model_type": (config(model_type="gpt2"), "'gpt2' is not one of bert"),
    "a number as model_type": (config(model_type=3), "'3' is not one of bert"),
    "another family": (config(architectures=["RobertaForSequenceClassification"]), "says model_type=bert, but architectures="),
    "architectures of another kind": (config(architectures="BertModel"), "must be a list of names"),
    "heads that do not divide": (config(num_attention_heads=5), "5 attention heads, which do not divide the hidden size of 32"),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers=0; it must be a whole number from 1"),
    "a billion layers": (config(num_hidden_layers=10**9), "num_hidden_layers=1000000000; .* from 1 to 1000"),
    "a width of millions": (config(hidden_size=2**23), r"is \[32\] in the file, \[8388608\] by config.json"),
    "a vocabulary of billions": (config(vocab_size=10**10), "vocab_size=10000000000; .* from 1 to 16777216"),
    "a size in words": (config(hidden_size="wide"), "cannot be loaded: .*hidden_size|hidden_size=wide"),
    "an unknown activation": (config(hidden_act="gelub"), "hidden_act=gelub, which transformers does not know"),
    "a dropout of everything": (config(hidden_dropout_prob=1.5), r"hidden_dropout_prob=1.5; it must be in \[0, 1\)"),
    "a negative range": (config(initializer_range=-1.0), "initializer_range=-1.0; it must be a positive number"),
    "padding outside": (config(pad_token_id=99), "pad_token_id=99, which is outside its vocabulary of 41"),
    "a decoder": (config(is_decoder=True), "is_decoder=True: a decoder"),
    "cross attention": (config(add_cross_attention=True), "add_cross_attention=True: a decoder"),
    "relative positions": (config(position_embedding_type="relative_key"), "position_embedding_type=relative_key"),
    "quantised": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "has a quantization_config"),
    "an unknown type": (config(dtype="float23"), "cannot be loaded"),
    "id2label as a list": (config(id2label=["a", "b"]), "id2label must be an object"),
    "id2label with names first": (config(id2label={"negative": 0}), "id2label has the numbers negative; they must be whole"),
    "id2label with a number twice": (config(id2label={"1": "a", "01": "b"}), "id2label has the numbers 1, 01"),
    # -- tokenizer
    "no tokenizer": (both(text("tokenizer.json", None), text("tokenizer_config.json", None)), "tokenizer"),
    "a damaged tokenizer": (text("tokenizer.json", '{"version": "1.0", "model": {}}'), "the tokenizer of .* cannot be loaded"),
    "more tokens than embeddings": (
        tokens(lambda t: t.add_tokens(["great film", "x y"])),
        "43 tokens.*to 42,.* for 41",
    ),
    "no padding token": (no_token("pad_token"), "the tokenizer has no pad_token"),
    "no unknown token": (no_token("unk_token"), "the tokenizer has no unk_token"),
    "no first token": (no_token("cls_token"), "the tokenizer has no cls_token"),
    "no last token": (no_token("sep_token"), "the tokenizer has no sep_token"),
    "another padding token": (
        config(pad_token_id=7),
        r"pads with token 0 \(\[PAD\]\), the model's .* pad_token_id=7",
    ),
    "nothing around a text": (rules(lambda r: r.update(post_processor=None)), r"does not put \[CLS\] before a text.*nothing"),
    "a first token that is not there": (
        rules(lambda r: r["post_processor"]["special_tokens"]["[CLS]"].update(ids=[99])),
        "makes token 99, the model has embeddings for 41",
    ),
    "rules that name no token": (
        rules(lambda r: r["post_processor"]["single"][0]["SpecialToken"].update(id="[X]")),
        "tokenizer.* cannot",
    ),
    "words without [UNK]": (rules(lambda r: r["model"].update(unk_token="[NONE]")), "cannot read every text: .*UNK"),
}
"""Damage -> how the folder is damaged, and what is said of it, whatever it is used for."""


@pytest.mark.parametrize("damage", EVERYWHERE)
def test_a_folder_that_contradicts_itself_is_refused_before_anything_is_trained(
    plans: Plans, folder: Path, damage: str
) -> None:
    break_it, words = EVERYWHERE[damage]
    break_it(folder)
    with pytest.raises(InputError, match=f"(?s){words}") as caught:
        examined(plans["backbone"](folder))
    assert caught.value.key == "backbone"


@pytest.mark.parametrize(
    ("role", "key"),
    [
        ("student", "student.backbone"),
        ("checkpoint", "student.checkpoint"),
        ("teacher", "teacher.hub.model"),
        ("start", "teacher.hub.model"),
        ("made", "teacher.minilm.backbone"),
    ],
)
@pytest.mark.parametrize("damage", ["another vocabulary", "no padding token", "a decoder"])
def test_the_error_names_the_key_that_names_the_folder(plans: Plans, folder: Path, role: str, key: str, damage: str) -> None:
    break_it, words = EVERYWHERE[damage]
    break_it(folder)
    with pytest.raises(InputError, match=f"(?s){words}") as caught:
        examined(plans[role](folder))
    assert caught.value.key == key


LABELS = "teacher.hub.labels"
OF_TEACHERS = {
    "head of another size": (
        both(shape("classifier.weight", 3, 32), shape("classifier.bias", 3)),
        r"classifier.bias is \[3\] in the file, \[2\] by config.json \(.*labels in id2label: 2",
        "model",
    ),
    "no head": (without("classifier"), LACKS + "classifier.bias, classifier.weight", "model"),
    "a head of another name": (renamed("classifier", "score"), LACKS + "classifier.*in their place: score.bias", "model"),
    "no head and no word of it": (both(without("classifier"), config(architectures=None)), LACKS + "classifier", "model"),
    "no pooler": (without("pooler"), LACKS + "bert.pooler.dense", "model"),
    "an encoder": (config(architectures=["BertModel"]), "has no head for this task: its architecture is BertModel", "model"),
    "several labels at once": (config(problem_type="multi_label_classification"), "says problem_type=multi_label", "model"),
    "a regression": (config(problem_type="regression"), "says problem_type=regression", "model"),
    "names in place of none": (config(id2label=None, label2id=None), r"no names but numbers.*teacher.hub.labels=\[", "labels"),
    "other names": (config(id2label={"0": "bad", "1": "good"}, label2id=None), "do not match.*teacher.hub.labels", "labels"),
    "one name twice": (config(id2label={"0": "positive", "1": "positive"}), "names two of .* 'positive'", "labels"),
    "a number left out": (
        config(id2label={"0": "negative", "2": "positive"}),
        "0, 2; they must be 0 to 1",
        "labels",
    ),
    "numbers from one on": (
        config(id2label={"1": "negative", "2": "positive"}),
        "1, 2; they must be 0 to 1",
        "labels",
    ),
    "a name that is none": (config(id2label={"0": None, "1": "positive"}), "names output 0 None", "labels"),
    "a name that is a list": (config(id2label={"0": ["negative"], "1": "positive"}), "names output 0", "labels"),
    "label2id in another order": (config(label2id={"negative": 1, "positive": 0}), "contradict each other", "labels"),
}
"""Damage -> how a ready teacher is damaged, what is said of it, and the end of the key."""


@pytest.mark.parametrize("damage", OF_TEACHERS)
def test_a_ready_teacher_whose_outputs_are_not_certain_is_refused(plans: Plans, folder: Path, damage: str) -> None:
    break_it, words, key = OF_TEACHERS[damage]
    break_it(folder)
    with pytest.raises(InputError, match=f"(?s){words}") as caught:
        examined(plans["teacher"](folder))
    assert caught.value.key == f"teacher.hub.{key}"
    assert "student" not in str(caught.value)


@pytest.mark.parametrize("damage", [name for name, (_, _, key) in OF_TEACHERS.items() if key == "labels"])
def test_the_key_that_is_named_for_outputs_that_are_not_certain_cures_it(plans: Plans, folder: Path, damage: str) -> None:
    OF_TEACHERS[damage][0](folder)
    examined(plans["teacher"](folder, f"{LABELS}=[negative,positive]"))


@pytest.mark.parametrize("labels", ["[negative]", "[negative,negative]", "[negative,neutral,positive]"])
def test_listed_labels_name_each_output_of_a_teacher_once(plans: Plans, whole: Path, labels: str) -> None:
    with pytest.raises(InputError, match="must name each of the 2 outputs") as caught:
        examined(plans["teacher"](whole, f"teacher.hub.labels={labels}"))
    assert caught.value.key == LABELS


def test_a_whole_folder_is_taken_in_every_role(plans: Plans, whole: Path) -> None:
    for role in ("backbone", "student", "checkpoint", "teacher", "start", "made"):
        examined(plans[role](whole))


@pytest.mark.parametrize(
    "damage",
    [
        weights(lambda found: found, "pytorch_model.bin"),
        sharded(2),
        weights(lambda found: {name.removeprefix("bert."): tensor for name, tensor in found.items()}),
        weights(lambda found: {n.replace("LayerNorm.weight", "LayerNorm.gamma"): t for n, t in found.items()}),
        weights(lambda found: found | {"bert.embeddings.position_ids": torch.arange(64)[None]}),
        config(torch_dtype="float16", dtype=None),
        config(layer_norm_eps=1e-12, chunk_size_feed_forward=4),
    ],
    ids=["bin", "shards", "no prefix", "old names", "position_ids", "torch_dtype", "chunks"],
)
def test_other_forms_of_the_same_weights_give_the_same_student(whole: Path, folder: Path, damage: Damage) -> None:
    damage(folder)
    one, other = (
        plan_student(StudentSpec(name="x", init="checkpoint"), str(path), list(NAMES.values()), str(path))
        .materialise()
        .model.state_dict()
        for path in (whole, folder)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


# -- what is taken, and told ---------------------------------------------------------------------------------------------


def begun(path: Path, init: str = "first", head: str = "classifier", labels: list[str] | None = None):
    spec = StudentSpec(name="x", init=init, layers=2 if init == "first" else None)
    return plan_student(spec, str(path), labels or list(NAMES.values()), str(path), head=head).materialise()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_any_precision_are_used_and_exported_in_float32(family: str, kind: torch.dtype, tmp_path: Path) -> None:
    tiny_model(model_type=family).to(kind).save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    student = begun(tmp_path / "source")
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    name = str(kind).removeprefix("torch.")
    assert student.notes == [f"weights stored in {name}, used in float32"]
    student.save(tmp_path / "export")
    assert {tensor.dtype for tensor in load_file(tmp_path / "export" / WEIGHTS).values()} == {torch.float32}
    assert json.loads((tmp_path / "export" / "config.json").read_text())["dtype"] == "float32"
    stored = load_file(tmp_path / "source" / WEIGHTS)
    table = next(name for name in stored if name.endswith("word_embeddings.weight"))
    assert torch.equal(student.model.state_dict()[table], stored[table].float())


def test_precisions_that_are_mixed_in_one_file_are_told(folder: Path) -> None:
    weights(lambda found: found | {QUERY: found[QUERY].half()})(folder)
    assert begun(folder).notes == ["weights stored in float16 and float32, used in float32"]


def test_a_teacher_is_used_in_float32_and_says_what_it_was_stored_in(plans: Plans, folder: Path) -> None:
    weights(lambda found: {name: tensor.bfloat16() for name, tensor in found.items()})(folder)
    run = plans["teacher"](folder)
    examples = build_examples(run)
    teacher = build_models(run, examples.task, texts=examples.texts["train"]).teachers[0]
    assert {parameter.dtype for parameter in teacher.encoder.parameters()} == {torch.float32}
    assert teacher.shape.notes == ["weights stored in bfloat16, used in float32"]


def test_tensors_that_no_model_uses_are_told_with_their_names(folder: Path) -> None:
    weights(lambda found: found | {"bert.embeddings.extra.weight": torch.zeros(2), "nsp.bias": torch.zeros(2)})(folder)
    student = begun(folder)
    assert student.notes == ["1 tensors of the file not used: bert.embeddings.extra.weight"]
    assert student.asides == ["not used of the file: nsp"]


def test_weights_beside_those_that_are_read_are_told(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    assert begun(folder).asides == ["model.safetensors is read, not pytorch_model.bin beside it"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stored", [AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification])
def test_only_a_head_may_be_drawn_afresh_and_a_pooler_is_told(family: str, stored: type, tmp_path: Path) -> None:
    stored.from_config(tiny_config(family)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    student = begun(tmp_path)
    told = ["pooler drawn afresh"] if family == "bert" and stored is AutoModelForMaskedLM else []
    assert student.notes == told


@pytest.mark.parametrize("stored", [AutoModel, AutoModelForMaskedLM])
def test_a_masked_lm_head_that_is_drawn_afresh_is_told(stored: type, tmp_path: Path) -> None:
    stored.from_config(tiny_config()).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert begun(tmp_path, head="masked_lm").notes == (["head drawn afresh"] if stored is AutoModel else [])


@pytest.mark.parametrize(
    ("labels", "damage", "told"),
    [
        (None, config(), []),
        (["a", "b", "c"], config(), ["head drawn afresh"]),
        (None, both(without("classifier"), config(architectures=["BertModel"])), ["head drawn afresh"]),
        (None, both(without("classifier"), config(architectures=None)), ["head drawn afresh"]),
    ],
    ids=["same labels", "other labels", "no head", "no head and no word of it"],
)
def test_a_checkpoint_says_when_its_head_is_drawn_afresh(
    folder: Path, labels: list[str] | None, damage: Damage, told: list[str]
) -> None:
    damage(folder)
    assert begun(folder, "checkpoint", labels=labels).notes == told


@pytest.mark.parametrize("damage", [without("classifier"), without("classifier.bias"), shape("classifier.weight", 3, 32)])
def test_a_checkpoint_without_the_head_that_it_states_is_refused(folder: Path, damage: Damage) -> None:
    damage(folder)
    with pytest.raises(InputError, match="classifier") as caught:
        begun(folder, "checkpoint")
    assert caught.value.key == "checkpoint"


def test_a_backbones_head_is_not_used_and_may_be_anything(folder: Path) -> None:
    both(shape("classifier.weight", 3, 32), config(id2label={"0": "a", "1": "a"}))(folder)
    assert begun(folder).notes == []


@pytest.mark.parametrize("part", ["classifier.bias", "classifier.weight"])
def test_a_part_of_a_head_is_not_used_and_that_is_told(folder: Path, part: str) -> None:
    torch.manual_seed(0)
    whole = begun(folder)
    without(part)(folder)
    torch.manual_seed(0)
    half = begun(folder)
    assert half.asides == [f"the file has a part of a head, which is not used: it lacks {part}"]
    assert whole.asides == half.notes == []
    assert all(torch.equal(tensor, half.state_dict()[name]) for name, tensor in whole.state_dict().items())


@pytest.mark.parametrize("drawn", [AutoModel, AutoModelForMaskedLM])
def test_comparing_weights_draws_no_random_numbers(drawn: type, tmp_path: Path) -> None:
    drawn.from_config(tiny_config()).save_pretrained(tmp_path)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    check_weights(str(tmp_path), "backbone", load_config(str(tmp_path), "backbone"))
    assert torch.equal(torch.rand(1), expected)


def test_numbers_of_a_teacher_are_read_when_it_is_loaded_or_before_something_is_trained_for_the_run(
    plans: Plans, folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, tensors = [], pretrained._tensors
    monkeypatch.setattr(pretrained, "_tensors", lambda path: read.append(path) or tensors(path))
    examined(plans["teacher"](folder))
    assert str(folder / WEIGHTS) not in read
    entry(QUERY, (3, 4), float("nan"))(folder)
    examined(plans["teacher"](folder))
    with pytest.raises(InputError, match="not finite") as loaded:
        load_model(str(folder), "teacher.hub.model", load_config(str(folder), "x"), head_needed=True)
    assert loaded.value.key == "teacher.hub.model"
    pool = ("teacher=[hub,minilm]", f"teacher.minilm.backbone={whole}", "pool=stochastic")
    with pytest.raises(InputError, match="not finite") as trained:
        examined(plans["teacher"](folder, *pool))
    assert trained.value.key == "teacher.hub.model"


def test_headers_tell_shapes_and_types_of_what_has_no_rows_or_no_axes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3), "half": torch.zeros(2, 3, dtype=torch.bfloat16)}
    save_file(tensors, path)
    told = {name: (shape, tensor.dtype) for name, shape, tensor in pretrained._headers(str(path))}
    assert told == {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def test_a_folder_that_changes_is_read_again(folder: Path) -> None:
    load_model(str(folder), "x", load_config(str(folder), "x"), head_needed=True)
    without("layer.2.")(folder)
    with pytest.raises(InputError, match="lacks"):
        load_model(str(folder), "x", load_config(str(folder), "x"), head_needed=True)


# -- labels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("id2label", "label2id", "names"),
    [
        ({"2": "c", "0": "a", "1": "b"}, None, ["a", "b", "c"]),
        ({"0": 0, "1": 1}, {"0": 0, "1": 1}, ["0", "1"]),
        ({"0": 1.0, "1": 2.5}, None, ["1", "2.5"]),
        ({"0": False, "1": True}, None, ["False", "True"]),
        ({"0": " a ", "1": "b"}, None, ["a", "b"]),
        (None, {"b": 1, "a": 0}, ["a", "b"]),
        ({"0": "a", "1": "b"}, {"LABEL_0": 0, "LABEL_1": 1}, ["a", "b"]),
        ({str(number): f"n{number}" for number in (10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)}, None, [f"n{n}" for n in range(11)]),
    ],
)
def test_labels_are_read_in_the_order_of_the_outputs(
    folder: Path, id2label: object, label2id: object, names: list[str]
) -> None:
    config(id2label=id2label, label2id=label2id)(folder)
    assert label_names(load_config(str(folder), "x"), "x") == names


def test_the_columns_of_a_teacher_follow_the_numbers_of_its_labels(plans: Plans, folder: Path) -> None:
    config(id2label={"1": "negative", "0": "positive"}, label2id={"negative": 1, "positive": 0})(folder)
    run = plans["start"](folder)
    examples = build_examples(run)
    models = build_models(run, examples.task, texts=examples.texts["train"])
    assert models.teachers[0].columns == [1, 0]
    stored = load_file(folder / WEIGHTS)["classifier.weight"]
    assert torch.equal(models.student.model.classifier.weight, stored[[1, 0]])


def test_a_student_takes_a_teachers_head_by_the_names_that_are_listed_for_it(plans: Plans, folder: Path) -> None:
    config(id2label=None, label2id=None)(folder)
    run = plans["start"](folder, "teacher.hub.labels=[positive,negative]")
    examples = build_examples(run)
    models = build_models(run, examples.task, texts=examples.texts["train"])
    assert torch.equal(models.student.model.classifier.weight, load_file(folder / WEIGHTS)["classifier.weight"][[1, 0]])


@pytest.mark.parametrize(
    ("task", "model", "expected"),
    [
        (["Yes", "yes"], ["yes", "Yes"], [1, 0]),
        (["Yes", "yes"], ["YES", "yES"], None),
        (["yes", "no"], ["NO", "Yes"], [1, 0]),
        (["0", "1"], ["1.0", "0.0"], [1, 0]),
        (["1", "1.0"], ["1.0", "1"], [1, 0]),
        (["10", "100"], ["100", "10"], [1, 0]),
        (["a", "b"], ["a", "b", "c"], None),
        (["a", "b"], ["a", "a"], None),
    ],
)
def test_names_match_only_where_it_is_certain_which_is_which(
    task: list[str], model: list[str], expected: list[int] | None
) -> None:
    assert columns(task, model) == expected


# -- tokenizers ----------------------------------------------------------------------------------------------------------


def test_a_pair_of_texts_needs_a_model_with_two_segments(folder: Path) -> None:
    both(config(type_vocab_size=1), shape("bert.embeddings.token_type_embeddings.weight", 1, 32))(folder)
    spec = StudentSpec(name="x", init="first", layers=2)
    labels = list(NAMES.values())
    plan_student(spec, str(folder), labels, str(folder)).materialise()
    with pytest.raises(InputError, match="2 segments in a pair of texts, but the model has embeddings for 1") as caught:
        plan_student(spec, str(folder), labels, str(folder), pairs=True).materialise()
    assert caught.value.key == "backbone"


def test_a_masked_language_model_needs_a_mask_token(folder: Path) -> None:
    no_token("mask_token")(folder)
    begun(folder)
    with pytest.raises(InputError, match="no mask_token"):
        begun(folder, head="masked_lm")


def test_an_embedding_table_may_be_larger_than_the_vocabulary(folder: Path) -> None:
    both(config(vocab_size=48), shape("bert.embeddings.word_embeddings.weight", 48, 32))(folder)
    assert begun(folder).notes == []


@pytest.mark.parametrize("limits", [False, True], ids=["plain", "with limits in tokenizer.json"])
def test_the_exported_files_do_not_depend_on_what_the_tokenizer_has_read(folder: Path, tmp_path: Path, limits: bool) -> None:
    if limits:
        tokens(lambda t: (t.backend_tokenizer.enable_truncation(7), t.backend_tokenizer.enable_padding(length=7)))(folder)
    prints = set()
    for name, lengths in {"warm": [], "cold": [16], "other": [9, 5]}.items():
        student = begun(folder, "checkpoint")
        for length in lengths:
            Tokens(student.tokenizer, [("a film",), ("the story of that",)], length)
        if name == "other":
            student.tokenizer(["a", "the film"], padding=True, truncation=True, max_length=3)
        student.save(tmp_path / name)
        prints.add(fingerprint(str(tmp_path / name), "x"))
        rules_of_it = json.loads((tmp_path / name / "tokenizer.json").read_text())
        assert (rules_of_it["truncation"], rules_of_it["padding"]) == (None, None)
    assert len(prints) == 1
