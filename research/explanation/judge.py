"""Whether an explanation tells the truth: what becomes of the output, the map and its like when parts, weights and inputs are disturbed."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from research.core.build import build
from research.core.keys import named, per_example
from research.core.progress import track
from research.core.tree import map_paths
from research.core.types import Batch, Edits, Hyper, Objective, Tree
from research.explanation import methods
from research.explanation.model import INPUT, Examples, Model, with_input
from research.explanation.order import layer_of, layers
from research.explanation.perturbation import coalition_scores
from research.explanation.result import Attribution, Finding, Method, Result
from research.figures.explanation import Heat, Lines, Panel, Rows

MEASURES = {  # what the rows of the table are called
    "deletion": "deletion (low is good)",
    "deletion_random": "… in a random order",
    "insertion": "insertion (high is good)",
    "insertion_random": "… in a random order",
    "infidelity": "infidelity (low)",
    "infidelity_scaled": "… at best scale, 0 to 1",
    "sensitivity": "sensitivity (low)",
    "sparseness": "sparseness, 0 to 1",
    "weights": "same at random weights (low)",
    "weights_similarity": "… as pictures (SSIM)",
}


@dataclasses.dataclass(frozen=True)
class Judge:
    """Measures of every attribution, each a mean over the examples.

    deletion, insertion: area under the output while the highest positions are replaced by the baseline, or put into it, one share after another;
    low and high are good, and beside each stands the area for a random order (Petsiuk et al. 2018, here of the output itself, a logit).
    infidelity: mean square of (sum of the values that are replaced - fall of the output) over random sets of positions (Yeh et al. 2019);
    scaled: at the best factor, as a share of the mean square of the fall: 0 a map that is right up to its scale, 1 one that tells nothing.
    sensitivity: largest change of the map, relative to its size, when the input is slightly disturbed (Yeh et al. 2019).
    sparseness: Gini index of the sizes: 0 all alike, 1 all in one position (Chalasani et al. 2020).
    weights: rank correlation of the map with that of the same model whose weights are shuffled within each array, at random rather than
    drawn anew as Adebayo et al. 2018 do, so that compressed models can be judged and outputs keep their scale. Shuffled from the last layer to
    the first, and all at once. Where the map stays as it was, it shows the input, not what the model has learnt: a warning says so.

    Args:    steps: of a deletion or insertion curve.  orders: random ones, for comparison.  sets: of positions, for infidelity.
             noise: largest disturbance, in standard deviations of an example's own input.  draws: of noise, and of shuffled weights.
             layers: at most so many stages from the last layer to the first.
             baseline: a number that fills the input tap, in the units in which the model reads it; one for all methods.
             alike: rank correlation from which a map counts as independent of the weights.  top: share of positions that methods are compared by.
             rows: inputs in one call of the model.
    """

    steps: int = 32
    orders: int = 8
    sets: int = 256
    noise: float = 0.05
    draws: int = 3
    layers: int = 8
    baseline: float = 0.0
    alike: float = 0.9
    top: float = 0.1
    rows: int = 256

    def __call__(self, results: Sequence[Result], seed: int = 0, again: Mapping[str, Method] | None = None) -> Finding | None:
        """The verdict on the attributions among the results; None where there is none.

        Args:    results: of one model and the same examples.  seed: with which they were made, and of what is drawn by lot here.
                 again: name -> the method, where conf/method/ does not describe it.
        """
        judged = [result for result in results if isinstance(result, Attribution) and result.subject is not None]
        if not judged:
            return None
        model, examples = _subject(judged[0])
        made = {result.method: (again or {}).get(result.method) or _method(result) for result in judged}
        key = jax.random.key(seed)
        random = np.random.default_rng(seed)
        maps = {result.method: positions(result) for result in judged}
        table = {result.method: {"sparseness": [gini(values) for values in _flat(result)]} for result in judged}
        curves = self._faithful(model, examples, {name: x for name, x in maps.items() if x is not None}, table, random)
        whole, stages = self._shuffled(model, examples, judged, made, key, random)
        for result in judged:
            name = result.method
            table[name]["sensitivity"] = self._sensitivity(model, examples, result, made[name], key)
            table[name]["weights"] = whole[name]["rank_correlation"]
            if "similarity" in whole[name]:
                table[name]["weights_similarity"] = whole[name]["similarity"]
        numbers: dict[str, Any] = {
            "methods": {name: {measure: _mean(values) for measure, values in found.items()} for name, found in table.items()},
            "each": table,
            "layers": stages,
        }
        agreement = self._agreement({name: x for name, x in maps.items() if x is not None})
        if agreement:
            numbers["agreement"] = agreement
        numbers["warnings"] = list(self._warnings(numbers["methods"]))
        return Finding(_panels(numbers, curves), numbers, method="judge", settings=dataclasses.asdict(self))

    def _faithful(self, model, examples, maps, table, random) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Fills deletion, insertion and infidelity into the table; {curve: (share, mean output)}."""
        share = np.linspace(0.0, 1.0, self.steps + 1)
        sums: dict[str, np.ndarray] = {}
        if not maps:
            return {}
        for i in track(range(len(examples)), "deletion and insertion"):
            row, places = examples.row(i), _groups(model, examples, i)
            count = int(places.max()) + 1
            cuts = np.round(share * count).astype(int)
            ranks = {name: _order(values[i][places.ravel() >= 0]) for name, values in maps.items()}
            chance = [random.permutation(count) for _ in range(self.orders)]
            sets = random.random((self.sets, count)) >= random.uniform(0.0, 1.0, (self.sets, 1))  # what stays: any share of the positions
            asked = [rank[None] >= cuts[:, None] for rank in chance]
            for rank in ranks.values():
                asked += [rank[None] >= cuts[:, None], rank[None] < cuts[:, None]]
            asked.append(sets)
            outputs = coalition_scores(model, row, self.baseline, places, np.concatenate(asked), self.rows)
            lines, drawn = outputs[: -self.sets].reshape(-1, len(share)), outputs[-self.sets :]
            by_chance = lines[: self.orders].mean(0)
            fall = by_chance[0] - drawn
            known = {"random, deletion": by_chance, "random, insertion": by_chance[::-1]}
            for j, name in enumerate(maps):
                deletion, insertion = lines[self.orders + 2 * j : self.orders + 2 * j + 2]
                known |= {f"{name}, deletion": deletion, f"{name}, insertion": insertion}
                claim = (~sets).astype(np.float64) @ maps[name][i][places.ravel() >= 0].astype(np.float64)
                found = {
                    "deletion": np.trapezoid(deletion, share),
                    "deletion_random": np.trapezoid(by_chance, share),
                    "insertion": np.trapezoid(insertion, share),
                    "insertion_random": np.trapezoid(by_chance[::-1], share),
                    "infidelity": np.mean((claim - fall) ** 2),
                    "infidelity_scaled": _unexplained(claim, fall),
                }
                for measure, value in found.items():
                    table[name].setdefault(measure, []).append(float(value))
            for name, line in known.items():
                sums[name] = sums.get(name, 0.0) + line
        return {name: (share, total / len(examples)) for name, total in sums.items()}

    def _sensitivity(self, model: Model, examples: Examples, result: Attribution, method: Method, key: jax.Array) -> list[float]:
        """The largest relative change of each example's map."""
        size = np.linalg.norm(_flat(result), axis=1)
        largest = np.zeros(len(examples))
        for draw in track(range(self.draws), f"{result.method}: disturbed inputs"):
            noisy = dataclasses.replace(
                model,
                objective=Disturbed(model.objective, self.noise),
                frozen={"model": model.frozen, "noise": jax.random.fold_in(named(key, "noise"), draw)},
            )
            moved = np.linalg.norm(_flat(_again(method, noisy, examples, key)) - _flat(result), axis=1)
            largest = np.maximum(largest, moved / np.where(size > 0, size, 1.0))
        return largest.tolist()

    def _shuffled(self, model, examples, judged, made, key, random) -> tuple[dict[str, dict[str, list[float]]], dict[str, Any]]:
        """({method: {measure: of each example}} with all weights shuffled, the same from the last layer to the first as means)."""
        order = list(layers(model))[::-1]
        last = [math.ceil(len(order) * (i + 1) / min(self.layers, len(order))) for i in range(min(self.layers, len(order)))]
        whole: dict[str, dict[str, list[Any]]] = {result.method: {} for result in judged}
        stages: dict[str, Any] = {"shuffled": [order[i - 1] for i in last], "rank_correlation": {result.method: [] for result in judged}}
        everything = [shuffled(model, order, random) for _ in range(self.draws)]
        for result in judged:
            method = made[result.method]
            stirred = np.random.default_rng(int(random.integers(1 << 31)))
            visits = [shuffled(model, order[:stop], stirred) for stop in last[:-1]] + everything
            for i, other in enumerate(track(visits, f"{result.method}: shuffled weights")):
                found = _alike(result, _again(method, other, examples, key))
                if i >= len(last) - 1:
                    for measure, values in found.items():
                        whole[result.method].setdefault(measure, []).append(values)
                else:
                    stages["rank_correlation"][result.method].append(_mean(found["rank_correlation"]))
            whole[result.method] = {measure: np.mean(values, axis=0).tolist() for measure, values in whole[result.method].items()}
            stages["rank_correlation"][result.method].append(_mean(whole[result.method]["rank_correlation"]))
        return whole, stages

    def _agreement(self, maps: Mapping[str, Any]) -> dict[str, Any]:
        """Rank correlation and overlap of the highest positions of every two methods."""
        if len(maps) < 2:
            return {}
        names = list(maps)
        correlation, overlap = np.ones((len(names), len(names))), np.ones((len(names), len(names)))
        for i, first in enumerate(names):
            for j, second in enumerate(names[:i]):
                pairs = [(x[k], y[k]) for x, y in zip(maps[first], maps[second], strict=True) if (k := np.isfinite(x)).any()]
                correlation[i, j] = correlation[j, i] = _mean([rank_correlation(x, y) for x, y in pairs])
                overlap[i, j] = overlap[j, i] = _mean([top_overlap(x, y, self.top) for x, y in pairs])
        return {"names": names, "rank_correlation": correlation.tolist(), "overlap": overlap.tolist()}

    def _warnings(self, table: Mapping[str, Mapping[str, float]]):
        for name, row in table.items():
            if row["weights"] >= self.alike:
                yield (
                    f"{name}: the map does not depend on what the model has learnt: with shuffled weights it is nearly the same "
                    f"(rank correlation {row['weights']:.2f})"
                )
            if "deletion" in row and row["deletion"] >= row["deletion_random"] and row["insertion"] <= row["insertion_random"]:
                yield (
                    f"{name}: the map does not order the input: without its highest positions the output stays as high as without random ones "
                    f"(area {row['deletion']:.3g} against {row['deletion_random']:.3g})"
                )


