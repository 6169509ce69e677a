import jax
import numpy as np
import pytest

from research.core.errors import ConfigError


@pytest.fixture(scope="module")
def outcome(configured, rows):
    """outcome(loss=…) = (valid differences, tally, weights, objective) of a perceptron."""
    params, extra = configured("regress", "perceptron").init(jax.random.key(0), rows)

    def run(**changes):
        objective = configured("regress", "perceptron", **changes)
        value = jax.jit(lambda batch: objective.predict(params, extra, None, batch, None, {})[0]["value"])(rows)
        tally = jax.jit(lambda batch: objective(params, extra, None, batch, None, {}, train=True)[0])(rows)
        return (np.asarray(value) - rows["target"])[rows["mask"]], tally, objective.weights(rows), objective

    return run


FORMULAS = {
    "mse": lambda d: d**2,
    "mae": np.abs,
    "huber": lambda d: np.where(np.abs(d) < 0.5, d**2 / 2, 0.5 * (np.abs(d) - 0.25)),
}


@pytest.mark.parametrize("loss", FORMULAS)
def test_sums_over_all_outputs_of_the_valid_examples(outcome, loss):
    d, tally, weights, objective = outcome(loss=loss, delta=0.5)
    np.testing.assert_allclose(tally.terms[loss], FORMULAS[loss](d).sum(), rtol=1e-5)
    np.testing.assert_allclose(tally.metrics["loss"], (FORMULAS[loss](d).sum(), 20), rtol=1e-5)
    np.testing.assert_allclose(tally.metrics["mse"], (np.square(d).sum(), 20), rtol=1e-5)
    np.testing.assert_allclose(tally.metrics["mae"], (np.abs(d).sum(), 20), rtol=1e-5)
    assert weights == {loss: 20}
    assert objective.coefficients == ((loss, 1.0),)


def test_the_root_of_the_mean_squared_error_is_derived(configured):
    objective = configured("regress", "perceptron")
    assert objective.derived({"mse": 4.0}) == {"rmse": 2.0}
    assert objective.derived({"mse": None}) == {}


@pytest.mark.parametrize(
    ("changes", "message"), [({"loss": "hubr"}, "'hubr' is unknown; did you mean 'huber'"), ({"delta": 0}, "delta=0.0 must be above 0")]
)
def test_a_mistake_is_named(configured, changes, message):
    with pytest.raises(ConfigError, match=message):
        configured("regress", "perceptron", **changes)
