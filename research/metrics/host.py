"""Scores from stored predictions: what needs the whole split at once, in float64 on the host.

A score that is undefined (the recall of a class without examples, R2 of a constant target) is None, never NaN, and averages leave it out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from research.core.errors import DataError

Number = float | None


def classification(
    logits: Float[np.ndarray, "b n"],
    label: Int[np.ndarray, "b"],
    mask: Bool[np.ndarray, "b"] | None = None,
    *,
    classes: Sequence[str] | None = None,
    top: Sequence[int] = (5,),
    bins: int = 15,
) -> dict[str, Any]:
    """Everything that is reported about a classifier, as plain JSON values.

    Args:    logits: before the softmax.  label: the true classes.  mask: True = counts; None: all do.  classes: names; None: "0", "1" …
             top: the k of each `top_<k>`; those that are not below the number of classes are left out, being 1.  bins: for the calibration.
    Returns: examples, accuracy, top_<k>, macro {precision, recall, f1}, per_class (a list in the order of `classes`), calibration
             {error, bins}, confusion_matrix (rows: true, columns: predicted).
    Raises:  DataError: a logit is NaN, a label is no class, or `classes` has another length.
    """
    count = logits.shape[1]
    names = [str(i) for i in range(count)] if classes is None else list(classes)
    if len(names) != count:
        raise DataError(f"{len(names)} class names for {count} logits")
    kept = np.ones(len(label), bool) if mask is None else mask
    logits, label = logits[kept].astype(np.float64), label[kept]
    probability = softmax(logits)
    matrix = confusion_matrix(logits.argmax(1), label, count)
    scores = per_class(matrix)
    return {
        "examples": len(label),
        "accuracy": _ratio(np.trace(matrix), len(label)),
        **{f"top_{k}": top_k_accuracy(logits, label, k) for k in top if k < count},
        "macro": {name: average(scores[name]) for name in ("precision", "recall", "f1")},
        "per_class": [{"class": name, **{score: values[i] for score, values in scores.items()}} for i, name in enumerate(names)],
        "calibration": calibration(probability, label, bins=bins),
        "confusion_matrix": matrix.tolist(),
    }


def softmax(logits: Float[np.ndarray, "b n"]) -> Float[np.ndarray, "b n"]:
    """Probabilities in float64.

    Raises:  DataError: a logit is NaN or +inf, which has no probabilities; the message names the first such row.
    """
    wrong = np.flatnonzero(np.isnan(logits).any(1) | (logits == np.inf).any(1))
    if len(wrong):
        raise DataError(f"the logits of {len(wrong):,} of {len(logits):,} examples are not finite, first in row {wrong[0]}")
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    exponential = np.exp(shifted)
    return exponential / exponential.sum(1, keepdims=True)


def confusion_matrix(predicted: Int[np.ndarray, "b"], label: Int[np.ndarray, "b"], count: int) -> Int[np.ndarray, "n n"]:
    """Counts of examples by true class (row) and predicted class (column).

    Raises:  DataError: a label or a prediction outside [0, count).
    """
    for name, values in (("label", label), ("prediction", predicted)):
        wrong = np.flatnonzero((values < 0) | (values >= count))
        if len(wrong):
            raise DataError(f"{name}={values[wrong[0]]} in row {wrong[0]} is none of the {count} classes 0 to {count - 1}")
    return np.bincount(label.astype(np.int64) * count + predicted, minlength=count * count).reshape(count, count)  # [n * n] -> [n, n]


def per_class(matrix: Int[np.ndarray, "n n"]) -> dict[str, list[Any]]:
    """Precision, recall, F1 and counts of each class.

    precision = right / predicted, recall = right / support, f1 = 2 right / (predicted + support).

    Args:    matrix: rows true, columns predicted.
    Returns: {"precision", "recall", "f1": numbers, or None where the denominator is 0; "support": true examples; "predicted": predictions}.
    """
    right, predicted, support = np.diag(matrix), matrix.sum(0), matrix.sum(1)
    return {
        "precision": [_ratio(r, p) for r, p in zip(right, predicted, strict=True)],
        "recall": [_ratio(r, s) for r, s in zip(right, support, strict=True)],
        "f1": [_ratio(2 * r, p + s) for r, p, s in zip(right, predicted, support, strict=True)],
        "support": support.tolist(),
        "predicted": predicted.tolist(),
    }


def average(scores: Sequence[Number]) -> Number:
    """The plain mean over the scores that are defined; None where none is."""
    defined = [score for score in scores if score is not None]
    return _ratio(sum(defined), len(defined))


def top_k_accuracy(logits: Float[np.ndarray, "b n"], label: Int[np.ndarray, "b"], k: int) -> Number:
    """The share of examples whose class is among the k largest logits; of equal logits the lower class comes first. None without examples."""
    own = np.take_along_axis(logits, label[:, None].astype(np.int64), 1)
    earlier = (logits == own) & (np.arange(logits.shape[1])[None, :] < label[:, None])
    rank = ((logits > own) | earlier).sum(1)
    return _ratio((rank < k).sum(), len(label))


def calibration(probability: Float[np.ndarray, "b n"], label: Int[np.ndarray, "b"], *, bins: int = 15) -> dict[str, Any]:
    """The expected calibration error and the bins that it sums over.

    error = sum over bins of count / n x |accuracy - confidence|; bin m holds the confidences (largest probabilities) in ((m - 1) / bins, m / bins].

    Returns: {"error": number, None without examples; "bins": [{lower, upper, count, confidence, accuracy}]}; an empty bin has None for both means.
    Source:  Guo et al. 2017, equation 3.
    """
    edges = np.linspace(0.0, 1.0, bins + 1)
    confidence = np.minimum(probability.max(1), 1.0)
    right = probability.argmax(1) == label
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    confident = np.bincount(place, weights=confidence, minlength=bins)
    hits = np.bincount(place, weights=right.astype(np.float64), minlength=bins)
    rows = [
        {
            "lower": float(edges[i]),
            "upper": float(edges[i + 1]),
            "count": int(count[i]),
            "confidence": _ratio(confident[i], count[i]),
            "accuracy": _ratio(hits[i], count[i]),
        }
        for i in range(bins)
    ]
    return {"error": _ratio(np.abs(hits - confident).sum(), len(label)), "bins": rows}


def regression(value: Float[np.ndarray, "b o"], target: Float[np.ndarray, "b o"], mask: Bool[np.ndarray, "b"] | None = None) -> dict[str, Any]:
    """Errors and explained variance of a regressor, as plain JSON values.

    r2 = 1 - (sum of squared errors) / (sum of squares about the mean target), for each output; the headline number is the mean over outputs.

    Args:    value: predictions.  target: in the same units.  mask: True = counts; None: all do.
    Returns: examples, mse, rmse, mae, r2 and per_output, a list of the same. None without examples; r2 is None too where the target is constant.
    Raises:  DataError: a prediction or a target is not finite.
    """
    kept = np.ones(len(target), bool) if mask is None else mask
    value, target = value[kept].astype(np.float64), target[kept].astype(np.float64)
    for name, array in (("prediction", value), ("target", target)):
        wrong = np.flatnonzero(~np.isfinite(array).all(1))
        if len(wrong):
            raise DataError(f"the {name} of {len(wrong):,} of {len(array):,} examples is not finite, first in row {wrong[0]}")
    outputs = [_one_output(value[:, i], target[:, i]) for i in range(target.shape[1])]
    mse = average([output["mse"] for output in outputs])
    return {
        "examples": len(target),
        "mse": mse,
        "rmse": None if mse is None else float(np.sqrt(mse)),
        "mae": average([output["mae"] for output in outputs]),
        "r2": average([output["r2"] for output in outputs]),
        "per_output": outputs,
    }


def _one_output(value: Float[np.ndarray, "b"], target: Float[np.ndarray, "b"]) -> Mapping[str, Number]:
    if not len(target):
        return {"mse": None, "rmse": None, "mae": None, "r2": None}
    error = value - target
    spread = 0.0 if (target == target[0]).all() else np.square(target - target.mean()).sum()
    unexplained = _ratio(np.square(error).sum(), spread)
    return {
        "mse": float(np.square(error).mean()),
        "rmse": float(np.sqrt(np.square(error).mean())),
        "mae": float(np.abs(error).mean()),
        "r2": None if unexplained is None else 1.0 - unexplained,
    }


def _ratio(top: Any, bottom: Any) -> Number:
    return float(top) / float(bottom) if bottom else None
