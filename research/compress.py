"""Makes a smaller run of a run: `python -m research.compress run=PATH method=prune/wanda`."""

import dataclasses
import os
import shlex
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console

from research.compression import ledger
from research.compression.distill import student, taught
from research.compression.prune import STATIC
from research.compression.subject import Subject
from research.core import app, energy
from research.core.build import build
from research.core.config import compose, resolved, unscanned
from research.core.errors import CheckpointError, ConfigError, nearest
from research.core.folder import described, read_json, write_json
from research.core.spec import check_spec
from research.core.tree import count, paths, sha256, unstack
from research.core.types import Tree
from research.data.dataset import Dataset
from research.data.loader import Loader, whole
from research.evaluate import SHAPES
from research.inference.batches import padded
from research.run import Run, Weights, judging
from research.train import train
from research.training import run
from research.training.assembly import Assembly, assemble
from research.training.checkpoint import Checkpoints
from research.training.loop import new_host

LEDGER = "compression.json"


def compress(config: DictConfig) -> dict[str, Any]:
    """The content of compression.json: the ledger of the compressed run, which lies in `run_dir` and can be used as any other.

    The same command with the same `run_dir` goes on where it was interrupted.

    Args:    config: as `research.compose([...], verb="compress")` gives it.
    Raises:  ResearchError: no run there, a method that does not fit the model, a folder that is taken.
    """
    energy.check(config.ledger.energy, "ledger.energy")
    parent, stages = Run(config.run), _stages(config)
    name = "-".join(stage.replace("/", "_") for stage, _ in stages)
    path = epath.Path(config.run_dir or run.new_path(config.paths.runs, f"{parent.config.name}-{name}"))
    dataset = parent.dataset(config.data)
    check_spec({name: parent.spec[name] for name in SHAPES if name in parent.spec}, dataset.spec, f"{os.fspath(parent.path)}: data.spec")
    source, reports = parent, []
    for i, (name, node) in enumerate(stages):
        folder = path if i == len(stages) - 1 else path / "stages" / f"{i + 1}_{name.replace('/', '_')}"
        app.say(f"{name}: {os.fspath(source.path)} -> {os.fspath(folder)}")
        choice = (config.checkpoint, config.weights) if i == 0 else ("best", "auto")
        source, report = Stage(name, node, config, dataset, folder).run(source, *choice)
        reports.append(report)
    report = {**reports[-1], "stages": reports, **_measured(config, parent, source, dataset)}
    write_json(path / LEDGER, report)
    if not source.result["metrics"]:  # of a run that was trained they are there
        scores = {f"{report['split']}/{name}": row["after"][0] for name, row in report["metrics"].items()}
        run.write_result(path, **{**source.result, "metrics": scores, "flops_per_example": report["flops_per_example"]["after"]})
    for table in ledger.tables(report):
        Console(markup=False).print(table, "")
    if config.ledger.figures:
        ledger.draw(report, path / "figures" / "compression.png")
    app.say(f"wrote {os.fspath(path / LEDGER)}")
    app.say(f"next: python -m research.evaluate run={shlex.quote(os.fspath(path))}")
    return report


def main(argv: list[str] | None = None) -> int:
    """The exit code of the command line."""
    return app.main(compress, "compress", argv)


