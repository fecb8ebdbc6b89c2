"""Columns of a table of comparisons, what is in them as text, and the sentences below it."""

from collections.abc import Callable, Mapping, Sequence

from kd.results.comparison import Column, Comparison, Entry
from kd.results.figures import Figure
from kd.results.published import aggregate, compared_with, is_best_run
from kd.results.statistics import ALPHA, ExampleDifference, McNemar, PairedDifference
from kd.results.statistics.examples import EXAMPLE_DRAWS, SEED
from kd.results.tables import UNITS, in_own_units


def number(metric: str, value: float | None, sign: bool = False) -> str:
    """Return a value in percent, or in its own unit for errors.

    >>> number("accuracy", 0.7512), number("accuracy", 0.0123, sign=True), number("mse", 0.25), number("f1", None)
    ('75.1', '+1.2', '0.2500', '')
    """
    if value is None:
        return ""
    plus = "+" if sign else ""
    return f"{value:{plus}.4f}" if in_own_units(metric) else f"{100 * value:{plus}.1f}"


def ours(entry: Entry) -> str:
    """Return mean and spread of an entry, or what there is in their place."""
    if not entry.values:
        return "missing" if entry.expected else ""
    if entry.mean is None:
        return "undefined"
    spread = "" if entry.std is None else f" ± {number(entry.metric, entry.std)}"
    return number(entry.metric, entry.mean) + spread


def paper(entry: Entry) -> str:
    """Return the paper's figures of an entry; several, and a best run, with what they are of."""
    several = len(entry.paper) > 1
    return " / ".join(printed(figure, labelled=several or is_best_run(figure)) for figure in entry.paper)


MARKS = {"copied": "copied", "memory": "from memory"}
"""Words for the confidence of a figure that is not printed."""


def printed(figure: Figure, labelled: bool) -> str:
    """Return a figure of a paper with a mark if it is not printed there, and with what it is of.

    Args:
        figure: the figure.
        labelled: whether it is told what it is of.
    """
    words = [aggregate(figure) if labelled else "", MARKS.get(figure.confidence, "")]
    told = ", ".join(filter(None, words))
    return number(figure.metric, figure.value) + (f" ({told})" if told else "")


def gap_of(entry: Entry) -> float | None:
    """Return our mean minus the figure of the paper that it is compared with; None without one of each."""
    figure = compared_with(entry.paper)
    return None if entry.mean is None or figure is None or figure.value is None else entry.mean - figure.value


def gap(entry: Entry) -> str:
    """Return our mean minus the paper's, as text."""
    return number(entry.metric, gap_of(entry), sign=True)


def against(entry: Entry) -> str:
    """Return the difference from the baseline over seeds with its interval."""
    difference = entry.difference
    return "" if difference is None else with_interval(entry.metric, difference.mean, difference.low, difference.high)


def by_example(entry: Entry) -> str:
    """Return the difference from the baseline over examples with its interval, or that there is none."""
    if entry.incomparable:
        return "not comparable"
    test = entry.by_example
    return "" if test is None else with_interval(entry.metric, test.difference, test.low, test.high)


def with_interval(metric: str, mean: float | None, low: float | None, high: float | None) -> str:
    """Return a difference with its interval, if it has one.

    >>> with_interval("accuracy", 0.012, 0.004, 0.02), with_interval("accuracy", 0.012, None, None)
    ('+1.2 [+0.4, +2.0]', '+1.2')
    """
    ends = "" if low is None else f" [{number(metric, low, sign=True)}, {number(metric, high, sign=True)}]"
    return number(metric, mean, sign=True) + ends


def p_of(test: PairedDifference | ExampleDifference | McNemar | None) -> float | None:
    """Return the p of a test, corrected where it is."""
    return None if test is None else test.p if test.adjusted is None else test.adjusted


def probability(test: PairedDifference | ExampleDifference | McNemar | None) -> str:
    """Return the p of a test as text, corrected where it is; near .05 with more digits, so that it fits its verdict."""
    p = p_of(test)
    if p is None or p < 0.001:
        return "" if p is None else "< 0.001"
    texts = (f"{p:.{digits}f}" for digits in (3, 4, 5, 6))
    return next((text for text in texts if (float(text) <= ALPHA) == (p <= ALPHA) and float(text) != ALPHA), f"{p:.9f}")


def seed_test_name(entry: Entry) -> str:
    """Return the name of the test that p by seed is of."""
    return str((entry.difference and entry.difference.test) or "")


def verdict(entry: Entry, baseline: str) -> str:
    """Return the outcome of the comparison with the baseline in words."""
    if entry.method == baseline:
        return "baseline" if entry.values else ""
    if entry.difference is not None:
        unpaired = entry.difference.unpaired
        words = [f"seeds without a pair: {_list(unpaired)}"] if unpaired else []
        return "; ".join(filter(None, [str(entry.difference.verdict), unlike(entry), *words]))
    return "no baseline of this budget and selection" if entry.values else ""


def unlike(entry: Entry) -> str:
    """Return the conditions in which an entry differs from its baseline, in words; empty if they are the same."""
    return f"another {enumerated(entry.differs_in)}" if entry.differs_in else ""


