"""Shows what a model is made of: `python -m research.inspect run=PATH`, or `experiment=NAME` before anything is trained."""

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from research.compression.ledger import bit_width
from research.compression.linear import Model, linear_layers
from research.core import app, mup
from research.core.build import build
from research.core.config import remodelled, resolved, split_values, unscanned
from research.core.cost import cost, flops_by_layer
from research.core.errors import ConfigError, DataError
from research.core.folder import conf, experiments, write_json
from research.core.nodes import leaves
from research.core.spec import Spec, abstract_batch
from research.core.tree import UNSTACKED, paths, unstack
from research.core.types import Objective
from research.data.dataset import open_data
from research.data.loader import Loader
from research.data.random_data import random_data
from research.figures import mup as figures
from research.run import Run, looked_into
from research.training.assembly import assemble, parts, widening
from research.training.coordinates import coordinates, slopes
from research.training.preflight import check_memory, preflight, probe

LONG = 1_000_000  # steps of a run whose length only its data would tell
BLOCKS = 12  # of more equal blocks than these the terminal shows one row for all
RECORDED = ("peak_bytes", "device", "train_flops_per_example", "energy_kwh", "co2_g", "energy_method")  # of result.json


def inspect(config: DictConfig) -> dict[str, Any]:
    """{of, arrays, parameters, bytes, zeros, flops_per_example, flops_per_token, layers, taps, training, ...}: what a model is made of and costs.

    A scanned model is shown layer by layer. Of an experiment, `training` says what each device needs for a step, on any mesh, whether its devices
    are here or not. Nothing is computed but the zeros of a run's arrays, and a probe where it is asked for.

    Args:    config: as `research.compose([...], verb="inspect")` gives it.
    Raises:  ResearchError: no run there, no such checkpoint, or a config that cannot be built.
    """
    check_memory(config.memory)
    origins = _origins(config) if config.origins else None
    tree, spec, model, facts = _run(config) if config.run else _experiment(config)
    objective = build(split_values(tree)[0]["objective"], where="objective")
    model = _abstract(objective, spec, tree) if model is None else model
    one, full = (abstract_batch(spec, rows) for rows in (1, _rows(tree)))

    def predict(params, extra, frozen, hyper, batch):
        return objective.predict(params, extra, frozen, batch, None, hyper)

    needed = cost(lambda *args: predict(*args)[0], *model, full)
    per_example = needed.flops // _rows(tree)
    layers, products = linear_layers(objective, model, one), flops_by_layer(lambda *args: predict(*args)[0], *model, full)
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
        "flops_by_layer": {path: count // _rows(tree) for path, count in products.items()},
        "taps": {path: {"shape": tap.shape, "dtype": str(tap.dtype)} for path, tap in taps.items()},
    }
    if not config.run and not hasattr(objective, "taught"):  # what a teacher needs is known once it is there
        report["training"] = _training(config)
    if rows := _widening(tree):
        report["widening"] = rows
    if not config.run and config.coordinates.times is not None:
        report["coordinates"] = _coordinates(config, tree)
    if origins is not None:
        report["origins"] = origins
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
        config.train.steps, config.train.epochs = config.train.steps or LONG, None  # how long it would be trained does not matter here
    return unscanned(resolved(config)), spec, None, {"of": config.name}


