"""Turns to figures: against numbers worked out by hand."""

from pathlib import Path
from typing import Any

import pytest

from kd.bench.figures import cells, figures, markdown, measurement_notes, relative, spread, tabulate
from kd.bench.launches import Launches
from kd.bench.workers import Turn

LABELS = {"finetune": "fine-tuning", "live": "pkd, teacher live", "textbrewer": "TextBrewer, padded to 32"}
SECONDS = {"finetune": [9.0, 1.0, 2.0, 4.0], "live": [9.0, 2.0, 3.0, 4.0], "textbrewer": [9.0, 4.0, 4.0, 16.0]}
"""The first is the warm-up."""

MEGABYTES = {"finetune": 100, "live": 150, "textbrewer": 200}


def found() -> dict[str, Any]:
    """Figures of three rounds of 60 examples, 300 tokens; an epoch has 600."""
    fact = {"examples": 60, "tokens": 300, "turns_in_epoch": 10.0, "flops": 8e9, "precision": "32-true", "dtype": "float32"}
    more = {"students": ["random"], "setup_seconds": 1.0, "device": "cpu", "overrides": []}
    facts: dict[str, dict[str, Any]] = {name: {**fact, **more} for name in LABELS}
    facts["live"] |= {"precision": "bf16-mixed", "dtype": "bfloat16"}
    facts["textbrewer"]["losses"] = {"temperature": 10.0}
    peak = {name: [megabytes * 10**6 + place for place in range(4)] for name, megabytes in MEGABYTES.items()}
    rounds = [{name: Turn(SECONDS[name][place], 0.5, 60, peak[name][place]) for name in LABELS} for place in range(4)]
    rates = {"float32": [8e9, 16e9, 4e9], "bfloat16": [32e9]}
    setting = {"method": "pkd", "student": "2l", "teacher": ["minilm"], "task": "file", "precision": "32-true", "repeats": 3}
    machine = {"batch_size": 20, "batch_tokens": None, "hardware": {"cpu": "a cpu", "threads": 2, "gpus": []}}
    return {**setting, **machine, **figures(LABELS, facts, rounds, rates, "finetune")}


