"""The compiled launcher: one program for jobs that differ in numbers alone, with the results of lone runs."""

import collections
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from research.core.config import compose
from research.sweep import compiled
from research.sweep.ledger import Ledger
from research.training import log, parallel, trials

COMPILED = "hydra/launcher=compiled"
FOUR = ("optimizer.learning_rate=0.001,0.01", "seed=0,1")
MODES = ("reuse", "vmap")


def curves(folder):
    """{trial: its records of metrics.jsonl without times}."""
    times = ("time_s", "data_wait")
    return {
        trial.trial: [{name: x for name, x in record.items() if name not in times} for record in log.read(folder / trial.run)]
        for trial in Ledger(folder).trials()
    }


def sizes():
    """Programs that each way of training holds."""
    return parallel._jit_train._cache_size() + parallel._jit_chunk._cache_size(), trials.steps._cache_size() + trials.chunks._cache_size()


@pytest.mark.parametrize("chunk", [1, 10])
def test_one_after_another_each_is_the_lone_run_bit_for_bit(sweep, result, monkeypatch, chunk):
    monkeypatch.setattr(compiled, "_at_once", lambda told, seconds: 2)  # the last two beside each other, however fast this machine is
    before, four = sizes(), (*FOUR, f"train.chunk={chunk}")
    told, held = sweep(*four, COMPILED, "hydra.launcher.mode=reuse")
    assert told.code == 0, told.err
    assert [now - then for now, then in zip(sizes(), before, strict=True)] == [1, 0]
    assert "4 trials of one program: one after another" in "\n".join(told.err)
    assert "from here on 2 at a time" in "\n".join(told.err)
    _, alone = sweep(*four, folder="alone")
    assert sorted(trial.trial for trial in held) == sorted(trial.trial for trial in alone)
    for trial in held:
        assert result(sweep.path / trial.run)["state_sha256"] == result(sweep.path.parent / "alone" / trial.run)["state_sha256"]
    assert curves(sweep.path) == curves(sweep.path.parent / "alone")


TOLD = {"status": "finished", "train_s": 1.0, "compile_s": 0.5, "peak_bytes": 1}


@pytest.mark.parametrize(
    ("changed", "seconds", "count"),
    [
        ({}, 1.9, 2),
        ({}, 1.55, 1),  # nearly all of it was training
        ({"peak_bytes": 1 << 60}, 9.0, 1),  # two have no room
        ({"train_s": 40.0}, 3.0, 1),  # it was resumed: most of its training was another command's
        ({"status": "stopped_early"}, 9.0, 1),
    ],
)
def test_two_at_a_time_where_training_is_not_nearly_all_of_a_trial(changed, seconds, count):
    assert compiled._at_once({**TOLD, **changed}, seconds) == count


def test_what_needs_all_devices_or_measures_the_machine_is_alone():
    assert compiled._shares(compose(["experiment=digits_mlp"]))
    for line in ("parallel=fsdp", "debug.nans=true", "debug.disable_jit=true", "logger.energy=FRA"):
        assert not compiled._shares(compose(["experiment=digits_mlp", line]))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_trial_is_run_once_and_no_more_begin_after_one_was_stopped(count):
    began, waiting = [], collections.deque(range(9))
    compiled._lanes(waiting, count, began.append)
    assert sorted(began) == list(range(9))

    def attempt(job):
        began.append(job)
        raise KeyboardInterrupt

    began, waiting = [], collections.deque(range(9))
    with pytest.raises(KeyboardInterrupt):
        compiled._lanes(waiting, count, attempt)
    assert 1 <= len(began) <= count

    def asked(job):
        """Ctrl-C comes when no trial is in its loop any more."""
        began.append(job)
        if job == 1:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    began, waiting = [], collections.deque(range(9))
    with pytest.raises(KeyboardInterrupt):
        compiled._lanes(waiting, count, asked)
    assert len(began) < 9


def test_side_by_side_each_has_the_numbers_of_the_lone_run(sweep):
    before = sizes()
    told, _ = sweep(*FOUR, COMPILED, "hydra.launcher.mode=vmap")
    assert told.code == 0, told.err
    assert [now - then for now, then in zip(sizes(), before, strict=True)] == [0, 1]
    sweep(*FOUR, folder="alone")
    ours, alone = curves(sweep.path), curves(sweep.path.parent / "alone")
    assert ours.keys() == alone.keys()
    for trial in ours:
        assert len(ours[trial]) == len(alone[trial])
        for here, there in zip(ours[trial], alone[trial], strict=True):
            assert here == pytest.approx(there, rel=1e-6, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["cnn", "gpt", "lstm"])
def test_any_family_goes_side_by_side(command, tmp_path, family):
    families = {
        "cnn": ("experiment=digits_cnn", "model.channels=[4,4,4]", "model.hidden=[8]", "model.norm=batch", "model.dropout=0.3", "train.epochs=null"),
        "gpt": (
            "experiment=quickstart",
            "data.time=16",
            "data.batch=4",
            "model.width=16",
            "model.depth=1",
            "model.heads=2",
            "model.hidden=16",
            "schedule.warmup=0",
        ),
        "lstm": (
            "experiment=shakespeare_char_lstm",
            "data=python_docs",
            "data.time=16",
            "data.batch=4",
            "model.width=16",
            "model.depth=1",
            "schedule.warmup=0",
        ),
    }
    argv = (*families[family], "train.steps=20", "train.eval_every=20", "train.log_every=5", "expect=null", "logger.sample=false")
    argv += ("model.dropout=0.2",) if family == "gpt" else ()
    for mode in MODES:
        told = command("train", "-m", *argv, *FOUR, COMPILED, f"hydra.launcher.mode={mode}", f"sweep_dir={tmp_path / mode}")
        assert told.code == 0, told.err
    ours, alone = curves(tmp_path / "vmap"), curves(tmp_path / "reuse")
    for trial in alone:
        for here, there in zip(ours[trial], alone[trial], strict=True):
            assert here == pytest.approx(there, rel=1e-4, abs=1e-5)  # a GPT's gradient norm is at 1.4e-5 after 20 steps at a rate of .01
            assert here.get("train/loss", 0.0) == pytest.approx(there.get("train/loss", 0.0), rel=1e-5)


