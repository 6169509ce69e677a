"""The ledger: what a compression cost and what it gained, each number measured or left out."""

import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import Float
from rich.table import Table

from research.compression.linear import Model
from research.compression.subject import put
from research.core import cost
from research.core.energy import measured
from research.core.tree import paths
from research.core.types import Batch, Objective, Tree
from research.figures import compression as figure

Scores = dict[str, tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]]  # metric -> (sum, weight) of each example
DRAWS = 2000  # of the bootstrap
ROUNDS = 15  # in which both models are timed
CALLS = 20  # of a model in one round at most
SECONDS = 10.0  # for which a model runs while its energy is measured
JOULES = 3.6e6  # of a kilowatt-hour
SIZES = ("parameters", "nonzeros", "bytes", "disk_bytes")  # that are shown
WORST = 10  # layers that the table lists


def needed(objective: Objective, model: Model, batch: Batch) -> dict[str, Tree]:
    """{params, extra, frozen}, without the arrays that no prediction reads, as the originals of parameters that were trained in full.

    Args:    batch: arrays or abstract values.
    """
    tree, hyper = dict(zip(("params", "extra", "frozen"), model[:3], strict=True)), model[3]

    def outputs(tree, hyper, batch):
        return objective.predict(tree["params"], tree["extra"], tree["frozen"], batch, None, hyper)[0]

    program = jax.make_jaxpr(outputs)(tree, hyper, batch).jaxpr
    _, read = dce_jaxpr(program, [True] * len(program.outvars))
    leaves, form = jax.tree.flatten(tree)
    flags = paths(jax.tree.unflatten(form, read[: len(leaves)]))
    return put(tree, {path: None for path, flag in flags.items() if not flag})


def sizes(tree: Tree) -> dict[str, Any]:
    """{parameters, nonzeros, bytes, bytes_by_type, bytes_by_form} of a tree of arrays.

    Bytes count each array by the bits of its type (an int4 is half a byte), scales and biases included. An array of two or more axes is counted
    in the smallest of three forms: dense; its non-zeros and a mask of one bit an entry (what the index of a 2:4 pattern comes to as well); its
    non-zeros and the place of each among all entries.
    """
    parameters = nonzeros = 0
    types: dict[str, float] = {}
    forms: dict[str, float] = {}
    for leaf in jax.tree.leaves(tree):
        width, filled = bit_width(leaf.dtype), int(np.count_nonzero(np.asarray(leaf)))
        bits = {"dense": leaf.size * width}
        if leaf.ndim > 1:
            bits |= {"mask": filled * width + leaf.size, "places": filled * (width + math.ceil(math.log2(max(leaf.size, 2))))}
        form = min(bits, key=bits.__getitem__)
        parameters, nonzeros = parameters + leaf.size, nonzeros + filled
        types[str(leaf.dtype)] = types.get(str(leaf.dtype), 0.0) + bits[form] / 8
        forms[form] = forms.get(form, 0.0) + bits[form] / 8
    whole = {name: {key: math.ceil(value) for key, value in parts.items()} for name, parts in (("bytes_by_type", types), ("bytes_by_form", forms))}
    return {"parameters": parameters, "nonzeros": nonzeros, "bytes": math.ceil(sum(types.values())), **whole}


def bit_width(dtype: Any) -> int:
    """Bits of one number of this type, as it is stored where space counts."""
    return 1 if dtype == jnp.bool_ else jax.dtypes.itemsize_bits(dtype)


def disk_bytes(folder: epath.PathLike) -> int:
    """The bytes of all files in a folder and below it."""
    return sum(disk_bytes(path) if path.is_dir() else path.stat().length for path in epath.Path(folder).iterdir())


