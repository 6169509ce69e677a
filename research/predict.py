"""Asks a run: `python -m research.predict run=PATH prompt="ROMEO:"`, or `input=photo.png`. The training data is never opened."""

import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath
from omegaconf import DictConfig
from rich.console import Console

from research.core import app
from research.core.errors import ConfigError
from research.data.inputs import read_inputs
from research.inference.predict import class_rows, table, value_rows, write_predictions
from research.inference.predict import predict as outputs_of
from research.inference.sample import Sampling
from research.metrics.host import softmax
from research.run import Run, Weights, text

FILE = "predictions.jsonl"


def predict(config: DictConfig) -> list[dict[str, Any]]:
    """The rows of predictions.jsonl: one per text, or one per example of the input.

    Args:    config: as `research.compose([...], verb="predict")` gives it.
    Raises:  ResearchError: no run there, neither or both of prompt and input, an input that cannot be read or does not fit.
    """
    run = Run(config.run)
    if (config.prompt is None) == (config.input is None):
        wanted = 'prompt="…"' if run.tokenizer is not None else "input=PATH"
        raise ConfigError(f"prompt={config.prompt!r} and input={config.input!r}: give exactly one of them; this run takes {wanted}")
    for name, least in (("samples", 1), ("seed", 0), ("batch", 1), ("top", 1)):
        if type(config[name]) is not int or config[name] < least:
            raise ConfigError(f"{name}={config[name]!r}: must be a whole number of at least {least}")
    weights = run.weights(config.checkpoint, config.weights)
    rows = _texts(config, run, weights) if config.prompt is not None else _rows(config, run, weights)
    path = (epath.Path(config.out) if config.out else run.path) / FILE
    write_predictions(path, rows)
    app.say(f"wrote {os.fspath(path)}")
    return rows


def main(argv: list[str] | None = None) -> int:
    """The exit code of the command line."""
    return app.main(predict, "predict", argv)


def _texts(config: DictConfig, run: Run, weights: Weights) -> list[dict[str, Any]]:
    """One row per sample; each streams to the terminal as it is made."""
    sampling = Sampling(config.temperature, config.top_k, config.top_p)
    rows = []
    for i in range(config.samples):
        pieces = text(run.objective, weights, run.preprocessor, config.prompt, tokens=config.tokens, sampling=sampling, seed=config.seed + i)
        if config.samples > 1:
            app.say(f"--- sample {i + 1} of {config.samples}, seed {config.seed + i}")
        sys.stdout.write(config.prompt)
        made = "".join(_streamed(pieces))
        print(flush=True)
        rows.append({"prompt": config.prompt, "text": made, "seed": config.seed + i})
    return rows


def _streamed(pieces: Iterator[str]) -> Iterator[str]:
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
        yield piece


def _rows(config: DictConfig, run: Run, weights: Weights) -> list[dict[str, Any]]:
    """One row per example of the input, shown as a table."""
    names, raw = read_inputs(config.input, run.spec)
    parts = ({name: array[i : i + config.batch] for name, array in raw.items()} for i in range(0, len(names), config.batch))
    batches = ({**run.preprocessor(part), "mask": np.ones(len(next(iter(part.values()))), bool)} for part in parts)
    model = (weights.params, weights.extra, weights.frozen, weights.hyper)
    outputs = outputs_of(run.objective, *model, batches, rows=config.batch)
    if "logits" in outputs:
        rows = class_rows(softmax(outputs["logits"]), names, run.preprocessor.classes, config.top)
    else:
        rows = value_rows(run.preprocessor.restore(outputs["value"]), names)
    Console().print(table(rows))
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
