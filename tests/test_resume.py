"""Resuming: a run that was stopped, interrupted or killed ends in the very state of one that was not."""

import json
import os
import pathlib
import random
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest

QUIET = ("logger.figures=false", "logger.tensorboard=false", "logger.progress=none")
FORTY = ("train.steps=40", "train.eval_every=10", "train.log_every=4", "schedule=cosine", "schedule.warmup=3")
GPT = ("experiment=quickstart", "data.time=16", "data.batch=4", "model.width=16", "model.depth=1", "model.heads=2", "model.hidden=16")
RUNS = {
    "mlp": ("model.width=8", "model.depth=1", *FORTY),
    "cnn with batch statistics": (
        "model=cnn",
        "model.channels=[4]",
        "model.pool=2",
        "model.hidden=[8]",
        "model.norm=batch",
        "model.dropout=0.2",
        *FORTY,
    ),
    "gpt with dropout": (*GPT, "model.dropout=0.2", "logger.sample=false", *FORTY),
    "accumulation, average, lamb": ("model.width=8", "optimizer=lamb", "train.accumulate=2", "train.ema=0.9", "train.clip=1.0", *FORTY),
}
CHUNKS = ("model.width=8", "model.depth=1", "model.dropout=0.2", "train.chunk=5", *FORTY, "train.log_every=10")
LONG = ("model.width=8", "model.depth=1", "train.steps=800", "train.eval_every=100", "train.save_every=50", "schedule=cosine", *QUIET)


def result(folder):
    return json.loads((folder / "result.json").read_text())


def curve(folder):
    """The records of metrics.jsonl without what is measured by the clock."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in ("time_s", "data_wait")} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    """undisturbed(argv): the folder of this run without any interruption; made once."""
    held = {}

    def make(argv):
        if argv not in held:
            held[argv] = tmp_path_factory.mktemp("undisturbed") / "run"
            told = command("train", *argv, f"run_dir={held[argv]}")
            assert told.code == 0, told.err
        return held[argv]

    return make


def start(*argv, folder):
    """The command in a process of its own; what it says lies beside the folder."""
    with open(f"{folder}.out", "w") as file:
        return subprocess.Popen([sys.executable, "-m", "research.train", *argv, f"run_dir={folder}"], stdout=file, stderr=subprocess.STDOUT)


def said(folder):
    return pathlib.Path(f"{folder}.out").read_text()


def until(condition, process, folder, seconds=120):
    """Waits for a condition on a living process."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, said(folder)
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name.startswith(("gpt", "accumulation", "cnn")) else name for name in RUNS]
)
def test_stopped_at_17_and_resumed_equals_undisturbed(command, undisturbed, tmp_path, name):
    """17 is neither a log point nor an evaluation, so that the records of metrics.jsonl would show a window that was cut."""
    argv = (*RUNS[name], *QUIET)
    for stop in ("train.stop_at=17", "train.stop_at=null"):
        told = command("train", *argv, f"run_dir={tmp_path}", stop)
        assert told.code == 0, told.err
    assert result(tmp_path)["state_sha256"] == result(undisturbed(argv))["state_sha256"]
    assert result(tmp_path)["metrics"] == result(undisturbed(argv))["metrics"]
    assert curve(tmp_path) == curve(undisturbed(argv))
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 2


def test_chunks_stopped_inside_a_window_and_resumed_equal_undisturbed_ones(command, undisturbed, tmp_path):
    argv = (*CHUNKS, *QUIET)
    for stop in ("train.stop_at=15", "train.stop_at=null"):
        assert command("train", *argv, f"run_dir={tmp_path}", stop).code == 0
    assert result(tmp_path)["state_sha256"] == result(undisturbed(argv))["state_sha256"]
    assert curve(tmp_path) == curve(undisturbed(argv))
    told = command("train", *argv, f"run_dir={tmp_path}", "train.chunk=1")
    assert (told.code, told.err) == (2, [line for line in told.err if "train.chunk: 5 there, 1 here" in line])


@pytest.mark.parametrize("monitor", [pytest.param("validation/loss", marks=pytest.mark.slow), "train/loss"])
def test_decisions_of_the_host_are_resumed(command, undisturbed, tmp_path, monitor):
    """Plateau and patience look at results, so that what the host remembers must be the same too."""
    validation = "data.validation=0.2" if monitor.startswith("validation") else "data.validation=0"
    argv = (
        "experiment=mlp_regression",
        "train.chunk=1",
        validation,
        f"train.monitor={monitor}",
        "optimizer.learning_rate=0.3",
        "data.batch=16",
        "train.epochs=null",
    )
    argv += ("schedule=plateau", "schedule.patience=0", "train.patience=6", "train.steps=400", "train.eval_every=5", "train.log_every=7", *QUIET)
    folder = undisturbed(argv)
    rates = {record["learning_rate"] for record in curve(folder) if "learning_rate" in record}
    assert len(rates) > 2
    assert result(folder)["status"] == "stopped_early"
    for stop in (3, 18, 31, "null"):
        assert command("train", *argv, f"run_dir={tmp_path}", f"train.stop_at={stop}").code == 0
    assert curve(tmp_path) == curve(folder)
    same = ("status", "step", "best", "state_sha256")
    assert {name: result(tmp_path)[name] for name in same} == {name: result(folder)[name] for name in same}


