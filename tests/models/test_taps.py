"""Taps of every family: read, patched, ablated and differentiated by one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.layers.tap import nest

BLOCK = ["attention/value", "attention/weights", "attention/heads", "middle", "mlp/hidden", "output"]
CASES = {
    "perceptron": ({}, []),
    "mlp": ({"width": 6, "activation": "gelu"}, ["hidden_0", "hidden_1"]),
    "cnn": ({"channels": [4, 4], "pool": [2, 1], "hidden": [8], "activation": "gelu"}, ["maps_0", "maps_1", "hidden_0"]),
    "resnet18": ({"blocks": [1], "channels": [4], "activation": "gelu"}, ["maps", "block_0/hidden", "block_0/output", "pooled"]),
    "lstm": ({"width": 8}, ["hidden_0", "hidden_1"]),
    "gpt": ({"width": 16, "depth": 1, "kv_heads": 2}, [*(f"block_0/{name}" for name in BLOCK), "normalized"]),
}


@pytest.fixture(scope="module", params=CASES)
def family(request, configured, filled, image, tokens):
    """(read(x, edits) -> (logits, taps), inner taps, two inputs); all edits of a family share one program."""
    changes, inner = CASES[request.param]
    module = configured(request.param, **changes)
    x = tokens if request.param in ("gpt", "lstm") else image
    variables = filled(module, x)
    shapes = jax.eval_shape(module.apply, variables, x)[1]
    unedited = {name: (np.zeros(shapes[name].shape, bool), np.zeros(shapes[name].shape, np.float32)) for name in ("input", *inner)}

    traces = []

    @jax.jit
    def program(x, edits):
        traces.append(1)
        return module.apply({**variables, "edits": nest(edits)}, x)

    def read(x, edits):
        return program(x, unedited | edits)

    yield read, inner, (x, x[::-1].copy())
    assert len(traces) == 1


def replacing(value):
    return np.ones(value.shape, bool), value


def test_the_input_and_the_logits_are_taps(family):
    read, inner, (a, _) = family
    logits, taps = read(a, {})
    assert {"input", "logits", *inner} <= set(taps)
    np.testing.assert_array_equal(taps["logits"], logits)


def test_patching_the_input_makes_it_the_other_example(family):
    read, _, (a, b) = family
    (want, taps), (other, _) = read(a, {}), read(b, {})
    got, _ = read(b, {"input": replacing(taps["input"])})
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(got - other).max() > 1e-2


def test_every_tap_can_be_patched_and_ablated(family):
    read, inner, (a, b) = family
    (_, taps), (clean, _) = read(a, {}), read(b, {})
    for name in inner:
        for value in (taps[name], np.zeros_like(taps[name])):
            edited, seen = read(b, {name: replacing(value)})
            np.testing.assert_array_equal(seen[name], value)
            assert np.abs(edited - clean).max() > 1e-4, name


@pytest.mark.parametrize(("name", "at"), [("perceptron", "input"), ("mlp", "hidden_0"), ("cnn", "maps_1"), ("gpt", "block_0/attention/weights")])
def test_the_gradient_of_a_tap_is_the_slope_of_the_logits(configured, filled, image, tokens, name, at):
    module, x = configured(name, **CASES[name][0]), tokens if name == "gpt" else image
    variables = filled(module, x)

    @jax.jit
    def loss(added):
        return jnp.tanh(module.apply({**variables, "edits": nest({at: added})}, jnp.asarray(x))[0]).sum()

    shape = jax.eval_shape(module.apply, variables, x)[1][at].shape
    direction = np.random.RandomState(0).randn(*shape).astype(np.float32)
    gradient = jax.jit(jax.grad(loss))(np.zeros_like(direction))
    slope = (loss(3e-3 * direction) - loss(-3e-3 * direction)) / 6e-3
    np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=3e-2, atol=3e-3)
    assert np.abs(gradient).max() > 1e-2