def scores(objective: Objective, model: Model, batches: Iterable[Batch]) -> Scores:
    """Every metric's sum and weight for each example that counts, in order: what a bootstrap draws from."""
    model = jax.device_put(model)
    parts = []
    for batch in batches:
        mask = np.asarray(batch["mask"])
        counts = mask.any(axis=tuple(range(1, mask.ndim)))
        parts.append(jax.tree.map(lambda x, counts=counts: np.asarray(x, np.float64)[counts], _score(objective, *model, batch)))
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


@functools.partial(jax.jit, static_argnums=0)
def _score(objective, params, extra, frozen, hyper, batch):
    """Metrics of each example alone: all others are masked. Only what depends on the mask is computed anew, so the model runs once."""

    def alone(mask):
        tally, _ = objective(params, extra, frozen, {**batch, "mask": mask}, None, hyper, train=False)
        return {name: pair for name, pair in tally.metrics.items() if jnp.ndim(pair[0]) == 0}

    mask = jnp.asarray(batch["mask"])
    examples = len(mask)
    own = jnp.eye(examples, dtype=bool).reshape(examples, examples, *[1] * (mask.ndim - 1))
    return jax.vmap(alone)(own & mask[None])


def interval(scores: Scores, name: str, other: Scores | None = None) -> tuple[float, float, float]:
    """(value, low, high): a metric of a split with its 95 % interval, or how it differs from that of another model on the same examples.

    By the bootstrap over examples, paired where there are two models: 2.5 and 97.5 percentiles. It tells how the score would vary with other
    examples of the same kind, not with another seed of training.

    Source:  Efron and Tibshirani 1993, section 13.3.
    """
    pairs = [*scores[name], *(other[name] if other is not None else ())]
    columns = np.stack(pairs, axis=1)
    values = _means(np.vstack([columns.sum(0), _resampled(columns)]))
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return float(values[0]), float(low), float(high)


def _means(sums: Float[np.ndarray, "r 2k"]) -> Float[np.ndarray, "r"]:
    mean = sums[:, 0] / sums[:, 1]
    return mean if sums.shape[1] == 2 else mean - sums[:, 2] / sums[:, 3]


def _resampled(columns: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "r c"]:
    """Sums over as many examples drawn with replacement; the same draws at every call."""
    rng, n = np.random.default_rng(0), len(columns)
    return np.stack([np.bincount(rng.integers(n, size=n), minlength=n) @ columns for _ in range(DRAWS)])


def metrics(before: Scores, after: Scores) -> dict[str, Mapping[str, Any]]:
    """{metric: {before, after, change, examples}}: the first three [value, low, high], the last how many were resampled."""
    return {
        name: {"before": interval(before, name), "after": interval(after, name), "change": interval(after, name, before), "examples": len(pair[0])}
        for name, pair in after.items()
        if name in before
    }


def costs(
    before: tuple[Objective, Model], after: tuple[Objective, Model], batch: Batch, *, timed: bool = True, country: str | None = None
) -> dict[str, Any]:
    """{flops_per_example: {before, after}, latency: as `latency` gives it where it is `timed`, energy: as `energy` does where there is a country}.

    Args:    before, after: objective and arrays.  batch: one full batch.
    """
    flops = {name: cost.flops_per_example(*program, batch) for name, program in (("before", before), ("after", after))}
    timings = {"latency": latency(before, after, batch)} if timed else {}
    return {"flops_per_example": flops, **timings} | ({} if country is None else {"energy": energy(before, after, batch, country)})


def latency(before: tuple[Objective, Model], after: tuple[Objective, Model], batch: Batch) -> dict[str, Any]:
    """{rows of the batch: {before, after: {median_ms, p95_ms, examples_per_s}, speedup: [median, lower, upper quartile of the rounds]}}.

    Both compiled predict programs, their data on the device, at one example and at the full batch. They are timed in turn, the order
    exchanged from round to round, so that both see the same machine; a round's speedup is before / after of its two medians.
    """
    result = {}
    for rows in dict.fromkeys((1, len(batch["mask"]))):
        part = {name: x[:rows] for name, x in batch.items()}
        programs = {name: program(*of, part) for name, of in (("before", before), ("after", after))}
        seconds = rounds(programs)
        ratios = [float(np.median(times["before"]) / np.median(times["after"])) for times in seconds]
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        result[str(rows)] = {name: _summary([t for times in seconds for t in times[name]], rows) for name in programs}
        result[str(rows)]["speedup"] = [float(middle), float(low), float(high)]
    return result


