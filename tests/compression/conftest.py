"""Small models of every family as subjects of compression: their own config, random parameters, calibration data."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.compression.subject import Subject
from research.core.build import build
from research.core.config import compose, resolved, split_values
from research.core.spec import fields

CONF = Path(__file__).parents[2] / "conf"
SPECS = {
    "image": {"classes": 5, "outputs": 5, "image": [8, 8, 1], "fields": fields(image=((8, 8, 1), "float32"), label=((), "int32"))},
    "text": {
        "vocabulary": 11,
        "time": 8,
        "bytes_per_token": 1.0,
        "fields": fields(mask=(8,), tokens=((8,), "int32"), target=((8,), "int32")),
    },
}
FAMILIES = {
    "mlp": ["data=digits", "model=mlp", "model.width=[16,24]"],
    "cnn": ["data=digits", "model=cnn", "model.channels=[8,16]", "model.padding=SAME", "model.pool=[2,1]", "model.hidden=[16]"],
    "resnet": ["data=digits", "model=resnet18", "model.blocks=[1,1]", "model.channels=[8,16]"],  # its second stage has a stride of 2
    "gpt": ["data=python_docs", "model=gpt", "objective=language_model", "model.width=16", "model.depth=2", "model.heads=2"],
}


@pytest.fixture(scope="session")
def subject():
    """subject("cnn", "model.norm=batch"): the family's model with these overrides, freshly initialised, and 32 examples."""

    def make(family: str, *overrides: str) -> Subject:
        config = compose([*FAMILIES[family], *overrides])
        spec = SPECS["text" if family == "gpt" else "image"]
        config.data.spec = spec
        tree = resolved(config)
        objective = build(split_values(tree)[0]["objective"], where="objective")
        batches = [_batch(spec, seed) for seed in range(2)]
        params, extra = objective.init(jax.random.key(0), batches[0])
        noise = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
        params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(noise), x.shape), params)  # biases and scales too
        return Subject(tree, objective, params, extra, None, {"learning_rate": jnp.float32(1e-3)}, batches)

    return make


@pytest.fixture(scope="session")
def outputs():
    """outputs(subject): what its model predicts for the first batch, as one array."""

    def of(subject: Subject) -> np.ndarray:
        predicted, _ = _predict(subject.objective, *subject.model, subject.batches[0])
        return np.asarray(next(iter(predicted.values())))

    return of


_predict = jax.jit(lambda objective, *model_and_batch: _forward(objective, *model_and_batch), static_argnums=0)


def _forward(objective, params, extra, frozen, hyper, batch):
    return objective.predict(params, extra, frozen, batch, None, hyper)


def _batch(spec, seed, examples=16):
    random = np.random.RandomState(seed)
    batch = {"index": np.arange(examples, dtype=np.int32)}
    if "vocabulary" in spec:
        text = random.randint(0, spec["vocabulary"], (examples, spec["time"] + 1)).astype(np.int32)
        return {**batch, "tokens": text[:, :-1], "target": text[:, 1:], "mask": np.ones((examples, spec["time"]), bool)}
    image = random.randn(examples, *spec["image"]).astype(np.float32)
    return {**batch, "image": image, "label": random.randint(0, 5, examples).astype(np.int32), "mask": np.ones(examples, bool)}
