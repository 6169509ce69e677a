"""Pruning inside a trial: optuna's own decisions, seen by all processes, kept through a crash, and a run that is complete all the same."""

import json
import math
import os

import numpy as np
import optuna
import pytest

from research.core.config import compose, fingerprint
from research.core.errors import ConfigError, ResearchError
from research.sweep import pruning

STEPS, EVERY = 81, 3


@pytest.fixture
def study(tmp_path, monkeypatch):
    """study(pruner settings): (address of a journal that holds a new search with them, its study)."""
    monkeypatch.setattr(os, "fsync", lambda _: None)

    def make(name="asha", folder="a", *, direction="minimize", **settings):
        address = str(tmp_path / f"{folder}.journal")
        made = optuna.create_study(storage=pruning.storage(address), study_name=pruning.STUDY, direction=direction)
        held = {"name": name, "metric": "validation/loss", "rung": None, "reduction": 3, "startup": 4, **settings}
        made.set_user_attr(pruning.SETTINGS, held)
        return address, made

    return make


def curve(trial, step):
    """A loss that falls to a level of its own; the order at the start is not quite that at the end."""
    level, rate = np.random.default_rng(trial).random(2)
    return float(level + (1 + rate) * math.exp(-step / 20))


def run(pruner, trial, steps=STEPS, start=0):
    """(last step, why it ended there) of a trial that is evaluated every few steps."""
    for step in range(start + EVERY, steps + 1, EVERY):
        if reason := pruner(step, {"validation/loss": curve(trial, step), "validation/accuracy": 0.5}):
            return step, reason
    return steps, None


@pytest.mark.parametrize("name", pruning.PRUNERS)
def test_trials_end_where_optuna_itself_would_end_them(study, name):
    address, kept = study(name)
    made = {
        "median": optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=EVERY),
        "asha": optuna.pruners.SuccessiveHalvingPruner(min_resource=EVERY, reduction_factor=3),
        "hyperband": optuna.pruners.HyperbandPruner(min_resource=EVERY, max_resource=STEPS, reduction_factor=3),
    }
    reference = optuna.create_study(study_name=pruning.STUDY, pruner=made[name])

    def objective(trial):
        for step in range(EVERY, STEPS + 1, EVERY):
            trial.report(curve(trial.number, step), step)
            if step < STEPS and trial.should_prune():
                raise optuna.TrialPruned
        return curve(trial.number, STEPS)

    reference.optimize(objective, n_trials=24)
    wanted = [trial.last_step for trial in reference.trials]
    ended = []
    for i in range(24):
        kept.ask()
        ended.append(run(pruning.pruner_of(f"{address}#{i}", EVERY, STEPS), i)[0])  # told only when the whole batch has ended
    assert ended == wanted
    assert STEPS in wanted
    assert sum(wanted) < 0.8 * STEPS * 24


def test_a_rising_metric_is_pruned_from_below(study):
    address, kept = study(metric="validation/accuracy", direction="maximize", reduction=2)
    ended = []
    for value in (0.9, 0.1, 0.95, 0.2):
        kept.ask()
        pruner = pruning.pruner_of(f"{address}#{len(ended)}", EVERY, STEPS)
        ended.append(pruner(EVERY, {"validation/accuracy": value, "validation/loss": 0.0}) is None)
    assert ended == [True, False, True, False]


def test_a_decision_stands_and_a_value_is_told_once(study):
    address, kept = study(reduction=2)
    for _ in range(3):
        kept.ask()
    assert pruning.pruner_of(f"{address}#0", EVERY, STEPS)(EVERY, {"validation/loss": 0.1}) is None
    pruner = pruning.pruner_of(f"{address}#1", EVERY, STEPS)
    assert pruner(EVERY, {}) is None
    reason = pruner(EVERY, {"validation/loss": 0.2})
    assert reason == "validation/loss 0.2 at step 3, behind other trials (asha)"
    again = pruning.pruner_of(f"{address}#1", EVERY, STEPS)  # killed after the decision, and begun again
    assert again(EVERY, {}) == again(EVERY, {"validation/loss": 0.0}) == reason
    assert kept.trials[1].intermediate_values == {EVERY: 0.2}


def test_a_score_that_is_no_number_ends_a_trial(study):
    address, kept = study()
    kept.ask()
    assert "is no number" in pruning.pruner_of(f"{address}#0", EVERY, STEPS)(EVERY, {"validation/loss": None})