def energy(before: tuple[Objective, Model], after: tuple[Objective, Model], batch: Batch, country: str) -> dict[str, Any]:
    """{rows: of the batch, before, after: joules an example, method: how they were measured}.

    Each compiled predict program runs alone for ten seconds. The whole machine counts, what it takes when idle included.

    Args:    country: as of `research.core.energy.measured`.
    """
    found: dict[str, Any] = {"rows": len(batch["mask"])}
    for name, of in (("before", before), ("after", after)):
        run, calls = program(*of, batch), 0
        _timed(run, 3)
        with measured(country, "ledger.energy") as used:
            began = time.perf_counter()
            while time.perf_counter() - began < SECONDS:
                run()
                calls += 1
        found |= {name: used["energy_kwh"] * JOULES / (calls * found["rows"]), "method": used["energy_method"]}
    return found


def program(objective: Objective, model: Model, batch: Batch) -> Callable[[], Any]:
    """The compiled predict program, ready to run, its arrays on the device."""
    model, batch = jax.device_put((model, batch))
    compiled = _outputs.lower(objective, *model, batch).compile()
    return lambda: jax.block_until_ready(compiled(*model, batch))


@functools.partial(jax.jit, static_argnums=0)
def _outputs(objective, params, extra, frozen, hyper, batch):
    return objective.predict(params, extra, frozen, batch, None, hyper)[0]


def rounds(programs: Mapping[str, Callable[[], Any]]) -> list[dict[str, list[float]]]:
    """The seconds of each call, round by round; a slow model is called less often."""
    for program in programs.values():
        _timed(program, 3)
    slowest = max(min(_timed(program, 3)) for program in programs.values())
    calls = int(np.clip(0.1 / slowest, 2, CALLS))
    order = list(programs)
    return [{name: _timed(programs[name], calls) for name in (order if i % 2 else order[::-1])} for i in range(ROUNDS)]


def _timed(program: Callable[[], Any], calls: int) -> list[float]:
    seconds = []
    for _ in range(calls):
        began = time.perf_counter()
        program()
        seconds.append(time.perf_counter() - began)
    return seconds


def _summary(seconds: Sequence[float], rows: int) -> dict[str, float]:
    middle, late = np.percentile(seconds, [50, 95])
    return {"median_ms": 1e3 * float(middle), "p95_ms": 1e3 * float(late), "examples_per_s": rows / float(middle)}


def tables(report: Mapping[str, Any]) -> list[Table]:
    """The ledger for the terminal: scores, what the model weighs and costs, and the layers that changed most; what was not measured is not there."""
    return [table for table in (_scores_table(report), _cost_table(report), _layers_table(report)) if table.row_count]


def draw(report: Mapping[str, Any], path: epath.PathLike) -> None:
    """Writes the ledger as a figure: costs as shares of those before, metrics with their intervals."""
    before, after = report["sizes"]["before"], report["sizes"]["after"]
    costs = {name.replace("_", " "): (before[name], after[name]) for name in SIZES if name in after}
    if flops := report.get("flops_per_example"):
        costs["FLOPs per example"] = (flops["before"], flops["after"])
    for rows, row in report.get("latency", {}).items():
        costs[f"ms, batch {rows}"] = (row["before"]["median_ms"], row["after"]["median_ms"])
    metrics = {name: (row["before"], row["after"]) for name, row in report["metrics"].items()}
    figure.ledger(costs, metrics, path, title=f"{_methods(report)}, {report['split']}")


