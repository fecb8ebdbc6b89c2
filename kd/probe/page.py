"""The page of an analysis: tables and charts, the control beside every figure."""

from collections.abc import Sequence
from html import escape

from kd.probe.charts import ablations, alignments, attention, probes
from kd.probe.grid import by_size
from kd.probe.result import Case, Settings
from kd.probe.summary import Summary
from kd.probe.words import estimate, label, number, ordered, over_seeds, spread, table
from kd.results.page import document

IN_SLICES = {"delta.accuracy": "teacher minus", "agreement": "agreement,", "lost": "lost,", "gained": "gained,", "kl": "KL,"}
"""Figures that the table of slices shows, and what stands before the model's name; the JSON has all, with intervals."""


def page(summaries: Sequence[Summary], settings: Settings, about: str) -> str:
    """Return the page of an analysis.

    Args:
        summaries: the summaries, in the order of the page.
        settings: settings of the analysis.
        about: sentence about what made the page.
    """
    title = "Students beside their teachers and controls"
    tasks = dict.fromkeys(summary.cases[0].about.task for summary in summaries)
    sections = [
        f"<h1>{title}</h1>",
        explained(settings),
        by_task(summaries) if "differences" in settings.parts else "",
        by_size(summaries),
        *(of_summary(summary) for task in tasks for summary in summaries if summary.cases[0].about.task == task),
        f'<p class="quiet">{escape(about)}</p>',
    ]
    return document(title, sections)


def explained(settings: Settings) -> str:
    """Return how the page is read."""
    control = (
        "Student: a model that was trained with a teacher. Control: fine-tuning of the same student with the same "
        "initialisation, data, budget and seed, and no teacher. What the control lacks, a model of this size lacks without "
        "distillation; only the difference between the two is one of distillation."
    )
    vector = "the mean of its tokens" if settings.vectors == "mean" else "that of its first token"
    items = [
        f"Examples: the {settings.split} split. Scores, shares and calibration errors are in percent.",
        "[a, b]: 95 % interval over examples, for these trained models. ±: standard deviation over seeds, in its place.",
    ]
    if set(settings.parts) - {"differences"}:
        items.append(
            f"Layers are compared on at most {settings.examples} examples, attention and models without a part on at most "
            f"{settings.part_examples}; linear probes are trained on at most {settings.train_examples}. The vector of an "
            f"example is {vector}."
        )
    listed = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f'<p>{escape(control)}</p><ul class="quiet">{listed}</ul>'


def by_task(summaries: Sequence[Summary]) -> str:
    """Return the table of all configurations and tasks: what each loses, beside what its control loses."""
    rows = []
    for summary in sorted(summaries, key=lambda one: one.label):
        about = summary.cases[0].about
        metric = about.metrics[0]
        names = [f"score.{metric}", f"delta.{metric}", f"retention.{metric}"]
        row = [summary.label, about.task, about.teacher, ", ".join(map(str, summary.seeds)), metric]
        row += [number(names[0], about.majority.get(metric)) if metric in about.majority else ""]
        row.append(over_seeds(names[0], summary.teacher.get(names[0])))
        for name in names:
            shown = spread if name == names[1] else over_seeds
            row += [
                shown(name, summary.figures.get(name, {}).get(model), len(summary.cases)) for model in ("student", "control")
            ]
        rows.append(row)
    header = ["student", "task", "teacher", "seeds", "metric", "constant prediction", "teacher", "student", "control"]
    header += ["lost by student", "lost by control", "retained by student", "retained by control"]
    note = (
        "Lost: the teacher's score less the model's, in points. Retained: the model's score over the teacher's. Constant "
        "prediction: the most frequent class, or the mean score, of train; retention counts from 0, so that even this has one."
    )
    return f'<h2>By task</h2><p class="quiet">{note}</p>{table(header, rows)}'


def of_summary(summary: Summary) -> str:
    """Return the sections about one configuration of a task."""
    about = summary.cases[0].about
    heading = f"{about.task}: {summary.label}, teacher {about.teacher}"
    parts = [
        f"<h2>{escape(heading)}</h2>",
        description(summary),
        figures(summary),
        churn(summary.cases),
        slices(summary),
        alignments(summary),
        probes(summary),
        attention(summary),
        ablations(summary),
        absent(summary.cases),
    ]
    return "\n".join(filter(None, parts))


def description(summary: Summary) -> str:
    """Return what a configuration's runs are: seeds, selection, initialisation, and the control."""
    about, several = summary.cases[0].about, len(summary.cases) > 1
    lines = [
        f"Seed{'s' * several} {', '.join(map(str, summary.seeds))}; {about.selection}; starts from {about.init}.",
        f"Run{'s' * several}: {', '.join(case.about.run for case in summary.cases)}.",
    ]
    items = [escape(line) for line in lines]
    for case in summary.cases:
        if case.about.control is not None:
            words = f"Control of seed {case.about.seed}: {case.about.control}, starts from {case.about.control_init}."
            items.append(escape(words))
        else:
            words = case.about.without_control
            shown = f"<code>{escape(words)}</code>" if words.startswith("kd-train") else escape(words)
            items.append(f"No control of seed {case.about.seed}: {shown}")
    for case in summary.cases:
        for model, name in ({} if case.differences is None else case.differences.one_class).items():
            of = f"the {model}" + (f" of seed {case.about.seed}" if several else "")
            items.append(escape(f"Of {of} all predictions are '{name}': it has learnt nothing that these figures could show."))
    computed = [case.about.run for case in summary.cases if "computed" in case.about.logits.values()]
    if computed:
        items.append(escape(f"Logits were not stored, and computed from the exported models: {', '.join(computed)}."))
    return f'<ul class="quiet">{"".join(f"<li>{item}</li>" for item in items)}</ul>'