def test_median_of_even_and_odd_counts_and_the_ends() -> None:
    assert spread([4.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 4.0}
    assert spread([4.0, 1.0]) == {"median": 2.5, "low": 1.0, "high": 4.0}


def test_ratios_are_taken_within_a_round() -> None:
    # The medians' ratio would be 2: a machine that slows down would show as a slower method.
    assert relative([10.0, 2.0, 4.0], [10.0, 2.0, 1.0]) == {"median": 1.0, "low": 1.0, "high": 4.0}
    with pytest.raises(ValueError, match="zip"):
        relative([1.0], [1.0, 2.0])


def test_figures_leave_the_warm_up_out() -> None:
    candidates = found()["candidates"]
    assert candidates["live"]["seconds"] == [2.0, 3.0, 4.0]
    assert candidates["live"]["warm_up_seconds"] == 9.0
    assert candidates["live"]["time_relative_to_finetune"] == {"median": 1.5, "low": 1.0, "high": 2.0}
    assert candidates["finetune"]["time_relative_to_finetune"] == {"median": 1.0, "low": 1.0, "high": 1.0}


def test_speed_relative_to_the_peer_is_its_time_over_ours() -> None:
    candidates = found()["candidates"]
    assert candidates["live"]["speed_relative_to_textbrewer"] == {"median": 2.0, "low": 4 / 3, "high": 4.0}
    assert candidates["finetune"]["speed_relative_to_textbrewer"] == {"median": 4.0, "low": 2.0, "high": 4.0}


def test_rates_epochs_memory_and_share() -> None:
    every = found()
    live, finetune = every["candidates"]["live"], every["candidates"]["finetune"]
    assert live["examples_per_second"] == {"median": 20.0, "low": 15.0, "high": 30.0}
    assert live["tokens_per_second"] == {"median": 100.0, "low": 75.0, "high": 150.0}
    assert live["seconds_per_epoch"] == {"median": 30.0, "low": 20.0, "high": 40.0}
    assert live["peak_megabytes"] == 150.0
    # 8e9 operations in 2 s, where float32 makes 16e9 a second at its best; in 3 s, where bfloat16 makes 32e9.
    assert finetune["share_of_matrix_product_rate"]["median"] == 0.25
    assert live["share_of_matrix_product_rate"]["median"] == pytest.approx(8 / 3 / 32)
    assert every["examples_per_epoch"] == 600


def test_tables_say_the_same() -> None:
    head, *rows = cells(found())
    assert [len(row) for row in rows] == [len(head)] * 3
    row = dict(zip(head, rows[1], strict=True))
    assert row["candidate"] == "pkd, teacher live (bf16-mixed)"  # another precision than the command's
    assert row["time / fine-tuning"] == "1.50 [1.00, 2.00]"
    assert row["speed / TextBrewer, padded to 32"] == "2.00 [1.33, 4.00]"
    assert row["share of rate"] == "8.3%"
    assert tabulate(found()).row_count == 3
    text = markdown(found())
    assert text.count("\n|") == 5
    assert "1.50 [1.00, 2.00]" in text
    assert "Median [range] of 3 rounds" in measurement_notes(found())[0]


CPU_HEADINGS = ["candidate", "examples/s", "tokens/s", "s/epoch", "peak MB", "share of rate", "time / fine-tuning"]
CPU_FIGURES = (
    "label overrides precision device students warm_up_seconds seconds cpu_seconds setup_seconds examples_per_second "
    "tokens_per_second seconds_per_epoch peak_megabytes flops_per_turn share_of_matrix_product_rate time_relative_to_finetune "
    "speed_relative_to_textbrewer"
).split()


def test_without_a_gpu_the_table_and_the_figures_are_those_of_before() -> None:
    every = found()
    assert cells(every)[0] == [*CPU_HEADINGS, "speed / TextBrewer, padded to 32"]
    assert list(every["candidates"]["live"]) == CPU_FIGURES
    assert len(measurement_notes(every)) == 2


def on_a_gpu() -> dict[str, Any]:
    """Figures of two rounds on a GPU, of fine-tuning and a cached teacher, both also with graphs; 4 steps of 60 examples."""
    labels = {
        "finetune": "fine-tuning",
        "cached": "cached",
        "finetune_graphs": "with graphs",
        "cached_graphs": "cached, graphs",
    }
    seconds = {"finetune": [9, 2, 4], "cached": [9, 3, 4], "finetune_graphs": [9, 1, 1], "cached_graphs": [9, 3, 2]}
    fact = {"examples": 60, "tokens": 300, "turns_in_epoch": 10.0, "flops": 8e9, "precision": "bf16-mixed", "dtype": "bfloat16"}
    more = {"students": ["random"], "setup_seconds": 1.0, "device": "cuda", "overrides": [], "steps": 4}
    facts = {name: {**fact, **more} for name in labels}
    reserved = {name: 10**6 * place for place, name in enumerate(labels, start=1)}
    rounds = [
        {name: Turn(float(seconds[name][place]), 0.5, 60, 10**6, reserved[name] + place) for name in labels}
        for place in range(3)
    ]
    launches = {name: Launches(4000, 0, 4000, 2, 0) for name in ("finetune", "cached")}
    launches |= {name: Launches(400, 48, 4000, 2, 6) for name in ("finetune_graphs", "cached_graphs")}
    rates = {"float32": [8e9], "bfloat16": [16e9, 32e9]}
    setting = {"method": "pkd", "student": "2l", "teacher": ["minilm"], "task": "file", "precision": "bf16-mixed", "repeats": 2}
    machine = {"batch_size": 20, "batch_tokens": None, "hardware": {"cpu": "a cpu", "threads": 2, "gpus": ["a card"]}}
    return {**setting, **machine, **figures(labels, facts, rounds, rates, "finetune", launches)}


def test_what_graphs_gain_is_a_ratio_within_rounds() -> None:
    candidates = on_a_gpu()["candidates"]
    assert candidates["finetune_graphs"]["time_relative_to_no_graphs"] == {"median": 0.375, "low": 0.25, "high": 0.5}
    assert candidates["cached_graphs"]["time_relative_to_no_graphs"] == {"median": 0.75, "low": 0.5, "high": 1.0}
    assert candidates["cached_graphs"]["time_relative_to_finetune"] == {"median": 1.0, "low": 0.5, "high": 1.5}
    assert "time_relative_to_no_graphs" not in candidates["finetune"]


def test_a_step_on_a_gpu_has_its_launches_and_its_share_of_the_cards_rate() -> None:
    every = on_a_gpu()
    graphs = every["candidates"]["finetune_graphs"]
    assert graphs["per_step"] == {
        "kernel_launches": 100.0,
        "graph_launches": 12.0,
        "kernels": 1000.0,
        "waits": 0.5,
        "pageable_copies": 1.5,
    }
    assert graphs["peak_reserved_megabytes"] == 3.0
    assert graphs["share_of_matrix_product_rate"]["median"] == 0.25, "8e9 operations in 1 s, of 32e9 in the run's precision"
    head, *rows = cells(every)
    own = ["reserved MB", "time / without graphs", "kernel launches/step", "graph launches/step", "kernels/step", "waits/step"]
    assert head == [*CPU_HEADINGS, *own]
    assert rows[0][-6:] == ["1", "", "1,000.0", "0.0", "1,000.0", "0.5"]
    assert rows[2][-6:] == ["3", "0.38 [0.25, 0.50]", "100.0", "12.0", "1,000.0", "0.5"]
    text = markdown(every)
    assert "| 100.0 | 12.0 | 1,000.0 | 0.5 |" in text
    assert "by torch's profiler in a further turn" in text
    assert tabulate(every).row_count == 4


def test_without_a_count_of_operations_there_is_no_share() -> None:
    every = found()
    every["candidates"]["live"]["share_of_matrix_product_rate"] = None
    head, _, row, _ = cells(every)
    assert dict(zip(head, row, strict=True))["share of rate"] == ""


def test_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from kd.bench.picture import draw

    draw(found(), tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
