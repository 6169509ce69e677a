"""Permutation importance and partial dependence: closed forms, scikit-learn's own, in the data's units, and what they refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.inspection import partial_dependence, permutation_importance

from research.core.errors import ConfigError
from research.core.keys import named
from research.core.spec import fields
from research.explanation.dependence import PartialDependence, Permutation
from research.explanation.lime import generator
from research.figures import explanation as draw

KEY = jax.random.key(0)
ROWS = 40


class Wrapped(RegressorMixin, BaseEstimator):
    """A model as scikit-learn sees it."""

    def __init__(self, model=None, output=0):
        self.model, self.output = model, output

    def fit(self, features, target):
        self.fitted_ = True
        return self

    def predict(self, features):
        batch = {"features": np.asarray(features, np.float32), "mask": np.ones(len(features), bool)}
        return np.asarray(self.model.read(batch)[0])[:, self.output].astype(np.float64)


@pytest.fixture(scope="module")
def table(model, with_data):
    """(a regressor with data, its features, its targets)."""
    made = model("regression")
    random = np.random.RandomState(2)
    features = random.standard_normal((ROWS, 6)).astype(np.float32)
    features[:, 5] = random.randint(0, 3, ROWS)
    target = (np.asarray(made.read({"features": features, "mask": np.ones(ROWS, bool)})[0]) + 0.1).astype(np.float32)
    spec = {**made.spec, "columns": ["age", "rooms", "size", "year", "tax", "floor"]}
    data = {"features": features, "target": target}
    return dataclasses.replace(with_data(made, train=data, test=data), spec=spec), features, target


def test_importance_of_a_linear_model_is_the_closed_form(model, with_data):
    made = model("regression", "model.depth=0", "model.width=[]")
    kernel = np.array(made.params["head"]["kernel"])
    kernel[2] = 0.0
    made = dataclasses.replace(made, params={"head": {**made.params["head"], "kernel": kernel}})
    features = np.random.RandomState(0).standard_normal((ROWS, 6)).astype(np.float32)
    batch = {"features": features, "mask": np.ones(ROWS, bool)}
    made = with_data(made, test={"features": features, "target": np.asarray(made.read(batch)[0])})
    found = Permutation(examples=ROWS, repeats=3, rows=16)(made, None, KEY)
    random = generator(named(KEY, "orders"))
    orders = [random.permutation(ROWS) for _ in range(3)]
    wanted = [[np.mean(np.square(kernel[j]) * (features[order, j] - features[:, j])[:, None] ** 2) for j in range(6)] for order in orders]
    np.testing.assert_allclose(found.kept["falls"], wanted, atol=1e-5)
    assert found.numbers["importance"]["2"] == 0.0
    assert found.numbers["base"] == pytest.approx(0.0, abs=1e-9)


def test_importance_and_its_interval_agree_with_scikit_learn(table):
    made, features, target = table
    found = Permutation(repeats=40)(made, None, KEY)
    each = [
        permutation_importance(
            Wrapped(made, output).fit(features, target[:, output]),
            features.astype(np.float64),
            target[:, output],
            scoring="neg_mean_squared_error",
            n_repeats=40,
            random_state=0,
        )
        for output in range(2)
    ]
    theirs = (each[0].importances + each[1].importances) / 2
    mean, half = found.kept["importance"], (found.kept["high"] - found.kept["low"]) / 2
    error = np.sqrt(theirs.var(1) / 40 + found.kept["falls"].var(0) / 40)
    np.testing.assert_array_less(np.abs(mean - theirs.mean(1)), 4 * error)
    np.testing.assert_allclose(half, 2.0227 * found.kept["falls"].std(0, ddof=1) / np.sqrt(40), rtol=1e-4)  # Student's t of 39
    assert list(found.numbers["importance"]) == ["age", "rooms", "size", "year", "tax", "floor"]
    assert "loss 0.01 on 40 examples of the test split" in found.lines[0]


def test_the_cell_that_holds_the_class_is_the_one_that_matters(model, with_data):
    made = model("mlp", "model.depth=0", "model.width=[]")
    kernel = np.zeros((64, 5), np.float32)
    kernel[9:14, np.arange(5)] = np.eye(5)  # row 1, columns 1 to 5: the brightest of five pixels is the class
    made = dataclasses.replace(made, params={"head": {"kernel": kernel, "bias": np.zeros(5, np.float32)}})
    image = np.random.RandomState(0).rand(60, 8, 8, 1).astype(np.float32)
    label = image[:, 1, 1:6, 0].argmax(1).astype(np.int32)
    made = with_data(made, validation={"image": image, "label": label})
    found = Permutation(segments=4, repeats=3)(made, None, KEY)
    assert found.numbers["base"] == 1.0
    falls = list(found.numbers["importance"].values())
    assert falls[0] > 0.2
    assert falls[1] > 0.2
    assert falls[2:] == [0.0, 0.0]
    assert next(iter(found.numbers["importance"])) == "y 0-3 x 0-3"
    assert [type(panel) for panel in found.drawn] == [draw.Overlay, draw.Bars]
    loss = Permutation(segments=4, repeats=3, score="loss")(made, None, KEY)
    log_probs = jax.nn.log_softmax(jnp.asarray(image[:, 1, 1:6, 0]))
    assert loss.numbers["base"] == pytest.approx(-float(np.asarray(log_probs)[range(60), label].mean()), abs=1e-5)
    assert min(list(loss.numbers["importance"].values())[:2]) > 0


@pytest.mark.parametrize("name", ["age", "floor"])
def test_partial_dependence_is_that_of_scikit_learn(name, table):
    made, features, target = table
    found = PartialDependence(columns=(name,), output=1, points=9)(made, None, KEY)
    j = made.spec["columns"].index(name)
    wrapped = Wrapped(made, 1).fit(features, target[:, 1])
    x = np.linspace(*np.quantile(features[:, 0], [0.05, 0.95]), 9) if name == "age" else np.arange(3.0)  # a column of three values has three
    np.testing.assert_allclose(found.kept[f"{name}/x"], x, atol=1e-6)
    theirs = partial_dependence(wrapped, features.astype(np.float64), [j], kind="both", method="brute", custom_values={j: x})
    np.testing.assert_allclose(found.kept[f"{name}/mean"][:, 0], theirs["average"][0], atol=1e-6)
    np.testing.assert_allclose(found.kept[f"{name}/each"][..., 0], theirs["individual"][0], atol=1e-6)
    assert np.ptp(theirs["average"]) > 0.05


def test_curves_stand_in_the_units_of_the_data(table):
    made, _, _ = table
    statistics = {"features_mean": np.arange(6.0), "features_std": np.full(6, 10.0), "target_mean": np.array([100.0, 7.0])}
    units = dataclasses.replace(made, statistics={**statistics, "target_std": np.array([2.0, 3.0])})
    method = PartialDependence(columns=("rooms", 0), grid={"rooms": [1.0, 11.0, 21.0]}, points=4)
    found, plain = method(units, None, KEY), PartialDependence(columns=("rooms", 0), grid={"rooms": (0.0, 1.0, 2.0)}, points=4)(made, None, KEY)
    np.testing.assert_allclose(found.kept["rooms/x"], [1.0, 11.0, 21.0], atol=1e-5)
    np.testing.assert_allclose(found.kept["age/x"], 10 * plain.kept["age/x"], atol=1e-5)
    for name in ("rooms", "age"):
        np.testing.assert_allclose(found.kept[f"{name}/mean"], 100 + 2 * plain.kept[f"{name}/mean"], atol=1e-4)
    assert found.numbers["range"]["age"] == pytest.approx(2 * plain.numbers["range"]["age"], abs=1e-4)


def test_a_classifier_has_a_curve_for_each_class_and_single_examples_for_one(model, with_data):
    made = model("regression")
    spec = {**made.spec, "classes": 2, "fields": fields(features=((6,), "float32"), label=((), "int32"))}
    random = np.random.RandomState(0)
    train = {"features": random.standard_normal((30, 6)).astype(np.float32), "label": random.randint(0, 2, 30).astype(np.int32)}
    made = with_data(dataclasses.replace(made, spec=spec, classes=("no", "yes")), train=train)
    every = PartialDependence(columns=(3,))(made, None, KEY)
    assert list(every.drawn[0].series) == ["no", "yes"]
    one = PartialDependence(columns=(3,), output="yes", lines=5)(made, None, KEY)
    assert list(one.drawn[0].series) == ["yes"]
    assert len(one.drawn[0].faint) == 5
    np.testing.assert_array_equal(one.kept["3/mean"][:, 0], every.kept["3/mean"][:, 1])
    with pytest.raises(ConfigError, match=r"method.output=yess: this model has the outputs 0 to 1; did you mean 'yes'?"):
        PartialDependence(output="yess")(made, None, KEY)


def test_what_does_not_fit_says_why(model, with_data, examples_of):
    text, image, table = model("gpt"), model("cnn"), model("regression")
    assert "no place of its own" in Permutation().fits(with_data(text))
    assert "needs the run's data" in Permutation().fits(image)
    assert "reads image" in PartialDependence().fits(with_data(image))
    assert "needs the run's data" in PartialDependence().fits(table)
    assert Permutation().fits(with_data(table)) is None is PartialDependence().fits(with_data(table))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: Permutation(repeats=1), "method.repeats=1: must be at least 2"),
        (lambda: Permutation(score="accurate"), "method.score='accurate' is unknown; did you mean 'accuracy'?"),
        (lambda: PartialDependence(points=1), "method.points=1: must be at least 2"),
        (lambda: Permutation(score="accuracy"), "method.score=accuracy: this model has no classes; use loss"),
        (lambda: Permutation(split="tset"), "method.split='tset': the run's data has no such split; did you mean 'test'?"),
        (lambda: PartialDependence(columns=("romms",)), "method.columns: 'romms' is no column of this run; did you mean 'rooms'?"),
        (lambda: PartialDependence(grid={"rooms": []}), "method.grid: rooms lists no value"),
        (lambda: PartialDependence(grid={"rooms": 1}), "method.grid: rooms=1 must be a number of points, at least 2, or a list of values"),
        (lambda: PartialDependence(output=2), "method.output=2: this model has the outputs 0 to 1"),
    ],
)
def test_settings_out_of_range_are_refused(method, message, table):
    with pytest.raises(ConfigError) as told:
        method()(table[0], None, KEY)
    assert message in str(told.value)
