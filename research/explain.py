"""Opens the black box: `python -m research.explain run=PATH method=integrated_gradients input=photo.png`."""

import hashlib
import io
import json
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from research.core import app
from research.core.config import resolved
from research.core.errors import ConfigError, ResearchError
from research.core.folder import plain, write_json, write_text
from research.data.images import SUFFIXES, image_paths, image_size
from research.data.inputs import read_inputs
from research.explanation import methods
from research.explanation.judge import Judge
from research.explanation.model import Examples, Model, examples
from research.explanation.page import page
from research.explanation.result import Attribution, Finding, Result, one_each
from research.figures import explanation as draw
from research.run import Run

FILE, PAGE = "explanation.json", "explanation.html"
GIVEN = ("input", "index", "prompt")  # how examples are named
MOST = 64  # examples of one command
MISSED = 0.1  # share of an output's change that values which should add up to it may miss before a warning says so
_log = logging.getLogger(__name__)


def explain(config: DictConfig) -> dict[str, Any]:
    """The content of explanation.json: each method's settings and numbers; beside it a page, a picture an example, and the arrays.

    Args:    config: as `research.compose([...], verb="explain")` gives it.
    Raises:  ResearchError: no run there, a method that does not fit it, an input that cannot be read or does not fit, a target out of range.
    """
    _check(config)
    run = Run(config.run)
    chosen = _chosen(config)
    model = run.model(config.checkpoint, config.weights, data={str(name): value for name, value in config.data.items() if name != "split"})
    given = any(config[name] is not None for name in GIVEN)
    ready = {name: methods.prepare(model, name, node, given) for name, node in chosen.items()}  # all, before data is opened and time is taken
    found = _examples(config, run, model)
    results, failed = [], {}
    for name, method in ready.items():
        read = 0 if found is None or method.reads == "nothing" else len(found)
        app.say(f"{name}: {f'{read} example' + 's' * (read > 1) if read else 'the model as a whole'}")
        try:
            results.append(methods.apply(method, model, name, chosen[name], found, config.seed))
        except (ResearchError, ValueError) as error:
            if len(ready) == 1:
                raise
            failed[name] = error
    target = _folder(config, run, chosen)
    lost = {"failed": {name: str(error) for name, error in failed.items()}} if failed else {}
    report = {"run": os.fspath(run.path), **_asked(config), "methods": [_row(result) for result in results], **lost}
    try:
        verdict = Judge()(results, config.seed) if config.judge else None
    except BaseException:  # an interruption too: what was explained is kept
        _write(target, report, results, config.figures, None, _incomplete(results))
        raise
    if verdict is not None:
        report["judge"] = verdict.summary()
    warnings = [*_incomplete(results), *(verdict.numbers["warnings"] if verdict is not None else ())]
    _write(target, report, results, config.figures, verdict, warnings)
    for result in results:
        _show(result)
    if verdict is not None:
        _print(verdict.drawn[0])
    for warning in warnings:
        _log.warning("%s", warning)
    app.say(f"wrote {os.fspath(target / PAGE)}")
    for error in failed.values():  # what the others found is kept
        raise error
    return report


