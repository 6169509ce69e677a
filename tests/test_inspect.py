"""Inspect as a person calls it: the parts and the cost of a run's model, or of one that is not trained yet."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from research import Run
from research.core.tree import paths

QUIET = ("logger.figures=false", "logger.tensorboard=false", "logger.progress=none", "logger.sample=false")
SHORT = ("train.steps=4", "train.eval_every=2", "train.log_every=2")
MLP = ("experiment=digits_mlp", "train.chunk=1", "model.width=8", "model.depth=1")
GPT = ("experiment=quickstart", "data.time=16", "data.batch=4", "model.width=16", "model.depth=2", "model.heads=2", "model.hidden=16")


@pytest.fixture(scope="module")
def run(command, tmp_path_factory):
    """A run of digits; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "mlp"
    told = command("train", *MLP, *SHORT, *QUIET, f"run_dir={folder}")
    assert told.code == 0, told.err
    return folder


@pytest.fixture
def inspect(command, tmp_path):
    """inspect("run=…"): (what is printed, what is written)."""

    def call(*argv):
        told = command("inspect", *argv, f"json={tmp_path / 'inspect.json'}")
        assert told.code == 0, told.err
        return told.out, json.loads((tmp_path / "inspect.json").read_text())

    return call


def test_a_run_is_counted_array_by_array(inspect, run, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    out, report = inspect(f"run={moved}")
    params = paths(Run(run).weights().params)
    assert {row["path"]: tuple(row["shape"]) for row in report["arrays"]} == {path: leaf.shape for path, leaf in params.items()}
    assert report["parameters"] == report["trained"] == 64 * 8 + 8 + 8 * 10 + 10
    assert report["bytes"] == 4 * report["parameters"]
    zeros = sum((np.asarray(leaf) == 0).sum() for leaf in params.values())
    assert report["zeros"] == pytest.approx(zeros / report["parameters"])
    assert report["flops_per_example"] == 2 * (64 * 8 + 8 * 10)
    assert report["flops_per_token"] is None
    assert [(layer["path"], layer["kind"]) for layer in report["layers"]] == [("dense_0/kernel", "dense"), ("head/kernel", "dense")]
    assert report["taps"]["logits"]["shape"] == [1, 10]
    recorded = json.loads((run / "result.json").read_text())
    assert report["train_flops_per_example"] == recorded["train_flops_per_example"] == 2 * report["flops_per_example"] + 2 * 8 * 10
    assert recorded["flops_per_example"] == report["flops_per_example"]
    for word in ("dense_0/kernel", "64 x 8", "FLOPs per example", "1,184", "peak bytes", "logits"):
        assert word in out


def test_a_model_that_is_not_trained_yet_is_known_by_its_shapes(inspect):
    out, report = inspect(*GPT, "model.activation=gelu_tanh")
    width, tokens, vocabulary = 16, 16, next(row["shape"][0] for row in report["arrays"] if row["path"] == "token/embedding")
    products = 2 * (4 * width * width + 2 * width * 16) + vocabulary * width
    assert report["flops_per_token"] == 2 * products + 2 * 2 * 2 * tokens * width
    assert report["flops_per_example"] == tokens * report["flops_per_token"]
    assert report["zeros"] is None
    assert "block_1/mlp/up/kernel" in out


def test_a_scanned_model_is_shown_layer_by_layer(inspect):
    _, plain = inspect(*GPT, "taps=false")
    out, scanned = inspect(*GPT, "model.scan=true", "taps=false")
    assert scanned.pop("training")["params_bytes"] == plain.pop("training")["params_bytes"]
    assert scanned == plain
    assert "taps, of a batch of 1" not in out


def test_data_that_is_missing_is_not_needed(inspect, tmp_path):
    (tmp_path / "mnist").mkdir()
    out, report = inspect("data=mnist", "model=cnn", f"data.root={tmp_path}", "model.channels=[4]", "model.pool=[2]", "model.hidden=[8]")
    assert "random data" in out
    assert report["taps"]["input"]["shape"] == [1, 28, 28, 1]
    assert report["parameters"] > 0


def test_a_folder_that_is_no_run_is_refused(command, tmp_path):
    told = command("inspect", f"run={tmp_path}")
    assert told.code == 2
    assert "is no run folder" in told.err[-1]


def test_a_step_is_told_before_it_runs_and_probed_where_that_is_asked_for(inspect):
    out, report = inspect(*MLP, "probe=true", "memory=1000000", "data.batch=32")
    training = report["training"]
    assert training["params_bytes"] == 4 * report["trained"]
    assert training["memory_bytes"] == 1_000_000
    assert training["ms_per_step"] > 0
    for word in ("a training step", "state bytes per device", "largest microbatch", "ms per step"):
        assert word in out


def test_every_value_of_a_config_has_an_origin(inspect):
    out, report = inspect(*MLP, "origins=true", "taps=false", "optimizer=lion")
    origin = {row["path"]: row["from"] for row in report["origins"]}
    assert origin["model.width"] == "command line"
    assert origin["train.eval_every"] == "experiments/digits_mlp.yaml"
    assert origin["optimizer.b2"] == "conf/optimizer/lion.yaml (chosen on the command line)"
    assert origin["train.log_every"] == "conf/train/default.yaml"
    assert origin["seed"].startswith("conf/")
    assert next(row for row in report["origins"] if row["path"] == "model.dtype")["written"] == "${train.precision}"
    assert "command line" in out


@pytest.mark.slow
def test_the_largest_model_is_inspected_on_a_laptop():
    """175 billion parameters on 512 devices: in half a minute and 4 GB, on any machine."""
    program = """
import resource, sys, time
began = time.process_time()
from research.inspect import main
code = main(sys.argv[1:])
print("cost", code, time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    model = ("data=shakespeare", "data.time=2048", "data.batch=512", "model=gpt3_175b", "objective=language_model")
    layout = ("parallel=mesh", "parallel.data=1", "parallel.fsdp=64", "parallel.tensor=8")
    done = subprocess.run([sys.executable, "-c", program, *model, *layout], capture_output=True, text=True, timeout=120)
    _, code, seconds, kilobytes = done.stdout.splitlines()[-1].split()
    assert code == "0", done.stderr
    assert "174,604,259,328" in done.stdout
    assert float(seconds) < 30  # of the processor: what others do on this machine is not the model's fault
    assert int(kilobytes) < 4e6
