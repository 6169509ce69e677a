"""Pruning against what the authors' own programs made of the same weights; references/make.py wrote the arrays."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.compression.linear import Moments
from research.compression.prune import SparseGPT, Wanda
from research.compression.subject import Subject
from research.core.tree import paths
from research.objectives.regress import Regress

REFERENCES = pathlib.Path(__file__).parent / "references"


@pytest.fixture(scope="module")
def stored():
    return {name: dict(np.load(REFERENCES / f"{name}.npz")) for name in ("sparsegpt", "wanda")}


def seen(x):
    return Moments(jnp.asarray(x.T @ x), jnp.abs(x).sum(0), jnp.abs(x).max(0), jnp.float32(len(x)))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("unstructured_50", {"sparsity": 0.5}),
        ("unstructured_80", {"sparsity": 0.8}),
        ("2:4", {"pattern": "2:4"}),
        ("4:8", {"pattern": "4:8"}),
    ],
)
def test_sparsegpt_is_the_authors_program(name, settings, stored):
    weights, x, expected = (stored["sparsegpt"][key] for key in ("weights", "inputs", name))
    method = SparseGPT(block=40, damp=0.01, **settings)
    pruned = np.asarray(method.pruned(jnp.asarray(weights.T), seen(x), method.sparsity)).T
    np.testing.assert_array_equal(pruned == 0, expected == 0)
    np.testing.assert_allclose(pruned, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(pruned - weights)[pruned != 0].max() > 0.1  # the errors were made up for


class Block(nn.Module):
    """Two layers with a rectifier between them."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(48, use_bias=False, name="up")(x))
        return nn.Dense(32, use_bias=False, name="down")(x)


class Two(nn.Module):
    """Two blocks."""

    @nn.compact
    def __call__(self, x, **_):
        for i in range(2):
            x = Block(name=f"block_{i}")(x)
        return x, {}


@pytest.mark.parametrize(("name", "settings"), [("unstructured", {"sparsity": 0.6}), ("2:4", {"pattern": "2:4"})])
def test_wanda_is_the_authors_program_and_each_block_sees_the_pruned_ones_before_it(name, settings, stored):
    arrays = stored["wanda"]
    params = {f"block_{i}": {part: {"kernel": jnp.asarray(arrays[f"{part}_{i}"].T)} for part in ("up", "down")} for i in range(2)}
    batches = [{"features": half, "index": np.arange(64, dtype=np.int32)} for half in np.split(arrays["inputs"], 2)]
    dense = Subject({"train": {}}, Regress(Two()), params, {}, None, {}, batches)
    pruned = Wanda(**settings)(dense)
    assert sorted(paths(pruned.params)) == sorted(paths(params))
    for path, kernel in paths(pruned.params).items():
        block, part, _ = path.split("/")
        np.testing.assert_array_equal(kernel, arrays[f"{name}/{part}_{block[-1]}"].T, err_msg=path)
    at_once = Wanda(**settings, sequential=False)(dense)
    first, second = (jax.tree.map(lambda x, y: bool((x == y).all()), at_once.params[block], pruned.params[block]) for block in ("block_0", "block_1"))
    assert all(jax.tree.leaves(first))
    assert not all(jax.tree.leaves(second))
