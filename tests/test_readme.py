"""The README's own code does what the README says: a model, a data set and an objective in a few lines each, through every verb."""

import pathlib
import re
import sys
import types

import numpy as np
import pytest

import research.data
import research.models
import research.objectives
from research.core.build import build

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```(?:python|yaml)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
IMPORTS = {
    "models": "import flax.linen as nn\nfrom research.layers.tap import tap\n",
    "objectives": """
import dataclasses
from typing import ClassVar
import jax.numpy as jnp
from research.core.types import Tally
from research.metrics.average import average
from research.objectives.supervised import Supervised
""",
    "data": """
import numpy as np
from research.data.classification import labelled_images
from research.data.dataset import Dataset
from research.data.preprocess import Preprocessor
from research.data.split import draw
""",
}
QUIET = ("train.steps=20", "logger.progress=none", "logger.figures=false")


def block(word):
    """The one block of code that holds this word."""
    (found,) = (text for text in BLOCKS if word in text)
    return found


@pytest.fixture
def mine(monkeypatch):
    """mine(room, code): research.<room>.mine, as if its file were there."""

    def make(room, code):
        module = types.ModuleType(f"research.{room}.mine")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(getattr(research, room), "mine", module, raising=False)
        exec(IMPORTS[room] + code, module.__dict__)

    return make


def test_a_model_of_ones_own_is_trained(mine, command, tmp_path):
    mine("models", block("class Mine(nn.Module)"))
    node = dict(line.split(": ") for line in block("_target_: research.models.mine.Mine").splitlines())
    argv = ("model=perceptron", "~model.dtype", *(f"{'+' if name == 'width' else ''}model.{name}={value}" for name, value in node.items()))
    told = command("train", *argv, *QUIET, f"run_dir={tmp_path}")
    assert told.code == 0, told.err
    assert command("evaluate", f"run={tmp_path}", "figures=false").code == 0


def test_an_objective_of_ones_own_is_trained_scored_and_asked(mine, command, tmp_path):
    mine("objectives", block("class Mine(Supervised)"))
    argv = ("data=random_regression", "model.width=8", "objective=regress", "objective._target_=research.objectives.mine.Mine")
    told = command("train", *argv, "~objective.loss", "~objective.delta", *QUIET, f"run_dir={tmp_path}")
    assert told.code == 0, told.err
    assert command("evaluate", f"run={tmp_path}").code == 0
    np.savez(tmp_path / "new.npz", features=np.zeros((3, 10)))
    told = command("predict", f"run={tmp_path}", f"input={tmp_path / 'new.npz'}")
    assert told.code == 0, told.err
    assert "value" in told.out


def test_a_data_set_of_ones_own_is_opened(mine):
    made = "images, labels, classes = np.zeros((50, 4, 4, 1), np.uint8), np.arange(50) % 2, ['no', 'yes']"
    code = re.sub(r"images, labels = ….*", made, block("def mine("))
    assert made in code
    mine("data", code)
    dataset = build({"_target_": "research.data.mine.mine", "root": "."})
    assert {name: len(source) for name, source in dataset.splits.items()} == {"train": 40, "validation": 5, "test": 5}
