"""Report as a person calls it: many run folders, some of them broken, as one table, its files and its figure."""

import csv
import json

import pytest
import yaml

from research.compression import ledger

RUN = ("experiment=digits_mlp", "train.chunk=1", "model.width=8", "model.depth=1", "train.steps=4", "train.eval_every=2", "train.log_every=2")
QUIET = ("logger.figures=false", "logger.tensorboard=false", "logger.progress=none")


def write(folder, *, accuracy=0.9, method=None, parent=None, status="finished", **sizes):
    """A run folder as the verbs leave it, as far as report reads it."""
    folder.mkdir(parents=True)
    made = [{"method": method, "parent": {"run": str(parent)}}] if method else []
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": "small", "compression": made}))
    metrics = {"test/accuracy": accuracy, "test/loss": None}
    (folder / "result.json").write_text(json.dumps({"status": status, "step": 10, "params": 100, "metrics": metrics, "train_s": 2.0}))
    if method:
        latency = {rows: {which: {"median_ms": ms} for which, ms in (("before", 8.0), ("after", 4.0))} for rows in ("1", "64")}
        both = {"before": {"parameters": 100, "bytes": 400}, "after": {"parameters": 100, "bytes": sizes["bytes"]}}
        scores = {"accuracy": {"before": [0.95, 0.9, 1.0], "after": [accuracy, 0.5, 1.0]}}
        ledger = {"split": "test", "sizes": both, "latency": latency, "stages": [{"seconds": 1.5}], "metrics": scores}
        (folder / "compression.json").write_text(json.dumps(ledger))
    return folder


@pytest.fixture
def runs(tmp_path):
    """A parent and two that were made of it, one of them deeper."""
    parent = write(tmp_path / "runs" / "parent", accuracy=0.95)
    write(tmp_path / "runs" / "wanda", accuracy=0.9, method="prune/wanda", parent=parent, bytes=212)
    write(tmp_path / "runs" / "more" / "int8", accuracy=0.94, method="quantize/int8", parent=parent, bytes=100)
    return tmp_path / "runs"