def _list(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def seeds(entry: Entry) -> str:
    """Return the seeds of an entry and those that are missing."""
    text = _list(sorted(entry.values))
    return f"{text}; missing {_list(entry.missing)}".lstrip("; ") if entry.missing else text


def detail(entry: Entry, name: str, form: str) -> str:
    """Return a size or cost, empty where it is not known."""
    value = entry.details.get(name)
    return "" if value is None else format(value, form)


COLUMNS: Mapping[str, Callable[[Entry, Comparison], str]] = {
    "row": lambda entry, _: label(entry),
    "student": lambda entry, _: entry.student,
    "teacher": lambda entry, _: entry.teacher,
    "ours": lambda entry, _: ours(entry),
    "paper": lambda entry, _: paper(entry),
    "ours - paper": lambda entry, _: gap(entry),
    "against baseline": lambda entry, _: against(entry),
    "p": lambda entry, _: probability(entry.difference),
    "test": lambda entry, _: seed_test_name(entry),
    "verdict": lambda entry, comparison: verdict(entry, comparison.baseline),
    "by example": lambda entry, _: by_example(entry),
    "p by example": lambda entry, _: probability(entry.by_example),
    "p of McNemar": lambda entry, _: probability(entry.mcnemar),
    "seeds": lambda entry, _: seeds(entry),
    "parameters": lambda entry, _: detail(entry, "parameters", ",.0f"),
    "speed-up": lambda entry, _: detail(entry, "speed_up", ".2f"),
}
"""Columns of a table of entries, with what is in them."""


def notes(comparison: Comparison) -> list[str]:
    """Return sentences that have to stand below any table of a comparison."""
    own = [entry for entry in comparison.entries if entry.values]
    lines = [f"{UNITS} Mean ± standard deviation over seeds."]
    if comparison.protocol:
        lines.append(comparison.protocol)
    if own:
        selections = sorted({entry.selection for entry in own})
        inits = sorted({entry.init for entry in own})
        lines.append(f"Ours: {' | '.join(selections)}. Students start from {' | '.join(inits)}.")
    lines.append(
        f"Baseline: {comparison.baseline} with the same student, initialisation, selection, budget and seeds. Differences are "
        "means over pairs of seeds, from six pairs on with Student's 95 % interval, which supposes normal differences and is "
        "not corrected. p is that of the test beside it, corrected by Holm over the methods that share student and budget in "
        f"a column{corrected_for(own)}: the sign-flip test, which supposes that differences are symmetric "
        "about 0 if there is no true one, where pairs suffice for so many methods, else the paired t-test, which supposes that "
        "they are normal. Fewer than six pairs decide nothing."
    )
    if comparison.any_budget:
        lines.append(
            "A verdict that names another selection, initialisation or budget is beside a baseline that differs in these, so "
            "that the difference is not one of the method alone. Its p is corrected over these methods and all others of that "
            "baseline. In the column of the split that selects, none has another selection."
        )
    if comparison.incomplete:
        lines.append(
            "Seeds are missing: with them, numbers of pairs and methods change, and so may tests, corrections and verdicts, "
            "none of which is final."
        )
    if any(len(entry.paper) > 1 for entry in own):
        lines.append(
            "Of several figures of the paper, ours is compared with the printed one that is a mean over runs, never with a "
            "best run."
        )
    lines += notes_by_example(comparison)
    for (method, student, teacher, split), summary in comparison.over_tasks.items():
        if summary.better + summary.worse + summary.equal < 2:
            continue
        counts = f"{summary.better} better, {summary.worse} worse, {summary.equal} equal"
        p = "" if summary.p is None else f", sign test p = {summary.p:.3f}"
        of_teacher = f" of {teacher}" if teacher else ""
        lines.append(f"{method} {student}{of_teacher} on {split}, over tasks: {counts}{p}: {summary.verdict}.")
    return lines


def corrected_for(entries: Sequence[Entry]) -> str:
    """Return how many tests p are corrected for, where p are shown; empty where there is none."""
    tests = [entry.difference for entry in entries if entry.difference is not None]
    found = sorted({test.comparisons for test in tests if test.adjusted is not None})
    return f" (of six pairs or more: {', '.join(map(str, found))})" if found else ""


def enumerated(words: Sequence[str]) -> str:
    """Return words as a list in a sentence.

    >>> enumerated(["budget"]), enumerated(["selection", "initialisation", "budget"])
    ('budget', 'selection, initialisation and budget')
    """
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def notes_by_example(comparison: Comparison) -> list[str]:
    """Return sentences about the tests by example, and the reasons why predictions that are at hand were not compared."""
    lines = []
    if any(entry.by_example is not None for entry in comparison.entries):
        lines.append(
            "By example: about these trained models on other examples of the same kind, not about the method: another seed may "
            f"give another outcome. Means over the paired seeds, {EXAMPLE_DRAWS:,} bootstrap samples of the examples (seed "
            f"{SEED}), 95 % interval; for accuracy of one seed McNemar's exact test too; p corrected by Holm over the methods "
            "of a column."
        )
    lines += [
        f"Not compared by example: {label(entry)} on {title_of(entry.column)}: {entry.incomparable}."
        for entry in comparison.entries
        if entry.incomparable
    ]
    return lines


def label(entry: Entry) -> str:
    """Return the label of an entry's row with its settings."""
    return entry.row + (f" ({entry.settings})" if entry.settings else "")


def title_of(column: Column) -> str:
    """Return the heading of a column; of cells of a task that has no figure yet, only the task is known.

    >>> title_of(("rte", "validation", "accuracy")), title_of(("rte", "", ""))
    ('rte: validation accuracy', 'rte: no figure yet')
    """
    task, *measured = column
    return f"{task}: {' '.join(measured) if all(measured) else 'no figure yet'}"


def used_columns(comparison: Comparison) -> list[str]:
    """Return the columns of which an entry has something."""
    return [name for name, text in COLUMNS.items() if any(text(entry, comparison) for entry in comparison.entries)]
