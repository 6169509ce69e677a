"""Scores a run on a whole split: `python -m research.evaluate run=PATH`."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from rich.table import Table

from research.core import app
from research.core.errors import DataError
from research.core.folder import write_json
from research.core.spec import check_spec
from research.data.dataset import Dataset, open_data
from research.data.loader import whole
from research.figures import classification as draw
from research.figures.images import image_grid
from research.figures.regression import predicted_against_true
from research.inference.evaluate import evaluate as score
from research.metrics import host
from research.run import Run, judging

FILE = "evaluation.json"
SHAPES = ("image", "features", "columns", "classes", "outputs", "vocabulary")  # what another data set must share with the run's own
NAMES = ("_target_", "name", "path")  # what tells one data config from another


def evaluate(config: DictConfig) -> dict[str, Any]:
    """The content of evaluation.json: the split's scores; for classifiers and regressors also what needs the whole split at once.

    Args:    config: as `research.compose([...], verb="evaluate")` gives it.
    Raises:  ResearchError: no run there, no such checkpoint or split, data that is missing or not what the run was trained on.
    """
    run = Run(config.run)
    node = _node(config, run)
    dataset = _dataset(config, run, node)
    split = config.data.split or next(name for name in ("test", "validation", "train") if name in dataset.splits)
    source = dataset.split(split)
    weights = run.weights(config.checkpoint, config.weights)
    batch = run.config.data.batch if config.data.batch is None else config.data.batch
    batches = whole(source, batch)
    kind = "text" if "vocabulary" in run.spec else "class" if "classes" in run.spec else "value"
    model = (weights.params, weights.extra, weights.frozen, weights.hyper)
    metrics, outputs = score(judging(run.objective, source), *model, batches, collect=kind != "text")
    report: dict[str, Any] = {"run": os.fspath(run.path), "checkpoint": config.checkpoint, "step": weights.step, "weights": weights.kind}
    report |= {"data": {name: node[name] for name in NAMES if name in node}, "split": split, "examples": batches.examples}
    report["metrics"] = {f"{split}/{name}": value for name, value in metrics.items()}
    if kind == "class":
        report["classification"] = host.classification(outputs["logits"], outputs["label"], classes=run.preprocessor.classes or None)
    elif kind == "value":
        restore = run.preprocessor.restore
        outputs = {**outputs, "value": restore(outputs["value"]), "target": restore(outputs["target"])}
        report["regression"] = host.regression(outputs["value"], outputs["target"])
    write_json(run.path / FILE, report)
    figures = _draw(run, report, outputs, dataset, split) if config.figures else []
    _show(report)
    for path in (os.fspath(run.path / FILE), *figures):
        app.say(f"wrote {path}")
    return report


def main(argv: list[str] | None = None) -> int:
    """The exit code of the command line."""
    return app.main(evaluate, "evaluate", argv)


def _node(config: DictConfig, run: Run) -> DictConfig:
    """The config of the data set that the command names, or of the run's own, where that lies now."""
    if "_target_" not in config.data:
        merged = OmegaConf.merge(run.config.data, {"root": config.data.root} if config.data.root else {})
        assert isinstance(merged, DictConfig)
        return merged
    if config.data.root is None:  # the data set has no files
        with open_dict(config.data):
            del config.data["root"]
    if (time := run.spec.get("time")) not in (None, asked := config.data.get("time", time)):
        app.say(f"with a context of {asked} tokens, data.time; the run was trained with {time}")
    return config.data


def _dataset(config: DictConfig, run: Run, node: DictConfig) -> Dataset:
    """What the node names, read with the run's tokenizer and statistics."""
    try:
        dataset = open_data(node, run.preprocessor)
    except DataError as error:
        moved = "_target_" not in config.data and config.data.root is None and "root" in run.config.data
        raise DataError(f"{error}{'; has the data moved? data.root=FOLDER says where it is now' if moved else ''}") from error
    check_spec({name: run.spec[name] for name in SHAPES if name in run.spec}, dataset.spec, f"{os.fspath(run.path)}: data.spec")
    return dataset


def _draw(run: Run, report: Mapping[str, Any], outputs: Mapping[str, np.ndarray], dataset: Dataset, split: str) -> list[str]:
    """The paths of the figures that fit the run."""
    folder = run.path / "figures"
    names = []

    def path(name: str) -> str:
        names.append(os.fspath(folder / f"{split}_{name}.png"))
        return names[-1]

    if "classification" in report:
        scores, classes = report["classification"], [row["class"] for row in report["classification"]["per_class"]]
        draw.confusion_matrix(np.array(scores["confusion_matrix"]), classes, path("confusion_matrix"))
        draw.reliability(scores["calibration"], path("calibration"))
        draw.per_class(scores["per_class"], path("per_class"))
        if "image" in run.spec:
            wrong = np.flatnonzero(outputs["logits"].argmax(1) != outputs["label"])[:64]
            images = dataset.split(split).take(outputs["index"][wrong])["image"]
            image_grid(images, outputs["label"][wrong], outputs["logits"][wrong].argmax(1), path("mistakes"), classes=classes, title="Mistakes")
    elif "regression" in report:
        predicted_against_true(outputs["value"], outputs["target"], path("predicted_against_true"))
    return names


def _show(report: Mapping[str, Any]) -> None:
    """The scores as a table on standard output."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(f"{report['split']}, {report['examples']:,} examples")
    table.add_column("score", justify="right")
    rows = dict(report["metrics"])
    if "classification" in report:
        scores = report["classification"]
        rows |= {"macro F1": scores["macro"]["f1"], "calibration error (ECE)": scores["calibration"]["error"]}
    for name, value in rows.items():
        table.add_row(name, "-" if value is None else f"{value:.4f}")
    for name in ("rmse", "mae", "r2") if "regression" in report else ():
        value = report["regression"][name]
        table.add_row(f"{name} (in the data's units)" if name != "r2" else name, "-" if value is None else f"{value:.4g}")
    Console(markup=False).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
