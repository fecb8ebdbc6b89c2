"""The smallest difference that seeds show, against exact powers and against tables that are decided one by one."""

import importlib.util
import itertools
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import binom, nct, norm, t

from kd.errors import InputError
from kd.results.comparison import entries_of, pairs_of
from kd.results.figures import read_figures
from kd.results.statistics import (
    ALPHA,
    PairedDifference,
    SeedTest,
    Verdict,
    corrected,
    detectable_difference,
    median_spread,
    power,
    seed_difference,
)

ROOT = Path(__file__).parents[2]


def exact_t(pairs: int, methods: int = 1, share: float = 0.8) -> float:
    """Difference in spreads that a t-test at ALPHA / methods shows with its sign in a share of samples, by the noncentral t."""
    critical = t.ppf(1 - ALPHA / methods / 2, pairs - 1)
    return float(brentq(lambda gain: nct.sf(critical, pairs - 1, gain * math.sqrt(pairs)) - share, 0.1, 50))


def around(difference: float, share_at: float, tables: int) -> float:
    """Four standard errors of a share, as a difference, by the slope of a normal power curve there; and the step."""
    return 4 * math.sqrt(share_at * (1 - share_at) / tables) / norm.pdf(norm.ppf(share_at)) * difference / 2 + power.STEP


@pytest.mark.parametrize("pairs", [3, 6, 10])
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_of_one_method_it_is_the_power_of_the_noncentral_t(pairs: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "seed_test", lambda *_: SeedTest.T)  # the rule has the sign-flip test for one method
    found = power._in_spreads.__wrapped__(pairs, 1, None, share, 2_000)
    expected = exact_t(pairs, share=share)
    assert found == pytest.approx(expected, abs=around(expected, share, 2_000))


@pytest.mark.parametrize("pairs", [6, 9])
def test_of_many_methods_it_is_the_t_test_at_a_corrected_level(pairs: int) -> None:
    found = detectable_difference(1.0, pairs, 25)
    expected = exact_t(pairs, 25)  # Holm's correction of one true difference is Bonferroni's, but for a few tables
    assert found == pytest.approx(expected, abs=around(expected, 0.8, power.TABLES))
    assert abs((found or 0) - exact_t(pairs, 1)) > 3 * around(expected, 0.8, power.TABLES)


@pytest.mark.parametrize(("pairs", "methods"), [(6, 1), (8, 5), (8, 6)])
def test_with_seeds_enough_it_is_the_sign_flip_test(pairs: int, methods: int) -> None:
    """With just enough pairs all differences have to be positive, which has a power of cdf(gain) ** pairs."""
    expected = norm.ppf(0.8 ** (1 / pairs))
    assert detectable_difference(1.0, pairs, methods) == pytest.approx(expected, abs=around(expected, 0.8, power.TABLES))


@pytest.mark.parametrize(("pairs", "methods"), [(6, 3), (7, 3)])
def test_tables_that_are_decided_one_by_one_show_it_as_often(pairs: int, methods: int) -> None:
    """Draw scores of 850 examples anew, and decide each table as a report does."""
    spread, tables, examples = 0.007, 400, 850
    gain = detectable_difference(spread, pairs, methods, examples=examples) or math.nan
    rng = np.random.default_rng(7)
    shown = 0
    for _ in range(tables):
        expected = rng.uniform(0.7, 0.8) + np.eye(1 + methods)[1] * gain
        scores = rng.normal(expected[:, None], spread / math.sqrt(2), (1 + methods, pairs))
        baseline, *others = (dict(enumerate(np.rint(row * examples) / examples)) for row in scores)
        table = {str(k): seed_difference(one, baseline) for k, one in enumerate(others)}
        shown += corrected(table)["0"].verdict == Verdict.BETTER
    assert binom.ppf(0.0005, tables, 0.78) <= shown <= binom.ppf(0.9995, tables, 0.82)


