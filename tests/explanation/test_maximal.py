"""What units answer to: the search is the data's maximum, the ascent that of a linear unit in closed form."""

import dataclasses

import jax
import numpy as np
import pytest

from research.core.errors import ConfigError
from research.explanation.maximal import Maximal, SparseFeatures
from research.figures.explanation import Bars, Pictures, Rows, Tokens
from research.objectives.sparse_autoencoder import SparseAutoencoder

KEY = jax.random.key(0)


def images(rows=80):
    random = np.random.RandomState(0)
    return {"image": random.rand(rows, 8, 8, 1).astype(np.float32), "label": random.randint(0, 5, rows).astype(np.int32)}


def test_the_examples_are_those_with_the_largest_answers(model, with_data):
    cnn, data = with_data(model("cnn"), test=images()), images()
    found = Maximal(at="maps_0", units=(2, 0), steps=0, top=5)(cnn, None, KEY)
    _, taps = cnn.read({**data, "mask": np.ones(80, bool), "index": np.arange(80, dtype=np.int32)}, ["maps_0"])
    largest = np.asarray(taps["maps_0"]).max((1, 2))
    for row, unit in enumerate((2, 0)):
        np.testing.assert_array_equal(found.kept["examples"][row], np.argsort(-largest[:, unit])[:5])
        np.testing.assert_allclose(found.kept["answers"][row], np.sort(largest[:, unit])[::-1][:5], rtol=1e-5)
    np.testing.assert_array_equal(found.drawn[0].images, data["image"][found.kept["examples"][0]])
    with pytest.raises(ConfigError, match=r"method\.units=6: maps_0 has the units 0 to 3"):
        Maximal(at="maps_0", units=6)(cnn, None, KEY)


def test_the_input_made_for_a_linear_unit_is_light_where_its_weight_is_positive(model, with_data):
    linear = with_data(model("mlp", "model.depth=0", "model.width=[]"), test=images())
    found = Maximal(at="logits", units=(1, 3), steps=200, jitter=0, blur=0.0, decay=0.0)(linear, None, KEY)
    (kernel,) = (np.asarray(leaf) for leaf in jax.tree.leaves(linear.params) if np.ndim(leaf) == 2)
    data = images()["image"]
    for made, unit in zip(found.kept["inputs"], (1, 3), strict=True):
        weight = kernel[:, unit].reshape(8, 8, 1)
        clear = np.abs(weight) > 0.02
        np.testing.assert_allclose(made[clear], np.where(weight > 0, data.max(), data.min())[clear], atol=1e-5)
    again = Maximal(at="logits", units=(1, 3), steps=200, jitter=0, blur=0.0, decay=0.0)(linear, None, KEY)
    np.testing.assert_array_equal(again.kept["inputs"], found.kept["inputs"])


def test_an_image_made_for_a_channel_beats_the_data_and_decay_darkens_it(model, with_data):
    cnn = with_data(model("cnn"), test=images())
    data = images()
    _, taps = cnn.read({**data, "mask": np.ones(80, bool), "index": np.arange(80, dtype=np.int32)}, ["maps_1"])
    best = np.asarray(taps["maps_1"]).mean((1, 2)).max(0)
    found = Maximal(at="maps_1", units=(1, 2), steps=60, jitter=1)(cnn, None, KEY)
    assert isinstance(found.drawn[0], Pictures)
    assert (found.kept["reached"] > best[1:3]).all()
    dark = Maximal(at="maps_1", units=(1, 2), steps=60, jitter=1, decay=100.0)(cnn, None, KEY)
    assert (dark.kept["inputs"] ** 2).mean() < 0.5 * (found.kept["inputs"] ** 2).mean()


def test_texts_are_coloured_around_the_token_and_padding_is_never_the_largest(model, with_data):
    random = np.random.RandomState(0)
    tokens = random.randint(0, 11, (20, 8)).astype(np.int32)
    mask = np.ones((20, 8), bool)
    mask[:, 5:] = False
    gpt = with_data(model("gpt"), train={"tokens": tokens, "target": tokens, "mask": mask})
    found = Maximal(at="block_0/mlp/hidden", units=3, top=2)(gpt, None, KEY)
    _, taps = gpt.read({"tokens": tokens, "mask": mask, "index": np.arange(20, dtype=np.int32)}, ["block_0/mlp/hidden"])
    answers = np.asarray(taps["block_0/mlp/hidden"])[:, :5, 3]
    best = np.argsort(-answers.max(1))[:2]
    np.testing.assert_array_equal(found.kept["examples"][0], best)
    panel = found.drawn[0]
    assert isinstance(panel, Tokens)
    assert list(panel.tokens) == ["abcdefghijk"[i] for i in tokens[best[0], :5]]
    np.testing.assert_allclose(panel.values, answers[best[0]], rtol=1e-4, atol=1e-5)


def test_rows_of_a_table(model, with_data):
    features = np.random.RandomState(0).standard_normal((30, 6)).astype(np.float32)
    regression = with_data(model("regression"), train={"features": features, "target": features[:, :2]})
    found = Maximal(top=3)(regression, None, KEY)
    assert found.numbers["at"] == "hidden_0"
    assert isinstance(found.drawn[0], Rows)
    np.testing.assert_allclose([row[2:] for row in found.drawn[0].rows], features[found.kept["examples"][0]], rtol=1e-6)
    with pytest.raises(ValueError, match="top=0"):
        Maximal(top=0)


def test_features_of_a_dictionary_are_counted_and_shown_where_they_are_above_0(model, with_data):
    cnn = model("cnn")
    objective = SparseAutoencoder(cnn.objective, "hidden_0", features=24, active=None, sparsity=0.1)
    batch = {**images(), "mask": np.ones(80, bool), "index": np.arange(80, dtype=np.int32)}
    params, extra = objective.init(KEY, batch)
    params["encoder"]["bias"] = params["encoder"]["bias"].at[:5].set(-1e3)
    frozen = objective.taught(None, cnn.params, cnn.extra, None, {})
    looking = with_data(dataclasses.replace(cnn, objective=objective, params=params, extra=extra, frozen=frozen), test=images())
    found = SparseFeatures(features=(1, 7), top=3)(looking, None, KEY)
    above = np.asarray(looking.read(batch, ["dictionary/features"])[1]["dictionary/features"]) > 0
    np.testing.assert_allclose(found.kept["density"], above.mean(0), rtol=1e-6)
    assert found.numbers["dead"] == (~above.any(0)).mean() >= 5 / 24
    assert found.numbers["shown"] == [1, 7]
    assert found.numbers["spliced_loss"] != found.numbers["model_loss"]
    assert any(isinstance(panel, Bars) for panel in found.drawn)
    with pytest.raises(ConfigError, match=r"method\.features=24: there are the features 0 to 23"):
        SparseFeatures(features=24)(looking, None, KEY)
    assert SparseFeatures().fits(with_data(cnn, test=images())) == (
        "it has no tap dictionary/features; experiment=sparse_autoencoder trains a run that has"
    )
