"""Every form of causal attention against the plain formula, and what each is refused for."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import ConfigError
from research.layers import causal
from research.layers.causal import (
    BLOCK,
    KEPT,
    LONG_BLOCK,
    attention_weights,
    blockwise_attention,
    causal_attention,
    reference_attention,
    span,
    splash_attention,
)

RANDOM = np.random.RandomState(0)


def heads(t, h=4, g=2, k=8):
    return [jnp.asarray(2 * RANDOM.randn(2, n, t, k), jnp.float32) for n in (h, g, g)]


def assert_equal_in_value_and_gradient(form, inputs, tolerance):
    weight = jnp.asarray(RANDOM.randn(*inputs[0].shape), inputs[0].dtype)

    @jax.jit
    def outputs_and_gradients(*inputs):
        pairs = [jax.vjp(f, *inputs) for f in (form, reference_attention)]
        return [(out, pull(weight)) for out, pull in pairs]

    got, want = outputs_and_gradients(*inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), got, want)


def test_the_reference_is_softmax_over_the_positions_so_far():
    query, key, value = (np.asarray(x) for x in heads(5, h=2, g=1, k=3))
    for row in range(5):
        scores = query[0, 1, row] @ key[0, 0, : row + 1].T / np.sqrt(3)
        want = np.exp(scores) / np.exp(scores).sum() @ value[0, 0, : row + 1]
        np.testing.assert_allclose(reference_attention(*map(jnp.asarray, (query, key, value)))[0, 1, row], want, rtol=1e-5)


@pytest.mark.parametrize(("t", "g"), [(1, 4), (7, 1), (BLOCK, 2), (BLOCK + 5, 4), (2 * BLOCK + 1, 2)])
def test_blockwise(t, g):
    assert_equal_in_value_and_gradient(blockwise_attention, heads(t, g=g), 3e-5)


@pytest.mark.parametrize("t", [KEPT + 3, 11 * LONG_BLOCK + LONG_BLOCK // 2])  # the second: spans of two blocks; the last one of one, and a rest
def test_blockwise_where_weights_are_computed_again(t):
    assert_equal_in_value_and_gradient(blockwise_attention, heads(t, h=2, g=1, k=2), 1e-4)


@pytest.mark.parametrize(("t", "g"), [(128, 4), (70, 2)])  # the second is padded
def test_splash(t, g):
    assert_equal_in_value_and_gradient(functools.partial(splash_attention, interpret=True), heads(t, g=g), 3e-5)


def test_the_form_of_other_platforms(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "rocm")
    assert_equal_in_value_and_gradient(causal_attention, heads(19), 3e-5)


@pytest.mark.parametrize("t", [9, KEPT + 3])
def test_scores_that_would_overflow_stay_finite(t):
    query, key, value = heads(t)
    got, want = jax.jit(lambda *inputs: (blockwise_attention(*inputs), reference_attention(*inputs)))(query * 1e3, key * 1e3, value)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("t", [9, KEPT + 3])
@pytest.mark.parametrize("score", [1e4, 1e8])
def test_weights_sum_to_one_in_the_backward_pass_however_large_the_scores(t, score):
    query, key, value = heads(t)
    query, key = jnp.full_like(query, score), jnp.ones_like(key)  # equal keys
    slope = jax.jit(jax.grad(lambda value: blockwise_attention(query, key, value).sum()))(value)
    np.testing.assert_allclose(slope.sum(), query.size, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_a_gradient_where_weights_are_computed_again(dtype):
    inputs = [x.astype(dtype) for x in heads(KEPT + 3, h=2, g=1, k=2)]

    def curvature(form):
        gradient = jax.grad(lambda query: jnp.square(form(query, *inputs[1:])).astype(jnp.float32).sum())
        return gradient(inputs[0]), jax.grad(lambda query: jnp.square(gradient(query)).astype(jnp.float32).sum())(inputs[0])

    for got, want in zip(*jax.jit(lambda: (curvature(blockwise_attention), curvature(reference_attention)))(), strict=True):
        got, want = (np.asarray(x, np.float32) for x in (got, want))
        np.testing.assert_allclose(got, want, atol=(1e-4 if dtype == "float32" else 0.1) * np.abs(want).max())


def test_weights_are_a_distribution_over_what_the_mask_allows():
    query, key, _ = heads(5)
    mask = np.tri(5, dtype=bool)
    weights = np.asarray(jax.jit(attention_weights)(query, key, jnp.asarray(mask)[None]))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    assert (weights[..., ~mask] == 0).all()


def test_a_span_grows_only_when_there_would_be_too_many():
    assert [span(t) for t in (1, 64, 512, 513, 1024, 1025, 8192)] == [64, 64, 64, 128, 128, 256, 1024]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_context_at_fixed_tokens():
    def temporary(form, t):
        shapes = [jax.ShapeDtypeStruct((4096 // t, 2, t, 16), jnp.float32)] * 3
        gradient = jax.grad(lambda *inputs: form(*inputs).sum(), argnums=(0, 1, 2))
        return jax.jit(gradient).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    short, long = (temporary(blockwise_attention, t) for t in (1024, 4096))
    assert long < 1.5 * short
    assert long < temporary(reference_attention, 4096) / 8


class Device(types.SimpleNamespace):
    """A GPU as far as the choice of a form looks at it."""

    client = types.SimpleNamespace(platform_version="cuda 12")


@pytest.mark.parametrize(
    ("platform", "dtype", "width", "capability", "chosen"),
    [
        ("cpu", "float32", 8, None, "blockwise"),
        ("gpu", "bfloat16", 64, "9.0", "cudnn"),
        ("gpu", "float32", 64, "9.0", "dot_product"),
        ("gpu", "bfloat16", 60, "9.0", "dot_product"),
        ("gpu", "bfloat16", 256, "8.0", "dot_product"),
        ("gpu", "bfloat16", 64, "7.5", "dot_product"),
        ("tpu", "bfloat16", 64, None, "splash"),
        ("tpu", "float32", 60, None, "dot_product"),
    ],
)
def test_auto_takes_what_the_platform_can_do(monkeypatch, platform, dtype, width, capability, chosen):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "devices", lambda: [Device(compute_capability=capability)])
    monkeypatch.setattr(causal, "_forms", lambda: {name: lambda *_, name=name: name for name in ("blockwise", "cudnn", "splash", "dot_product")})
    x = jnp.zeros((1, 1, 4, width), dtype)
    assert causal_attention.__wrapped__(x, x, x) == chosen  # without the check of its result's type


@pytest.mark.parametrize(
    ("attention", "platform", "dtype", "message"),
    [
        ("cudnn", "cpu", "bfloat16", "model.attention=cudnn: it needs an NVIDIA GPU, and this program runs on cpu"),
        ("cudnn", "gpu", "float32", "model.attention=cudnn: it needs train.precision=bfloat16, and this model computes in float32"),
        ("splash", "cpu", "float32", "model.attention=splash: it needs a TPU, and this program runs on cpu"),
        ("splash", "tpu", "float32", "model.attention=splash: it needs a head_width that is a multiple of 8, not 12"),
    ],
)
def test_a_form_that_is_not_there_is_refused(monkeypatch, attention, platform, dtype, message):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "devices", lambda: [Device(compute_capability="9.0")])
    x = jnp.zeros((1, 1, 4, 12), dtype)
    with pytest.raises(ConfigError, match=message):
        causal_attention(x, x, x, attention)
