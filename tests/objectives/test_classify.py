import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import ConfigError

KEY = jax.random.key(1)


@pytest.fixture(scope="module")
def outcome(configured, images):
    """outcome(train=…, **changes) = (logits, tally, weights) of a perceptron under the objective with these changes."""
    params, extra = configured("classify", "perceptron").init(jax.random.key(0), images)

    def run(train=False, hyper=None, **changes):
        objective = configured("classify", "perceptron", **changes)
        logits = jax.jit(lambda batch: objective.predict(params, extra, None, batch, None, {})[0]["logits"])(images)
        tally = jax.jit(lambda batch: objective(params, extra, None, batch, KEY, hyper or {}, train=train)[0])(images)
        return np.asarray(logits), tally, objective.weights(images)

    return run


def log_probabilities(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_loss_and_accuracy_over_the_valid_examples(outcome, images):
    logits, tally, weights = outcome()
    keep, label = images["mask"], images["label"]
    want = -log_probabilities(logits)[np.arange(6), label][keep].sum()
    np.testing.assert_allclose(tally.terms["cross_entropy"], want, rtol=1e-5)
    np.testing.assert_allclose(tally.metrics["loss"], (want, 4), rtol=1e-5)
    np.testing.assert_allclose(tally.metrics["accuracy"], ((logits.argmax(-1) == label)[keep].sum(), 4))
    assert weights["cross_entropy"] == 4
    assert set(tally.metrics) == {"loss", "accuracy"}


def test_smoothing_acts_in_training_alone(outcome):
    plain, smoothed = outcome()[1], outcome(label_smoothing=0.2)[1]
    jax.tree.map(np.testing.assert_array_equal, plain, smoothed)
    _, trained, _ = outcome(train=True, label_smoothing=0.2)
    assert abs(trained.terms["cross_entropy"] - plain.terms["cross_entropy"]) > 1e-3
    from_hyper = outcome(train=True, label_smoothing=None, hyper={"label_smoothing": jnp.float32(0.2)})[1]
    np.testing.assert_allclose(from_hyper.terms["cross_entropy"], trained.terms["cross_entropy"], rtol=1e-6)


def test_class_weights_weigh_the_sum_and_its_denominator(outcome, images):
    each = np.array([1.0, 2.0, 0.5, 0.0, 3.0])
    logits, tally, weights = outcome(class_weights=each.tolist())
    keep, label = images["mask"], images["label"]
    want = (-log_probabilities(logits)[np.arange(6), label] * each[label])[keep].sum()
    np.testing.assert_allclose(tally.metrics["loss"], (want, each[label][keep].sum()), rtol=1e-5)
    assert weights["cross_entropy"] == tally.metrics["loss"][1]
    assert tally.metrics["accuracy"][1] == 4


def test_top_k_is_reported_where_asked(outcome, images):
    logits, tally, _ = outcome(top_k=2)
    right = (np.argsort(-logits, -1)[:, :2] == images["label"][:, None]).any(-1)[images["mask"]].sum()
    np.testing.assert_allclose(tally.metrics["top_2"], (right, 4))


def test_nothing_is_decoded(configured):
    assert configured("classify", "perceptron").decoder() is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing=1.0 must be in"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
    ],
)
def test_a_mistake_is_named(configured, changes, message):
    with pytest.raises(ConfigError, match=message):
        configured("classify", "perceptron", **changes)


def test_as_many_class_weights_as_classes_are_needed(outcome):
    with pytest.raises(ConfigError, match="class_weights has 2 entries for 5 classes"):
        outcome(class_weights=[1.0, 2.0])