def test_it_follows_the_unit_and_shrinks_with_seeds_and_grows_with_methods() -> None:
    few = {
        (pairs, methods): detectable_difference(0.01, pairs, methods, tables=300) for pairs in (6, 9) for methods in (1, 5, 25)
    }
    for (pairs, methods), found in few.items():
        assert found == detectable_difference(0.02, pairs, methods, tables=300) / 2
    assert few[9, 1] < few[6, 1] < few[6, 5] < few[6, 25]
    assert few[9, 25] < few[6, 25]
    exact = detectable_difference(0.01, 6, 25, tables=300)
    assert detectable_difference(0.01, 6, 25, examples=10**6, tables=300) == pytest.approx(exact, abs=2e-4)
    assert detectable_difference(0.01, 6, 25, examples=50, tables=300) > 1.05 * exact  # a step of two spreads
    assert detectable_difference(0.01, 6, 25, share=0.5, tables=300) < exact


def test_too_few_seeds_and_scores_without_a_spread_show_nothing() -> None:
    assert [detectable_difference(0.01, pairs) for pairs in (1, 3, 5)] == [None] * 3
    # A spread of a hundredth of an example: all six differences are equal, which is no p.
    assert detectable_difference(1e-4, 6, 25, examples=100, tables=200) is None


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        *(({"spread": spread}, "spread") for spread in (0.0, -1.0, math.nan, math.inf)),
        *(({name: value}, name) for name, value in itertools.product(("pairs", "methods", "examples", "tables"), (0, -3))),
        *(({"share": share}, "share") for share in (0.0, 1.0, 80.0)),
    ],
)
def test_numbers_out_of_range_are_refused(arguments: dict[str, float], key: str) -> None:
    with pytest.raises(InputError, match=f"{key}=") as error:
        detectable_difference(**{"spread": 0.01, "pairs": 6, **arguments})
    assert error.value.key == key


def test_the_median_of_the_spreads_is_no_matter_of_one_collapse() -> None:
    def of(*values: float) -> PairedDifference:
        return seed_difference(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0))

    assert median_spread([of(1, 2, 3), of(2, 4, 6), of(0, 0, 300), of(1)]) == 2
    assert median_spread([of(1)]) is None
    assert median_spread([]) is None


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("power_script", ROOT / "experiments" / "statistics" / "power.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def printed(script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["power.py", *words])
    script.main()
    return capsys.readouterr().out


def test_the_script_reads_spreads_of_a_table(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ROOT / "experiments" / "pkd_dev" / "ours.csv"
    entries = entries_of(read_figures(path))
    spreads = []
    for index, pair in pairs_of(entries, "finetune").items():
        entry, other = entries[index], pair.baseline
        if entry.column == ("rte", "validation", "accuracy"):
            spreads.append(100 * np.std([entry.values[seed] - other.values[seed] for seed in entry.values], ddof=1))
    assert len(spreads) == 4
    text = printed(
        script, capsys, monkeypatch, str(path), "--task", "rte", "--examples", "277", "--seeds", "3", "6", "--methods", "2"
    )
    title = f"rte: validation accuracy; 4 differences with spreads of {min(spreads):.2f} to {max(spreads):.2f}"
    assert f"{title}: spread {np.median(spreads):.2f}, 277 examples" in text
    smallest = 100 * detectable_difference(np.median(spreads) / 100, 6, 2, examples=277)
    assert text.splitlines()[-2:] == ["| 3 | too few seeds |", f"| 6 | {smallest:.2f} (paired t-test) |"]


def test_the_script_takes_a_spread_and_refuses_what_it_cannot_read(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = printed(script, capsys, monkeypatch, "--spread", "1.4", "--seeds", "6", "--methods", "1")
    assert f"| 6 | {1.4 * detectable_difference(1.0, 6):.2f} (sign-flip test) |" in text
    table = str(ROOT / "experiments" / "pkd_dev" / "ours.csv")
    for words, message in (
        ([table, "--task", "cola"], "no two runs of task cola"),
        (["none.csv"], "cannot read 'none.csv'"),
        (["--spread", "-1"], "spread=-0.01 is not a number above 0"),
        ([], "either a file or --spread"),
        ([table, "--spread", "1"], "either a file or --spread"),
    ):
        with pytest.raises(SystemExit) as stop:
            printed(script, capsys, monkeypatch, *words)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