def main(argv: list[str] | None = None) -> int:
    """The exit code of the command line; `index=0,5,9` and `method=[a,b]` are lists here, as a person means them."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return app.main(explain, "explain", [_meant(argument) for argument in arguments])


def _meant(argument: str) -> str:
    """An override as Hydra reads it: a list of numbers in brackets, several methods under their own key."""
    name, _, value = argument.partition("=")
    if name == "index" and "," in value and not value.startswith("["):
        return f"index=[{value}]"
    return f"methods={value}" if name == "method" and value.startswith("[") else argument


def _check(config: DictConfig) -> None:
    """Refuses a value of another kind.

    Raises:  ConfigError: naming it.
    """
    for name in ("judge", "figures"):
        if not isinstance(config[name], bool):
            raise ConfigError(f"{name}={config[name]!r}: must be true or false")
    if type(config.seed) is not int or config.seed < 0:
        raise ConfigError(f"seed={config.seed!r}: must be a whole number of at least 0")
    if config.position is not None and type(config.position) is not int:
        raise ConfigError(f"position={config.position!r}: must be a whole number, from 0, or from the end where negative")


def _chosen(config: DictConfig) -> dict[str, dict[str, Any]]:
    """{name: config node} of the methods to apply.

    Raises:  ConfigError: none, or a method or a setting that does not exist.
    """
    if config.methods is None:
        if config.get("method") is None:
            raise ConfigError(f"give method=NAME or method=[NAME,NAME]; there are: {', '.join(methods.names())}")
        return {config.name: methods.node(config.name, {k: v for k, v in resolved(config.method).items() if k != "_target_"})}
    chosen = {}
    for entry in OmegaConf.to_container(config.methods) or ():
        if not isinstance(entry, str) and not (isinstance(entry, dict) and len(entry) == 1):
            raise ConfigError(f"method: {entry!r} is neither the name of a method nor {{NAME: {{SETTING: VALUE}}}}")
        name, settings = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
        if str(name) in chosen:
            raise ConfigError(f"method: {name} is listed twice; give each its own command, since arrays and pictures are named by their method")
        chosen[str(name)] = methods.node(str(name), settings)
    if not chosen:
        raise ConfigError(f"method=[] lists no method; there are: {', '.join(methods.names())}")
    return chosen


def _examples(config: DictConfig, run: Run, model: Model) -> Examples | None:
    """What the command asks to explain; None where it names nothing.

    Raises:  ConfigError: more than one of input, index and prompt, an index out of range, an empty prompt.
    """
    given = [name for name in GIVEN if config[name] is not None]
    if len(given) > 1:
        raise ConfigError(f"{given[0]} and {given[1]} are both given: give one of input, index and prompt")
    if not given:
        return None
    names, batch = {"input": _read, "index": _drawn, "prompt": _text}[given[0]](config, run, model)
    if len(names) > MOST:
        raise ConfigError(f"{given[0]} holds {len(names)} examples; one command explains at most {MOST}")
    return examples(model, batch, names, resolved(config)["target"], config.position)


def _read(config: DictConfig, run: Run, model: Model) -> tuple[list[str], dict[str, np.ndarray]]:
    names, raw = read_inputs(config.input, run.spec)
    _tell_fitted(epath.Path(config.input), run.spec)
    return names, {**run.preprocessor(raw), "mask": np.ones(len(names), bool)}


def _tell_fitted(path: epath.Path, spec: Mapping[str, Any]) -> None:
    """Says that the model sees an image in another size than the file has."""
    if "image" not in spec:
        return
    files = image_paths(path) if path.is_dir() else [path] if path.suffix.lower() in SUFFIXES else []
    rows, columns, _ = spec["image"]
    other = [(file, size) for file in files if (size := image_size(file)) != (rows, columns)]
    if other:
        (file, (high, wide)), more = other[0], f", and {len(other) - 1} more like it" * (len(other) > 1)
        app.say(f"{file.name} has {high} x {wide} pixels{more}; what is explained is fitted to the model's {rows} x {columns}")


def _drawn(config: DictConfig, run: Run, model: Model) -> tuple[list[str], dict[str, np.ndarray]]:
    """Examples of the run's own data by number."""
    assert model.data is not None
    data = model.data()
    split = config.data.get("split") or next(name for name in ("test", "validation", "train") if name in data.splits)
    if split not in data.splits:
        raise ConfigError(f"data.split={split!r}: the run's data has {', '.join(data.splits)}")
    source: Any = data.splits[split]
    source = getattr(source, "whole", source)  # windows that do not overlap, as they are scored
    given: Any = resolved(config)["index"]
    asked = np.atleast_1d(given)
    for i in asked:
        if isinstance(i, bool | np.bool_) or not isinstance(i, int | np.integer) or not 0 <= i < len(source):
            raise ConfigError(f"index={i}: the {split} split has the examples 0 to {len(source) - 1}")
    indices = asked.astype(np.int64)
    fields = dict(source.take(indices))
    return [f"{split} {i}" for i in indices], {"mask": np.ones(len(indices), bool), "index": indices.astype(np.int32), **fields}


