"""The programs that speed is compared with: their commands, their blocks of steps, and which of their variants is timed."""

import importlib.util
import io
import itertools
import json
import sys
import time

import pytest
from omegaconf import open_dict

from research.core.config import compose
from research.core.errors import ConfigError, ResearchError
from research.training import peer


def command(*overrides: str, **spec) -> list[str]:
    """The peer's command for a config whose data has this spec."""
    config = compose([*overrides, "peer=torch"], "benchmark")
    with open_dict(config):
        config.data.spec.update(spec)
    program = peer.find_program(config)
    assert program is not None
    return peer.peer_command(program, config)


def options(arguments: list[str]) -> dict[str, list[str]]:
    """{option: its values} of a command line."""
    found: dict[str, list[str]] = {}
    for word in arguments:
        if word.startswith("--"):
            found[word[2:]] = []
        else:
            found[list(found)[-1]].append(word)
    return found


def test_arguments_of_the_gpt():
    arguments = command("experiment=shakespeare_char_cpu", vocabulary=65, bytes_per_token=1.0)
    assert arguments[:2] == [sys.executable, str(peer.PEER_FOLDER / "gpt_torch.py")]
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
    monkeypatch.setattr(peer.jax, "default_backend", lambda: "gpu")
    half = ("train.precision=bfloat16",)
    told = options(command("experiment=shakespeare_char_cpu", *half, vocabulary=65, bytes_per_token=1.0)[2:])
    assert (told["device"], told["dtype"]) == (["cuda"], ["bfloat16"])
    with pytest.raises(ConfigError, match=r"cnn_torch\.py runs on cpu, and this is a gpu"):
        command("experiment=mnist_cnn")
    with pytest.raises(ConfigError, match=r'only knows train\.precision="float32"'):
        command("experiment=mnist_cnn", *half)


def test_a_peer_answers_block_by_block():
    program = """
import json, sys
print(json.dumps({"parameters": 3, "seconds": [9.0]}))
for _ in sys.stdin:
    print(json.dumps({"seconds": [1.0, 2.0]}))
"""
    with peer.started("echo", [sys.executable, "-u", "-c", program]) as program:
        assert program.facts == {"parameters": 3}
        assert program.block() == program.block() == [1.0, 2.0]


def test_the_last_words_of_a_peer_that_fails_are_shown():
    with (
        pytest.raises(ResearchError, match=r"ended with code 1: ValueError: no such size"),
        peer.started("torch", [sys.executable, "-c", "raise ValueError('no such size')"]),
    ):
        pass


def test_the_variant_that_is_timed_has_the_fastest_median_and_not_the_fastest_step(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("blocks", peer.PEER_FOLDER / "blocks.py")
    assert spec is not None
    assert spec.loader is not None
    blocks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(blocks)
    monkeypatch.setattr(blocks, "TRIAL_S", 0.1)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    lucky = itertools.cycle([0.0] + [0.02] * 4)
    blocks.serve({"eager": lambda: time.sleep(next(lucky)), "steady": lambda: time.sleep(0.005)}, 3, 7)
    facts = json.loads(capsys.readouterr().out)
    assert (facts["variant"], facts["parameters"]) == ("steady", 7)
    assert facts["variants"]["eager"] >= 20
