"""Report of a sweep as a person calls it: settings with intervals, failures with reasons, and every file of the folder."""

import csv
import html.parser
import itertools
import json
import os
import pathlib
import re
import time

import numpy as np
import pytest
import yaml

from research.sweep.statistics import holm

BASE = {
    "name": "small",
    "data": {"_target_": "research.data.digits.digits", "batch": 10, "validation": 0.1, "spec": {"classes": 10}},
    "model": {"_target_": "research.models.mlp.MLP", "width": 8},
    "objective": {"_target_": "research.objectives.classify.Classify", "module": {"_target_": "research.models.mlp.MLP", "width": 8}},
    "optimizer": {"_target_": "optax.adamw", "learning_rate": 1e-3},
    "schedule": {"warmup": 0},
    "train": {"steps": 100},
    "seed": 0,
}


def planted(folder, swept, seeds, score, *, states=None, base=BASE, steps=5, sweep=True):
    """A sweep as `research.train -m` leaves it: score(values, seed) is test/accuracy; states: number of the trial -> (state, reason)."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (*values, seed) in enumerate(itertools.product(*swept.values(), seeds)):
        config = json.loads(json.dumps({**base, "seed": seed}))
        for key, value in zip(swept, values, strict=True):
            *parents, last = key.split(".")
            node = config
            for name in parents:
                node = node[name]
            node[last] = value
        config["objective"]["module"] = dict(config["model"])
        state, reason = (states or {}).get(number, ("finished", None))
        found = float(score(dict(zip(swept, values, strict=True)), seed))
        metrics = {"test/accuracy": found, "test/loss": 1 - found} if state == "finished" else {}
        name = f"{number:012x}"
        overrides = [f"{key}={value}" for key, value in zip(swept, values, strict=True)] + [f"seed={seed}"]
        line = {"trial": name, "number": number, "overrides": overrides, "state": state, "run": name, "metrics": metrics, "reason": reason}
        lines += [{**line, "state": "running", "metrics": {}}, {**line, "seconds": 2.0 + number % 3}]
        if state == "failed":
            continue  # before it had a folder
        run = folder / name
        run.mkdir()
        (run / "config.yaml").write_text(yaml.dump(config, Dumper=yaml.CSafeDumper))
        result = {"status": state, "step": 100, "params": 26 * config["model"]["width"], "metrics": metrics, "train_s": 1.0, "peak_bytes": 4e8}
        (run / "result.json").write_text(json.dumps({**result, "train_flops_per_example": 100 * config["model"]["width"], "reason": reason}))
        curve = [{"step": 100 * (i + 1) // steps, "validation/accuracy": found * (1 - 0.6 ** (i + 1))} for i in range(steps)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in curve))
    if sweep:
        (folder / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def around(values, seed):
    """Best at 0.003 and wide, with a part that a seed gives to all settings."""
    noise = np.random.default_rng([seed, int(1e7 * values["optimizer.learning_rate"])]).normal(0, 0.004)
    shared = np.random.default_rng(seed).normal(0, 0.01)
    return 0.9 - 0.05 * np.log10(values["optimizer.learning_rate"] / 3e-3) ** 2 + 0.001 * np.log2(values.get("model.width", 8)) + noise + shared


RATES = {"optimizer.learning_rate": [1e-4, 3e-3, 1e-2]}


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A sweep of two keys and three seeds in which one trial failed, one was pruned, one diverged and one line of the ledger is cut."""
    ends = {1: ("failed", "width=<b>0</b> | must be above 0"), 4: ("pruned", "median at step 40"), 8: ("diverged", "loss was nan")}
    folder = planted(tmp_path_factory.mktemp("sweeps") / "grid", {**RATES, "model.width": [8, 16, 32, 64]}, range(3), around, states=ends)
    with open(folder / "ledger.jsonl", "a") as file:
        file.write('{"trial": "cut off\n')
    return folder


