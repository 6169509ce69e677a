"""Small models of every family as explanation sees them: their own config, parameters drawn by numpy, examples to explain."""

import dataclasses
import math
import string
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.build import build
from research.core.config import compose, resolved, split_values
from research.core.spec import fields, zero_batch
from research.core.tree import map_paths
from research.explanation.model import Examples, Model, examples

SPECS: dict[str, dict[str, Any]] = {
    "image": {"classes": 5, "outputs": 5, "image": [8, 8, 1], "fields": fields(image=((8, 8, 1), "float32"), label=((), "int32"))},
    "table": {"features": 6, "outputs": 2, "fields": fields(features=((6,), "float32"), target=((2,), "float32"))},
    "text": {
        "vocabulary": 11,
        "time": 8,
        "bytes_per_token": 1.0,
        "fields": fields(mask=(8,), tokens=((8,), "int32"), target=((8,), "int32")),
    },
}
FAMILIES = {  # name: (spec, overrides)
    "mlp": ("image", ["data=digits", "model=mlp", "model.width=[16,12]"]),
    "regression": ("table", ["data=digits", "model=mlp", "objective=regress", "model.width=[16]", "model.depth=1"]),
    "cnn": ("image", ["data=digits", "model=cnn", "model.channels=[4,6]", "model.padding=SAME", "model.pool=[2,1]", "model.hidden=[16]"]),
    "gpt": ("text", ["data=python_docs", "model=gpt", "objective=language_model", "model.width=16", "model.depth=2", "model.heads=2"]),
}
CLASSES = ("zero", "one", "two", "three", "four")


@pytest.fixture(scope="session")
def model() -> Callable[..., Model]:
    """model("cnn", "model.norm=batch"): the family's model with these overrides; the same parameters each time, the same object for the same call.

    "mlp" and "cnn" classify 8 x 8 images into `CLASSES`, "regression" is an MLP of 6 features and 2 outputs, "gpt" has 11 tokens, a to k.
    """
    made: dict[tuple[str, ...], Model] = {}

    def make(family: str, *overrides: str) -> Model:
        if (family, *overrides) not in made:
            kind, own = FAMILIES[family]
            config = compose([*own, *overrides])
            config.data.spec = SPECS[kind]
            objective = build(split_values(resolved(config))[0]["objective"], where="objective")
            params, extra = jax.eval_shape(objective.init, jax.random.key(0), zero_batch(SPECS[kind], 2))
            hyper = {"learning_rate": jnp.float32(1e-3)}
            pieces = [letter.encode() for letter in string.ascii_lowercase[:11]] if kind == "text" else None
            classes = CLASSES if kind == "image" else ()
            made[family, *overrides] = Model(objective, filled(params), filled(extra), None, hyper, SPECS[kind], classes, pieces)
        return made[family, *overrides]

    return make


@pytest.fixture(scope="session")
def examples_of() -> Callable[..., Examples]:
    """examples_of(model, 3, target=1): so many examples drawn by numpy; texts of a GPT end in two tokens of padding, but for the first."""

    def make(model: Model, count: int = 3, target: Any = None, position: int | None = None, seed: int = 0) -> Examples:
        return examples(model, batch_of(model, count, seed), target=target, position=position)

    return make


@pytest.fixture(scope="session")
def with_data() -> Callable[..., Model]:
    """with_data(model, train={"image": …, "label": …}): the model with data of these splits and fields."""

    def make(model: Model, **splits: dict[str, np.ndarray]) -> Model:
        held = types.SimpleNamespace(splits={name: Fields(fields) for name, fields in splits.items()})
        return dataclasses.replace(model, data=lambda: held)

    return make


@dataclasses.dataclass(frozen=True, eq=False)
class Fields:
    """A source of examples in memory."""

    fields: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.fields.values()), ()))

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {name: values[indices] for name, values in self.fields.items()}


def batch_of(model: Model, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of random inputs, without labels."""
    random = np.random.RandomState(seed)
    shape = tuple(model.spec["fields"][model.field]["shape"])
    if model.field != "tokens":
        return {model.field: random.standard_normal((count, *shape)).astype(np.float32), "mask": np.ones(count, bool)}
    mask = np.ones((count, *shape), bool)
    mask[1:, -2:] = False
    return {"tokens": random.randint(0, model.spec["vocabulary"], (count, *shape)).astype(np.int32), "mask": mask}


def filled(tree: Any, seed: int = 0) -> Any:
    """Numbers in place of shapes, from numpy alone: kernels scaled by their inputs, norms near 1, biases near 0, variances above 0."""
    random = np.random.RandomState(seed)

    def leaf(path, x):
        drawn = random.standard_normal(x.shape).astype(np.float32)
        name = path.rsplit("/", 1)[-1]
        if name == "variance":
            return np.exp(0.3 * drawn)
        if name == "scale":
            return 1.0 + 0.2 * drawn
        if x.ndim < 2:
            return 0.2 * drawn
        inputs = math.prod(x.shape[:-1]) if x.ndim != 3 or path.endswith("out/kernel") else x.shape[0]  # of heads: d h k
        return drawn * np.float32(inputs**-0.5)

    return map_paths(leaf, tree)