@dataclasses.dataclass(frozen=True)
class Disturbed:
    """An objective whose input is disturbed, evenly within +-radius standard deviations of each example's input: the same for the same example.

    `frozen` is {"model": the objective's own, "noise": a typed key}, so that all draws share a program.
    """

    objective: Objective
    radius: float

    def predict(
        self, params: Tree, extra: Tree, frozen: Tree, batch: Batch, key: jax.Array | None, hyper: Hyper, *, edits: Edits | None = None
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """As the objective's own; edits apply to the disturbed input."""
        own = functools.partial(self.objective.predict, params, extra, frozen["model"], batch, key, hyper)
        clean = own()[1][INPUT]
        axes = tuple(range(1, clean.ndim))
        spread = jnp.std(clean.astype(jnp.float32), axes, keepdims=True)
        draw = functools.partial(jax.random.uniform, shape=clean.shape[1:], minval=-1.0, maxval=1.0)
        noise = jax.vmap(draw)(per_example(frozen["noise"], jnp.asarray(batch["index"])))
        value = clean + (self.radius * spread * noise).astype(clean.dtype)
        return own(edits=with_input(value, edits))


def shuffled(model: Model, names: Sequence[str], random: np.random.Generator) -> Model:
    """The model with the entries of every array of these layers in random order."""
    chosen = set(names)

    def stir(path: str, x: Any) -> Any:
        array = np.asarray(x) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else None
        if array is None or array.ndim == 0 or layer_of(path, model.params) not in chosen:
            return x
        return random.permutation(array.ravel()).reshape(array.shape)

    params, extra, frozen = (map_paths(stir, tree) for tree in (model.params, model.extra, model.frozen))
    return dataclasses.replace(model, params=params, extra=extra, frozen=frozen)


def positions(result: Attribution) -> Float[np.ndarray, "b n"] | None:
    """One number for each position of the input: the sum over its channels or units, a coarser map stretched; NaN where nothing counts.

    None for values that lie elsewhere than the input's positions.
    """
    model, examples = _subject(result)
    values = np.asarray(result.values)
    shape = np.shape(examples.batch[model.field])[1:]
    if model.field == "image" and values.ndim in (3, 4):
        flat = values.sum(-1) if values.ndim == 4 else values
        y, x = (np.arange(size) * have // size for size, have in zip(shape, flat.shape[1:], strict=False))
        return flat[:, y][:, :, x].reshape(len(flat), -1) / (shape[0] * shape[1] / math.prod(flat.shape[1:]))
    if model.field == "tokens" and values.ndim in (2, 3) and values.shape[1] == shape[0]:
        flat = values.sum(-1) if values.ndim == 3 else values
        return np.where(examples.mask, flat, np.nan)
    if values.shape[1:] == shape and result.at == INPUT:
        return values.reshape(len(values), -1)
    return None


def gini(values: Float[np.ndarray, "n"]) -> float:
    """The Gini index of the sizes: 0 where all are alike, 1 - 1/n where all but one are 0; 0 for nothing at all."""
    sizes = np.sort(np.abs(np.asarray(values, np.float64)))
    total, n = sizes.sum(), len(sizes)
    return float(1 - 2 * np.sum(sizes / total * (n - np.arange(1, n + 1) + 0.5)) / n) if total > 0 else 0.0


def rank_correlation(first: Float[np.ndarray, "n"], second: Float[np.ndarray, "n"]) -> float:
    """Spearman's: the correlation of the ranks, ties sharing theirs; of a map without differences 0, of two such 1."""
    x, y = (_ranks(values) - (len(values) + 1) / 2 for values in (first, second))
    size = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / size if size > 0 else float(not x.any() and not y.any())


def top_overlap(first: Float[np.ndarray, "n"], second: Float[np.ndarray, "n"], share: float) -> float:
    """Which part of the highest positions of one map is among those of the other."""
    count = max(1, round(share * len(first)))
    highest = [set(np.argsort(-values, kind="stable")[:count].tolist()) for values in (first, second)]
    return len(highest[0] & highest[1]) / count


def similarity(first: Float[np.ndarray, "y x"], second: Float[np.ndarray, "y x"], window: int = 7) -> float:
    """Structural similarity of two maps, each by its largest size, in windows of equal weight: 1 for the same map.

    Source:  Wang et al. 2004, equation 13, for values in [-1, 1].
    """
    size = min(window, *first.shape)
    x, y = (np.lib.stride_tricks.sliding_window_view(values / max(float(np.abs(values).max()), 1e-12), (size, size)) for values in (first, second))
    mean_x, mean_y = x.mean((-1, -2)), y.mean((-1, -2))
    var_x, var_y = x.var((-1, -2)), y.var((-1, -2))
    both = (x * y).mean((-1, -2)) - mean_x * mean_y
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    return float(np.mean((2 * mean_x * mean_y + c1) * (2 * both + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))))


def _ranks(values: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """From 1, in increasing order; of equal values the mean."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place.ravel()]


def _order(values: Float[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """The place of each position when the highest comes first."""
    order = np.empty(len(values), np.int64)
    order[np.argsort(-values, kind="stable")] = np.arange(len(values))
    return order


def _unexplained(claim: Float[np.ndarray, "m"], fall: Float[np.ndarray, "m"]) -> float:
    """The share of the fall's mean square that the best multiple of the claim leaves."""
    there, said = float(fall @ fall), float(claim @ claim)
    return max(0.0, 1 - float(claim @ fall) ** 2 / (said * there)) if said > 0 and there > 0 else float(there > 0)


def _groups(model: Model, examples: Examples, i: int) -> Int[np.ndarray, "..."]:
    """Each position of the input as a feature of its own; -1 where nothing counts."""
    shape = np.shape(examples.batch[model.field])[1:]
    places = shape[:2] if model.field == "image" else shape
    counts = examples.mask[i] if examples.mask.ndim > 1 else np.ones(places, bool)
    return np.where(counts, np.cumsum(counts).reshape(places) - 1, -1)


def _flat(result: Attribution) -> Float[np.ndarray, "b n"]:
    """The map at its own resolution, b n, channels summed; what does not count is 0."""
    _, examples = _subject(result)
    values = np.asarray(result.values, np.float64)
    if values.ndim == 4:
        values = values.sum(-1)
    if examples.mask.ndim > 1 and values.shape[1] == examples.mask.shape[1]:
        values = np.where(examples.mask.reshape(*examples.mask.shape, *[1] * (values.ndim - 2)), values, 0.0)
    return values.reshape(len(values), -1)


def _alike(result: Attribution, other: Attribution) -> dict[str, list[float]]:
    """How like two maps of the same examples are, of each example."""
    first, second = _flat(result), _flat(other)
    _, examples = _subject(result)
    counts = np.ones(first.shape, bool)
    if examples.mask.ndim > 1 and first.shape == examples.mask.shape:
        counts = examples.mask
    found = {"rank_correlation": [rank_correlation(x[k], y[k]) for x, y, k in zip(first, second, counts, strict=True)]}
    if result.values.ndim in (3, 4) and _subject(result)[0].field == "image":
        shape = result.values.shape[1:3]
        found["similarity"] = [similarity(x.reshape(shape), y.reshape(shape)) for x, y in zip(first, second, strict=True)]
    return found


def _again(method: Method, model: Model, examples: Examples, key: jax.Array) -> Attribution:
    made = method(model, examples, key)
    assert isinstance(made, Attribution)
    return dataclasses.replace(made, subject=(model, examples))


def _method(result: Attribution) -> Method:
    return build(methods.node(result.method, result.settings), where="method")


def _subject(result: Attribution) -> tuple[Model, Examples]:
    assert result.subject is not None
    return result.subject


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _panels(numbers: Mapping[str, Any], curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> tuple[Panel, ...]:
    table = numbers["methods"]
    known = [measure for measure in MEASURES if any(measure in row for row in table.values())]
    cells = [[MEASURES[measure], *(float(row[measure]) if measure in row else "" for row in table.values())] for measure in known]
    panels: list[Panel] = [Rows(("does it tell the truth?", *table), cells, "mean over the examples")]
    for kind, what in (("deletion", "the highest positions replaced"), ("insertion", "only the highest positions kept")):
        lines = {name.removesuffix(f", {kind}"): line for name, line in curves.items() if name.endswith(kind)}
        if lines:
            panels.append(Lines(lines, f"{kind}: {what}", "share of the positions", "output"))
    stages = numbers["layers"]
    found = {name: (np.arange(len(line) + 1), [1.0, *line]) for name, line in stages["rank_correlation"].items()}
    panels.append(Lines(found, f"weights shuffled from {stages['shuffled'][0]} down", "stages, the last: all layers", "rank correlation"))
    if agreement := numbers.get("agreement"):
        for measure, title in (("rank_correlation", "agreement: rank correlation"), ("overlap", "agreement: share of the highest positions")):
            panels.append(Heat(np.array(agreement[measure]), agreement["names"], agreement["names"], title))
    return tuple(panels)
