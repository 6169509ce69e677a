"""The benchmark verb: what it writes, whom it compares with, and what it refuses."""

import json
import math
import sys

import pytest
from omegaconf import open_dict

from research import benchmark
from research.core.config import compose
from research.core.errors import ConfigError, ResearchError

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


def command(*overrides: str, **spec) -> list[str]:
    """The peer's command for a config whose data has this spec."""
    config = compose([*overrides, "peer=torch"], "benchmark")
    with open_dict(config):
        config.data.spec.update(spec)
    program = benchmark.find_program(config)
    assert program is not None
    return benchmark.peer_command(program, config)


def options(arguments: list[str]) -> dict[str, list[str]]:
    """{option: its values} of a command line."""
    found: dict[str, list[str]] = {}
    for word in arguments:
        if word.startswith("--"):
            found[word[2:]] = []
        else:
            found[list(found)[-1]].append(word)
    return found


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


def test_arguments_of_the_gpt():
    arguments = command("experiment=shakespeare_char_cpu", vocabulary=65, bytes_per_token=1.0)
    assert arguments[:2] == [sys.executable, str(benchmark.PEER_FOLDER / "gpt_torch.py")]
    text = "device=cpu vocabulary=65 time=64 width=128 depth=4 heads=4 batch=12 clip=1.0 dtype=float32"
    assert options(arguments[2:]) == {name: [value] for name, value in (pair.split("=") for pair in text.split())}


def test_arguments_of_the_cnn_follow_overrides():
    arguments = options(command("experiment=mnist_cnn", "model.channels=[8,16,16]", "data.batch=32", "train.ema=0.99")[2:])
    text = "image=28,28,1 outputs=10 batch=32 channels=8,16,16 kernel=3 pool=2,2,1 hidden=64 ema=0.99"
    assert arguments == {name: value.split(",") for name, value in (pair.split("=") for pair in text.split())}


def test_a_network_that_the_program_does_not_know_is_refused():
    with pytest.raises(ConfigError, match=r"gpt_torch\.py only knows model\.activation=\"gelu_tanh\", not \"swiglu\""):
        command("experiment=shakespeare_char_cpu", "model.activation=swiglu", vocabulary=65, bytes_per_token=1.0)


def test_a_program_for_cpu_is_not_compared_elsewhere(monkeypatch):
    monkeypatch.setattr(benchmark.jax, "default_backend", lambda: "gpu")
    half = ("train.precision=bfloat16",)
    told = options(command("experiment=shakespeare_char_cpu", *half, vocabulary=65, bytes_per_token=1.0)[2:])
    assert (told["device"], told["dtype"]) == (["cuda"], ["bfloat16"])
    with pytest.raises(ConfigError, match=r"cnn_torch\.py runs on cpu, and this is a gpu"):
        command("experiment=mnist_cnn")
    with pytest.raises(ConfigError, match=r'only knows train\.precision="float32"'):
        command("experiment=mnist_cnn", *half)


def test_unknown_peers_and_models_without_a_program_are_named(capsys):
    assert "did you mean 'torch'" in refused(capsys, "experiment=digits_mlp", "peer=troch")
    assert "there is no program for research.models.mlp.MLP" in refused(capsys, "experiment=digits_mlp", "peer=torch")
    assert "peak=-1" in refused(capsys, "experiment=digits_mlp", "peak=-1")
    assert "steps=0" in refused(capsys, "experiment=digits_mlp", "steps=0")


def test_a_peer_that_is_not_there_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "PEER_FOLDER", tmp_path)
    assert "cnn_torch.py" in refused(capsys, "experiment=mnist_cnn", "peer=torch")
    monkeypatch.undo()
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    assert "torch is not installed" in refused(capsys, "experiment=mnist_cnn", "peer=torch")


def test_a_peer_answers_block_by_block():
    program = """
import json, sys
print(json.dumps({"parameters": 3, "seconds": [9.0]}))
for _ in sys.stdin:
    print(json.dumps({"seconds": [1.0, 2.0]}))
"""
    with benchmark.started("echo", [sys.executable, "-u", "-c", program]) as peer:
        assert peer.facts == {"parameters": 3}
        assert peer.block() == peer.block() == [1.0, 2.0]


def test_the_last_words_of_a_peer_that_fails_are_shown():
    with (
        pytest.raises(ResearchError, match=r"ended with code 1: ValueError: no such size"),
        benchmark.started("torch", [sys.executable, "-c", "raise ValueError('no such size')"]),
    ):
        pass
