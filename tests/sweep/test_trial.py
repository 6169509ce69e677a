"""A multirun of train: a folder and a row for each trial, whatever launcher runs it, and the same command again goes on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from research.core.config import compose, fingerprint
from research.sweep.ledger import Ledger


def test_each_trial_has_a_folder_named_by_its_config_and_a_row(sweep, result):
    told, trials = sweep("optimizer.learning_rate=0.001,0.01", "seed=0,1")
    assert told.code == 0, told.err
    assert len(trials) == 4
    for trial in trials:
        folder = sweep.path / trial.run
        assert trial.state == result(folder)["status"] == "finished"
        assert trial.trial == fingerprint(compose(list(trial.overrides)))[:12]
        assert trial.metrics == result(folder)["metrics"]
        assert trial.score == result(folder)["best"]
        assert trial.seconds > 0
    assert [trial.overrides[-2:] for trial in trials[:2]] == [
        ("optimizer.learning_rate=0.001", "seed=0"),
        ("optimizer.learning_rate=0.001", "seed=1"),
    ]
    assert "4 trials: 4 finished" in told.out


def test_a_trial_is_the_lone_run_bit_for_bit(sweep, command, typed, result, tmp_path):
    _, (trial,) = sweep("seed=3")
    assert command("train", *typed, "seed=3", f"run_dir={tmp_path / 'lone'}").code == 0
    assert result(sweep.path / trial.run)["state_sha256"] == result(tmp_path / "lone")["state_sha256"]


def test_the_same_command_again_does_nothing_and_another_goes_on(sweep, snapshot):
    assert sweep("seed=0,1")[0].code == 0
    before = snapshot(sweep.path)
    told, _ = sweep("seed=0,1")
    assert told.code == 0
    assert told.out.count("nothing to do") == 2
    assert snapshot(sweep.path) == before
    told, trials = sweep("seed=0,1,2")
    assert told.out.count("nothing to do") == 2
    assert [trial.state for trial in trials] == ["finished"] * 3


@pytest.mark.slow
def test_a_default_folder_is_that_of_the_command(command, typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argv in (("seed=0,1",), ("seed=0,1", "hydra.verbose=false"), ("seed=1,2",)):
        assert command("train", "-m", *typed, *argv).code == 0
    one, other = sorted((tmp_path / "sweeps").iterdir())
    assert {one.name.rpartition("-")[0], other.name.rpartition("-")[0]} == {"digits_mlp"}
    assert [len(Ledger(folder).trials()) for folder in (one, other)] == [2, 2]


def test_one_failure_of_each_kind_is_a_row_and_the_rest_is_done(sweep, typed):
    rates = ("0.001", "0.01", "1e9", "-1", "0.1")  # the third diverges, the fourth is refused
    sweep.path.mkdir()
    blocked = sweep.path / fingerprint(compose([*typed, "optimizer.learning_rate=0.1"]))[:12]
    blocked.write_text("")  # a file in the place of the last one's folder
    told, trials = sweep(f"optimizer.learning_rate={','.join(rates)}", "train.skip_limit=3")
    assert [trial.state for trial in trials] == ["finished", "finished", "diverged", "failed", "failed"]
    assert [trial.code for trial in trials] == [0, 0, 3, 2, 1]
    assert told.code == 3
    assert "3 updates in a row" in trials[2].reason
    assert "optimizer.learning_rate=-1" in trials[3].reason
    assert "cannot be written" in trials[4].reason
    assert told.err[-1].startswith("error: 3 of 5 jobs failed: ")
    assert "5 trials: 2 finished, 1 diverged, 2 failed" in told.out


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "compiled"])
def test_three_of_thirty_two_fail_and_the_others_have_results(sweep, typed, result, launcher):
    rates = [f"{0.001 * (1 + i / 30):.6f}" for i in range(30)] + ["1e9", "-1"]
    sweep.path.mkdir()
    blocked = sweep.path / fingerprint(compose([*typed, f"optimizer.learning_rate={rates[7]}"]))[:12]
    blocked.write_text("")
    told, trials = sweep(f"optimizer.learning_rate={','.join(rates)}", "train.skip_limit=3", f"hydra/launcher={launcher}")
    states = {trial.overrides[-2] if "skip" in trial.overrides[-1] else trial.overrides[-1]: trial.state for trial in trials}
    assert len(states) == len(trials) == 32
    assert sum(result(sweep.path / trial.run)["status"] == "finished" for trial in trials if trial.state == "finished") == 29
    bad = {line: state for line, state in states.items() if state != "finished"}
    assert bad == {
        f"optimizer.learning_rate={rates[7]}": "failed",
        "optimizer.learning_rate=1000000000.0": "diverged",
        "optimizer.learning_rate=-1": "failed",
    }
    assert told.code == 3
    assert "32 trials: 29 finished" in told.out


def test_what_failed_is_tried_again_when_asked(sweep):
    _, (before,) = sweep("optimizer.learning_rate=1e9", "train.skip_limit=3")
    told, (again,) = sweep("optimizer.learning_rate=1e9", "train.skip_limit=3")
    assert (told.code, again) == (3, before)
    assert "diverged before (3 updates in a row" in told.err[-1]
    assert "retry=true" in told.err[-1]
    told, (retried,) = sweep("optimizer.learning_rate=1e9", "train.skip_limit=20", "retry=true")
    assert (told.code, retried.state) == (0, "finished")


def test_two_jobs_that_are_one_run_are_named(sweep):
    told, trials = sweep("logger.energy=null", "train.log_every=10,5", "seed=0")
    assert told.code == 2
    assert len(trials) == 1
    assert "is the same run as" in told.err[-1]


def test_run_dir_is_not_for_sweeps(sweep, tmp_path):
    told, _ = sweep("seed=0,1", f"run_dir={tmp_path / 'run'}")
    assert told.code == 2
    assert "each trial of a sweep has its own folder" in told.err[-1]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (("sede=0,1",), "error: override 'sede=0,1': train has no key 'sede'; did you mean 'seed'?"),
        (("optimizer=adam,adanw",), "error: override 'optimizer=adam,adanw': there is no optimizer 'adanw'; did you mean 'adamw'?"),
        (("seeds=0",), "error: seeds=0: must be a whole number of at least 1"),
        (("k_fold=1",), "error: k_fold=1: must be a whole number of at least 2"),
        (("seeds=2", "seed=1"), "error: seeds=2 and seed=1: give one of them"),
    ],
)
def test_bad_input_is_one_line_and_no_folder(sweep, argv, line):
    told, trials = sweep(*argv)
    assert (told.code, trials, told.err) == (2, [], [line])
    assert not sweep.path.exists()


def test_seeds_and_folds_make_a_sweep_of_a_single_command(command, typed, tmp_path):
    argv = (*typed, f"sweep_dir={tmp_path}", "hydra.launcher.mode=reuse")
    assert command("train", *argv, "seeds=2").code == 0
    assert command("train", *argv, "k_fold=3").code == 0
    overrides = [trial.overrides[-1] for trial in Ledger(tmp_path).trials()]
    assert overrides == ["seed=0", "seed=1", "data.validation=0/3", "data.validation=1/3", "data.validation=2/3"]


def _start(*argv):
    return subprocess.Popen([sys.executable, "-m", "research.train", "-m", *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reuse", "vmap"])
def test_killed_in_the_middle_and_started_again_it_ends_as_undisturbed(sweep, typed, tmp_path, mode):
    argv = ("seed=range(4)", "train.steps=4000", "train.eval_every=100", "hydra/launcher=compiled", f"hydra.launcher.mode={mode}")
    killed = tmp_path / "killed"
    process = _start(*typed, *argv, f"sweep_dir={killed}")
    end = time.monotonic() + 120
    while len(list(killed.glob("*/checkpoints/[1-9]*/manifest.json"))) < 3:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert {trial.state for trial in Ledger(killed).trials()} & {"running"}
    assert sweep(*argv, folder="killed")[0].code == 0
    told, trials = sweep(*argv)
    assert told.code == 0, told.err
    again = {trial.trial: trial for trial in Ledger(killed).trials()}
    assert len(again) == len(trials) == 4
    for trial in trials:
        other = again[trial.trial]
        assert (trial.state, trial.overrides, trial.score["step"]) == (other.state, other.overrides, other.score["step"])
        assert trial.metrics == (other.metrics if mode == "reuse" else pytest.approx(other.metrics, rel=1e-3))


def test_interrupted_by_ctrl_c_everything_is_kept(sweep, typed, tmp_path):
    argv = ("seed=range(3)", "train.steps=100000", "train.eval_every=1000", "hydra/launcher=compiled", "hydra.launcher.mode=vmap")
    process = _start(*typed, *argv, f"sweep_dir={sweep.path}")
    end = time.monotonic() + 120
    while len(list(sweep.path.glob("*/checkpoints/[1-9]*/manifest.json"))) < 3:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 75
    trials = Ledger(sweep.path).trials()
    assert [trial.state for trial in trials] == ["interrupted"] * 3
    for trial in trials:
        held = json.loads((sweep.path / trial.run / "result.json").read_text())
        assert held["status"] == "interrupted"
        assert held["step"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [("joblib", "hydra.launcher.n_jobs=2"), ("submitit_local", "hydra.launcher.timeout_min=5"), ("ray",)], ids=lambda x: x[0]
)
def test_other_launchers_make_the_same_sweep(sweep, typed, tmp_path, launcher):
    """In a process of its own: they fork, or start servers."""
    name, *argv = launcher
    if name == "ray":
        pytest.importorskip("ray", reason="pip install -e '.[ray]'")
    swept = ("optimizer.learning_rate=0.001,-1", "seed=0,1")
    command = [sys.executable, "-m", "research.train", "-m", *typed, *swept, f"hydra/launcher={name}", *argv, f"sweep_dir={tmp_path / name}"]
    done = subprocess.run(command, capture_output=True, text=True)
    _, alone = sweep(*swept)
    assert done.returncode == 2, done.stderr
    trials = Ledger(tmp_path / name).trials()
    assert sorted(trial.state for trial in trials) == ["failed", "failed", "finished", "finished"]
    assert {trial.trial: trial.metrics for trial in trials} == {trial.trial: trial.metrics for trial in alone}
    assert done.stderr.splitlines()[-1].startswith("error: 2 of 4 trials failed, the first: [")
