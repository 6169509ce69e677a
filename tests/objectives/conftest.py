"""Small batches, and objectives as their YAML describes them."""

from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from research.core.build import build

CONF = Path(__file__).parents[2] / "conf"
SPEC = {"outputs": 5, "vocabulary": 11, "time": 8, "bytes_per_token": 2.0}


@pytest.fixture(scope="session")
def configured():
    """configured("classify", "mlp", model={…}, label_smoothing=0.1): the objective of both YAML files with these changes."""

    def objective(name, model_name, model=None, **changes):
        files = {"objective": OmegaConf.load(CONF / "objective" / f"{name}.yaml"), "model": OmegaConf.load(CONF / "model" / f"{model_name}.yaml")}
        given = {"data": {"spec": SPEC}, "train": {"precision": "float32"}}
        config = OmegaConf.merge(files, given, {"model": model or {}, "objective": changes})
        return build(config.objective, where="objective")

    return objective


@pytest.fixture(scope="session")
def images():
    random = np.random.RandomState(0)
    return {
        "image": random.randn(6, 8, 8, 1).astype(np.float32),
        "label": random.randint(0, 5, 6).astype(np.int32),
        "mask": np.array([True, True, False, True, True, False]),
        "index": np.arange(6, dtype=np.int32),
    }


@pytest.fixture(scope="session")
def rows():
    random = np.random.RandomState(0)
    return {
        "features": random.randn(6, 7).astype(np.float32),
        "target": random.randn(6, 5).astype(np.float32),
        "mask": np.array([True, True, False, True, True, False]),
        "index": np.arange(6, dtype=np.int32),
    }


@pytest.fixture(scope="session")
def text():
    random = np.random.RandomState(0)
    tokens = random.randint(0, 11, (4, 9)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "target": tokens[:, 1:],
        "mask": random.rand(4, 8) > 0.3,
        "index": np.arange(4, dtype=np.int32),
    }