def rows(folder):
    with open(folder / "report.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_one_row_a_run_with_the_figure(command, runs, tmp_path):
    told = command("report", f"runs={runs}/**", f"out={tmp_path / 'out'}")
    assert told.code == 0, told.err
    found = {row["run"].removeprefix(f"{runs}/"): row for row in rows(tmp_path / "out")}
    assert list(found) == ["more/int8", "parent", "wanda"]
    assert [found["wanda"][name] for name in ("method", "bytes", "ms", "seconds", "test/accuracy")] == ["prune/wanda", "212", "4.0", "3.5", "0.9"]
    assert [found["parent"][name] for name in ("method", "bytes", "ms", "seconds")] == ["", "400", "8.0", "2.0"]  # as its children measured it
    first = json.loads((tmp_path / "out" / "report.json").read_text())["runs"][0]
    assert (first["bytes"], first["intervals"]) == (100, {"test/accuracy": [0.5, 1.0]})
    assert (tmp_path / "out" / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "quantize/int8" in told.out


@pytest.mark.parametrize(
    ("pattern", "fitting"),
    [("*", ["parent", "wanda"]), ("**/int8", ["more/int8"]), ("m*/*", ["more/int8"]), ("parent", ["parent"]), ("**/[pw]*", ["parent", "wanda"])],
)
def test_a_pattern_chooses_folders(command, runs, tmp_path, pattern, fitting):
    assert command("report", f"runs={runs}/{pattern}", f"out={tmp_path / 'out'}").code == 0
    assert [row["run"].removeprefix(f"{runs}/") for row in rows(tmp_path / "out")] == fitting


def test_a_relative_pattern_starts_where_the_command_runs(command, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(runs.parent)
    before = sorted(tmp_path.rglob("*"))
    told = command("report", "runs=runs/*")
    assert told.code == 0, told.err
    assert "run in runs" in told.out
    assert sorted(tmp_path.rglob("*")) == before  # without `out` nothing is written


@pytest.mark.parametrize(("sort", "order"), [("bytes", [100, 212, 400]), ("-bytes", [400, 212, 100]), ("-test/accuracy", [400, 100, 212])])
def test_rows_are_sorted_by_any_column(command, runs, tmp_path, sort, order):
    (runs / "going").mkdir()
    (runs / "going" / "config.yaml").write_text("name: small\n")
    told = command("report", f"runs={runs}/**", f"out={tmp_path / 'out'}", f"sort={sort}")
    assert told.code == 0, told.err
    assert [row["bytes"] for row in rows(tmp_path / "out")] == [*map(str, order), ""]  # what has no value comes last
    assert "going (running)" in told.out


def test_broken_folders_are_named_and_left_out(command, runs, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text('{"status": "finished", "metrics": {"test/accuracy": 1.0}}')
    contents = {"cut": '{"status":', "list": "[1]", "number": '{"metrics": 3}'}
    for name, text in contents.items():
        write(runs / name)
        (runs / name / "result.json").write_text(text)
    (write(runs / "linked") / "result.json").unlink()
    (runs / "linked" / "result.json").symlink_to(secret)
    (write(runs / "nameless") / "config.yaml").write_text("seed: 0\n")
    write(tmp_path / "elsewhere" / "run")
    (runs / "out").symlink_to(tmp_path / "elsewhere")
    told = command("report", f"runs={runs}/**", f"out={tmp_path / 'out'}")
    assert told.code == 0, told.err
    assert len(rows(tmp_path / "out")) == 3
    said = {line.split(": ")[1].removeprefix(f"{runs}/"): line for line in told.out.splitlines() if line.startswith("left out: ")}
    assert set(said) == {*contents, "linked", "nameless"}
    assert "result.json is not JSON: line 1" in said["cut"]
    assert "result.json is a link" in said["linked"]
    assert "does not hold what a run writes" in said["nameless"]


def test_settings_are_columns_and_names_of_points(command, runs, tmp_path):
    for name, node in (("parent", {"width": [8, 16], "kernel": 3}), ("wanda", {"width": [4], "kernel": None})):
        path = runs / name / "config.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "model": node}))
    told = command("report", f"runs={runs}/*", f"out={tmp_path / 'out'}", "settings=[model.width,model.kernel]", "sort=model.width")
    assert told.code == 0, told.err
    assert [(row["model.width"], row["model.kernel"]) for row in rows(tmp_path / "out")] == [("[4]", ""), ("[8, 16]", "3")]
    assert "[8,16]" in told.out
    told = command("report", f"runs={runs}/*", "settings=[model.widht]")
    assert told.code == 2
    assert "settings: no run here has 'model.widht'; did you mean 'model.width'?" in told.err[-1]


BAD = {
    "no run": (("runs={folder}/nothing/**",), "fits no folder of a run"),
    "a column": (("runs={folder}/**", "sort=byte"), "sort='byte': there is no such column; did you mean 'bytes'?"),
    "a batch": (("runs={folder}/**", "latency=0"), "latency=0: must be a number of examples, as 256, or null"),
    "a metric": (("runs={folder}/**", "metric=test/acuracy"), "metric='test/acuracy': no run here has it; did you mean 'test/accuracy'?"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_in_one_line(case, command, runs):
    argv, message = BAD[case]
    told = command("report", *(entry.format(folder=runs) for entry in argv))
    assert told.code == 2
    assert message in told.err[-1]


def test_real_runs_are_read_and_timed(command, tmp_path, monkeypatch):
    parent, small = tmp_path / "runs" / "parent", tmp_path / "runs" / "small"
    assert command("train", *RUN, *QUIET, f"run_dir={parent}").code == 0
    little = ("calibration.examples=32", "calibration.batch=16", "ledger.latency=false", "ledger.figures=false")
    told = command("compress", f"run={parent}", f"run_dir={small}", "method=prune/magnitude", "method.sparsity=0.75", *little)
    assert told.code == 0, told.err
    broken = write(tmp_path / "runs" / "zzz")  # has a result, and nothing to run
    monkeypatch.setattr(ledger, "ROUNDS", 2)
    told = command("report", f"runs={tmp_path}/runs/**", f"out={tmp_path / 'out'}", "latency=16")
    assert told.code == 0, told.err
    whole, less, dead = rows(tmp_path / "out")
    assert 0 < float(whole["ms"]) < 1e3
    assert 0 < float(less["ms"]) < 1e3
    assert dead["ms"] == ""
    assert f"not timed: {broken}: " in told.out
    assert [whole["parameters"], less["method"]] == ["610", "prune/magnitude"]
    assert 0 < int(less["bytes"]) < 0.5 * int(whole["bytes"])
    assert int(whole["flops_per_example"]) == 2 * (64 * 8 + 8 * 10)
    result = json.loads((small / "result.json").read_text())["metrics"]
    assert float(less["test/accuracy"]) in result.values()