def test_a_run_killed_after_its_last_checkpoint_needs_only_its_result(command, tmp_path):
    argv = ("model.width=8", "model.depth=1", "train.steps=100", "train.eval_every=10", "train.patience=2", "train.minimum_delta=100", *QUIET)
    assert command("train", *argv, f"run_dir={tmp_path}").code == 0
    before = result(tmp_path)
    (tmp_path / "result.json").unlink()
    assert command("train", *argv, f"run_dir={tmp_path}").code == 0
    same = ("status", "step", "reason", "best", "metrics", "state_sha256")
    assert {name: result(tmp_path)[name] for name in same} == {name: before[name] for name in same}


def test_a_damaged_latest_checkpoint_costs_its_steps_only(command, undisturbed, tmp_path):
    argv = (*RUNS["mlp"], *QUIET, "train.save_every=10")
    assert command("train", *argv, f"run_dir={tmp_path}", "train.stop_at=20").code == 0
    (tmp_path / "checkpoints" / "20" / "host.json").write_text("{}")
    told = command("train", *argv, f"run_dir={tmp_path}")
    assert told.code == 0
    assert "resuming at step 10" in told.out
    assert result(tmp_path)["state_sha256"] == result(undisturbed(argv))["state_sha256"]
    assert curve(tmp_path) == curve(undisturbed(argv))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_leaves_with_75(command, undisturbed, tmp_path, name):
    folder = tmp_path / "some run"
    metrics = folder / "metrics.jsonl"

    def ask():
        while not metrics.exists() or '"step": 50' not in metrics.read_text():
            time.sleep(0.001)
        os.kill(os.getpid(), getattr(signal, name))

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # should it come too late, the test fails and not the whole session
    try:
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        told = command("train", *LONG, f"run_dir={folder}")
        thread.join()
    finally:
        signal.signal(signal.SIGTERM, before)
    stopped = result(folder)
    assert (told.code, stopped["status"], stopped["reason"]) == (75, "interrupted", name)
    assert 50 <= stopped["step"] < 800
    assert told.err == [
        f"error: {name}: saved at step {stopped['step']}; the same command with run_dir={shlex.quote(str(folder))} goes on from there"
    ]
    assert command("train", *LONG, f"run_dir={folder}").code == 0
    assert result(folder)["state_sha256"] == result(undisturbed(LONG))["state_sha256"]
    assert curve(folder) == curve(undisturbed(LONG))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_forty_steps_equal_twenty_and_a_new_process(undisturbed, folder, name):
    argv = (*RUNS[name], *QUIET)
    for stop in ("train.stop_at=20", "train.stop_at=null"):
        assert start(*argv, stop, folder=folder).wait() == 0, said(folder)
    assert result(folder)["state_sha256"] == result(undisturbed(argv))["state_sha256"]


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_ends_the_same(undisturbed, folder):
    argv, moments = (*LONG, "train.save_every=5"), random.Random(0)
    metrics = folder / "metrics.jsonl"
    for kill in range(7):
        process = start(*argv, folder=folder)
        if kill % 3:  # two of three within training, the others at any moment from the start of the program
            reached = metrics.read_bytes() if metrics.exists() else b""
            until(lambda reached=reached: metrics.exists() and metrics.read_bytes() > reached, process, folder)
            time.sleep(moments.uniform(0, 0.1))
        else:
            time.sleep(moments.uniform(0, 6))
        process.kill()
        if process.wait() != -signal.SIGKILL:  # on a fast machine it may have come to its end
            break
    assert start(*argv, folder=folder).wait() == 0, said(folder)
    assert len(json.loads((folder / "environment.json").read_text())) >= 3
    assert result(folder)["state_sha256"] == result(undisturbed(argv))["state_sha256"]
    assert curve(folder) == curve(undisturbed(argv))
    assert not list(folder.rglob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_a_process_saves_and_leaves_with_75(undisturbed, folder, name):
    process = start(*LONG, folder=folder)
    until(lambda: (folder / "metrics.jsonl").exists() and '"step": 30,' in (folder / "metrics.jsonl").read_text(), process, folder)
    process.send_signal(getattr(signal, name))
    assert process.wait(60) == 75, said(folder)
    assert said(folder).splitlines()[-1].startswith(f"error: {name}: saved at step ")
    assert start(*LONG, folder=folder).wait() == 0, said(folder)
    assert result(folder)["state_sha256"] == result(undisturbed(LONG))["state_sha256"]


@pytest.mark.slow
def test_a_second_signal_ends_the_process_at_once(folder):
    process = start(*LONG, "train.steps=1000000", "train.eval_every=null", "train.save_every=null", folder=folder)
    until(lambda: (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size, process, folder)
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):  # both are waiting when it goes on
        process.send_signal(number)
    assert process.wait(20) in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    assert not (folder / "result.json").exists()


@pytest.mark.slow
def test_a_signal_before_training_begins_is_resumable_too(folder):
    process = start(*LONG, folder=folder)
    until((folder / ".lock").exists, process, folder)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75, said(folder)
    assert said(folder).splitlines()[-1].startswith("error: ")
    assert result(folder)["status"] == "interrupted"
    assert start(*LONG, folder=folder).wait() == 0, said(folder)
    assert result(folder)["status"] == "finished"
