"""Definitions of tables: unions of products, labels and overrides, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from kd.errors import InputError
from kd.table.definition import load_table, parse_table, table_names


def content(*products: dict[str, Any], overrides: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    scale = {"overrides": list(overrides), "cells": list(products)}
    return {"paper": "pkd", "title": "A table", "scales": {"local": scale}, **more}


def test_cells_are_a_union_of_products() -> None:
    first = {"method": ["kd", "pkd"], "seed": [0, 1]}
    second = {"method": ["finetune"], "seed": [0]}
    table = parse_table("t", content(first, second, overrides=("task=rte",)))
    assert [cell.overrides for cell in table.cells("local")] == [
        ("task=rte", "method=kd", "seed=0"),
        ("task=rte", "method=kd", "seed=1"),
        ("task=rte", "method=pkd", "seed=0"),
        ("task=rte", "method=pkd", "seed=1"),
        ("task=rte", "method=finetune", "seed=0"),
    ]


def test_a_label_names_a_list_of_overrides() -> None:
    product = {"row": "PKD, last layers", "method": [{"pkd_last": ["method=pkd", "method.layers=last"]}], "student": ["6l"]}
    (cell,) = parse_table("t", content(product)).cells("local")
    assert cell.labels == {"method": "pkd_last", "student": "6l"}
    assert cell.overrides == ("method=pkd", "method.layers=last", "student=6l")
    assert cell.row == "PKD, last layers"


def test_values_are_words_of_hydra() -> None:
    product = {"optimizer.lr": [5.0e-5], "student.width": [None], "compile": [True], "teacher": [["minilm", "minilm_4l"], []]}
    first, second = parse_table("t", content(product)).cells("local")
    assert first.overrides == ("optimizer.lr=5e-05", "student.width=null", "compile=true", "teacher=[minilm,minilm_4l]")
    assert first.labels["teacher"] == "minilm+minilm_4l"
    assert second.overrides[-1] == "teacher=[]"


@pytest.mark.parametrize(
    ("change", "key", "words"),
    [
        ({"paper": None}, "paper", "has no 'paper'"),
        ({"scales": {}}, "scales", "no rows"),
        ({"scales": {"local": {"cells": []}}}, "scales.local.cells", "no rows at scale=local"),
        ({"scales": {"local": {"cells": [{"method": []}]}}}, "scales.local.cells.0", "lists no values of method"),
        ({"scales": {"local": {"cells": [{}]}}}, "scales.local.cells.0", "lists no values"),
        ({"scales": {"local": {"cells": [{"method": "kd"}]}}}, "scales.local.cells.0.method", "a list is needed"),
        ({"scales": {"local": {"rows": []}}}, "scales.local.rows", "it may have overrides, cells"),
        ({"scales": {"local": {"overrides": [1], "cells": []}}}, "scales.local.overrides", "an override"),
        ({"scales": {"local": {"cells": [{"method": [{"a": [], "b": []}]}]}}}, "scales.local.cells.0.method", "not 2"),
        ({"rows": 1}, "table.rows", "it may have paper"),
    ],
)
def test_what_is_no_table_is_refused_with_its_key(change: dict[str, Any], key: str, words: str) -> None:
    values = {name: value for name, value in {**content({"method": ["kd"]}), **change}.items() if value is not None}
    with pytest.raises(InputError, match=words) as caught:
        parse_table("t", values)
    assert caught.value.key == key


def test_a_table_that_does_not_exist_is_told_with_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no table 'nosuch'"):
        load_table("nosuch")
    with pytest.raises(InputError, match="No such file"):
        load_table(str(tmp_path / "mine.yaml"))
    (tmp_path / "mine.yaml").write_text("a: [")
    with pytest.raises(InputError, match="is not YAML"):
        load_table(str(tmp_path / "mine.yaml"))


def test_a_file_of_ones_own_is_a_table(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content({"method": ["kd"]}, protocol="a\n  b", not_run={"x": "why"})))
    table = load_table(str(tmp_path / "mine.yaml"))
    assert (table.name, table.protocol, table.not_run) == ("mine", "a b", {"x": "why"})
    with pytest.raises(InputError, match="no scale=published; it has local"):
        table.cells("published")


def test_tables_of_the_package_are_valid() -> None:
    for name in table_names():
        load_table(name)


def test_tables_of_the_package_say_what_students_begin_with() -> None:
    for name in table_names():
        for scale, cells in load_table(name).scales.items():
            silent = [cell for cell in cells if not any(word.startswith("student.init_from=") for word in cell.overrides)]
            assert not silent, (name, scale)


def test_rows_are_methods_of_the_table_and_others_in_the_cells_of_one_that_it_names() -> None:
    product = {"student": ["3l", "2l"], "method": ["finetune", "kd", {"pkd_last": ["method=pkd", "method.layers=last"]}]}
    table = parse_table("t", content(product, overrides=("task=rte",), new_rows="kd"))
    assert [str(cell) for cell in table.rows("local", ["pkd_last"])] == [
        "student=3l method=pkd_last",
        "student=2l method=pkd_last",
    ]
    listed, mine = table.rows("local", ["mine", "kd"])[:2], table.rows("local", ["mine", "kd", "mine"])[2:]
    assert [cell.labels["method"] for cell in listed] == ["kd", "kd"]
    assert [cell.overrides for cell in mine] == [
        ("task=rte", "student=3l", "method=mine"),
        ("task=rte", "student=2l", "method=mine"),
    ]
    assert [cell.labels for cell in mine] == [{"student": "3l", "method": "mine"}, {"student": "2l", "method": "mine"}]


@pytest.mark.parametrize(("new_rows", "method"), [(None, "mine"), ("kd", "no name"), ("kd", "")])
def test_rows_of_a_method_that_the_table_has_no_cells_for_are_refused(new_rows: str | None, method: str) -> None:
    table = parse_table("t", content({"method": ["finetune", "kd"]}, **({} if new_rows is None else {"new_rows": new_rows})))
    with pytest.raises(InputError, match="finetune, kd") as caught:
        table.rows("local", [method])
    assert caught.value.key == "rows"


@pytest.mark.parametrize("name", ["pkd", "pkd_last", "finetune,kd"])
def test_cells_of_new_rows_are_those_of_a_word_of_the_table(name: str) -> None:
    product = {"method": ["finetune", {"pkd_last": ["method=pkd", "method.layers=last"]}]}
    with pytest.raises(InputError, match="other methods take") as caught:
        parse_table("t", content(product, new_rows=name))
    assert caught.value.key == "new_rows"
