"""Files that the server of the GLUE benchmark takes, and the test sets without labels that they are for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kd.config.values import literal
from kd.data.readers import Row, rows
from kd.data.sources import FOLDER_KEY, REPOSITORY, check_text, examples_of, hub_data, no_column
from kd.data.texts import Texts
from kd.errors import InputError

NLI = ("entailment", "neutral", "contradiction")
BINARY_NLI = ("entailment", "not_entailment")
NUMBERS = ("0", "1")

INDEX_COLUMNS = ("index", "id")
"""Names of the column with the number of an example, from 0; `id` is QQP's."""


@dataclass(frozen=True, slots=True)
class ServerFile:
    """One file of a submission, with the predictions for one test set.

    Attributes:
        name: name of the file.
        task: GLUE task whose models predict it, as `kd.data.sources.Glue.folder`.
        examples: number of examples of the test set.
        words: the words for the classes; empty for scores.
        constant: prediction that fills the file where there is no model.
        paths: the test set in a folder of GLUE's TSV files; the first that exists is read.
        hub: configuration and split of the test set on the hub.
    """

    name: str
    task: str
    examples: int
    words: tuple[str, ...]
    constant: str
    paths: tuple[str, ...]
    hub: tuple[str, str]

    def path(self, root: str) -> Path | None:
        """Return the path of the test set in a folder of GLUE's TSV files; None if it is not there."""
        paths = [Path(root).expanduser() / path for path in self.paths]
        return next((path for path in paths if path.is_file()), None)


# Names, header, words and three decimals: nyu-mll/jiant, jiant/scripts/benchmarks/benchmarks.py at 8b13996, and
# nyu-mll/GLUE-baselines, src/main.py at a634833, which also has the sizes of MNLI's test sets. The other sizes are those of
# the data set nyu-mll/glue on the hub. Constants: the most frequent class of train; of dev for QNLI and MNLI, whose classes are
# equally frequent in train; MNLI's for AX; the mean score of train for STS-B.
SERVER_FILES = (
    ServerFile("CoLA.tsv", "CoLA", 1063, NUMBERS, "1", ("CoLA/test.tsv",), ("cola", "test")),
    ServerFile("SST-2.tsv", "SST-2", 1821, NUMBERS, "1", ("SST-2/test.tsv",), ("sst2", "test")),
    ServerFile("MRPC.tsv", "MRPC", 1725, NUMBERS, "1", ("MRPC/test.tsv",), ("mrpc", "test")),
    ServerFile("STS-B.tsv", "STS-B", 1379, (), "2.701", ("STS-B/test.tsv",), ("stsb", "test")),
    ServerFile("QQP.tsv", "QQP", 390965, NUMBERS, "0", ("QQP/test.tsv",), ("qqp", "test")),
    ServerFile("MNLI-m.tsv", "MNLI", 9796, NLI, "entailment", ("MNLI/test_matched.tsv",), ("mnli", "test_matched")),
    ServerFile("MNLI-mm.tsv", "MNLI", 9847, NLI, "entailment", ("MNLI/test_mismatched.tsv",), ("mnli", "test_mismatched")),
    ServerFile("QNLI.tsv", "QNLI", 5463, BINARY_NLI, "not_entailment", ("QNLI/test.tsv",), ("qnli", "test")),
    ServerFile("RTE.tsv", "RTE", 3000, BINARY_NLI, "entailment", ("RTE/test.tsv",), ("rte", "test")),
    ServerFile("WNLI.tsv", "WNLI", 146, NUMBERS, "0", ("WNLI/test.tsv",), ("wnli", "test")),
    # The diagnostic set, which MNLI's models predict. GLUE's script downloads AX.tsv as diagnostic/diagnostic.tsv.
    ServerFile("AX.tsv", "MNLI", 1104, NLI, "entailment", ("diagnostic/diagnostic.tsv", "AX.tsv"), ("ax", "test")),
)
"""Files that the server takes: all of them, in one zip archive without folders."""


def unlabelled_texts(file: ServerFile, text: Sequence[str], root: str | None, repository: str | None = None) -> Texts:
    """Return the texts of a test set, in its order.

    Args:
        file: the file that they are predicted for.
        text: text columns.
        root: a folder of GLUE's TSV files; None reads the hub.
        repository: data set on the hub; None for GLUE's.

    Raises:
        InputError: if the test set cannot be read, is not numbered from 0 on, or has another number of examples than the
            server expects.
    """
    texts, where = _from_hub(file, text, repository or REPOSITORY) if root is None else _from_folder(file, text, root)
    if len(texts) != file.examples:
        raise InputError(
            f"{where} has {len(texts):,} examples, and GLUE's server takes {file.name} with {file.examples:,}", FOLDER_KEY
        )
    return texts


def _from_folder(file: ServerFile, text: Sequence[str], root: str) -> tuple[Texts, str]:
    path = file.path(root)
    if path is None:
        raise InputError(f"there is no test set '{file.paths[0]}' in '{root}', which {file.name} is for", FOLDER_KEY)
    return examples_of(_numbered(path), path, text, None, FOLDER_KEY).texts, f"'{path}'"


def _numbered(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield the rows of a test set.

    Raises:
        InputError: for a row whose number is not that of its position, which is what the server compares by.
    """
    for number, (line, row) in enumerate(rows(path, FOLDER_KEY)):
        for column in INDEX_COLUMNS:
            if row.get(column, str(number)) != str(number):
                why = f"{column} is {literal(row[column])} where a test set, numbered from 0, has {number}"
                raise InputError(f"'{path}', line {line}: {why}", FOLDER_KEY)
        yield line, row


def _from_hub(file: ServerFile, text: Sequence[str], repository: str) -> tuple[Texts, str]:
    subset, split = file.hub
    where = f"{repository}/{subset}, {split}"
    data = hub_data(repository, subset)
    if split not in data:
        raise InputError(f"'{repository}/{subset}' has no split '{split}'", FOLDER_KEY)

    def texts() -> Iterator[list[str]]:
        for number, row in enumerate(data[split]):
            for name in text:
                if name not in row:
                    raise no_column(name, row, f"{where}, row {number}", FOLDER_KEY)
                check_text(row[name], name, f"{where}, row {number}", blank=True)
            yield [row[name] for name in text]

    return Texts.of(texts()), f"'{where}'"