def figures(summary: Summary) -> str:
    """Return the table of the differences of the predictions."""
    if not summary.figures:
        return ""
    n = next(case.differences.n for case in summary.cases if case.differences is not None)
    controlled = any("control" in by_model for by_model in summary.figures.values())
    header = ["figure", "teacher", "student", *(["control", "student minus control"] if controlled else [])]
    rows = []
    for name in ordered(summary.figures):
        by_model = summary.figures[name]
        models = ("student", "control", "difference")[: 3 if controlled else 1]
        cells = [spread(name, by_model.get(model), len(summary.cases)) for model in models]
        rows.append([label(name), spread(name, summary.teacher.get(name)), *cells])
    return f"<h3>Predictions, {n:,} examples</h3>{table(header, rows)}{seeds_table(summary)}"


def seeds_table(summary: Summary) -> str:
    """Return the folded table of each seed's figures with their intervals; empty for one seed."""
    if len(summary.cases) < 2:
        return ""
    found = [case for case in summary.cases if case.differences is not None]
    header = ["figure", *(f"{model}, seed {case.about.seed}" for case in found for model in ("student", "control"))]
    rows = []
    for name in ordered(summary.figures):
        compared = [case.differences.figures[name] for case in found if case.differences is not None]
        cells = [estimate(name, value) for one in compared for value in (one.student, one.control)]
        rows.append([label(name), *cells])
    return f"<details><summary>each seed, with intervals over examples</summary>{table(header, rows)}</details>"


def churn(cases: Sequence[Case]) -> str:
    """Return the tables of churn: numbers of examples that each of two models gets right and wrong, of the first seed."""
    differences = cases[0].differences
    if differences is None or not differences.churn:
        return ""
    rows = [
        [f"teacher {side}", *(f"{count:,}" for counts in differences.churn.values() for count in counts[index])]
        for index, side in enumerate(("right", "wrong"))
    ]
    header = ["examples", *(f"{model} {side}" for model in differences.churn for side in ("right", "wrong"))]
    seed = f" (seed {cases[0].about.seed})" if len(cases) > 1 else ""
    sums = [identity(model, *counts) for model, counts in differences.churn.items()]
    note = f"accuracy = teacher's accuracy * (1 - lost) + (100 - teacher's accuracy) * gained; {'; '.join(sums)}."
    return f'<h3>Churn{seed}</h3>{table(header, rows)}<p class="quiet">{escape(note)}</p>'


def identity(model: str, teacher_right: Sequence[int], teacher_wrong: Sequence[int]) -> str:
    """Return the accuracy of a model by its churn, as a sum in percent.

    >>> identity("student", [81, 9], [2, 8])
    'student: 90.0 * 0.900 + 10.0 * 0.200 = 83.0'
    """
    right, wrong = sum(teacher_right), sum(teacher_wrong)
    kept, gained = (counts[0] / max(sum(counts), 1) for counts in (teacher_right, teacher_wrong))
    shares = [100 * count / (right + wrong) for count in (right, wrong, teacher_right[0] + teacher_wrong[0])]
    return f"{model}: {shares[0]:.1f} * {kept:.3f} + {shares[1]:.1f} * {gained:.3f} = {shares[2]:.1f}"


def slices(summary: Summary) -> str:
    """Return the table of slices."""
    if not summary.slices:
        return ""
    controlled = any("control" in by_model for by_model in summary.figures.values())
    models = ("student", "control") if controlled else ("student",)
    header = ["sliced by", "slice", "examples", "teacher's accuracy"]
    header += [f"{words} {model}" for words in IN_SLICES.values() for model in models]
    rows = [
        [
            one.by,
            one.name,
            f"{one.n:,}",
            over_seeds("score.accuracy", one.teacher.get("score.accuracy")),
            *(
                (spread if name == "delta.accuracy" else over_seeds)(name, one.figures[name].get(model), len(summary.cases))
                for name in IN_SLICES
                for model in models
            ),
        ]
        for one in summary.slices
    ]
    note = (
        "Length: words. Confidence: the teacher's largest probability. Both are cut in three, as equal as ties permit. The "
        "intervals of the other figures are in probe.json."
    )
    return f'<h3>Slices</h3><p class="quiet">{note}</p>{table(header, rows)}'


def absent(cases: Sequence[Case]) -> str:
    """Return the reasons for what there is not."""
    reasons: dict[str, None] = {}
    for case in cases:
        found = dict(case.absent) | ({} if case.differences is None else dict(case.differences.absent))
        reasons |= dict.fromkeys(f"{name}: {reason}" for name, reason in found.items())
    if not reasons:
        return ""
    return f'<h3>Left out</h3><ul class="quiet">{"".join(f"<li>{escape(reason)}</li>" for reason in reasons)}</ul>'
