"""Probes: selective where something was planted, at chance on labels by lot, never proud of what they memorised."""

import dataclasses

import jax
import numpy as np
import pytest

from research.core.errors import ConfigError
from research.explanation.probe import Probe, _interval

KEY = jax.random.key(0)


def planted(rows, seed):
    """Images whose label lies in the upper half alone, and labels by lot beside it."""
    random = np.random.RandomState(seed)
    label = random.randint(0, 5, rows).astype(np.int32)
    image = random.standard_normal((rows, 8, 8, 1)).astype(np.float32)
    image[np.arange(rows), label % 4, label] += 5.0
    return {"image": image, "label": label, "weight": random.randint(0, 5, rows).astype(np.int32)}


@pytest.fixture(scope="module")
def half_blind(model, with_data):
    """An MLP that does not see the upper half."""
    mlp = model("mlp")
    params = jax.tree.map(np.array, mlp.params)
    next(iter(params.values()))["kernel"][:32] = 0.0
    return with_data(dataclasses.replace(mlp, params=params), train=planted(400, 0), test=planted(300, 1))


def test_selectivity_is_high_where_the_label_was_planted_and_gone_where_the_model_dropped_it(half_blind):
    found = Probe()(half_blind, None, KEY).numbers
    assert found["accuracy"]["input"] > 0.9
    assert found["selectivity"]["input"] > 0.6
    low, high = found["selectivity_interval"]["hidden_0"]
    assert low < 0 < high
    assert abs(found["accuracy"]["hidden_0"] - 0.2) < 0.08
    assert (found["classes"], found["learned_from"], found["judged_by"]) == (5, 400, 300)


def test_labels_by_lot_are_read_at_chance_everywhere(half_blind):
    found = Probe(label="weight")(half_blind, None, KEY).numbers
    assert all(abs(value - 0.2) < 0.08 for value in found["accuracy"].values())
    assert all(low < 0 < high for low, high in found["selectivity_interval"].values())


def test_of_a_text_the_control_task_is_learned_from_the_token(model, with_data):
    """Which token was read is known at the input, so a label by lot for each token is too: accuracy without selectivity."""
    random = np.random.RandomState(0)

    def source(rows):
        tokens = random.randint(0, 11, (rows, 8)).astype(np.int32)
        return {"tokens": tokens, "target": random.randint(0, 11, (rows, 8)).astype(np.int32), "mask": np.ones((rows, 8), bool)}

    gpt = with_data(model("gpt"), train=source(150), validation=source(100))
    found = Probe(at="input", label="tokens")(gpt, None, KEY).numbers
    assert found["accuracy"]["input"] > 0.95
    assert found["control"]["input"] > 0.95
    assert abs(found["selectivity"]["input"]) < 0.05
    chance = Probe(at="input")(gpt, None, KEY).numbers  # the next token is drawn by lot here
    assert chance["accuracy"]["input"] < 0.2
    assert chance["control"]["input"] > 0.95


def test_numbers_are_cut_into_classes_of_equal_size(model, with_data):
    random = np.random.RandomState(0)
    features = random.standard_normal((300, 6)).astype(np.float32)
    source = {"features": features, "target": (features[:, :2] * 3).astype(np.float32)}
    regression = model("regression")
    spec = {**regression.spec, "columns": ["age", "height", "c", "d", "e", "f"]}
    subject = with_data(dataclasses.replace(regression, spec=spec), train=source)  # one split: cut in two
    found = Probe(at="input", examples=200, held_out=100)(subject, None, KEY).numbers
    assert found["accuracy"]["input"] > 0.7
    assert found["learned_from"] + found["judged_by"] == 300
    assert Probe(at="input", label="height", classes=2)(subject, None, KEY).numbers["accuracy"]["input"] > 0.9
    with pytest.raises(ConfigError, match=r"method\.label='hight' is neither a field nor a column.*did you mean 'height'"):
        Probe(label="hight")(subject, None, KEY)


def test_intervals_count_whole_examples():
    random = np.random.RandomState(0)
    values = random.rand(50).astype(np.float32)
    mean, low, high = _interval(values, np.arange(50))
    error = values.std(ddof=1) / np.sqrt(50)
    np.testing.assert_allclose([mean, high - mean, mean - low], [values.mean(), 1.96 * error, 1.96 * error], rtol=1e-4)
    _, low, high = _interval(np.repeat(values, 4), np.repeat(np.arange(50), 4))  # four copies of an item say no more than one
    np.testing.assert_allclose((high - low) / 2, 1.96 * error, rtol=1e-4)


def test_one_value_is_nothing_to_tell_apart(model, with_data):
    source = {"image": np.zeros((9, 8, 8, 1), np.float32), "label": np.ones(9, np.int32)}
    with pytest.raises(ConfigError, match="one value alone"):
        Probe()(with_data(model("mlp"), train=source), None, KEY)
    assert Probe().fits(model("mlp")) is not None
    with pytest.raises(ValueError, match="held_out=1"):
        Probe(held_out=1)
