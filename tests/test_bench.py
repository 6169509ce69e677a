"""`make bench`: what its table says, and what it refuses."""

import json
import pathlib
import runpy

import pytest

from research.core import folder
from research.core.overrides import Composer

FILE = pathlib.Path(folder.experiments()) / "bench" / "bench.py"
ENTRY = {
    "device": "2 CPU cores",
    "measured": "2026-11-26",
    "ms_per_step": 40.0,
    "ratio": 0.9,
    "ratios": [0.8, 0.9, 1.0],
    "busy": 0.01,
    "steps": 60,
    "items_per_s": 20000.0,
    "utilisation": 0.3,
    "peer": {"ms_per_step": 44.0, "variant": "eager"},
}


@pytest.fixture
def bench(tmp_path):
    """The script's names, its results in a folder of their own."""
    names = runpy.run_path(str(FILE))
    names["main"].__globals__.update({"TABLE": tmp_path / "table.json", "MARKDOWN": tmp_path / "table.md", "FIGURE": tmp_path / "context.png"})
    return names


def test_a_row_is_judged_by_its_bar_on_a_quiet_machine(bench):
    verdict = bench["verdict"]
    assert verdict("gpt", ENTRY) == "met"
    assert verdict("gpt", {**ENTRY, "ratio": 1.01}) == "MISSED"
    assert verdict("gpt", {**ENTRY, "busy": 0.5}) == "machine busy"
    assert verdict("gpt", {"failed": "why"}) == "FAILED"
    assert verdict("gpt2_124m", {**ENTRY, "ratio": 5.0}) == ""
    assert verdict("quickstart", {"cold_s": 14.0, "warm_s": 4.0}) == "met"
    assert verdict("quickstart", {"cold_s": 14.0, "warm_s": 6.0}) == "MISSED"


def test_parts_are_kept_beside_each_other_and_the_worst_decides(bench, tmp_path, capsys):
    told = {"gpt": ENTRY, "cnn": {**ENTRY, "ratio": 1.5}}
    bench["main"].__globals__["_beside_torch"] = lambda row, extra: told["gpt" if row.experiment == "shakespeare_char_cpu" else "cnn"]
    assert bench["main"](["gpt"]) == 0
    assert bench["main"](["cnn", "steps=3"]) == 1
    assert set(json.loads((tmp_path / "table.json").read_text())) == {"gpt", "cnn"}
    page = (tmp_path / "table.md").read_text()
    assert page in capsys.readouterr().out
    assert "| GPT 4x128, batch 12 x 64 | 40.00 | 44.00 (eager) | 0.90 (0.80, 0.90, 1.00) | 1 | met | 20,000 | 30.0% | 180 |" in page
    assert "1.50" in page
    assert "MISSED" in page


def test_what_cannot_be_measured_here_is_refused_in_one_line(bench, capsys):
    for argument, words in (("gtp", "there is no part 'gtp'"), ("gpu", "needs an NVIDIA GPU")):
        assert bench["main"]([argument]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert words in lines[0]


def test_every_row_is_a_config(bench):
    composer = Composer("benchmark")
    for row in {**bench["ROWS"], **bench["GPU"]}.values():
        config = composer.load(composer.check([f"experiment={row.experiment}", "peer=torch", *row.overrides]))
        length = f" x {config.data.time}" if "time" in config.data else ""
        assert row.title.endswith(f"batch {config.data.batch}{length}")


@pytest.mark.slow
def test_devices_hold_their_part(bench, capsys):
    assert bench["main"](["devices"]) == 0
    assert "over 1/n" in capsys.readouterr().out
    points = json.loads(bench["main"].__globals__["TABLE"].read_text())["devices"]["points"]
    assert [point["devices"] for point in points] == [1, 2, 4, 8]
    for point in points:
        assert point["bytes"] == point["told"] == pytest.approx(points[0]["bytes"] / point["devices"], rel=0.01)


def test_sweeps_are_judged_by_the_whole_command(bench):
    point = {"cold_s": 10.0, "warm_s": 5.0, "trials": 32, "added_s": 0.25, "train_s": 0.2, "told": "how"}
    entry = {"device": "2 CPU cores", "measured": "2026-11-27", "points": [{**point, "launcher": name} for name in bench["LAUNCHERS"]]}
    assert bench["verdict"]("sweeps", entry) == "MISSED"
    for one in entry["points"][-2:]:  # the other launchers
        one["cold_s"] = 90.0
    assert bench["verdict"]("sweeps", entry) == "met"
    page = bench["markdown"]({"sweeps": entry})
    assert "| basic | 90.0 | 9.00 | 8 | 5.0 | how | 0.25 |" in page
    assert "in a lone run training\nalone takes 0.20 s" in page
