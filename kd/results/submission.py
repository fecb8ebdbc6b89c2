"""Submission to the server of the GLUE benchmark: predictions of exported students for the test sets without labels."""

import io
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kd.data.glue_server import SERVER_FILES, ServerFile, unlabelled_texts
from kd.data.texts import Texts
from kd.errors import InputError, disk_is_full, one_of
from kd.models.pretrained import label_names, load_config
from kd.results.candidates import Candidate, best, candidates_of
from kd.results.predict import check_export, load_student, logits_over
from kd.results.tables import score
from kd.system import distributed
from kd.system.files import atomic_write

FILLS = ("majority",)
"""Allowed values of `fill`."""

RANGE = (0.0, 5.0)
"""Range of the scores of STS-B, to which predictions are clipped (nyu-mll/GLUE-baselines, src/evaluate.py at bfbe769)."""


@dataclass(frozen=True)
class Entry:
    """One file of a submission.

    Attributes:
        file: name of the file.
        run: directory of the run whose student predicted it; None if it was filled.
        metric: metric by which the run was chosen.
        validation: value of the metric on validation; None if it is undefined.
        candidates: number of runs that it was chosen from.
        why: reason why the file was filled; None if it was not.
    """

    file: str
    run: Path | None = None
    metric: str = ""
    validation: float | None = None
    candidates: int = 0
    why: str | None = None


def write_submission(
    path: Path, runs: Sequence[Path], glue: str | None = None, *, fill: str | None = None, device: str = "auto"
) -> list[Entry]:
    """Predict GLUE's test sets with the students of finished runs, write the archive for its server, and print its files.

    Of several runs of a task, the best on validation by the metric that it monitors predicts, among equals the first. The runs
    of MNLI predict the diagnostic set AX as well. A mixture counts as a run of each of its tasks; of a cohort the best student
    predicts. Everything is checked before the first prediction.

    Args:
        path: the zip archive, which is replaced if it exists.
        runs: directories of finished runs of GLUE tasks, in any order.
        glue: a folder of GLUE's TSV files (`paths.glue`); None reads the hub.
        fill: `majority` fills the files of tasks without a run, and of test sets that the folder lacks, with the most frequent
            class of train, or its mean score. None refuses: the server takes no archive with fewer files.
        device: as `trainer.accelerator`; `auto` is a GPU if there is one.

    Returns:
        The files, in the order of `kd.data.glue_server.SERVER_FILES`.

    Raises:
        InputError: for a directory without a finished run of a GLUE task, runs of a task that cannot be compared, a damaged
            student or one with other classes, a test set that is missing or has another number of examples than the server
            expects, a task without a run, or an archive that cannot be written.
    """
    if fill is not None and fill not in FILLS:
        raise one_of(fill, FILLS, "fill")
    candidates = candidates_of(runs, {file.task for file in SERVER_FILES})
    lacking = {file: why for file in SERVER_FILES if (why := why_lacking(file, candidates.keys(), glue)) is not None}
    if lacking and fill is None:
        listed = ", ".join(f"{file.name} ({why})" for file, why in lacking.items())
        raise InputError(
            f"GLUE's server takes no archive without all files, and these cannot be predicted: {listed}. fill=majority fills "
            "them with the most frequent class of train",
            "fill",
        )
    if not path.parent.is_dir():
        raise InputError(f"there is no folder '{path.parent}' for '{path.name}'", "path")
    chosen = {task: best(of_task) for task, of_task in candidates.items()}
    known = [file for file in SERVER_FILES if file not in lacking]
    words = {file: words_of(file, chosen[file.task]) for file in known}
    texts = {file: texts_of(file, chosen[file.task], glue) for file in known}
    content, entries = {}, []
    for file in SERVER_FILES:
        if file in lacking:
            predictions = [file.constant] * file.examples
            entries.append(Entry(file.name, why=lacking[file]))
        else:
            one = chosen[file.task]
            predictions = predicted(one, texts[file], words[file], distributed.device(device))
            entries.append(Entry(file.name, one.directory, one.monitor, one.validation, len(candidates[file.task])))
        content[file.name] = tsv(predictions)
    write_archive(path, content)
    print("\n".join(lines_of(entries)), flush=True)
    return entries


