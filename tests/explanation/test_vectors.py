"""Vectors of items over a run's data, and the linear classifier of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from research.core.errors import ConfigError
from research.explanation.vectors import deepest, drawn, last, logistic, read, vector_taps

KEY = jax.random.key(0)


@pytest.fixture
def texts(model, with_data):
    random = np.random.RandomState(0)
    tokens = random.randint(0, 11, (70, 9)).astype(np.int32)
    mask = np.ones((70, 8), bool)
    mask[:, 6:] = False
    source = {"tokens": tokens[:, :-1], "target": tokens[:, 1:], "mask": mask}
    return with_data(model("gpt"), train=source), source


def test_items_of_a_text_are_its_positions_that_count(texts):
    model, source = texts
    split = drawn(model, "train", 70, KEY)  # more than one call of the model, the last one filled up
    items = read(model, split, ["input", "block_0/output"], KEY)
    assert len(items) == 70 * 6
    _, taps = model.read({**source, "index": np.arange(70, dtype=np.int32)}, ["block_0/output"])
    wanted = np.asarray(taps["block_0/output"])[items.example, items.position]
    np.testing.assert_allclose(items.values["block_0/output"], wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(items.field("target"), source["target"][:, :6].ravel())
    few = read(model, split, ["input"], KEY, each=2)
    assert np.bincount(few.example).tolist() == [2] * 70
    assert (few.position < 6).all()
    assert len({*zip(few.example.tolist(), few.position.tolist(), strict=True)}) == 140  # no position twice


def test_a_large_map_is_read_as_the_mean_over_its_places(model, with_data):
    images = np.random.RandomState(0).standard_normal((5, 8, 8, 1)).astype(np.float32)
    cnn = model("cnn", "model.channels=[20,6]")
    subject = with_data(cnn, test={"image": images, "label": np.zeros(5, np.int32)})
    split = drawn(subject, "test", 5, KEY)
    _, taps = subject.read(split.batch(split.indices), ["maps_0", "maps_1"])
    first, second = (np.asarray(taps[name]) for name in ("maps_0", "maps_1"))
    items = read(subject, split, ["maps_0", "maps_1"], KEY)
    np.testing.assert_allclose(items.values["maps_0"], first.mean((1, 2)), rtol=1e-4, atol=1e-5)  # 8 x 8 x 20 numbers
    np.testing.assert_allclose(items.values["maps_1"], second.reshape(5, -1), rtol=1e-4, atol=1e-5)
    assert read(subject, split, ["maps_0"], KEY, whole=True).values["maps_0"].shape == (5, 8 * 8 * 20)


def test_taps_that_have_a_vector_for_each_item(model, with_data):
    gpt = model("gpt")
    assert vector_taps(gpt)[0] == "input"
    assert {gpt.taps[name].shape[1:] for name in vector_taps(gpt)} == {(8, 16), (8, 11)}
    assert deepest(gpt) == "normalized"
    assert vector_taps(gpt, "block_0/mlp/hidden") == ["block_0/mlp/hidden"]
    weights = next(name for name in gpt.taps if name.endswith("weights"))
    with pytest.raises(ConfigError, match="vector at each position"):
        vector_taps(gpt, weights)
    with pytest.raises(ConfigError, match="did you mean 'hidden_0'"):
        vector_taps(model("mlp"), "hidden0")
    assert last(with_data(gpt, train={}, validation={})) == "validation"
    with pytest.raises(ConfigError, match=r"method\.split='dev': the run's data has train"):
        drawn(with_data(gpt, train={}), "dev", 3, KEY)


@pytest.mark.parametrize("penalty", [1e-3, 0.1])
def test_the_classifier_is_that_of_scikit_learn(penalty):
    random = np.random.RandomState(0)
    centers = random.standard_normal((4, 6))
    label = random.randint(0, 4, 300).astype(np.int32)
    x = ((centers[label] + random.standard_normal((300, 6))) * np.logspace(-2, 2, 6) + 3).astype(np.float32)
    kernel, bias = (np.asarray(part) for part in logistic(jnp.asarray(x), jnp.asarray(label), 4, jnp.float32(penalty)))
    logits = x @ kernel + bias
    found = np.exp(logits - logits.max(1, keepdims=True))
    found /= found.sum(1, keepdims=True)
    scaled = (x - x.mean(0)) / x.std(0)
    oracle = LogisticRegression(C=1 / (300 * penalty), max_iter=5000, tol=1e-8).fit(scaled, label)
    np.testing.assert_allclose(found, oracle.predict_proba(scaled), atol=2e-3)
