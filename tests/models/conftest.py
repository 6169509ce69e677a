"""Models as their YAML describes them, with changes, and small inputs for them."""

from pathlib import Path

import jax
import numpy as np
import pytest
from omegaconf import OmegaConf

from research.core.build import build
from research.core.tree import map_paths

SPEC = {"outputs": 10, "vocabulary": 65, "time": 16}


@pytest.fixture(scope="session")
def configured():
    """configured("mlp", width=8): the model of conf/model/mlp.yaml with these changes."""

    def model(name, **changes):
        folder = Path(__file__).parents[2] / "conf" / "model"
        node = OmegaConf.load(folder / f"{name}.yaml")
        for base in node.pop("defaults", []):
            node = OmegaConf.merge(OmegaConf.load(folder / f"{base}.yaml"), node)
        node = OmegaConf.merge(node, changes)
        config = OmegaConf.create({"data": {"spec": SPEC}, "train": {"precision": "float32"}, "model": node})
        return build(config.model, where="model")

    return model


@pytest.fixture(scope="session")
def filled():
    """filled(module, x): variables of the right shapes with random numbers from numpy, for which nothing need be compiled."""

    def variables(module, x):
        random = np.random.RandomState(0)

        def fill(path, leaf):
            noise = 0.2 * random.randn(*leaf.shape).astype(np.float32)
            return 1 + np.abs(noise) if path.endswith(("scale", "variance")) else noise

        return map_paths(fill, jax.eval_shape(module.init, jax.random.key(0), x))

    return variables


@pytest.fixture(scope="session")
def image():
    return np.random.RandomState(0).randn(4, 8, 8, 1).astype(np.float32)


@pytest.fixture(scope="session")
def tokens():
    return np.random.RandomState(0).randint(0, 65, (3, 10)).astype(np.int32)


@pytest.fixture(scope="session")
def run():
    """run(module, variables, x, …) = module.apply, compiled once for each module and shape."""
    return jax.jit(
        lambda module, variables, x, mask=None, index=None, hyper=None, train=False, mutable=(): module.apply(
            variables, x, mask=mask, index=index, hyper=hyper, train=train, mutable=list(mutable), rngs={"dropout": jax.random.key(7)}
        )[0],
        static_argnums=0,
        static_argnames=("train", "mutable"),
    )