def why_lacking(file: ServerFile, tasks: Collection[str], glue: str | None) -> str | None:
    """Return the reason why a file cannot be predicted; None if it can be.

    Args:
        file: the file.
        tasks: tasks that there are runs of.
        glue: a folder of GLUE's TSV files; None for the hub, which has all test sets.
    """
    if file.task not in tasks:
        return f"no run of {file.task}"
    if glue is not None and file.path(glue) is None:
        return f"no '{file.paths[0]}' in '{glue}'"
    return None


def texts_of(file: ServerFile, candidate: Candidate, glue: str | None) -> Texts:
    """Return the texts of the test set of a file, in the columns that the run read.

    Raises:
        InputError: if the test set cannot be read, or has another number of examples than the server expects.
    """
    data = candidate.data
    columns = data["text"] if glue is None else data.get("local_text") or data["text"]
    return unlabelled_texts(file, columns, glue, data.get("repository"))


def words_of(file: ServerFile, candidate: Candidate) -> list[str]:
    """Return the word of the server for each output of a run's student; none for a score.

    The word for a class is its label in GLUE's files: its code, or else its name.

    Raises:
        InputError: if the exported student is damaged, or its outputs are not the classes of the task.
    """
    folder = candidate.folder
    check_export(candidate.directory, folder, candidate.record.get("files") or {}, "runs")
    names = label_names(load_config(str(folder), "runs"), "runs")
    if not file.words and len(names) == 1:
        return []
    codes = {label: code for code, label in candidate.codes.items() if code in file.words}
    words = [codes.get(name, name) for name in names]
    if not file.words or sorted(words) != sorted(file.words):
        wanted = ", ".join(file.words) or "scores"
        raise InputError(f"the outputs of '{folder}' are {', '.join(names)}, and {file.name} takes {wanted}", "runs")
    return words


def predicted(candidate: Candidate, texts: Texts, words: Sequence[str], device: torch.device) -> list[str]:
    """Return the predictions of a run's student for a test set, in its order and in the words of the server.

    Scores have three decimals, as in nyu-mll/GLUE-baselines, src/main.py at a634833.
    """
    student = load_student(candidate.folder, "runs")
    logits = logits_over(student, texts, int(candidate.record["max_length"]), device)
    if not words:
        return [f"{value:.3f}" for value in logits[:, 0].clip(*RANGE).tolist()]
    return [words[number] for number in logits.argmax(axis=1).tolist()]


def tsv(predictions: Sequence[str]) -> str:
    r"""Return the content of a file of a submission.

    >>> tsv(["entailment", "not_entailment"])
    'index\tprediction\n0\tentailment\n1\tnot_entailment\n'
    """
    return "".join(["index\tprediction\n", *(f"{number}\t{word}\n" for number, word in enumerate(predictions))])


def write_archive(path: Path, content: Mapping[str, str]) -> None:
    """Write a zip archive of text files atomically; equal content gives equal bytes.

    Raises:
        InputError: if it cannot be written.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in content.items():
            about = zipfile.ZipInfo(name)  # with a fixed date
            about.compress_type, about.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(about, text)
    try:
        with atomic_write(path, "wb") as file:
            file.write(buffer.getvalue())
    except OSError as error:
        if disk_is_full(error):
            raise
        raise InputError(f"cannot write to '{path}': {error.strerror or error}", "path") from error


def lines_of(entries: Sequence[Entry]) -> list[str]:
    """Return a line about each file of a submission; those that were filled come last."""
    lines = []
    for entry in entries:
        if entry.run is not None:
            value = score(entry.metric, entry.validation, " %")
            among = "" if entry.candidates == 1 else f", the best of {entry.candidates} runs"
            lines.append(f"{entry.file}: {entry.run.name}, {entry.metric} {value} on validation{among}")
    return [*lines, *(f"{entry.file}: FILLED with a constant, {entry.why}" for entry in entries if entry.run is None)]
