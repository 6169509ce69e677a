"""Host metrics: against closed forms, ten lines of numpy, and scikit-learn."""

import itertools
import json

import numpy as np
import pytest
from sklearn import metrics as sklearn

from research.core.errors import DataError
from research.metrics import host


def _case(seed=0, b=500, n=7, present=7):
    rng = np.random.RandomState(seed)
    label = rng.randint(0, present, b)
    logits = rng.randn(b, n).astype(np.float32) * 2
    logits[np.arange(b), label] += rng.rand(b).astype(np.float32) * 4
    return logits, label


def test_confusion_matrix_against_sklearn():
    logits, label = _case()
    predicted = logits.argmax(1)
    np.testing.assert_array_equal(host.confusion_matrix(predicted, label, 7), sklearn.confusion_matrix(label, predicted, labels=range(7)))


@pytest.mark.parametrize("present", [7, 5])
def test_per_class_and_macro_against_sklearn(present):
    logits, label = _case(present=present)
    logits[:, 6] -= 100.0  # a class that is never predicted, and with present=5 never there either
    scores = host.per_class(host.confusion_matrix(logits.argmax(1), label, 7))
    expected = sklearn.precision_recall_fscore_support(label, logits.argmax(1), labels=range(7), zero_division=np.nan)
    for name, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        np.testing.assert_allclose([np.nan if x is None else x for x in scores[name]], values.astype(float), rtol=1e-12)
    macro = sklearn.precision_recall_fscore_support(label, logits.argmax(1), labels=range(7), zero_division=np.nan, average="macro")
    np.testing.assert_allclose([host.average(scores[name]) for name in ("precision", "recall", "f1")], macro[:3], rtol=1e-12)


def test_absent_classes_are_null_and_never_nan():
    scores = host.per_class(np.array([[3, 1, 0], [0, 0, 0], [0, 0, 0]]))
    assert scores["precision"] == [1.0, 0.0, None]  # class 1 is predicted once, wrongly; class 2 never
    assert scores["recall"] == [0.75, None, None]
    assert scores["f1"] == [6 / 7, 0.0, None]
    assert host.average([None, None]) is None


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_top_k_against_sklearn(k):
    logits, label = _case()
    assert host.top_k_accuracy(logits, label, k) == pytest.approx(sklearn.top_k_accuracy_score(label, logits, k=k, labels=range(7)) if k < 7 else 1.0)


def test_top_k_breaks_ties_towards_the_lower_class():
    logits = np.zeros((3, 3))
    assert host.top_k_accuracy(logits, np.array([0, 1, 2]), 2) == pytest.approx(2 / 3)


def _guo(probability, label, bins=15):
    """The definition in ten lines: a loop over half-open bins."""
    confidence, right = probability.max(1), probability.argmax(1) == label
    total, edges = 0.0, np.linspace(0, 1, bins + 1)
    for lower, upper in itertools.pairwise(edges):
        inside = (confidence > lower) & (confidence <= upper)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_against_the_definition(bins):
    logits, label = _case(seed=3)
    probability = host.softmax(logits)
    assert host.calibration(probability, label, bins=bins)["error"] == pytest.approx(_guo(probability, label, bins), abs=1e-12)


def test_calibration_error_on_the_edges_of_bins():
    confidence = np.arange(8, 16) / 15  # every one the upper edge of a bin
    probability = np.stack([confidence, 1 - confidence], 1)
    label = np.zeros(len(confidence), int)
    report = host.calibration(probability, label)
    assert report["error"] == pytest.approx(_guo(probability, label), abs=1e-12)
    assert [row["count"] for row in report["bins"]] == [0] * 7 + [1] * 8


def test_calibration_error_closed_forms():
    certain = np.tile([1.0, 0.0], (10, 1))
    assert host.calibration(certain, np.zeros(10, int))["error"] == 0.0
    assert host.calibration(certain, np.ones(10, int))["error"] == 1.0
    half = host.calibration(np.tile([0.8, 0.2], (10, 1)), np.array([0] * 5 + [1] * 5))
    assert half["error"] == pytest.approx(0.3)
    row = half["bins"][11]  # (11/15, 12/15], whose upper edge is 0.8
    assert row["count"] == 10
    assert row["accuracy"] == pytest.approx(0.5)
    assert half["bins"][0]["accuracy"] is None


def test_softmax_is_stable_and_takes_minus_infinity():
    np.testing.assert_allclose(host.softmax(np.array([[1e4, 1e4, -np.inf]])), [[0.5, 0.5, 0.0]])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_logit_without_probabilities_is_named(bad):
    logits = np.zeros((4, 3))
    logits[2, 1] = bad
    with pytest.raises(DataError, match="1 of 4 examples are not finite, first in row 2"):
        host.softmax(logits)


def test_classification_is_json_and_the_mask_is_a_subset():
    logits, label = _case(n=10)
    mask = np.arange(len(label)) % 3 > 0
    report = host.classification(logits, label, mask, top=(3, 20))
    assert report == host.classification(logits[mask], label[mask], top=(3, 20))
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["accuracy"] == pytest.approx(sklearn.accuracy_score(label[mask], logits[mask].argmax(1)))
    assert report["examples"] == mask.sum()
    assert "top_20" not in report
    assert 0.5 < report["top_3"] < 1
    assert [row["class"] for row in report["per_class"]] == [str(i) for i in range(10)]


def test_classification_of_nothing_is_null():
    report = host.classification(np.zeros((3, 2)), np.zeros(3, int), np.zeros(3, bool))
    assert report["accuracy"] is None
    assert report["calibration"]["error"] is None
    assert report["macro"] == {"precision": None, "recall": None, "f1": None}


def test_label_out_of_range_and_wrong_names():
    with pytest.raises(DataError, match="label=3 in row 1 is none of the 3 classes 0 to 2"):
        host.classification(np.zeros((2, 3)), np.array([0, 3]))
    with pytest.raises(DataError, match="2 class names for 3 logits"):
        host.classification(np.zeros((2, 3)), np.array([0, 1]), classes=("a", "b"))


def test_regression_against_sklearn():
    rng = np.random.RandomState(0)
    target = rng.randn(50, 3).astype(np.float32)
    value = target + rng.randn(50, 3).astype(np.float32) * np.float32(0.3)
    mask = rng.rand(50) > 0.3
    report = host.regression(value, target, mask)
    value, target = value[mask].astype(float), target[mask].astype(float)
    assert report["mse"] == pytest.approx(sklearn.mean_squared_error(target, value))
    assert report["mae"] == pytest.approx(sklearn.mean_absolute_error(target, value))
    assert report["rmse"] == pytest.approx(np.sqrt(sklearn.mean_squared_error(target, value)))
    assert report["r2"] == pytest.approx(sklearn.r2_score(target, value))
    np.testing.assert_allclose([row["r2"] for row in report["per_output"]], sklearn.r2_score(target, value, multioutput="raw_values"))
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_regression_where_r2_is_undefined():
    target = np.full((4, 1), 0.1)
    report = host.regression(target + 1.0, target)
    assert report["mse"] == pytest.approx(1.0)
    assert report["r2"] is None
    assert host.regression(target, target, np.zeros(4, bool)) == {
        "examples": 0, "mse": None, "rmse": None, "mae": None, "r2": None, "per_output": [{"mse": None, "rmse": None, "mae": None, "r2": None}],
    }  # fmt: skip


def test_regression_names_what_is_not_finite():
    target = np.zeros((3, 1))
    with pytest.raises(DataError, match="the prediction of 1 of 3 examples is not finite, first in row 1"):
        host.regression(np.array([[0.0], [np.nan], [0.0]]), target)