def _text(config: DictConfig, run: Run, model: Model) -> tuple[list[str], dict[str, np.ndarray]]:
    if run.tokenizer is None:
        raise ConfigError("prompt: this run reads no text; give input=PATH or index=NUMBERS")
    if not str(config.prompt):
        raise ConfigError("prompt is empty: there is nothing to explain")
    tokens = run.tokenizer.encode(str(config.prompt))
    return [repr(str(config.prompt))], {"tokens": tokens[None], "mask": np.ones((1, len(tokens)), bool)}


def _asked(config: DictConfig) -> dict[str, Any]:
    """What of the command decides the result."""
    names = ("checkpoint", "weights", "input", "index", "prompt", "target", "position", "seed")
    return {**{name: value for name, value in resolved(config).items() if name in names and value is not None}, "data": resolved(config)["data"]}


def _folder(config: DictConfig, run: Run, chosen: Mapping[str, Any]) -> epath.Path:
    """Where the explanation goes: the same command, the same folder."""
    if config.out:
        return epath.Path(config.out)
    digest = hashlib.sha256(json.dumps(plain([chosen, _asked(config)]), sort_keys=True).encode()).hexdigest()[:8]
    return run.path / "explanations" / f"{'-'.join(chosen)}-{digest}"


def _incomplete(results: list[Result]) -> list[str]:
    """A warning for each method whose values should add up to the output's change and miss much of it."""
    warnings = []
    for result in results:
        if isinstance(result, Attribution) and result.delta is not None:
            change = result.values.reshape(len(result.values), -1).sum(1) - result.delta
            missed = np.abs(result.delta) > MISSED * np.maximum(np.abs(change), 1e-6)
            if missed.any():
                i = int(np.abs(np.where(missed, result.delta, 0.0)).argmax())
                told = f"miss the output's change, {change[i]:.3g}, by {result.delta[i]:.3g}"
                more = "; more points come closer" if "points" in result.settings else ""
                warnings.append(f"{result.method}: the values of {result.names[i]} {told}{more}")
    return warnings


def _row(result: Result) -> dict[str, Any]:
    return {"method": result.method, "settings": dict(result.settings), "examples": list(result.names), **result.summary()}


def _write(target: epath.Path, report: Mapping[str, Any], results: list[Result], figures: bool, verdict: Finding | None, warnings: list[str]) -> None:
    """The page, the numbers, the arrays of each method and, with figures, a picture of each example."""
    title = f"{', '.join(result.method for result in results)} of {report['run']}"
    facts = {name: value for name, value in report.items() if name not in ("methods", "judge")}
    results = results if verdict is None else [*results, verdict]
    write_json(target / FILE, report)
    for result in results:
        if arrays := result.arrays():
            buffer = io.BytesIO()
            np.savez_compressed(buffer, allow_pickle=False, **arrays)
            (target / f"{result.method}.npz").write_bytes(buffer.getvalue())
    write_text(target / PAGE, page(title, results, facts=facts, warnings=warnings))
    if not figures:
        return
    for result in results:
        if drawn := getattr(result, "drawn", ()):
            draw.save(drawn, target / f"{result.method}.png", result.method)
        for i, name in enumerate(result.names):
            if panels := result.panels(i):
                pictured = result.pictured(i) if isinstance(result, Attribution) else ()
                draw.save((*pictured, *panels), target / f"{result.method}_{i}.png", str(name))


def _print(rows: draw.Panel) -> None:
    """A table on standard output."""
    assert isinstance(rows, draw.Rows)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, name in enumerate(rows.columns):
        table.add_column(str(name), justify="right" if i else "left")
    for row in rows.rows:
        table.add_row(*map(draw.cell_text, row))
    _tell(table)


def _tell(table: Table) -> None:
    """A table as it is: what stands in brackets in a name or a token is no markup."""
    Console(markup=False).print(table)


def _show(result: Result) -> None:
    """The numbers of a result on standard output."""
    for line in getattr(result, "lines", ()):
        app.say(line)
    columns = one_each(result)
    if columns:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for name in (result.method, *columns):
            table.add_column(name.replace("_", " "), justify="left" if name == result.method else "right")
        for i, name in enumerate(result.names):
            table.add_row(str(name), *(draw.cell_text(values[i]) for values in columns.values()))
        _tell(table)


if __name__ == "__main__":
    raise SystemExit(main())
