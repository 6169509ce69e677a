"""Shows what a model is made of: `python -m research.inspect run=PATH`, or `experiment=NAME` before anything is trained."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from omegaconf import DictConfig, open_dict
from rich.console import Console
from rich.table import Table

from research.compression.ledger import bit_width
from research.compression.linear import Model, linear_layers
from research.core import app
from research.core.build import build
from research.core.config import resolved, split_values, unscanned
from research.core.cost import cost
from research.core.errors import ConfigError, DataError
from research.core.folder import write_json
from research.core.spec import Spec, abstract_batch
from research.core.tree import paths, unstack
from research.core.types import Objective
from research.data.dataset import open_data
from research.data.random_data import random_data
from research.run import Run, looked_into

RECORDED = ("peak_bytes", "device", "train_flops_per_example", "energy_kwh", "co2_g", "energy_method")  # of result.json


def inspect(config: DictConfig) -> dict[str, Any]:
    """{of, arrays, parameters, bytes, zeros, flops_per_example, flops_per_token, layers, taps, ...}: what a model is made of and costs.

    A scanned model is shown layer by layer. Nothing is computed but the zeros of a run's arrays.

    Args:    config: as `research.compose([...], verb="inspect")` gives it.
    Raises:  ResearchError: no run there, no such checkpoint, or a config that cannot be built.
    """
    tree, spec, model, facts = _run(config) if config.run else _experiment(config)
    objective = build(split_values(tree)[0]["objective"], where="objective")
    model = _abstract(objective, spec, tree) if model is None else model
    one, full = (abstract_batch(spec, rows) for rows in (1, _rows(tree)))

    def predict(params, extra, frozen, hyper, batch):
        return objective.predict(params, extra, frozen, batch, None, hyper)

    needed = cost(lambda *args: predict(*args)[0], *model, full)
    per_example = needed.flops // _rows(tree)
    layers = linear_layers(objective, model, one)
    _, taps = jax.eval_shape(predict, *model, one)
    report = {
        **facts,
        "objective": tree["objective"]["_target_"],
        "arrays": _arrays(model),
        **_totals(model),
        "flops_per_example": per_example,
        "flops_per_token": per_example // spec["time"] if "time" in spec else None,
        "flops_exact": needed.exact,
        "layers": [{"path": path, "kind": layer.kind, "shape": layer.shape, "inputs": layer.inputs} for path, layer in layers.items()],
        "taps": {path: {"shape": tap.shape, "dtype": str(tap.dtype)} for path, tap in taps.items()},
    }
    for table in _tables(report, config.taps):
        Console(markup=False).print(table, "")
    if config.json:
        write_json(config.json, report)
        app.say(f"wrote {config.json}")
    return report


def main(argv: list[str] | None = None) -> int:
    """The exit code of the command line."""
    return app.main(inspect, "inspect", argv)


def _run(config: DictConfig) -> tuple[dict[str, Any], Spec, Model, dict[str, Any]]:
    """(config of the unscanned model, its data's spec, its arrays, what its folder tells)."""
    run = Run(config.run)
    weights = run.weights(config.checkpoint, config.weights)
    model = (unstack(weights.params), unstack(weights.extra), unstack(weights.frozen), weights.hyper)
    facts = {"of": os.fspath(run.path), "step": weights.step, "weights": weights.kind}
    recorded = {name: run.result[name] for name in RECORDED if run.result.get(name) is not None}
    return unscanned(resolved(run.config)), run.spec, model, {**facts, **recorded}


def _experiment(config: DictConfig) -> tuple[dict[str, Any], Spec, None, dict[str, Any]]:
    """The same of what the config describes, which has no arrays yet."""
    source = looked_into(config)
    try:
        spec = source.spec if source is not None else open_data(config.data).spec
    except DataError as error:
        try:
            spec = random_data(config.data).spec
        except ConfigError:
            raise error from None
        app.say(f"the shapes are those of random data, since {error}")
    with open_dict(config):
        config.data.spec = dict(spec)
        config.train.steps = config.train.steps or 1  # how long it would be trained does not matter here
    return unscanned(resolved(config)), spec, None, {"of": config.name}


def _rows(tree: Mapping[str, Any]) -> int:
    """Examples of a batch: those that share what a call computes once, as kernels that are put together from parts."""
    return tree["data"]["batch"] if isinstance(tree["data"]["batch"], int) else 1


def _abstract(objective: Objective, spec: Spec, tree: Mapping[str, Any]) -> Model:
    """The shapes of the arrays that the objective is called with."""
    key, batch = jax.random.key(0), abstract_batch(spec, 1)
    params, extra = jax.eval_shape(objective.init, key, batch)
    hyper = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in split_values(tree)[1]}
    return params, extra, jax.eval_shape(objective.still, key, batch), hyper


def _arrays(model: Model) -> list[dict[str, Any]]:
    """One row for each array; those beside `params` begin with `extra/` and `frozen/`."""
    params, extra, frozen, _ = model
    leaves = {**paths(params), **paths({"extra": extra, "frozen": frozen})}
    return [
        {
            "path": path,
            "shape": leaf.shape,
            "dtype": str(leaf.dtype),
            "parameters": leaf.size,
            "bytes": leaf.size * bit_width(leaf.dtype) / 8,
            "zeros": _zeros(leaf),
        }
        for path, leaf in leaves.items()
    ]


def _zeros(leaf: Any) -> float | None:
    """The share of zeros; None where there are shapes alone."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return None
    return 1 - int(np.count_nonzero(np.asarray(leaf))) / max(leaf.size, 1)


def _totals(model: Model) -> dict[str, Any]:
    """Over all arrays; `trained` counts those that a gradient sees."""
    rows = _arrays(model)
    count = sum(row["parameters"] for row in rows)
    zeros = None if any(row["zeros"] is None for row in rows) else sum(row["zeros"] * row["parameters"] for row in rows) / max(count, 1)
    trained = sum(leaf.size for leaf in jax.tree.leaves(model[0]))
    return {"parameters": count, "trained": trained, "bytes": sum(row["bytes"] for row in rows), "zeros": zeros}


def _tables(report: Mapping[str, Any], taps: bool) -> list[Table]:
    """The report for the terminal."""
    arrays = _table(report["of"], "layer", "shape", "type", "parameters", "bytes", "zeros")
    for row in report["arrays"]:
        kind = next((layer["kind"] for layer in report["layers"] if f"/{layer['path']}/" in f"/{row['path']}/"), "")  # in a wrapper it lies deeper
        arrays.add_row(row["path"], kind, _by(row["shape"]), row["dtype"], *_size(row))
    arrays.add_row("all", "", "", "", *_size(report))
    shown = _table("taps, of a batch of 1", "shape", "type")
    for path, tap in report["taps"].items() if taps else ():
        shown.add_row(path, _by(tap["shape"]), tap["dtype"])
    costs = _table("cost", "")
    for name in ("flops_per_example", "flops_per_token", *RECORDED):
        if (value := report.get(name)) is not None:
            least = "at least " if name in ("flops_per_example", "flops_per_token") and not report["flops_exact"] else ""
            text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
            costs.add_row(name.replace("_", " ").replace("flops", "FLOPs"), least + text)
    return [table for table in (arrays, shown, costs) if table.row_count]


def _table(title: str, *columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(title, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=column != "")
    return table


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _size(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return f"{row['parameters']:,}", f"{row['bytes']:,.0f}", "" if row["zeros"] is None else f"{row['zeros']:.1%}"


if __name__ == "__main__":
    raise SystemExit(main())
