import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import ConfigError
from research.core.tree import map_paths
from research.explanation.attention import AttentionMaps, AttentionRollout, AttentionXGradient, InductionScore, rollout
from research.explanation.model import replaced, score
from research.figures.explanation import Heat, Pictures

KEY = jax.random.key(0)
NAMES = [f"block_{i}/attention/weights" for i in range(2)]


def weights(model, examples):
    return [np.asarray(w) for w in model.read(examples.batch, NAMES)[1].values()]


def test_maps_are_the_weights_cut_to_the_tokens_that_count(model, examples_of):
    gpt = model("gpt")
    asked = examples_of(gpt)
    found = AttentionMaps()(gpt, asked, KEY)
    for layer, each in enumerate(weights(gpt, asked)):
        np.testing.assert_array_equal(found.kept[f"layer_{layer}"], each)
    panel = found.panels(1)[3]
    assert isinstance(panel, Heat)
    assert panel.title == "layer 1 head 1"
    np.testing.assert_array_equal(panel.values, found.kept["layer_1"][1, 1, :6, :6])
    assert list(panel.columns) == [gpt.token(int(t)) for t in asked.batch["tokens"][1, :6]]


def test_one_layer_and_head_can_be_chosen_and_long_texts_are_small(model, examples_of, monkeypatch):
    gpt = model("gpt")
    asked = examples_of(gpt)
    one = AttentionMaps(layer=-1, head=0)(gpt, asked, KEY)
    assert {name: x.shape for name, x in one.kept.items()} == {"layer_1": (3, 1, 8, 8)}
    monkeypatch.setattr("research.explanation.attention.LEGIBLE", 100)
    assert [type(panel) for panel in AttentionMaps()(gpt, asked, KEY).panels(0)] == [Pictures, Pictures]
    with pytest.raises(ConfigError, match=r"method\.head=2: this model has the heads 0 to 1"):
        AttentionMaps(head=2)(gpt, asked, KEY)


def test_rollout_of_identity_attention_is_the_identity():
    identity = jnp.broadcast_to(jnp.eye(5), (2, 3, 5, 5))
    np.testing.assert_array_equal(rollout([identity] * 3, 0.5), np.broadcast_to(np.eye(5, dtype=np.float32), (2, 5, 5)))


def test_rollout_is_the_product_of_the_mixed_weights(model, examples_of):
    gpt = model("gpt")
    asked = examples_of(gpt)
    found = AttentionRollout(residual=0.3)(gpt, asked, KEY)
    first, second = (0.3 * np.eye(8) + 0.7 * w.mean(1) for w in weights(gpt, asked))
    expected = (second @ first)[np.arange(3), asked.target[:, 0]]
    np.testing.assert_allclose(found.values, expected, atol=1e-6)
    np.testing.assert_allclose(found.values.sum(1), 1, atol=1e-6)
    assert not found.values[1, 6:].any()  # padding, after the explained position


def test_attention_x_gradient_is_the_rollout_of_the_positive_products(model, examples_of):
    gpt = model("gpt")
    asked = examples_of(gpt, target=3)

    batch = jax.device_put(dict(asked.batch))

    @functools.partial(jax.jit, static_argnums=0)
    def slope(name, value):  # of one block's weights, through all that they change after them
        return jax.grad(lambda value: score(gpt.objective, gpt.arrays, batch, jnp.asarray(asked.target), {name: replaced(value)})[0].sum())(value)

    expected = np.broadcast_to(np.eye(8), (3, 8, 8))
    for name, value in zip(NAMES, weights(gpt, asked), strict=True):
        expected = expected + np.maximum(value * np.asarray(slope(name, value)), 0).mean(1) @ expected
    expected = (expected - np.eye(8))[np.arange(3), asked.target[:, 0]]
    found = AttentionXGradient()(gpt, asked, KEY)
    np.testing.assert_allclose(found.values, expected, atol=1e-5)
    assert np.abs(found.values).max() > 1e-3


def test_a_model_that_looks_everywhere_alike_scores_as_chance(model):
    gpt = model("gpt")
    blind = dataclasses.replace(gpt, params=map_paths(lambda path, x: 0 * x if "/query/" in path else x, gpt.params))
    found = InductionScore(examples=3)(blind, None, KEY)
    again, new = np.arange(4, 8), np.arange(1, 4)
    np.testing.assert_allclose(found.kept["induction"], np.full((2, 2), (1 / (again + 1)).mean()), rtol=1e-5)
    np.testing.assert_allclose(found.kept["same"], np.full((2, 2), (1 / (again + 1)).mean()), rtol=1e-5)
    np.testing.assert_allclose(found.kept["previous"], np.full((2, 2), (1 / (new + 1)).mean()), rtol=1e-5)


def test_scores_are_read_at_what_followed_the_last_time(model):
    gpt = model("gpt")
    found = InductionScore(examples=3, length=3)(gpt, None, KEY)
    assert found.numbers["length"] == 3
    assert (found.kept["induction"] != found.kept["same"]).all()
    with pytest.raises(ConfigError, match=r"method\.length=5: must be from 2 to 4"):
        InductionScore(length=5)(gpt, None, KEY)


def test_a_model_without_attention_is_told(model):
    for method in (AttentionMaps(), AttentionRollout(), AttentionXGradient(), InductionScore()):
        assert method.fits(model("gpt")) is None
        assert isinstance(method.fits(model("mlp")), str)
    with pytest.raises(ValueError, match=r"residual=1\.0 must be in \[0, 1\)"):
        AttentionRollout(residual=1.0)