def _methods(report: Mapping[str, Any]) -> str:
    """The method, or those of a chain in order."""
    return " + ".join(stage["method"] for stage in report.get("stages", [report]))


def _table(title: str, *columns: str) -> Table:
    """Its title stands above it, so that it does not widen the first column."""
    table = Table("", title=title, title_justify="left", title_style="bold", box=None, header_style="bold", pad_edge=False)
    table.min_width = len(title)
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    return table


def _scores_table(report: Mapping[str, Any]) -> Table:
    examples = max((row["examples"] for row in report["metrics"].values()), default=0)
    table = _table(f"{_methods(report)}, {report['split']}, {examples:,} examples", "before", "after", "change", "95 % interval")
    for name, row in report["metrics"].items():
        change, low, high = row["change"]
        table.add_row(name, f"{row['before'][0]:.4f}", f"{row['after'][0]:.4f}", f"{change:+.4f}", f"{low:+.4f} to {high:+.4f}")
    return table


def _cost_table(report: Mapping[str, Any]) -> Table:
    table = _table("cost", "before", "after", "ratio", "")
    for name in SIZES:
        if name in report["sizes"]["after"]:
            before, after = (report["sizes"][which][name] for which in ("before", "after"))
            note = _forms(report["sizes"]["after"]) if name == "bytes" else ""
            table.add_row(name.replace("_", " "), f"{before:,}", f"{after:,}", f"{after / before:.1%}", note)
    if flops := report.get("flops_per_example"):
        share = f"{flops['after'] / flops['before']:.1%}" if flops["before"] else ""
        table.add_row("FLOPs per example", f"{flops['before']:,}", f"{flops['after']:,}", share, "")
    captions = [f"times on {report.get('device', 'this machine')}"] if "latency" in report else []
    for rows, row in report.get("latency", {}).items():
        before, after, (middle, low, high) = row["before"], row["after"], row["speedup"]
        note = f"{middle:.2f}x as fast ({low:.2f} to {high:.2f})"
        table.add_row(f"ms, batch {rows}", f"{before['median_ms']:.3f}", f"{after['median_ms']:.3f}", "", note)
        table.add_row("  95th percentile", f"{before['p95_ms']:.3f}", f"{after['p95_ms']:.3f}", "", "")
        table.add_row("  examples/s", f"{before['examples_per_s']:,.0f}", f"{after['examples_per_s']:,.0f}", "", "")
    if energy := report.get("energy"):
        before, after = energy["before"], energy["after"]
        table.add_row(f"J an example, batch {energy['rows']}", f"{before:.3g}", f"{after:.3g}", f"{after / before:.1%}" if before else "", "")
        captions.append(f"energy by {energy['method']}")
    table.caption, table.caption_justify = "\n".join(captions) or None, "left"
    return table


def _forms(sizes: Mapping[str, Any]) -> str:
    """Of which types and forms the bytes are."""
    types = ", ".join(f"{name} {value / sizes['bytes']:.0%}" for name, value in sorted(sizes["bytes_by_type"].items(), key=lambda item: -item[1]))
    sparse = [name for name in sizes["bytes_by_form"] if name != "dense"]
    return f"{types}{'; non-zeros and ' + ' or '.join(sparse) if sparse else ''}"


def _layers_table(report: Mapping[str, Any]) -> Table:
    """The layers with the largest reconstruction error, where the method tells it."""
    layers = {path: notes for path, notes in report.get("layers", {}).items() if "error" in notes}
    worst = sorted(layers, key=lambda path: -layers[path]["error"])[:WORST]
    names = list(dict.fromkeys(name for path in worst for name in layers[path]))
    table = _table(f"layers with the largest error, {len(worst)} of {len(layers)}", *names)
    for path in worst:
        table.add_row(path, *(f"{layers[path][name]:.4g}" if name in layers[path] else "" for name in names))
    return table