@pytest.mark.parametrize("mode", [pytest.param("reuse", marks=pytest.mark.slow), "vmap"])
def test_one_that_fails_or_ends_early_neither_stops_nor_recompiles_the_others(sweep, mode):
    before = sizes()
    rates = "optimizer.learning_rate=0.01,1e9,-1,0.0"  # the last one never improves
    more = ("train.patience=1", "train.steps=40", "train.skip_limit=3", "train.minimum_delta=1e-9")
    told, held = sweep(rates, *more, COMPILED, f"hydra.launcher.mode={mode}")
    _, alone = sweep(rates, *more, folder="alone")
    assert told.code == 3
    states = {trial.trial: (trial.state, trial.reason, (trial.score or {}).get("step")) for trial in alone}
    assert [state for state, *_ in states.values()] == ["finished", "diverged", "failed", "stopped_early"]
    assert {trial.trial: (trial.state, trial.reason, (trial.score or {}).get("step")) for trial in held} == states
    assert sizes()[1] - before[1] == (mode == "vmap")


@pytest.mark.slow
def test_jobs_of_other_programs_are_other_groups_whatever_their_order(sweep):
    before = sizes()
    told, held = sweep("seed=0,1", "model.width=8,12", COMPILED, "hydra.launcher.mode=vmap")
    assert told.code == 0, told.err
    assert sizes()[1] - before[1] == 2
    assert "\n".join(told.err).count("2 trials of one program: 2 side by side") == 2
    assert sorted(trial.number for trial in held) == [0, 1, 2, 3]


@pytest.mark.slow
def test_more_trials_than_rows_take_turns_in_one_program(sweep):
    before = sizes()
    told, held = sweep("seed=range(5)", COMPILED, "hydra.launcher.mode=vmap", "hydra.launcher.rows=2")
    assert told.code == 0, told.err
    assert len(held) == 5
    assert sizes()[1] - before[1] == 1


def test_auto_says_what_it_measured(sweep):
    told, _ = sweep("seed=0,1", COMPILED)
    assert told.code == 0
    (line,) = [line for line in told.err if "of one program" in line]
    assert "one after another (reuse: " in line  # too short to be worth a second compilation
    assert "ms a step alone" in line


@pytest.mark.slow
def test_a_run_that_was_stopped_between_the_steps_of_the_others_goes_on_alone(sweep, command, typed, result):
    more = ("train.save_every=5", "seed=0,1")
    told, held = sweep(*more, "train.stop_at=15", "train.log_every=5", "train.eval_every=10", COMPILED, "hydra.launcher.mode=reuse")
    assert {trial.state for trial in held} == {"interrupted"}
    told, held = sweep(*more, COMPILED, "hydra.launcher.mode=vmap", "train.log_every=10", "train.save_every=10")
    assert told.code == 0, told.err
    assert [result(sweep.path / trial.run)["step"] for trial in held] == [20, 20]
    sweep("seed=0,1", folder="alone")
    ours, alone = ({trial.trial: trial.metrics for trial in Ledger(folder).trials()} for folder in (sweep.path, sweep.path.parent / "alone"))
    for trial in alone:
        assert ours[trial] == pytest.approx(alone[trial], rel=1e-5)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (("hydra.launcher.mode=vamp",), "error: hydra.launcher.mode='vamp' is unknown; did you mean 'vmap'?"),
        (("hydra.launcher.rows=0",), "error: hydra.launcher.rows=0: must be a number of trials, or null for as many as fit"),
        (("debug.nans=true,false",), "error: debug differs between the jobs, which share one process; use hydra/launcher=basic"),
    ],
)
def test_bad_input_is_one_line(sweep, argv, line):
    told, held = sweep("seed=0,1", COMPILED, *argv)
    assert (told.code, held, told.err[-1]) == (2, [], line)


@pytest.mark.slow
def test_over_four_devices_each_trial_is_the_lone_run(typed, tmp_path):
    """In a process of its own, which has four fake devices."""
    for mode in ("shard", "reuse"):
        command = [sys.executable, "-m", "research.train", "-m", *typed, "seed=range(6)", COMPILED, f"hydra.launcher.mode={mode}"]
        environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
        done = subprocess.run([*command, f"sweep_dir={tmp_path / mode}"], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert ("2 side by side on each of 4 devices" in done.stderr) == (mode == "shard")
    devices = {json.loads((folder / "result.json").read_text())["status"] for folder in (tmp_path / "shard").iterdir() if folder.is_dir()}
    assert devices == {"finished"}
    ours, alone = curves(tmp_path / "shard"), curves(tmp_path / "reuse")
    for trial in alone:
        for here, there in zip(ours[trial], alone[trial], strict=True):
            assert here == pytest.approx(there, rel=1e-6, abs=1e-6)