@pytest.fixture(scope="module")
def told(command, grid):
    """What the command says of it."""
    return command("report", f"sweep={grid}")


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class Reader(html.parser.HTMLParser):
    """What a browser would see of the page."""

    def __init__(self, text):
        super().__init__()
        self.text, self.images, self.loads, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.images += [found["src"]] if tag == "img" else []
        self.loads += [found[name] for name in ("href", "src") if name in found and not found[name].startswith("data:image/png;base64,")]
        if tag in ("table", "tr", "td", "th", "div", "details", "p", "h2"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and tag in ("table", "tr", "td", "th", "div", "details", "p", "h2"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_a_sweep_leaves_its_report_in_its_own_folder(told, grid):
    assert told.code == 0, told.err
    named = ("report.csv", "report.json", "report.md", "report.html", "settings.csv")
    figures = ("scores", "curves", "heat", "response", "parallel", "importance", "cost")
    assert sorted(os.listdir(grid / "report")) == sorted([*named, *(f"{name}.png" for name in figures)])
    assert all((grid / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in figures)
    assert all(f"wrote {grid / 'report' / name}" in told.out for name in named)


def test_rates_at_several_widths_are_drawn_beside_each_other(command, tmp_path):
    swept = {"model.base": [None, 8], "model.width": [8, 32], "optimizer.learning_rate": [1e-3, 3e-3, 1e-2]}
    folder = planted(tmp_path / "widths", swept, [0, 1], around, base={**BASE, "model": {**BASE["model"], "base": None}})
    assert command("report", f"sweep={folder}").code == 0
    assert not (folder / "report" / "transfer.png").exists()  # these runs have no loss of validation
    assert command("report", f"sweep={folder}", "metric=test/loss").code == 0
    assert (folder / "report" / "transfer.png").read_bytes().startswith(b"\x89PNG")
    assert "The best learning rate at each width" in (folder / "report" / "report.html").read_text()


def test_settings_have_means_and_corrected_differences(told, grid):
    found = rows(grid / "report" / "settings.csv")
    assert len(found) == 12
    first = found[0]
    assert (first["optimizer.learning_rate"], first["model.width"], first["n"]) == ("0.003", "64", "3")
    scores = [around({"optimizer.learning_rate": 3e-3, "model.width": 64}, seed) for seed in range(3)]
    np.testing.assert_allclose([float(first[name]) for name in ("mean", "deviation")], [np.mean(scores), np.std(scores, ddof=1)])
    np.testing.assert_allclose(float(first["test/loss mean"]), 1 - np.mean(scores))
    np.testing.assert_allclose([float(first[name]) for name in ("flops", "seconds")], [100 * 64 * 100 * 10, 3.0])
    other = next(row for row in found if (row["optimizer.learning_rate"], row["model.width"]) == ("0.01", "64"))
    gaps = [around({"optimizer.learning_rate": 1e-2, "model.width": 64}, seed) - scores[seed] for seed in range(3)]
    np.testing.assert_allclose(float(other["difference"]), np.mean(gaps))
    assert other["pairs"] == "3"
    p, corrected = (np.array([float(row[name]) for row in found[1:]]) for name in ("p", "p_corrected"))
    np.testing.assert_allclose(corrected, holm(p))
    assert corrected.min() > 5 * p.min()  # of eleven comparisons


def test_what_has_no_score_is_counted_and_has_its_reason(told, grid):
    assert "skipped: " in told.out
    assert "not JSON" in told.out
    for line in ("failed: learning_rate=0.0001 width=8 seed=1: width=<b>0</b> | must be above 0", "diverged: ", "pruned: "):
        assert line in told.out
    held = {(row["optimizer.learning_rate"], row["model.width"]): row for row in rows(grid / "report" / "settings.csv")}
    assert [held["0.0001", width]["n"] for width in ("8", "16", "32", "64")] == ["2", "2", "2", "3"]
    assert [held["0.0001", width]["without_score"] for width in ("8", "64")] == ["1", "0"]
    trials = rows(grid / "report" / "report.csv")
    assert len(trials) == 36
    assert {row["status"]: row["reason"] for row in trials}["pruned"] == "median at step 40"
    page = json.loads((grid / "report" / "report.json").read_text())
    assert len(page["comparison"]["failures"]) == 3


def test_the_page_needs_nothing_else_and_is_escaped(told, grid):
    text = (grid / "report" / "report.html").read_text()
    page = Reader(text)
    assert (len(page.images), page.loads, page.open) == (7, [], [])
    assert "<b>0</b>" not in text
    assert "width=<b>0</b> | must be above 0" in page.text
    assert "36 runs" in page.text
    markdown = (grid / "report" / "report.md").read_text()
    assert r"width=\<b\>0\</b\> \| must be above 0" in markdown
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if line.startswith("| 0.0")}
    assert len(widths) == 1  # no cell breaks its row


def test_the_best_is_marked_only_where_it_is_apart(command, tmp_path):
    apart = planted(tmp_path / "apart", RATES, range(5), around)
    told = command("report", f"sweep={apart}")
    assert told.code == 0, told.err
    assert "best: learning_rate=0.003: test/accuracy" in told.out
    assert "apart from all 2 others" in told.out
    assert '<tr class="best">' in (apart / "report" / "report.html").read_text()
    assert json.loads((apart / "report" / "report.json").read_text())["comparison"]["best"] == {"optimizer.learning_rate": 0.003}
    alike = planted(
        tmp_path / "alike", RATES, range(5), lambda values, seed: np.random.default_rng([seed, int(1e7 * sum(values.values()))]).uniform()
    )
    told = command("report", f"sweep={alike}")
    assert "highest: learning_rate=" in told.out
    assert "not apart from: learning_rate=" in told.out
    assert '<tr class="best">' not in (alike / "report" / "report.html").read_text()


def test_one_seed_has_no_interval_and_no_best(command, tmp_path):
    told = command("report", f"sweep={planted(tmp_path / 'one', RATES, [0], around)}")
    assert told.code == 0, told.err
    assert "each setting has one run, so there is no interval and no best is marked: seeds=5 gives one" in told.out
    assert "95 %" not in told.out


def test_loose_runs_are_grouped_the_same_way(command, tmp_path):
    planted(tmp_path / "runs", RATES, range(4), around, sweep=False)
    told = command("report", f"runs={tmp_path}/runs/**", f"out={tmp_path / 'out'}")
    assert told.code == 0, told.err
    loose = rows(tmp_path / "out" / "settings.csv")
    planted(tmp_path / "sweep", RATES, range(4), around)
    assert command("report", f"sweep={tmp_path / 'sweep'}").code == 0
    swept = rows(tmp_path / "sweep" / "report" / "settings.csv")
    same = ("optimizer.learning_rate", "n", "mean", "t_low", "bootstrap_high", "p_corrected")
    assert [[row[name] for name in same] for row in loose] == [[row[name] for name in same] for row in swept]
    planted(tmp_path / "runs" / "others", RATES, range(2), around, sweep=False, base={**BASE, "name": "other"})
    told = command("report", f"runs={tmp_path}/runs/**", f"out={tmp_path / 'both'}")
    assert told.code == 0, told.err
    assert "no settings are compared: the runs are of several experiments, small (12), other (6)" in told.out
    assert len(rows(tmp_path / "both" / "report.csv")) == 18
    assert not (tmp_path / "both" / "settings.csv").exists()
    told = command("report", f"runs={tmp_path}/runs/**", f"out={tmp_path / 'other'}", "name=other")
    assert (told.code, len(rows(tmp_path / "other" / "settings.csv"))) == (0, 3), told.err


def test_groups_are_swept_by_name_and_folds_are_repeats(command, tmp_path):
    """optimizer=adam,sgd changes many keys and is one; data.validation=0/3, 1/3, 2/3 is one setting."""
    folder = planted(tmp_path / "sweep", {"optimizer.learning_rate": [1e-3], "data.validation": ["0/3", "1/3", "2/3"]}, [0], around)
    second = planted(tmp_path / "second", {"optimizer.learning_rate": [1e-2], "data.validation": ["0/3", "1/3", "2/3"]}, [0], around)
    lines = []
    for place, group in ((folder, "adamw"), (second, "sgd")):
        for line in (place / "ledger.jsonl").read_text().splitlines():
            trial = json.loads(line)
            name = trial["trial"][:-1] + ("a" if group == "sgd" else "b") + trial["trial"][-1:]
            trial["overrides"] = [f"optimizer={group}", *trial["overrides"][1:]]
            if (place / trial["run"]).exists():
                config = yaml.safe_load((place / trial["run"] / "config.yaml").read_text())
                config["optimizer"] = {"_target_": f"optax.{group}", "learning_rate": 0.1, group: 1}
                (place / trial["run"] / "config.yaml").write_text(yaml.safe_dump(config))
                (place / trial["run"]).rename(folder / name)
            lines.append(json.dumps(trial | {"trial": name, "run": name}))
    (folder / "ledger.jsonl").write_text("\n".join(lines))
    told = command("report", f"sweep={folder}")
    assert told.code == 0, told.err
    found = rows(folder / "report" / "settings.csv")
    assert sorted((row["optimizer"], row["n"]) for row in found) == [("adamw", "3"), ("sgd", "3")]
    assert next(iter(found[0])) == "optimizer"


BAD = {
    "no folder": (("sweep={grid}/nothing",), "there is no such folder"),
    "no ledger": (("sweep={grid}/000000000000",), "there is no ledger.jsonl in it"),
    "a metric": (("sweep={grid}", "metric=test/acuracy"), "metric='test/acuracy': no run here has it; did you mean 'test/accuracy'?"),
    "a key of heat": (("sweep={grid}", "heat=[width,optimizer.learning_rat]"), "heat: 'optimizer.learning_rat' was not swept; did you mean"),
    "one key of heat": (("sweep={grid}", "heat=[width]"), "must be two swept keys, as [optimizer.learning_rate,model.width]"),
    "an experiment": (("sweep={grid}", "name=smal"), "name='smal': no run here has it; did you mean 'small'?"),
    "a budget alone": (("sweep={grid}", "budget=1e9"), "add scaling=true"),
    "a negative budget": (("sweep={grid}", "scaling=true", "budget=-1"), "budget=-1: must be a number of FLOPs"),
    "no loss": (("sweep={grid}", "scaling=true", "metric=test/accuracy"), "a scaling law is one of a loss"),
    "no tokens": (("sweep={grid}", "scaling=true"), "it must be a language model's"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_in_one_line(case, command, grid, tmp_path):
    argv, message = BAD[case]
    told = command("report", *(entry.format(grid=grid) for entry in argv), f"out={tmp_path}")
    assert told.code == 2
    assert message in told.err[-1]


def test_a_sweep_without_a_finished_trial_or_of_two_experiments_is_refused(command, tmp_path):
    ends = dict.fromkeys(range(3), ("failed", "the disk is full"))
    folder = planted(tmp_path / "failed", RATES, [0], around, states=ends)
    told = command("report", f"sweep={folder}")
    assert told.code == 2
    assert "none of the 3 runs finished (3 failed); the first: [optimizer.learning_rate=0.0001 seed=0] the disk is full" in told.err[-1]
    folder = planted(tmp_path / "mixed", RATES, [0], around)
    path = folder / "000000000001" / "config.yaml"
    path.write_text(path.read_text().replace("name: small", "name: other"))
    told = command("report", f"sweep={folder}")
    assert told.code == 2
    assert "the runs are of several experiments, small (2), other (1), whose scores are not compared; name=small takes those alone" in told.err[-1]
    assert command("report", f"sweep={folder}", "name=small").code == 0


@pytest.mark.slow
def test_five_hundred_trials_take_less_than_ten_seconds(command, tmp_path):
    """The processor's time is held against the bar, since others may share the machine."""
    rates = [float(rate) for rate in np.geomspace(1e-4, 1e-1, 10)]
    swept = {"optimizer.learning_rate": rates, "model.width": [8, 16, 32, 64, 128], "schedule.warmup": [0, 10]}
    folder = planted(tmp_path / "sweep", swept, range(5), around, steps=20)
    start = time.process_time()
    told = command("report", f"sweep={folder}")
    assert time.process_time() - start < 10
    assert told.code == 0, told.err
    assert len(rows(folder / "report" / "report.csv")) == 500
    assert len(rows(folder / "report" / "settings.csv")) == 100


@pytest.mark.slow
def test_a_real_sweep_is_reported(command, tmp_path):
    """What `research.train -m` writes is what is read: four runs, two settings."""
    small = (
        "experiment=digits_mlp",
        "train.chunk=1",
        "model.width=8",
        "model.depth=1",
        "train.steps=20",
        "train.eval_every=10",
        "logger.tensorboard=false",
    )
    argv = ("-m", *small, "optimizer.learning_rate=1e-4,1e-2", "seed=0,1", "hydra/launcher=compiled", f"sweep_dir={tmp_path / 'sweep'}")
    assert command("train", *argv).code == 0
    told = command("report", f"sweep={tmp_path / 'sweep'}")
    assert told.code == 0, told.err
    found = rows(tmp_path / "sweep" / "report" / "settings.csv")
    assert [(row["optimizer.learning_rate"], row["n"]) for row in found] == [("0.01", "2"), ("0.0001", "2")]
    result = [json.loads(path.read_text())["metrics"]["test/accuracy"] for path in pathlib.Path(tmp_path / "sweep").glob("*/result.json")]
    np.testing.assert_allclose(np.mean([float(row["mean"]) for row in found]), np.mean(result))
    assert all(float(row["flops"]) > 0 for row in found)
