"""The file of a run's maps of layers: what is read is what was written, and a damaged file is none."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from kd.results.maps import LayerMap, read_maps, write_maps
from kd.runs.run import write_record

MAPS = [
    LayerMap("rte", "student", "minilm", "hidden", [[0.0, 0.0, 0.0], [0.0, 0.25, 0.75]]),
    LayerMap("sst2", "a", "base", "attention", [[1.0, 0.0]]),
]
SELECTION = {"kind": "best", "epoch": 2}


def test_maps_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_maps(tmp_path, MAPS, SELECTION)
    assert read_maps(tmp_path) == MAPS
    assert json.loads((tmp_path / "maps.json").read_text())["selection"] == SELECTION
    assert [path.name for path in tmp_path.iterdir()] == ["maps.json"]


def test_without_maps_there_is_no_file(tmp_path: Path) -> None:
    write_maps(tmp_path, MAPS, SELECTION)
    write_maps(tmp_path, [], SELECTION)
    assert not list(tmp_path.iterdir())
    assert read_maps(tmp_path) == []


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_file_that_is_cut_or_changed_is_none(tmp_path: Path, share: float) -> None:
    write_maps(tmp_path, MAPS, SELECTION)
    path = tmp_path / "maps.json"
    text = path.read_text()
    path.write_text(text[: int(share * len(text))])
    assert read_maps(tmp_path) == []
    path.write_text(text.replace("0.75", "0.85"))
    assert read_maps(tmp_path) == []
    path.write_bytes(b"\xff\xfe")
    assert read_maps(tmp_path) == []


@pytest.mark.parametrize(
    "change",
    [
        {"weights": []},
        {"weights": [[]]},
        {"weights": [[0.5], [0.5, 0.5]]},
        {"weights": [[-0.5]]},
        {"weights": [["0.5"]]},
        {"weights": 0.5},
        {"weights": [0.5]},
        {"weights": None},
        {"name": 3},
        {"more": 3},
    ],
    ids=str,
)
def test_a_file_of_another_program_is_none(tmp_path: Path, change: dict[str, object]) -> None:
    write_record(tmp_path / "maps.json", {"maps": [{**asdict(MAPS[0]), **change}]})
    assert read_maps(tmp_path) == []
    write_record(tmp_path / "maps.json", {"maps": change})
    assert read_maps(tmp_path) == []
