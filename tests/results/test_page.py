"""The HTML page: what it holds, that it loads nothing, and that its controls work in a browser."""

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from kd.errors import InputError
from kd.results.comparison import compare, entries_of, with_details
from kd.results.figures import Figure
from kd.results.gathering import validation_curve, with_expected
from kd.results.maps import LayerMap
from kd.results.page import labels_of, page, picture, svg

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
PRINTED = [
    figure("finetune", 0.095, confidence="printed", digest=""),
    figure("kd", 0.552, confidence="printed", digest=""),
    figure("kd", 0.104, task="mrpc", confidence="printed", digest=""),
]
"""Figures of a paper, whose order as texts is another than as numbers."""


def example() -> str:
    entries = with_expected(entries_of(FIGURES), [{"method": "kd", "student": "2l", "task": "rte", "seed": "0"}])
    comparison = compare(entries, PRINTED, title="A & <B>", protocol="Dev.")
    comparison = with_details(comparison, {"kd0": record("kd0", 17.0), "finetune0": record("finetune0", 12.0)})
    curves = {"kd0": [(1.0, 0.4), (2.0, 0.6)], "finetune0": [(1.0, 0.3), (2.0, 0.5)]}
    maps = {"kd0": [LayerMap("rte", "student", "minilm", "hidden", [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])]}
    return page(comparison, curves, maps, about="made by hand")


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


ALIKE = [
    figure("kd", 0.50, digest="a"),
    figure("kd", 0.52, student="6l", digest="b"),
    figure("kd", 0.54, teacher="base", digest="c"),
    figure("kd", 0.56, teacher="base", init="random", family="r", digest="d"),
    figure("pkd", 0.58, digest="e"),
    figure("kd", 0.59, split="test", digest="a"),
]
"""Rows with one label; the last is the first again, on another split."""
LABELS = ["kd, 3l, minilm", "kd, 6l", "kd, 3l, base, first layers", "kd, 3l, base, random", "pkd"]


def test_rows_of_one_label_are_told_apart_and_none_is_lost_from_a_chart() -> None:
    comparison = compare(entries_of(ALIKE))
    seconds = dict(zip("abcde", range(10, 60, 10), strict=True))
    records = {digest: {**record(digest, 10.0), "seconds": {"train": time}} for digest, time in seconds.items()}
    comparison = with_details(comparison, records)
    curves = {digest: [(1.0, 0.1), (2.0, time / 100)] for digest, time in seconds.items()}
    maps = {d: [LayerMap("rte", "student", "minilm", "hidden", [[0.0, 0.0], [0.0, time]])] for d, time in seconds.items()}
    shown = page(comparison, curves, maps)
    quality, trained, cost, agreement, layers = (part.partition("</h2>")[2] for part in shown.split("<h2>")[2:7])
    validation = quality.partition("</figure>")[0]
    assert re.findall(r'<text class="label"[^>]*>(.*?)<', validation) == LABELS
    assert re.findall(r'<text class="label s.*?>(.*?)<', trained) == LABELS
    assert re.findall(r"<text.*?>(.*?)<", cost) == [
        w for label, time in zip(LABELS, seconds.values(), strict=True) for w in (label, f"{time} s")
    ]
    assert re.findall(r'<text class="label".*?>(.*?)<', agreement) == LABELS
    assert re.findall(r"<div>(.*?) on rte, teacher minilm: hidden</div>", layers) == LABELS


def test_rows_that_nothing_tells_apart_are_numbered() -> None:
    (entry,) = entries_of(ALIKE[:1])
    labels = labels_of([entry, replace(entry, budget="more epochs"), replace(entry, teacher="", budget="fewer")])
    assert list(labels.values()) == ["kd, minilm (1)", "kd, minilm (2)", "kd, no teacher"]


def mapped(*maps: LayerMap, digest: str = "kd0") -> str:
    return page(compare(entries_of(FIGURES)), maps={digest: list(maps)})


def cells(text: str) -> list[tuple[float, float, float, str]]:
    """Position, opacity and tooltip of each cell of the first heat map."""
    found = re.findall(r'<rect x="(.*?)" y="(.*?)" width=".*?" height=".*?" fill-opacity="(.*?)"><title>(.*?)</title>', text)
    return [(float(x), float(y), float(opacity), title) for x, y, opacity, title in found]


