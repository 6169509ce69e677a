"""Evaluation: exact however the split is cut, one program, and what is collected."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import DataError
from research.inference import evaluate as module
from research.inference.evaluate import evaluate
from research.models.gpt import GPT
from research.models.mlp import MLP
from research.objectives.classify import Classify
from research.objectives.language_model import LanguageModel
from research.objectives.regress import Regress

EXAMPLES = 150


def _data(kind):
    rng = np.random.RandomState(0)
    common = {"mask": np.ones(EXAMPLES, bool), "index": np.arange(EXAMPLES, dtype=np.int32)}
    image = rng.randn(EXAMPLES, 4, 4, 1).astype(np.float32)
    if kind == "classify":
        return Classify(MLP(3, width=8), top_k=2), {"image": image, "label": rng.randint(0, 3, EXAMPLES).astype(np.int32), **common}
    if kind == "regress":
        return Regress(MLP(2, width=8)), {"features": image.reshape(EXAMPLES, 16), "target": rng.randn(EXAMPLES, 2).astype(np.float32), **common}
    tokens = rng.randint(0, 11, (EXAMPLES, 9)).astype(np.int32)
    mask = np.arange(8)[None, :] < rng.randint(1, 9, EXAMPLES)[:, None]  # uneven rows
    objective = LanguageModel(GPT(11, 8, width=8, depth=1, heads=1), bytes_per_token=1.5)
    return objective, {**common, "tokens": tokens[:, :-1], "target": tokens[:, 1:], "mask": mask}


def _cut(data, size):
    return [{name: x[i : i + size] for name, x in data.items()} for i in range(0, EXAMPLES, size)]


@functools.cache
def _model(kind):
    objective, data = _data(kind)
    shapes = jax.eval_shape(objective.init, jax.random.key(0), jax.tree.map(jnp.asarray, _cut(data, 2)[0]))
    rng = np.random.RandomState(1)
    params, extra = jax.tree.map(lambda x: rng.randn(*x.shape).astype(np.float32) * np.float32(0.3), shapes)
    return (objective, params, extra, None, {}), data


@pytest.mark.parametrize("kind", ["classify", "regress", "language_model"])
def test_any_batch_size_gives_the_same_scores(kind):
    model, data = _model(kind)
    whole, outputs = evaluate(*model, _cut(data, EXAMPLES), collect=True)
    for size in (7, 64):
        scores, collected = evaluate(*model, _cut(data, size), collect=True)
        assert scores == pytest.approx(whole, rel=1e-6)
        for name in outputs:
            np.testing.assert_allclose(collected[name], outputs[name], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(outputs["index"], np.arange(EXAMPLES))


def test_scores_are_those_of_the_collected_outputs():
    model, data = _model("classify")
    scores, outputs = evaluate(*model, _cut(data, 64), collect=True)
    logits = outputs["logits"].astype(float)
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert scores["loss"] == pytest.approx(-log_probs[np.arange(EXAMPLES), data["label"]].mean(), rel=1e-5)
    assert scores["accuracy"] == pytest.approx((logits.argmax(1) == data["label"]).mean())
    np.testing.assert_array_equal(outputs["label"], data["label"])


def test_masked_examples_neither_count_nor_appear():
    model, data = _model("regress")
    kept = np.arange(EXAMPLES) % 4 > 0
    masked = {**data, "mask": kept, "target": np.where(kept[:, None], data["target"], np.float32(1e6))}
    subset = {name: x[kept] for name, x in data.items()}
    scores, outputs = evaluate(*model, _cut(masked, 32), collect=True)
    assert scores == pytest.approx(evaluate(*model, [subset])[0], rel=1e-6)
    np.testing.assert_array_equal(outputs["index"], np.flatnonzero(kept))
    assert len(outputs["value"]) == kept.sum()


def test_derived_metrics_and_nothing_collected_unless_asked():
    model, data = _model("language_model")
    scores, outputs = evaluate(*model, _cut(data, 64))
    assert outputs == {}
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    assert scores["bits_per_byte"] == pytest.approx(scores["loss"] / math.log(2) / 1.5, rel=1e-6)


def test_one_program_for_a_split_with_a_short_last_batch():
    model, data = _model("classify")
    before = module._measure._cache_size()
    evaluate(*model, _cut(data, 36))
    assert module._measure._cache_size() == before + 1


def test_batches_are_summed_in_float64():
    model, data = _model("classify")
    parts = _cut(data, 1)
    assert evaluate(*model, parts * 3)[0] == pytest.approx(evaluate(*model, parts)[0], rel=1e-12)


def test_nothing_valid_is_null_and_no_batches_is_an_error():
    model, data = _model("classify")
    scores, outputs = evaluate(*model, [{**data, "mask": np.zeros(EXAMPLES, bool)}], collect=True)
    assert scores == {"loss": None, "accuracy": None, "top_2": None}
    assert len(outputs["logits"]) == 0
    with pytest.raises(DataError, match="no batches"):
        evaluate(*model, [])
