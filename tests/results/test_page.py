"""The HTML page: what it holds, that it loads nothing, and that its controls work in a browser."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kd.results.comparison import compare, entries_of, with_details
from kd.results.figures import Figure
from kd.results.gathering import validation_curve, with_expected
from kd.results.page import page, svg

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt-get install chromium")


def figure(method: str, value: float | None, seed: int = 0, **more: Any) -> Figure:
    labels = {"paper": "toy", "table": "1", "row": method, "method": method, "student": "3l", "teacher": "minilm"}
    where = {"task": "rte", "split": "validation", "metric": "accuracy", "value": value, "std": None, "n": 1}
    about = {"seeds": str(seed), "selection": "best", "init": "first layers", "source": "kd", "confidence": "measured"}
    run = {"digest": f"{method}{seed}", "commit": "abc", "command": f"method={method} seed={seed}"}
    run |= {"family": method, "budget": "all", "scale": "local"}
    return Figure(**{**labels, **where, **about, **run, **more})


def record(digest: str, millions: float) -> dict[str, Any]:
    return {
        "digest": digest,
        "teacher": ["minilm"],
        "parameters": {"student": int(1e6 * millions)},
        "megabytes": {"student": 68.0},
        "latency_ms": {"student": 2.0, "minilm": 4.0},
        "seconds": {"train": 30.0},
        "agreement": {"validation": {"minilm": 0.9}},
    }


FIGURES = [
    *(figure("finetune", 0.50 + seed / 100, seed) for seed in range(3)),
    *(figure("kd", 0.60 + seed / 100, seed) for seed in range(3)),
    *(figure("pkd<script>alert(1)</script>", 0.55, seed, digest=f"p{seed}") for seed in range(3)),
    figure("kd", 0.3, task="mrpc", digest="m0"),
]


def example() -> str:
    entries = with_expected(entries_of(FIGURES), [{"method": "kd", "student": "2l", "task": "rte", "seed": "0"}])
    comparison = compare(entries, title="A & <B>", protocol="Dev.")
    comparison = with_details(comparison, {"kd0": record("kd0", 17.0), "finetune0": record("finetune0", 12.0)})
    curves = {"kd0": [(1.0, 0.4), (2.0, 0.6)], "finetune0": [(1.0, 0.3), (2.0, 0.5)]}
    return page(comparison, curves, {"kd0": {"uniform": [[0.0, 1.0], [1.0, 0.0]]}}, about="made by hand")


class Balanced(HTMLParser):
    """Parser that counts open elements, and collects addresses."""

    VOID = ("meta", "input", "br", "line", "circle", "rect", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.counts: dict[str, int] = {}

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def parsed(text: str) -> Balanced:
    parser = Balanced()
    parser.feed(text)
    return parser


def test_the_page_is_whole_and_loads_nothing() -> None:
    text = example()
    found = parsed(text)
    assert found.open == ["html"] or found.open == []
    assert found.addresses == []
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest", text)
    assert found.counts["script"] == 1


def test_names_are_text_whatever_they_mean_in_html() -> None:
    text = example()
    assert "<script>alert(1)" not in text
    assert "pkd&lt;script&gt;" in text
    assert "<title>A &amp; &lt;B&gt;</title>" in text


def test_the_page_has_each_part() -> None:
    text = example()
    for heading in ("Results", "Size against quality", "Training curves", "Cost of training", "Agreement", "Maps of layers"):
        assert f"<h2>{heading}" in text
    assert text.count("<code>kd-train method=kd seed=0</code>") == 2
    assert ">missing</td>" in text
    assert "61.0 ± 1.0" in text
    assert parsed(text).counts["svg"] == 5


def test_parts_without_values_are_left_out() -> None:
    text = page(compare(entries_of(FIGURES)))
    for heading in ("Size against quality", "Training curves", "Cost of training", "Maps of layers"):
        assert heading not in text


def test_the_front_has_no_point_that_another_beats() -> None:
    points = [svg.Point(3, 9, "a"), svg.Point(1, 5, "b"), svg.Point(2, 4, "c"), svg.Point(3, 8, "d"), svg.Point(1, 2, "e")]
    front = [point.label for point in svg.pareto(points)]
    assert front == ["b", "a"]
    for point in points:
        beaten = any(other.x <= point.x and other.y >= point.y and (other.x, other.y) != (point.x, point.y) for other in points)
        assert (point.label in front) == (not beaten)


@pytest.mark.parametrize("ends", [(0.0, 1.0), (17.3, 17.4), (-3.0, 250.0), (5.0, 5.0)])
def test_ticks_are_few_and_inside(ends: tuple[float, float]) -> None:
    scale = svg.Scale(*svg.padded(ends), 0.0, 100.0)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 8
    assert all(-1e-6 <= scale(tick) <= 100 + 1e-6 for tick in ticks)
    assert all(tick == round(tick) for tick in svg.Scale(1, 3, 0, 1, whole=True).ticks())


def test_labels_do_not_cover_one_another() -> None:
    moved = sorted(svg.apart([30.0, 10.0, 11.0, 31.0, 30.5]))
    assert all(after - before >= 13.0 - 1e-9 for before, after in pairwise(moved))


def test_a_curve_is_read_from_the_history_of_a_run(tmp_path: Path) -> None:
    history = tmp_path / "metrics.csv"
    history.write_text("step,epoch,train/loss,validation/accuracy\n1,0,0.7,\n9,0,,0.5\n18,1,,0.75\n")
    assert validation_curve(history, "accuracy") == [(1.0, 0.5), (2.0, 0.75)]
    assert validation_curve(history, "f1") == []
    history.write_bytes(b"\xff\xfe")
    assert validation_curve(history, "accuracy") == []
    assert validation_curve(tmp_path / "none.csv", "accuracy") == []


SCENE = """
<script>
const out = [];
const shown = () => rows.filter(row => !row.hidden).length;
const texts = index => [...body.rows].map(row => row.cells[index].textContent);
const names = headers.map(header => header.textContent);
out.push(`rows ${shown()}`);
const ours = names.indexOf("ours");
headers[ours].querySelector("button").click();
out.push(`up ${texts(ours).join("|")}`);
headers[ours].querySelector("button").click();
out.push(`down ${texts(ours).join("|")} ${headers[ours].getAttribute("aria-sort")}`);
const select = document.querySelector("select[name=task]");
select.value = "mrpc"; select.dispatchEvent(new Event("change"));
out.push(`mrpc ${shown()} ${count.textContent}`);
select.value = ""; select.dispatchEvent(new Event("change"));
search.value = "finetune rte"; search.dispatchEvent(new Event("input"));
out.push(`search ${shown()}`);
out.push(`wide ${document.documentElement.scrollWidth <= window.innerWidth}`);
document.body.innerHTML = `<pre id="out">${out.join("\\n")}</pre>`;
</script></body>
"""


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [420, 1400])
def test_the_controls_work_in_a_browser(tmp_path: Path, width: int) -> None:
    (tmp_path / "page.html").write_text(example().replace("</body>", SCENE))
    quiet = "--no-first-run --disable-background-networking --disable-component-update --disable-sync --disable-quic".split()
    options = ["--headless", "--no-sandbox", "--disable-gpu", *quiet, f"--user-data-dir={tmp_path / 'profile'}"]
    command = [BROWSER, *options, f"--window-size={width},900", "--dump-dom", f"file://{tmp_path / 'page.html'}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    lines = re.search(r'<pre id="out">(.*?)</pre>', shown, re.DOTALL)[1].splitlines()
    assert lines[0] == "rows 5"
    assert lines[1] == "up 30.0|51.0 ± 1.0|55.0 ± 0.0|61.0 ± 1.0|missing"
    assert lines[2] == "down 61.0 ± 1.0|55.0 ± 0.0|51.0 ± 1.0|30.0|missing descending"
    assert lines[3] == "mrpc 1 1 of 5 rows"
    assert lines[4] == "search 1"
    assert lines[5] == "wide true"