def test_a_heat_map_has_its_layers_its_scale_and_its_values() -> None:
    text = mapped(LayerMap("rte", "student", "minilm", "hidden", [[0.0, 0.0, 0.0], [0.0, 0.25, 0.5], [0.0, 0.125, 0.0]]))
    found = cells(text)
    assert [(opacity, title) for _, _, opacity, title in found] == [
        (0.5, "student layer 1, teacher layer 1: 0.25"),
        (1.0, "student layer 1, teacher layer 2: 0.5"),
        (0.25, "student layer 2, teacher layer 1: 0.125"),
    ]
    assert found[0][0] == found[2][0] < found[1][0]
    assert found[0][1] == found[1][1] < found[2][1]
    (chart,) = re.findall(r'<div class="maps">.*?(<svg.*?</svg>)', text)
    assert re.findall(r'class="tick".*?>(.*?)<', chart) == ["1", "2", "1", "2", "0", "0.5"]  # rows, columns, ends of the scale
    assert re.findall(r'class="axis".*?>(.*?)<', chart) == ["teacher layer", "student layer"]


def test_embeddings_are_shown_where_they_are_compared() -> None:
    text = mapped(LayerMap("rte", "student", "minilm", "hidden", [[0.0, 0.0], [1.0, 0.0]]))
    assert [title for *_, title in cells(text)] == ["student layer 1, teacher layer 0: 1"]
    (chart,) = re.findall(r'<div class="maps">.*?(<svg.*?</svg>)', text)
    assert re.findall(r'class="tick".*?>(.*?)<', chart) == ["1", "0", "1", "0", "1"]
    text = mapped(LayerMap("rte", "student", "minilm", "hidden", [[1.0, 0.0], [0.0, 1.0]]))
    assert [title for *_, title in cells(text)] == [
        "student layer 0, teacher layer 0: 1",
        "student layer 1, teacher layer 1: 1",
    ]


def test_equal_maps_are_one_figure_and_many_captions_are_folded() -> None:
    weights = [[0.0, 0.0], [0.0, 1.0]]
    maps = [
        LayerMap(f"t{number}", "student", "minilm", name, weights) for number in range(5) for name in ("hidden", "attention")
    ]
    text = mapped(*maps, LayerMap("t0", "student", "minilm", "other", [[0.0, 0.0], [0.0, 0.5]]))
    figures = re.findall(r"<figure>.*?</figure>", text)
    assert len(figures) == 2
    captions = re.findall(r"<div>(.*?)</div>", figures[0].replace('<div class="maps">', ""))
    assert captions == [f"kd on t{number}, teacher minilm: hidden, attention" for number in range(5)]
    assert "and 2 more" in figures[0]
    assert figures[0].index("t2") < figures[0].index("<details>") < figures[0].index("t3")
    assert "details" not in figures[1]


def test_maps_are_of_the_first_seed_at_hand_and_name_students_of_a_cohort() -> None:
    weights = [[0.0, 0.0], [0.0, 1.0]]
    one = LayerMap("rte", "a", "minilm", "hidden", weights)
    assert "kd on rte, teacher minilm: hidden" in mapped(one, digest="kd2")
    text = mapped(one, replace(one, student="<b>"))
    assert "kd on rte, student a, teacher minilm: hidden" in text
    assert "kd on rte, student &lt;b&gt;, teacher minilm: hidden" in text


def test_a_heat_map_has_two_colours_around_zero_and_numbers_where_they_are_asked_for() -> None:
    matrix = [[0.5, -0.25], [None, 0.0]]
    chart = svg.heat_map(matrix, "head", "layer", "drops", [1, 2], [0, 1], most=0.5, numbers=".2f")
    rects = re.findall(
        r'<rect x="\S+" y="\S+" width="\S+" height="\S+"( class="less")? fill-opacity="(.*?)"><title>(.*?)<', chart
    )
    assert rects == [("", "1.000", "layer 1, head 0: 0.5"), (' class="less"', "0.500", "layer 1, head 1: -0.25")]
    assert re.findall(r'<text class="(value.*?)".*?>(.*?)<', chart) == [
        *(("value on", ".50"), ("value", "-.25")),  # a number on a strong colour is in that of the ground
        *(("value", "-"), ("value", "0")),
    ]
    assert re.findall(r'class="tick".*?>(.*?)<', chart) == ["1", "2", "0", "1", "-0.5", "0.5"]
    assert chart.count("step less") == chart.count('"step"') == 20
    unsigned = svg.heat_map([[0.5]], "head", "layer", "drops", [1], [0])
    assert "less" not in unsigned
    assert "value" not in unsigned
    assert re.findall(r'class="tick".*?>(.*?)<', unsigned) == ["1", "0", "0", "0.5"]
    stronger = svg.heat_map([[0.5]], "head", "layer", "drops", [1], [0], most=0.25)
    assert 'fill-opacity="1.000"><title>' in stronger


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