def _widening(tree: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each parameter of a maximal-update model: its kind, and by what its first values and its learning rate are multiplied."""
    plain, _ = split_values(tree)
    model = build(plain["model"], where="model")
    if getattr(model, "base", None) is None:
        return []
    m, found = mup.multiplier(model), widening(plain)
    factors = mup.rates(found, m, assemble(OmegaConf.create(dict(tree)), training=False).step.optimizer.rule)
    return [{"path": path, "kind": kind, "first_values": m**-0.5 if kind == "hidden" else 1.0, "rate": factors[path]} for path, kind in found.items()]


def _coordinates(config: DictConfig, tree: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """{parametrization: {tap: the power of the width with which its change in the first updates grows}}; drawn as a figure."""
    model, (times, updates) = build(split_values(tree)[0]["model"], where="model"), (config.coordinates.times, config.coordinates.updates)
    if getattr(model, "base", None) is None:
        raise ConfigError("coordinates.times: the model has no base, so it has no maximal-update parametrization; set model.base, as to its width")
    if len(times) < 2 or any(type(time) is not int or time < 1 for time in times) or type(updates) is not int or updates < 1:
        raise ConfigError(
            f"coordinates.times={list(times)}, updates={updates}: give two or more whole multiples of the base, and at least one update"
        )
    loader = Loader(open_data(config.data).split("train"), config.data.batch, seed=config.seed)
    batches = [jax.tree.map(jnp.asarray, dict(loader[i])) for i in range(updates)]
    panels: dict[str, dict[int, dict[str, float]]] = {"standard": {}, "maximal update": {}}
    for time in times:
        sizes = mup.resized(model, Fraction(time) / Fraction(mup.multiplier(model)))
        for name, base in (("standard", None), ("maximal update", model.base)):
            assembly = assemble(OmegaConf.create(remodelled(tree, **sizes, base=base)))
            panels[name][time * model.base] = {tap: moved[-1] for tap, moved in coordinates(assembly, batches).items()}
    title = f"{config.name}, learning rate {config.optimizer.learning_rate:g}: activations after {updates} updates"
    figures.coordinates(panels, config.coordinates.figure, title=title, note="root mean square change")
    app.say(f"wrote {config.coordinates.figure}")
    return {name: slopes(by_width) for name, by_width in panels.items()}


def _training(config: DictConfig) -> dict[str, Any]:
    """What a training step needs, from shapes, and measured where a probe is asked for."""
    size = parts(config)
    batch = config.data.batch if isinstance(config.data.batch, int) else size
    if batch % size:
        near = max(round(batch / size), 1) * size
        raise ConfigError(f"data.batch={batch} cannot be cut into {size} parts for devices and microbatches; the nearest that can is {near}")
    assembly = assemble(config, batches=1)
    return preflight(assembly, batch, config.memory) | (probe(assembly, batch) if config.probe else {})


def _origins(config: DictConfig) -> list[dict[str, Any]]:
    """One row for each value of the config: as it is written, as it resolves, and the place that says so.

    The last of these that names it: the command line, the experiment, the file of its group, the verb's own file.
    """
    hydra = HydraConfig.get()
    given = {override.partition("=")[0].lstrip("+~") for override in hydra.overrides.task}
    choices = {group: option for group, option in hydra.runtime.choices.items() if isinstance(option, str) and "/" not in group}
    experiment = choices.pop("experiment", None)
    of_experiment = set() if experiment is None else {path for path, _ in leaves(yaml.safe_load((experiments() / f"{experiment}.yaml").read_text()))}
    known = {group: _keys(group, option) for group, option in choices.items()}

    def place(path: str) -> str:
        group = path.partition(".")[0]
        if any(path == name or path.startswith(f"{name}.") for name in given if name not in choices):
            return "command line"
        if any(path == name or path.startswith(f"{name}.") or name.startswith(f"{path}.") for name in of_experiment):
            return f"experiments/{experiment}.yaml"
        if group in known and path.partition(".")[2].split(".")[0] in known[group]:
            return f"conf/{group}/{choices[group]}.yaml" + (" (chosen on the command line)" if group in given else "")
        return f"conf/{hydra.job.config_name or 'inspect'}.yaml, or a file that it begins with"

    rows = {}
    for path, written in leaves(config):
        path = re.sub(r"(\.\d+)+$", "", path)  # a list is one value
        value = None
        with contextlib.suppress(OmegaConfBaseException):  # what the data decides, once it is open
            value = OmegaConf.select(config, path)
        value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        rows[path] = {"path": path, "value": value, "written": written, "from": place(path)}
    return list(rows.values())


def _keys(group: str, option: str) -> set[str]:
    """The top keys of an option's file and of those that it begins with."""
    file = conf() / group / f"{option}.yaml"
    if not file.exists():
        return set()
    tree = yaml.safe_load(file.read_text()) or {}
    before = [entry for entry in tree.get("defaults", ()) if isinstance(entry, str) and entry != "_self_"]
    return set(tree).union(*(_keys(group, entry) for entry in before))


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
    kinds = {layer["path"]: layer["kind"] for layer in report["layers"]}
    for row in _merged(report["arrays"]):
        kind = next((kind for path, kind in kinds.items() if f"/{path}/" in f"/{row['of']}/"), "")  # in a wrapper it lies deeper
        arrays.add_row(row["path"], kind, _by(row["shape"]), row["dtype"], *_size(row))
    arrays.add_row("all", "", "", "", *_size(report))
    products = _table("products, of one example", "FLOPs")
    rows = [{"path": path or "elsewhere", "shape": (), "dtype": "", "flops": flops} for path, flops in report["flops_by_layer"].items()]
    for row in _merged(rows):
        products.add_row(row["path"], f"{row['flops']:,}")
    shown = _table("taps, of a batch of 1", "shape", "type")
    for path, tap in report["taps"].items() if taps else ():
        shown.add_row(path, _by(tap["shape"]), tap["dtype"])
    costs = _table("cost", "")
    for name in ("flops_per_example", "flops_per_token", *RECORDED):
        if (value := report.get(name)) is not None:
            least = "at least " if name in ("flops_per_example", "flops_per_token") and not report["flops_exact"] else ""
            text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
            costs.add_row(name.replace("_", " ").replace("flops", "FLOPs"), least + text)
    training = _table("a training step", "")
    for name, value in report.get("training", {}).items():
        training.add_row(name.replace("_", " "), "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.1f}")
    widths = _table("maximal update", "kind", "first values x", "learning rate x")
    for row in report.get("widening", ()):
        widths.add_row(row["path"], row["kind"], f"{row['first_values']:.4g}", f"{row['rate']:.4g}")
    moved = _table("power of the width with which changes grow", *report.get("coordinates", ()))
    for tap in next(iter(report.get("coordinates", {}).values()), ()):
        moved.add_row(tap, *(f"{powers[tap]:+.2f}" for powers in report["coordinates"].values()))
    origins = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("value", "is", "written", "from"):
        origins.add_column(title, overflow="fold")
    for row in report.get("origins", ()):
        written = str(row["written"]) if isinstance(row["written"], str) and "${" in row["written"] else ""
        origins.add_row(row["path"], str(row["value"]), written, row["from"])
    return [table for table in (arrays, products, shown, costs, training, widths, moved, origins) if table.row_count]


def _merged(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows, those of many equal blocks as one."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        row = {**row, "of": row["path"]}
        name = re.sub(rf"(^|/){UNSTACKED}\d+/", rf"\1{UNSTACKED}*/", row["path"])
        groups.setdefault((name, str(row["shape"]), row["dtype"]), []).append(row)
    merged = []
    for (name, *_), same in groups.items():
        if len(same) <= BLOCKS:
            merged += map(dict, same)
            continue
        total = {key: sum(row[key] for row in same) for key in ("parameters", "bytes", "flops") if key in same[0]}
        zeros = None if same[0].get("zeros") is None else float(np.mean([row["zeros"] for row in same]))
        merged.append({**same[0], "path": f"{name} ({len(same)} of them)", "zeros": zeros, **total})
    return merged


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
