"""The benchmark verb: what it writes, whom it compares with, and what it refuses."""

import json
import math

import pytest

from research import benchmark
from research.training import peer

KEYS = {
    *("experiment", "device", "busy", "data", "batch", "parameters", "steps", "compile_s", "ms_per_step", "ms_per_step_quartiles", "steps_per_s"),
    *("items", "items_per_s", "data_wait", "peak_bytes", "versions", "peer", "ratio", "ratios", "profile"),
    *("model_flops_per_item", "model_flops_formula", "step_flops_per_item", "peak_flops_per_s", "peak_from", "utilisation", "step_utilisation"),
}


def refused(capsys, *arguments: str) -> str:
    """The one line on stderr of a command that must fail with exit code 2."""
    assert benchmark.main(list(arguments)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_json_has_every_key_and_finite_numbers(tmp_path):
    file = tmp_path / "result.json"
    assert (
        benchmark.main(
            ["experiment=digits_mlp", "train.chunk=1", "model.width=8", "model.depth=1", "steps=4", "warmup=1", "peak=0.5", f"json={file}"]
        )
        == 0
    )
    result = json.loads(file.read_text())
    assert set(result) == KEYS
    numbers = [value for value in result.values() if isinstance(value, int | float)] + result["ms_per_step_quartiles"]
    assert all(math.isfinite(number) and number >= 0 for number in numbers)
    low, high = result["ms_per_step_quartiles"]
    assert low <= result["ms_per_step"] <= high
    assert (result["experiment"], result["data"], result["batch"], result["items"]) == ("digits_mlp", "real", 64, "examples")
    assert result["items_per_s"] == pytest.approx(64 * result["steps_per_s"])
    assert 0 <= result["data_wait"] < 1
    assert result["parameters"] == 64 * 8 + 8 + 8 * 10 + 10
    assert result["peer"] is result["ratio"] is result["profile"] is None
    assert result["model_flops_per_item"] == 3 * 2 * (64 * 8 + 8 * 10)
    assert result["step_flops_per_item"] == result["model_flops_per_item"] - 2 * 64 * 8  # the image needs no gradient
    assert result["utilisation"] == pytest.approx(result["items_per_s"] * result["model_flops_per_item"] / 0.5e12)


def test_a_profile_is_written_and_told(tmp_path, capsys):
    file, folder = tmp_path / "result.json", tmp_path / "trace"
    sizes = ("model.width=512", "model.depth=2", "data.batch=256")
    assert (
        benchmark.main(["experiment=digits_mlp", "train.chunk=1", *sizes, "steps=3", "warmup=1", "peak=1", f"profile={folder}", f"json={file}"]) == 0
    )
    profile = json.loads(file.read_text())["profile"]
    assert (profile["folder"], profile["steps"]) == (str(folder), 3)
    assert {"dense_0", "dense_1"} & {operation["module"] for operation in profile["operations"]}
    assert len(profile["operations"]) <= 10
    out = capsys.readouterr().out
    assert f"trace: {folder}" in " ".join(out.split())
    assert "times a step" in out


def test_unknown_peers_and_models_without_a_program_are_named(capsys):
    assert "did you mean 'torch'" in refused(capsys, "experiment=digits_mlp", "peer=troch")
    assert "there is no program for research.models.mlp.MLP" in refused(capsys, "experiment=digits_mlp", "peer=torch")
    assert "peak=-1" in refused(capsys, "experiment=digits_mlp", "peak=-1")
    assert "steps=0" in refused(capsys, "experiment=digits_mlp", "steps=0")


def test_a_peer_that_is_not_there_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(peer, "PEER_FOLDER", tmp_path)
    assert "cnn_torch.py" in refused(capsys, "experiment=mnist_cnn", "peer=torch")
    monkeypatch.undo()
    monkeypatch.setattr(peer.importlib.util, "find_spec", lambda name: None)
    assert "torch is not installed" in refused(capsys, "experiment=mnist_cnn", "peer=torch")