@dataclasses.dataclass
class Stage:
    """One method on its way from a run to the next.

    Args:    name: of the method, as "prune/wanda".  node: its config; `finetune` there is this stage's own.  config: of the command.
             dataset: the run's data.  path: where the result goes.
    """

    name: str
    node: Mapping[str, Any]
    config: DictConfig
    dataset: Dataset
    path: epath.Path

    def run(self, parent: Run, checkpoint: str | int, which: str) -> tuple[Run, dict[str, Any]]:
        """(the compressed run, written and, where that is asked for, trained; what the method did, in figures)."""
        method = build(self.node, where="method", without=("finetune",))
        finetune = dict(self.config.finetune) | dict(self.node.get("finetune") or {})
        trains = finetune["steps"] is not None or finetune["epochs"] is not None
        if method.trains and not trains:
            raise ConfigError(f"method={self.name} is of use only when it is trained: give finetune.steps or finetune.epochs")
        weights = parent.weights(checkpoint, which)
        entry = self._entry(parent, weights)
        before = run.saved_config(self.path)
        if before is None:
            began = time.perf_counter()
            whole = self._subject(parent, weights, entry["parent"])
            subject = method(whole)
            settings = subject.config["train"]
            if settings.get("sparsify") and settings["sparsify"] == whole.config["train"].get("sparsify"):  # the parent's, which has chosen its zeros
                subject = subject.replace(config={**subject.config, "train": {**settings, "sparsify": STATIC}})
            if trains and finetune["teacher"]:
                subject = _taught(subject, whole)
            report = {"method": self.name, "settings": entry["settings"], "seconds": time.perf_counter() - began, "layers": dict(subject.notes)}
            with run.claimed(self.path):
                rate = finetune["learning_rate"] or whole.config["optimizer"]["learning_rate"] * (1 if method.trains else 0.1)
                before = self._write(subject, entry, {**finetune, "learning_rate": rate} if trains else None)
                write_json(self.path / LEDGER, report)
        elif not before.get("compression") or resolved(before)["compression"][-1] != entry:
            raise ConfigError(f"run_dir={os.fspath(self.path)!r} holds another run: choose another run_dir")
        if trains:
            train(before)
        report = read_json(self.path / LEDGER)
        return Run(self.path), {name: report[name] for name in ("method", "settings", "seconds", "layers")}

    def _entry(self, parent: Run, weights: Weights) -> dict[str, Any]:
        """What the config of the compressed run tells of its descent."""
        settings = {name: value for name, value in self.node.items() if not name.startswith("_")}
        digest = sha256({"params": weights.params, "extra": weights.extra}, weights.frozen)
        origin = {"run": os.fspath(parent.path), "step": weights.step, "weights": weights.kind, "sha256": digest}
        return {"method": self.name, "settings": settings, "parent": origin}

    def _subject(self, parent: Run, weights: Weights, origin: Mapping[str, Any]) -> Subject:
        """The run's model, unscanned, with calibration data of its own training split."""
        asked = self.config.calibration
        split = self.dataset.split("train")
        if asked.examples > len(split):
            raise ConfigError(f"calibration.examples={asked.examples}: the training split has {len(split)}")
        if asked.examples % asked.batch:
            raise ConfigError(f"calibration.batch={asked.batch} must divide calibration.examples={asked.examples}")
        loader = Loader(split, asked.batch, seed=asked.seed)
        batches = [loader[i] for i in range(asked.examples // asked.batch)]
        config = unscanned(
            {**resolved(parent.config), "data": {**resolved(parent.data_config(self.config.data)), "spec": resolved(self.dataset.spec)}}
        )
        others = [unstack(Run(path).weights().params) for path in self.node.get("runs", ())]
        config, params, frozen = student(config, unstack(weights.params), weights.frozen)
        arrays = params, unstack(weights.extra), frozen, weights.hyper
        return Subject(config, parent.objective, *arrays, batches, origin, others).replace(config=config)

    def _write(self, subject: Subject, entry: Mapping[str, Any], finetune: Mapping[str, Any] | None) -> DictConfig:
        """The folder of the compressed run, a finished one or one before the first step of its training; its config."""
        child = _child(subject.config, self.path, entry, finetune)
        assembly = assemble(child, batches=len(Loader(self.dataset.split("train"), child.data.batch)), training=False)
        with open_dict(child):
            child.train.steps, child.train.epochs = assembly.step.steps, None
        _require_fit(assembly, subject, self.name)
        state = assembly.state()
        step = jnp.asarray(0 if finetune else assembly.step.steps, jnp.int32)
        extra = {**subject.extra, "skipped": state.extra["skipped"]}
        opt = assembly.step.optimizer.init(subject.params)
        state = jax.tree.map(jnp.copy, dataclasses.replace(state, step=step, params=subject.params, extra=extra, opt=opt))
        with Checkpoints(self.path) as checkpoints:
            checkpoints.save_frozen(subject.frozen)
            checkpoints.save(state, new_host(), best=not finetune)
        self.dataset.save(self.path / "data")
        run.write_environment(self.path, entry["parent"])
        if not finetune:
            hashes = {"params_sha256": sha256(subject.params), "state_sha256": sha256(state, subject.frozen)}
            known = {"experiment": child.name, "step": int(step), "params": count(subject.params), "metrics": {}, **hashes}
            run.write_result(self.path, status="finished", **known, device=run.device_name(), peak_bytes=run.peak_bytes())
        run.write_config(self.path, child)  # last: it makes this folder a run
        return child


def _child(config: Mapping[str, Any], path: epath.Path, entry: Mapping[str, Any], finetune: Mapping[str, Any] | None) -> DictConfig:
    """The config of the compressed run, complete in itself."""
    child = {**config, "run_dir": os.fspath(path), "resume": "auto", "checkpoint": "latest", "expect": None}
    child["compression"] = [*config.get("compression", []), entry]
    if finetune:
        child["optimizer"] = {**config["optimizer"], "learning_rate": finetune["learning_rate"]}
        child["schedule"] = {"_target_": "research.training.schedule.Cosine", "warmup": 0, "final": 0.0}
        child["train"] = {**config["train"], "steps": finetune["steps"], "epochs": finetune["epochs"], "stop_at": None, "patience": None}
    made = OmegaConf.create(child)
    assert isinstance(made, DictConfig)
    return made


def _taught(subject: Subject, teacher: Subject) -> Subject:
    """The compressed model under an objective that lets it learn from the model that it was made of.

    Raises:  ConfigError: it has a teacher already.
    """
    if subject.config.get("teacher") and subject.config["teacher"].get("run"):
        raise ConfigError("finetune.teacher=true: this method gives the model a teacher of its own; use finetune.teacher=false")
    config = taught(subject.config, teacher.config["objective"], teacher.origin, {"hard": 0.5, "soft": 0.5, "temperature": 2.0})
    return subject.replace(config=config, frozen={"student": subject.frozen, "teacher": None})


def _require_fit(assembly: Assembly, subject: Subject, method: str) -> None:
    """Holds what a method returned against what its config describes: the run must be readable by its config alone."""
    abstract, still = assembly.abstract(), assembly.still()
    for name, expected, found in (("params", abstract.params, subject.params), ("frozen", still, subject.frozen)):
        there, here = ({path: (tuple(x.shape), str(x.dtype)) for path, x in paths(tree).items()} for tree in (expected, found))
        if there != here:
            different = sorted(path for path in {*there, *here} if there.get(path) != here.get(path))
            raise CheckpointError(
                f"method={method}: {name}/{different[0]} is {here.get(different[0], 'missing')}, its config says {there.get(different[0], 'nothing')}"
            )


def _stages(config: DictConfig) -> list[tuple[str, dict[str, Any]]]:
    """[(name, config node)] of the methods to apply, in order.

    Raises:  ConfigError: neither or both of method and pipeline; a method or a setting that does not exist.
    """
    if (config.pipeline is None) == (config.get("method") is None):
        raise ConfigError("give method=NAME, as method=prune/wanda, or pipeline=[NAME,NAME]")
    if config.pipeline is None:
        return [(_compressing(config.name), resolved(config.method))]
    stages = []
    for entry in OmegaConf.to_container(config.pipeline) or ():
        if not isinstance(entry, str) and not (isinstance(entry, dict) and len(entry) == 1):
            raise ConfigError(f"pipeline: {entry!r} is neither the name of a method nor {{NAME: {{SETTING: VALUE}}}}")
        name, settings = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
        node = resolved(compose([f"method={_compressing(name)}"], verb="compress").method)
        for setting in settings:
            if setting not in (*node, "finetune"):
                raise ConfigError(f"pipeline: {name} has no setting {setting!r}{nearest(setting, node)}")
        stages.append((name, {**node, **settings}))
    return stages


def _compressing(name: str) -> str:
    """The name of a method, refused where it is one that explains."""
    if name in described("method", "research.explanation."):
        raise ConfigError(f"method={name} makes no smaller model: it explains, see research.explain")
    return name


def _measured(config: DictConfig, parent: Run, child: Run, dataset: Dataset) -> dict[str, Any]:
    """Both models on one split, one after the other."""
    split = config.ledger.split or next(name for name in ("test", "validation", "train") if name in dataset.splits)
    source = dataset.split(split)
    batches = list(padded(whole(source, config.ledger.batch)))
    rows, sizes = {}, {}
    for name, of, weights in (("before", parent, parent.weights(config.checkpoint, config.weights)), ("after", child, child.weights())):
        objective, model = judging(of.objective, source), (weights.params, weights.extra, weights.frozen, weights.hyper)
        rows[name], tree = (objective, model), ledger.needed(objective, model, batches[0])
        sizes[name] = ledger.sizes(tree) | {"disk_bytes": _disk_bytes(tree)}
    scores = {name: ledger.scores(objective, model, batches) for name, (objective, model) in rows.items()}
    return {
        "split": split,
        "device": run.device_name(),
        "metrics": ledger.metrics(scores["before"], scores["after"]),
        "sizes": sizes,
        **ledger.costs(rows["before"], rows["after"], batches[0], timed=config.ledger.latency, country=config.ledger.energy),
    }


def _disk_bytes(tree: Tree) -> int:
    """What these arrays take in a checkpoint, compressed as Orbax does it."""
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
        checkpoints.save_frozen(tree)
        return ledger.disk_bytes(checkpoints.folder / "frozen" / "state")


if __name__ == "__main__":
    raise SystemExit(main())
