"""Runs made in memory: how they are grouped, what is said of the best, and what the tables hold."""

import csv
import io
import math

import numpy as np
import pytest
from rich.console import Console

from research.core.errors import ConfigError
from research.sweep import page, pictures
from research.sweep.comparison import choose, compare
from research.sweep.ledger import Trial
from research.sweep.settings import Outcome, group, shorten

MODEL = {"_target_": "MLP", "width": 8}


def outcome(score, *, seed=0, state="finished", number=0, overrides=None, reason=None, metric="test/accuracy", **config):
    """A run; with overrides a trial, which without a config ended before it had one."""
    held = {"name": "small", "seed": seed, "data": {"batch": 10, "spec": {"n": seed}}, "objective": {"module": config.get("model", MODEL)}, **config}
    metrics = {} if score is None else {metric: score}
    if overrides is None:
        return Outcome(f"run{number}", held, {"status": state, "metrics": metrics, "reason": reason})
    trial = Trial(f"{number:012x}", number, tuple(overrides), state, f"{number:012x}", None, metrics, reason, seconds=2.0)
    return Outcome(f"run{number}", held if config or score is not None else {}, {"step": 5, "train_flops_per_example": 7, "peak_bytes": 3}, trial)


def test_runs_are_grouped_by_what_differs_but_for_the_seed():
    runs = [outcome(0.5, seed=seed, model={**MODEL, "width": width}) for width in (8, 16) for seed in (0, 1)]
    found = group(runs)
    assert [setting.values for setting in found] == [{"model.width": 8}, {"model.width": 16}]  # not objective.module.width, not data.spec
    assert [list(setting.scores("test/accuracy")) for setting in found] == [["seed=0", "seed=1"]] * 2


def test_arguments_that_follow_their_target_are_no_key():
    adam, sgd = {"_target_": "adam", "b1": 0.9, "learning_rate": 0.1}, {"_target_": "sgd", "learning_rate": 0.1}
    runs = [outcome(0.5, optimizer=node) for node in (adam, sgd, {**sgd, "learning_rate": 0.2})]
    assert [setting.values for setting in group(runs)] == [
        {"optimizer._target_": "adam", "optimizer.learning_rate": 0.1},
        {"optimizer._target_": "sgd", "optimizer.learning_rate": 0.1},
        {"optimizer._target_": "sgd", "optimizer.learning_rate": 0.2},
    ]


def test_a_trial_without_a_config_belongs_where_it_was_typed():
    typed = [["optimizer.learning_rate=1e-3", f"seed={seed}"] for seed in (0, 1)]
    runs = [outcome(0.5, overrides=typed[0], optimizer={"learning_rate": 1e-3})]
    runs += [outcome(None, overrides=typed[1], number=1, state="failed", reason="no disk")]
    runs += [outcome(None, overrides=["optimizer.learning_rate=2e-3", "seed=0"], number=2, state="failed")]
    found = group(runs)
    assert [(setting.values, setting.missed) for setting in found] == [
        ({"optimizer.learning_rate": 1e-3}, {"failed": 1}),
        ({"optimizer.learning_rate": 2e-3}, {"failed": 1}),
    ]
    assert runs[1].replicate == "seed=1"


def test_one_seed_twice_is_one_score():
    assert group([outcome(0.5), outcome(0.7, number=1)])[0].scores("test/accuracy") == {"seed=0": 0.5}


def test_names_are_short_where_that_is_clear():
    assert shorten(["model.width", "optimizer.b", "data.b"]) == {"model.width": "width", "optimizer.b": "optimizer.b", "data.b": "data.b"}


def test_a_loss_is_best_where_it_is_least_and_the_main_metric_is_the_tests():
    runs = [
        outcome(value + 0.001 * seed * (1 + width), seed=seed, metric="test/loss", model={"width": width})
        for width, value in ((1, 0.3), (2, 0.1))
        for seed in (0, 1, 2)
    ]
    found = compare(runs)
    assert (found.metric, found.rising, found.lines[0].setting.values) == ("test/loss", False, {"model.width": 2})
    assert found.apart
    assert found.lines[1].gap.mean == pytest.approx(-0.199)
    assert choose(None, [{"validation/loss": 1, "validation/accuracy": 1}, {"test/loss": 1, "test/accuracy": 1}]) == "test/accuracy"
    assert choose(None, [{"validation/loss": 1}, {"validation/loss": 1}, {"test/loss": 1}]) == "validation/loss"
    with pytest.raises(ConfigError, match="nothing can be compared"):
        choose(None, [{}])


def test_a_setting_whose_runs_all_failed_is_last_and_has_no_mean():
    runs = [outcome(0.5, seed=seed, model={"width": 1}) for seed in (0, 1)]
    runs += [outcome(0.9, seed=seed, state="pruned", model={"width": 2}) for seed in (0, 1)]
    found = compare(runs)
    assert [line.summary.n for line in found.lines] == [2, 0]
    assert "width=1: test/accuracy 0.5000 (0.5000 to 0.5000) over 2 runs" in found.verdict()
    heads, rows = page.table(found)
    assert dict(zip(heads, rows[1], strict=True))["without a score"] == "2 pruned"
    assert page.counts(found) == "2 finished, 2 pruned"


def test_one_run_of_the_first_is_not_called_best():
    runs = [outcome(0.9, model={"width": 1}), *(outcome(0.5 + 0.01 * seed, seed=seed, model={"width": 2}) for seed in (0, 1, 2))]
    found = compare(runs)
    assert not found.apart
    assert "it has one run, so there is no interval" in found.verdict()


def test_the_csv_has_every_number_in_full():
    values = np.random.default_rng(0).normal(0.5, 0.1, (2, 3))
    runs = [outcome(float(values[w, s]), seed=s, model={"width": w}, overrides=[f"model.width={w}", f"seed={s}"]) for w in (0, 1) for s in (0, 1, 2)]
    found = compare(runs)
    row = next(csv.DictReader(io.StringIO(page._csv(found))))
    np.testing.assert_allclose(float(row["mean"]), values.mean(1).max(), rtol=1e-15)
    assert (row["n"], row["seconds"], row["flops"], row["bytes"], row["difference"]) == ("3", "2.0", str(7.0 * 5 * 10), "3.0", "")


def test_costs_and_numbers_are_finite_or_absent():
    runs = [outcome(math.nan, seed=0), outcome(0.5, seed=1)]
    assert compare(runs).lines[0].summary.n == 1


@pytest.mark.parametrize("width", [60, 100, 200])
def test_a_narrow_terminal_leaves_out_what_can_be_spared(width):
    runs = [outcome(0.5 + 0.01 * s * w, seed=s, model={"width": w}, overrides=[f"model.width={w}", f"seed={s}"]) for w in (1, 2) for s in (0, 1, 2)]
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(page.printed(compare(runs), width))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) == 4  # two of headings, two of settings: no row is broken
    assert ("difference" in lines[1]) == (width > 60)
    assert "95 % t" in lines[1]


def test_a_heat_map_is_of_two_swept_keys():
    runs = [outcome(0.5, model={"width": w, "depth": d}) for w in (1, 2) for d in (1, 2)]
    found = compare(runs)
    assert pictures.pair_of(found, None) == ("model.width", "model.depth")
    assert pictures.pair_of(found, ["depth", "model.width"]) == ("model.depth", "model.width")
    for asked in (["depth"], ["depth", "depth"], ["depth", "wide"]):
        with pytest.raises(ConfigError):
            pictures.pair_of(found, asked)
    assert pictures.pair_of(compare(runs[:2]), None) is None
