"""GPTQ against what the authors' own program made of the same weights; references_quantize/make.py wrote the arrays."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.compression.codes import decode, number_format
from research.compression.gptq import GPTQ
from research.compression.linear import Linear, Moments
from research.compression.quantize import Nearest

CASES = {
    "int4": GPTQ(format="int4", block=40),
    "int3": GPTQ(format="int3", block=40),
    "int4_group_32": GPTQ(format="int4", group=32, block=40),
    "int3_group_32_order": GPTQ(format="int3", group=32, order=True, block=40),
    "int8_order": GPTQ(format="int8", order=True, block=40),
}


@pytest.fixture(scope="module")
def stored():
    return dict(np.load(pathlib.Path(__file__).parent / "references_quantize" / "gptq.npz"))


def rounded(method, weights, x):
    """(out, in) weights as the method leaves them."""
    seen = Moments(jnp.asarray(x.T @ x), jnp.abs(x).sum(0), jnp.abs(x).max(0), jnp.float32(len(x)))
    layer = Linear("", "dense", weights.T.shape, 1)
    codes = jax.jit(lambda matrix: method.codes(layer, matrix, method.group, seen))(jnp.asarray(weights.T))
    return np.asarray(decode(codes["values"], codes["scale"], number_format(method.format, method.grid))).T


@pytest.mark.parametrize("name", CASES)
def test_gptq_is_the_authors_program(name, stored):
    weights, x, expected = (stored[key] for key in ("weights", "inputs", name))
    result = rounded(CASES[name], weights, x)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["int3", "int4_group_32"])
def test_gptq_changes_the_outputs_less_than_rounding_to_nearest(name, stored):
    weights, x = stored["weights"], stored["inputs"]
    method = CASES[name]
    nearest = Nearest(format=method.format, grid=method.grid, group=method.group)
    error, base = (np.linalg.norm(x @ (rounded(by, weights, x) - weights).T) for by in (method, nearest))
    assert error < 0.8 * base


def test_an_input_that_is_always_zero_is_rounded_to_zero(stored):
    weights, x = stored["weights"], stored["inputs"]
    result = rounded(CASES["int4"], weights, x)
    assert not result[:, [3, 48]].any()
    assert result[:, [2, 47]].any()


def test_the_block_changes_rounding_errors_alone(stored):
    weights, x = stored["weights"], stored["inputs"]
    np.testing.assert_allclose(rounded(GPTQ(format="int4", block=1), weights, x), stored["int4"], atol=1e-4)