def test_the_last_step_is_told_and_never_pruned(study):
    address, kept = study(reduction=2)
    for i in range(2):
        kept.ask()
        assert pruning.pruner_of(f"{address}#{i}", STEPS, STEPS)(STEPS, {"validation/loss": float(i)}) is None
    assert [trial.intermediate_values for trial in kept.trials] == [{STEPS: 0.0}, {STEPS: 1.0}]


def test_bad_places_and_metrics_are_named(study, tmp_path):
    address, kept = study(metric="validation/lose")
    kept.ask()
    with pytest.raises(ConfigError, match="an evaluation does not give 'validation/lose'; did you mean 'validation/loss'"):
        pruning.pruner_of(f"{address}#0", EVERY, STEPS)(EVERY, {"validation/loss": 1.0})
    with pytest.raises(ConfigError, match="has no trial 7"):
        pruning.pruner_of(f"{address}#7", EVERY, STEPS)
    with pytest.raises(ConfigError, match="holds no search"):
        pruning.pruner_of(f"{tmp_path}/b.journal#0", EVERY, STEPS)
    with pytest.raises(ConfigError, match="hydra/sweeper=search sets it"):
        pruning.pruner_of("yes", EVERY, STEPS)
    assert pruning.pruner_of(None, EVERY, STEPS) is None


def test_a_journal_that_is_none_is_one_line(tmp_path):
    (tmp_path / "a.journal").write_text("hello\nworld\n")
    with pytest.raises(ResearchError, match="is no journal of optuna"):
        pruning.storage(str(tmp_path / "a.journal"))


def test_a_line_cut_off_by_a_kill_is_left_out(study, tmp_path):
    address, kept = study()
    for _ in range(3):
        kept.ask()
    with open(address, "ab") as file:
        file.write(b'{"op_code": 4, "wor')
    again = optuna.load_study(study_name=pruning.STUDY, storage=pruning.storage(address))
    again.ask()
    assert [trial.number for trial in again.trials] == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_pruned_run_is_complete_and_goes_on_where_nothing_prunes_it(study, sweep, command, typed, result, tmp_path):
    address, kept = study(reduction=2)
    for _ in range(2):
        kept.ask()
    pruning.pruner_of(f"{address}#0", 10, 20)(10, {"validation/loss": 0.0})  # better than any run
    place = f"pruning='{address}#1'"
    told, (trial,) = sweep("seed=1", place)
    path = sweep.path / trial.run
    held = result(path)
    assert (told.code, trial.state, held["status"], held["step"]) == (0, "pruned", "pruned", 10)
    assert "behind other trials (asha)" in held["reason"] == trial.reason
    assert {"validation/loss", "test/accuracy"} <= held["metrics"].keys()
    assert trial.overrides[-1] == "seed=1"
    assert "pruning: null" in (path / "config.yaml").read_text()
    assert trial.trial == fingerprint(compose([*typed, "seed=1", place]))[:12]
    told, (trial,) = sweep("seed=1", place)
    assert (told.code, trial.state) == (0, "pruned")
    assert "nothing to do" in told.out
    told, (trial,) = sweep("seed=1")
    assert (told.code, trial.state) == (0, "finished")
    assert command("train", *typed, "seed=1", f"run_dir={tmp_path / 'lone'}").code == 0
    assert result(path)["state_sha256"] == result(tmp_path / "lone")["state_sha256"]


@pytest.mark.parametrize("launcher", ["basic", "compiled"])
def test_a_search_prunes_its_trials(sweep, launcher):
    argv = ["hydra/sweeper=search", "hydra.sweeper.sampler=grid", "hydra.sweeper.pruner=asha", "hydra.sweeper.reduction=2", "hydra.sweeper.at_once=4"]
    mode = ["hydra.launcher.mode=vmap"] if launcher == "compiled" else []
    told, trials = sweep(*argv, "optimizer.learning_rate=choice(0.01,1e-6,1e-5,0.02)", f"hydra/launcher={launcher}", *mode)
    assert told.code == 0, told.err
    states = {trial.overrides[-1].partition("=")[2]: trial.state for trial in trials}
    assert states["0.02"] == "finished"
    assert "pruned" in (states["1e-06"], states["1e-05"])
    counts = json.loads((sweep.path / "search.json").read_text())["trials"]
    assert counts["complete"] + counts["pruned"] == 4
    assert counts["pruned"] == list(states.values()).count("pruned")