@pytest.mark.parametrize("count", [2, 40])
def test_every_label_of_a_chart_is_inside_it(count: int) -> None:
    points = [svg.Point(7.0, 50 + value / 100, f"a method with a long name {value}") for value in range(count)]
    series = {f"a method with a long name {value}": [(1.0, 0.0), (2.0, value / 100)] for value in range(count)}
    for chart in (svg.scatter(points, "size", "accuracy", "a"), svg.lines(series, "epoch", "accuracy", "b")):
        width, height = map(float, re.findall(r'viewBox="0 0 (\S+) (\S+)"', chart)[0])
        ends = [float(x) + 6 * len(label) for x, label in re.findall(r'<text class="label[^>]* x="(.*?)".*?>(.*?)<', chart)]
        assert max(ends) <= width
        places = sorted(float(y) for y in re.findall(r'<text class="label[^>]* y="(.*?)"', chart))
        assert len(places) == count
        assert places[0] > 0
        assert places[-1] <= height - svg.BOTTOM + 4
        assert all(after - before >= svg.LINE - 0.11 for before, after in pairwise(places))  # of printed tenths of a pixel


def test_a_picture_is_a_file_of_its_own_with_a_chart_of_the_test_split_if_there_is_one() -> None:
    figures = [*FIGURES, figure("kd", 0.62, 0, split="test"), figure("finetune", 0.52, 0, split="test")]
    sizes = {"kd0": record("kd0", 17.0), "finetune0": record("finetune0", 12.0), "m0": record("m0", 17.0)}
    text = picture(with_details(compare(entries_of(figures)), sizes))
    root = ElementTree.fromstring(text)
    names = {"svg": "http://www.w3.org/2000/svg"}
    assert [found.text for found in root.findall("svg:text", names)] == ["mrpc: validation accuracy", "rte: test accuracy"]
    first, second = root.findall("svg:svg", names)
    titles = [title.text for title in second.iterfind(".//svg:title", names)]
    assert titles == ["kd: 62.00 at 17.00", "finetune: 52.00 at 12.00"]
    assert float(second.attrib["y"]) >= float(first.attrib["y"]) + float(first.attrib["height"])
    assert float(root.attrib["height"]) == float(second.attrib["y"]) + float(second.attrib["height"])
    assert not re.search(r"@import|url\(|href", text)


def test_a_method_has_one_colour_in_a_chart_of_sizes() -> None:
    comparison = with_details(compare(entries_of(ALIKE)), {digest: record(digest, 17.0) for digest in "abcde"})
    validation = page(comparison).partition("Size against quality")[2].partition("</figure>")[0]
    assert re.findall(r'<circle class="(s\d)"', validation) == ["s0", "s0", "s0", "s0", "s1"]


def test_a_picture_of_runs_without_sizes_is_refused() -> None:
    with pytest.raises(InputError, match=r"nothing to draw: .* which --runs names"):
        picture(compare(entries_of(FIGURES)))


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
const paper = names.indexOf("paper");
headers[paper].querySelector("button").click();
out.push(`paper ${texts(paper).join("|")}`);
const map = document.querySelector(".maps svg").getBoundingClientRect();
out.push(`map ${map.width > 150 && map.right <= window.innerWidth}`);
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
    assert lines[3] == "paper 9.5|10.4|55.2||"
    assert lines[4] == "map true"
    assert lines[5] == "mrpc 1 1 of 5 rows"
    assert lines[6] == "search 1"
    assert lines[7] == "wide true"
