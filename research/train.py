"""Trains a model: `python -m research.train experiment=quickstart`."""

import contextlib
import dataclasses
import os
import secrets
import shlex
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from rich.console import Console
from rich.table import Table

from research.compression.distill import student
from research.core import app, energy, hosts
from research.core.build import build
from research.core.config import resolved
from research.core.cost import flops, flops_per_example
from research.core.errors import CheckpointError, ConfigError, DataError, DivergedError, Interrupted, ResearchError, nearest
from research.core.folder import write_json, write_text
from research.core.memory import keep_freed_memory
from research.core.shared import shared
from research.core.spec import abstract_batch, check_spec
from research.core.tree import count, paths, restack, sha256, unstack
from research.core.types import State, Tree
from research.data.beside import Beside
from research.data.dataset import Dataset, Source, open_data
from research.data.loader import Loader, whole
from research.data.on_device import place
from research.data.preprocess import Preprocessor
from research.figures.pixels import sheet
from research.inference.evaluate import evaluate
from research.inference.predict import predict
from research.inference.sample import Sampling
from research.run import Run, Weights, judging, looked_into, select, text
from research.sweep.pruning import pruner_of
from research.sweep.trial import REPEATS, Sweep
from research.training import log, run, trials
from research.training.assembly import Assembly, assemble, parts, settings
from research.training.checkpoint import PACE_S, Checkpoints
from research.training.clock import Clock, programs
from research.training.interrupt import Interrupt
from research.training.loop import Diverged, Loop, Outcome, new_host
from research.training.parallel import Parallel
from research.training.schedule import same_history

RESUME = ("auto", "never", "fork")
EVALUATION_BATCH = 256  # examples, where the training batch is smaller


def train(config: DictConfig) -> dict[str, Any]:
    """What result.json says once the run has ended; the run folder holds the rest.

    Args:    config: as `research.compose([...])` gives it.
    Raises:  ResearchError: of the kind that the exit code tells; result.json is written all the same.
    """
    keep_freed_memory()
    explained = looked_into(config)
    _check(config)
    path, parent = _folder(config)
    pruning = _taken(config)
    with Interrupt().listening(patient=False) as interrupt, run.claimed(path):
        before = _before(config, path)
        if before is not None and _is_done(path, config.train.steps, pruning):
            return _nothing_to_do(path)
        training = None
        try:
            training = Training(config, path, before, parent, interrupt, explained, pruning)
            if before is not None and _is_done(path, training.assembly.step.steps, pruning):
                return _nothing_to_do(path)
            return training.run()
        except BaseException as error:
            if parent is not None and (training is None or not training.began) and isinstance(error, ConfigError | DataError | CheckpointError):
                shutil.rmtree(path, ignore_errors=True)  # nobody has chosen its name, and nothing is in it
            elif before is None or (training is not None and training.began):  # a refused command leaves the run of before as it is
                _fail(config, path, error)
            if (told := _told(error, path, config)) is not error:
                raise told from error
            raise


def main(argv: list[str] | None = None) -> int:
    """The exit code of the command line."""
    sweep = Sweep()
    return sweep.ended(app.main(sweep.trials_of(train), "train", argv, sweep.arrange))


def _check(config: DictConfig) -> None:
    """Refuses bad values before a folder is made and data is read: those of the verb itself and of the `train` group.

    Raises:  ConfigError: naming the value.
    """
    settings(config)
    energy.check(OmegaConf.select(config, "logger.energy"))
    if config.checkpoint != "latest" and config.resume != "fork":
        raise ConfigError(f"checkpoint={config.checkpoint}: only a fork starts from a checkpoint of choice; add resume=fork")
    for name, choices in (("resume", RESUME), ("logger.progress", log.MODES)):
        value = OmegaConf.select(config, name)
        if value not in choices:
            raise ConfigError(f"{name}={value!r} is unknown{nearest(value, choices)}")
    if config.expect is not None:
        band = config.expect.get("band") if isinstance(config.expect, DictConfig) else None
        numbers = [x for x in band if x is None or (isinstance(x, int | float) and not isinstance(x, bool))] if isinstance(band, ListConfig) else []
        if len(numbers) != 2 or "metric" not in config.expect:
            raise ConfigError(f"expect={config.expect}: must be null or {{metric: NAME, band: [LOW, HIGH]}}, either bound null where there is none")
    for name in REPEATS:
        if config.get(name) is not None:
            raise ConfigError(f"{name}={config[name]!r} stands in a config file: it is for the command line")
    for name in ("check", "retry", "logger.tensorboard", "logger.figures", "logger.sample"):
        if not isinstance(value := OmegaConf.select(config, name), bool):
            raise ConfigError(f"{name}={value!r}: must be true or false")
    for name in ("seed", "logger.histograms"):
        if type(value := OmegaConf.select(config, name)) is not int or value < 0:
            raise ConfigError(f"{name}={value!r}: must be a whole number of at least 0")


def _folder(config: DictConfig) -> tuple[epath.Path, Run | None]:
    """Where the run is to be, and the run that it is forked from."""
    if hosts.count() > 1 and not (config.run_dir and config.resume != "fork"):
        raise ConfigError(f"{hosts.count()} hosts need one run_dir=PATH that all of them see; fork on one host first, then go on with its folder")
    if config.resume != "fork":
        return epath.Path(config.run_dir or run.new_path(config.paths.runs, config.name)), None
    if not config.run_dir:
        raise ConfigError("resume=fork needs run_dir=PATH, the run to start from")
    path = epath.Path(config.run_dir)
    return path.parent / f"{path.name}-fork-{secrets.token_hex(3)}", Run(path)


def _nothing_to_do(path: epath.Path) -> dict[str, Any]:
    result = run.read_result(path)
    how = {
        "stopped_early": f"stopped early at step {result['step']} ({result['reason']}); resume=fork goes on",
        "pruned": f"was pruned at step {result['step']} ({result['reason']})",
    }
    app.say(f"{os.fspath(path)} {how.get(result['status'], 'is finished')}: nothing to do")
    return result


def _before(config: DictConfig, path: epath.Path) -> DictConfig | None:
    """The config of the run that this folder holds, found to be the one that is wanted; None in a new folder."""
    before = run.saved_config(path)
    if before is not None and config.resume == "never":
        raise ConfigError(f"run_dir={os.fspath(path)!r} holds a run already and resume=never: choose another run_dir, or resume=auto to go on")
    if before is not None:
        run.compare(before, config, path)
    return before


def _taken(config: DictConfig) -> Any:
    """The trial's place in a search, taken out of the config: it is of this command, and no part of the run."""
    if (pruning := config.get("pruning")) is not None:
        with open_dict(config):
            config.pruning = None
    return pruning


def _is_done(path: epath.Path, steps: int | None, pruning: Any) -> bool:
    """Whether the run in this folder has ended by itself, at this number of steps or early; one that was pruned goes on where nothing prunes it."""
    result = run.read_result(path)
    early = result.get("status") == "stopped_early" or (result.get("status") == "pruned" and pruning is not None)
    return early or (result.get("status") == "finished" and result["step"] == steps)


def _again(path: epath.Path, config: DictConfig) -> str:
    """What a person types to go on with this folder; a fork once made is a run like any other."""
    changes = [f"run_dir={shlex.quote(os.fspath(path))}"] if config.get("sweep_dir") is None else []
    if config.resume == "fork":
        changes += ["resume=auto", "checkpoint=latest"]
    if config.train.stop_at is not None:
        changes.append("train.stop_at=null")
    return f"the same command{' with ' if changes else ''}{' '.join(changes)}"


def _told(error: BaseException, path: epath.Path, config: DictConfig) -> BaseException:
    """The error as a person should read it."""
    if isinstance(error, KeyboardInterrupt):
        with Checkpoints(path, read_only=True) as checkpoints:
            where = "goes on from the last checkpoint" if checkpoints.steps() else "begins anew: nothing had been saved"
        return Interrupted(f"interrupted outside training; {_again(path, config)} {where}")
    if isinstance(error, jax.errors.JaxRuntimeError) and hosts.count() > 1:
        said = " ".join(str(error).split())[:160]
        return ResearchError(f"another host is gone, or the way to it ({said}); {_again(path, config)} on all hosts goes on from the last checkpoint")
    if isinstance(error, OSError):
        return ResearchError(f"{error.filename or os.fspath(path)}: {error.strerror or error}")
    return error


def _fail(config: DictConfig, path: epath.Path, error: BaseException) -> None:
    """Leaves in the folder what went wrong: result.json, and the examples of the updates that diverged."""
    if isinstance(error, Interrupted):
        return  # told already
    reason = " ".join(str(error).split()) or type(error).__name__
    status = "diverged" if isinstance(error, DivergedError) else "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
    step = error.step if isinstance(error, Diverged) else None
    with contextlib.suppress(ResearchError):  # a full or read-only disk must not hide the first error
        if isinstance(error, Diverged):
            write_json(path / "diverged.json", {"reason": reason, "indices": error.indices})
        run.write_result(path, status=status, reason=reason, experiment=config.name, step=step, device=run.device_name(), peak_bytes=run.peak_bytes())


class Training:
    """One command's part of a run, from opened data to result.json.

    Args:    before: the config of the run that the folder holds; None: a new one.  parent: the run that this one is forked from.
             interrupt: whether the process was asked to stop, listening already.  explained: the run that this one looks into.
             pruning: the place of this trial in a search.
    """

    def __init__(
        self,
        config: DictConfig,
        path: epath.Path,
        before: DictConfig | None,
        parent: Run | None,
        interrupt: Interrupt,
        explained: Run | None = None,
        pruning: Any = None,
    ):
        self.config, self.path, self.parent, self.before, self.interrupt, self.pruning = config, path, parent, before, interrupt, pruning
        self._programs = programs()  # of earlier runs of this process
        self.began = False  # whether the folder has been written to
        app.say(f"run folder {os.fspath(path)}")
        known = parent or explained  # a fork too: its weights know the parent's tokens
        fitted = Preprocessor.load(path / "data") if before is not None else known.preprocessor if known is not None else None
        self.dataset: Dataset = open_data(config.data, fitted)
        if before is not None:
            check_spec(before.data.spec, self.dataset.spec, f"{os.fspath(path / run.CONFIG)}: data.spec")
        with open_dict(config):
            config.data.spec = dict(self.dataset.spec)
            if "validation" not in self.dataset.splits and config.train.monitor.startswith("validation/"):
                app.say(f"the data has no validation split: the best step is the one with the lowest train/loss, not {config.train.monitor}")
                config.train.monitor, config.train.mode = "train/loss", "min"
        chunk = self._chunk = settings(config).chunk
        self._parallel: Parallel = build(config.parallel, where="parallel")
        self._parallel.check()
        if chunk > 1 and hosts.count() > 1:
            raise ConfigError(f"train.chunk={chunk}: {hosts.count()} hosts read their parts of each batch; use train.chunk=1")
        train = self.dataset.split("train")
        if trials.member() is not None:
            chunk = self._chunk = self._common_chunk(train)
        self.loader = self._loader(place(train, chunk) if hosts.count() == 1 else train)
        _check_batch(self.loader.batch, config)
        self.assembly: Assembly = assemble(config, batches=len(self.loader))
        with open_dict(config):
            config.train.steps, config.train.epochs = self.assembly.step.steps, None
        self._drawn, self._still = 0, self.assembly.still()
        self._keeps = getattr(self.assembly.step.objective, "keeps_teacher", False)
        held = self._keeps and (before is not None or parent is not None)  # the folder has it
        self._teacher = None if held else _teacher(config, self.assembly.step.objective, self.dataset)
        if config.check:
            self.assembly.check(self.loader.batch, self._taught(self._still))
        if self._teacher is not None and not self._keeps and config.teacher.cache:
            source = place(Beside(self.dataset.split("train"), "teacher", self._answers()), chunk)
            self.loader, self._teacher = self._loader(source), None

    def _loader(self, source: Source) -> Loader:
        i, n = self._parallel.share
        config, cut = self.config, parts(self.config) // n
        return Loader(source, config.data.batch, seed=config.seed, shard=(i, n), parts=cut, microbatches=config.train.accumulate)

    def _common_chunk(self, train: Source) -> int:
        """The steps that this run takes at once with others of its sweep; 1 where its data does not fit on the device."""
        chunk = trials.common_chunk(settings(self.config).resolved(len(self._loader(train))))
        try:
            place(train, chunk)
        except ConfigError:
            return 1
        return chunk

    def run(self) -> dict[str, Any]:
        """result.json's content."""
        logger = self.config.logger
        pace_s = PACE_S if self.assembly.settings.save_every is None else 0.0
        with Checkpoints(self.path, keep=self.assembly.settings.keep, pace_s=pace_s) as checkpoints:
            clock = Clock()
            state, host = self._start(checkpoints, clock)
            start, self._trained_before = int(state.step), clock.seconds["train"] + clock.seconds["wait"]
            if self.parent is not None:  # before the config, which makes this folder a run that can be resumed
                checkpoints.save_frozen(self.parent.frozen())
                checkpoints.save(state, host, best=False)
                checkpoints.wait()
            if self._keeps and self._teacher is not None:
                checkpoints.save_frozen(self._taught(None))
                self._teacher = None
            self._kept = checkpoints.frozen(self._still)
            self.frozen = self.assembly.parallel.hold(self._taught(self._kept))
            self._write_folder()
            steps, stop_at = self.assembly.step.steps, self.assembly.settings.stop_at
            app.say(f"{count(state.params):,} parameters, steps {start:,} to {min(steps, stop_at or steps):,}, on {run.device_name()}")
            self.log = log.Log(self.path, start, steps, tensorboard=logger.tensorboard, progress=logger.progress)
            if start == 0 and "image" in self.dataset.spec:
                self.log.image(0, "examples", sheet(np.asarray(self.loader[0]["image"][:16])))
            try:
                with energy.measured(logger.get("energy")) as self._energy:
                    outcome = self._loop(checkpoints, clock, start).run(state, self.frozen, host)
                return self._finish(outcome, checkpoints, clock, start)
            finally:
                self.log.close()

    def _taught(self, frozen: Tree) -> Tree:
        """What stands still, with the teacher in it where there is one: a run keeps a link to it, its weights only where predicting needs them."""
        objective: Any = self.assembly.step.objective
        return frozen if self._teacher is None else objective.taught(frozen, *self._teacher)

    def _answers(self) -> np.ndarray:
        """The teacher's outputs for every example of the training split."""
        source = self.dataset.split("train")
        objective: Any = self.assembly.step.objective
        if hasattr(source, "draws"):
            raise ConfigError("teacher.cache=true: the examples of this data overlap, so their outputs are too many to keep; use teacher.cache=false")
        assert self._teacher is not None
        answers = predict(objective.teacher, *self._teacher, whole(source, max(self.loader.batch, EVALUATION_BATCH)))
        return next(iter(answers.values()))

    def _start(self, checkpoints: Checkpoints, clock: Clock) -> tuple[State, dict[str, Any]]:
        """The state to go on from, and what the host remembers beside it."""
        if self.parent is not None:
            return self._forked(clock)
        if self.before is None and checkpoints.steps():
            raise ConfigError(
                f"run_dir={os.fspath(self.path)!r} holds checkpoints but no {run.CONFIG}, so nobody can say of which run: choose another run_dir"
            )
        if checkpoints.latest() is None:
            with clock.span("start"):
                return self.assembly.state(), new_host()
        state, host = checkpoints.restore("latest", self.assembly.abstract())
        clock.seconds |= host["seconds"]
        self._check_steps(int(state.step))
        if int(state.step):  # a compressed run begins with a state of its own
            app.say(f"resuming at step {int(state.step):,}")
        return state, host

    def _forked(self, clock: Clock) -> tuple[State, dict[str, Any]]:
        """The parent's state under this run's settings; another optimizer starts anew."""
        assert self.parent is not None
        old = self.parent.state(self.config.checkpoint)
        self.assembly.settings.check_start(int(old.step))
        with clock.span("start"):
            new = self.assembly.state()
        for part in ("params", "extra"):
            _require_same(getattr(old, part), getattr(new, part), self.parent.path)
        steps = self.assembly.step.steps
        if steps <= int(old.step):
            raise ConfigError(
                f"train.steps={steps}: {os.fspath(self.parent.path)} is at step {int(old.step)} already; give more steps, or checkpoint=STEP"
            )
        opt, before = self.assembly.step.optimizer.init(old.params), self.parent.assembly.step.optimizer
        if self.assembly.step.optimizer.factory == before.factory and _shapes(opt) == _shapes(old.opt):
            opt = jax.tree.unflatten(jax.tree.structure(opt), jax.tree.leaves(old.opt))
        state = dataclasses.replace(old, opt=opt, hyper=new.hyper, key=new.key)  # this config's key: it may be of another kind
        return jax.tree.map(jnp.copy, state), new_host()  # a running average starts as the very weights, which cannot be donated twice

    def _check_steps(self, at: int) -> None:
        """Refuses another length of the run where the rates up to here would have been other ones."""
        old, new = (self.before or self.config).train.steps, self.assembly.step.steps
        stop_at = self.assembly.settings.stop_at
        if stop_at is not None and stop_at <= at < new:
            raise ConfigError(f"train.stop_at={stop_at}: this run is at step {at} already; give more, or train.stop_at=null to go on to {new}")
        if new < at:
            raise ConfigError(f"train.steps={new}: this run is at step {at} already; give at least that many, or another run_dir")
        if new != old and not same_history(self.assembly.step.schedule, at, old, new):
            kind = type(self.assembly.step.schedule).__name__
            raise ConfigError(
                f"train.steps={new}: this run was begun for {old} steps, and its first {at} under schedule {kind} would have been other ones; "
                f"keep train.steps={old}, or use resume=fork, from an earlier checkpoint=STEP if the rate has fallen already"
            )

    def _write_folder(self) -> None:
        self.began, parent = True, None
        if self.parent is not None:
            parent = {"run": os.fspath(self.parent.path), "result": self.parent.result.get("state_sha256")}
        hosts.wait("read")  # before the first host writes, all have seen what was there
        if hosts.first():
            if self.before is None:
                self.dataset.save(self.path / "data")
            (self.path / run.RESULT).unlink(missing_ok=True)  # it tells of an end that is no longer the end
        run.write_config(self.path, self.config)
        run.write_environment(self.path, parent)

    def _loop(self, checkpoints: Checkpoints, clock: Clock, start: int) -> Loop:
        hooks = []
        readable = self.dataset.preprocessor.tokenizer is not None
        if self.config.logger.sample and readable and hosts.count() == 1 and self.assembly.step.objective.decoder() is not None:
            hooks.append(self._sample)
        if self.config.logger.histograms and hosts.count() == 1:
            hooks.append(self._histograms)
        settings, parallel = self.assembly.settings, self.assembly.parallel
        if (member := trials.member()) is not None and start % self._chunk:
            member.leave()  # goes on from between the steps of the others
        elif member is not None:
            settings, parallel = dataclasses.replace(settings, chunk=self._chunk), member.parallel()
        pruner = pruner_of(self.pruning, settings.eval_every, self.assembly.step.steps)
        return Loop(
            self.assembly.step, settings, parallel, self.loader, checkpoints, self.log, self._validate, clock, tuple(hooks), self.interrupt, pruner
        )

    def _validate(self, state: State) -> dict[str, float | None]:
        return self._scores("validation", self._weights(state))

    def _weights(self, state: State) -> Weights:
        return select(self.assembly, state, self.frozen)

    def _scores(self, split: str, weights: Weights) -> dict[str, float | None]:
        """The means of a whole split; {} where the data has no such split."""
        if split not in self.dataset.splits:
            return {}
        source = self.dataset.splits[split]
        parallel = self.assembly.parallel
        parts = 1 if parallel.layout is None else parallel.count
        batches = whole(source, max(self.loader.batch, EVALUATION_BATCH), parts=parts, shard=parallel.share)
        objective = judging(self.assembly.step.objective, source)
        model = (weights.params, weights.extra, weights.frozen, weights.hyper)
        metrics, _ = evaluate(objective, *model, batches, layout=parallel.layout, put=parallel.feed)
        return {f"{split}/{name}": value for name, value in metrics.items()}

    def _sample(self, state: State, step: int) -> None:
        """A text by the model as it is now, to samples/ and TensorBoard."""
        self.text = self._text(self._weights(state))
        write_text(self.path / "samples" / f"{step}.txt", self.text)
        self.log.text(step, "sample", self.text)

    def _text(self, weights: Weights) -> str:
        pieces = text(self.assembly.step.objective, weights, self.dataset.preprocessor, "", tokens=200, sampling=Sampling(0.8), seed=0)
        return "".join(pieces)

    def _histograms(self, state: State, step: int) -> None:
        """Parameters as distributions, as many times in the run as the logger says."""
        part = step * self.config.logger.histograms // self.assembly.step.steps
        if part > self._drawn:
            self._drawn = part
            self.log.histograms(step, {f"params/{path}": leaf for path, leaf in paths(jax.device_get(state.params)).items()})

    def _finish(self, outcome: Outcome, checkpoints: Checkpoints, clock: Clock, start: int) -> dict[str, Any]:
        """Scores with the best weights, figures, result.json, and what to do next."""
        best, state, at = outcome.host["best"], outcome.state, int(outcome.state.step)
        ended = outcome.status != "interrupted"
        if ended and best is not None and best["step"] != at:
            state, _ = checkpoints.restore("best", self.assembly.abstract())
            if int(state.step) != best["step"]:
                app.say(f"the best checkpoint, of step {best['step']}, is damaged: the scores are those of step {int(state.step)}")
        weights = self._weights(state)
        metrics = {**self._scores("validation", weights), **self._scores("test", weights)} or self._scores("train", weights) if ended else {}
        if self.config.logger.figures and hosts.first():
            from research.figures.curves import curves  # here: a trial of a sweep draws nothing, and matplotlib takes long to load

            curves(log.read(self.path), os.fspath(self.path / "figures" / "curves.png"), title=self.config.name)
        result = run.write_result(
            self.path,
            status=outcome.status,
            reason=outcome.reason,
            experiment=self.config.name,
            step=at,
            params=count(outcome.state.params),
            metrics=metrics,
            best=best,
            expect=_expected(self.config.expect, metrics) if ended else None,
            device=run.device_name(),
            peak_bytes=run.peak_bytes(),
            params_sha256=sha256(outcome.state.params),
            state_sha256=sha256(outcome.state, self._kept),
            **self._speed(clock, at, start),
            **self._flops(outcome.state, weights),
            **self._energy,
        )
        self.log.hparams(at, {**self.assembly.hyper, "seed": self.config.seed, "batch": self.loader.batch}, metrics)
        self.log.close()
        self._summary(result)
        if outcome.status == "interrupted" and outcome.reason in ("SIGINT", "SIGTERM"):
            raise Interrupted(f"{outcome.reason}: saved at step {at}; {_again(self.path, self.config)} goes on from there")
        return result

    def _speed(self, clock: Clock, at: int, start: int) -> dict[str, Any]:
        """Seconds of the whole run, and rates of this command's part of it, compilation and evaluation left out."""
        spent = clock.seconds
        trained = spent["train"] + spent["wait"] - self._trained_before
        steps_per_s = (at - start) / trained if at > start and trained > 0 else None
        examples_per_s = steps_per_s and steps_per_s * self.loader.batch
        tokens_per_s = examples_per_s and self.dataset.spec.get("time") and examples_per_s * self.dataset.spec["time"]
        wait = spent["wait"] / max(spent["wait"] + spent["train"], 1e-9)
        times = {"compile_s": spent["compile"], "train_s": spent["train"] + spent["wait"], "data_wait": wait}
        return {**times, "steps_per_s": steps_per_s, "examples_per_s": examples_per_s, "tokens_per_s": tokens_per_s}

    def _flops(self, state: State, weights: Weights) -> dict[str, int]:
        """Operations for each example: of predicting it, and of its share in an update; counted once for all runs of one program."""
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((self.loader.batch, *x.shape[1:]), x.dtype), self.loader[0])
        step = dataclasses.replace(self.assembly.step, axis=None)
        model = (weights.params, weights.extra, weights.frozen, weights.hyper)

        def count() -> dict[str, int]:
            update = flops(step, state, self.frozen, batch) // self.loader.batch
            return {"flops_per_example": flops_per_example(step.objective, model, batch), "train_flops_per_example": update}

        return shared(("flops", step, _kinds((batch, model))), count)

    def _summary(self, result: Mapping[str, Any]) -> None:
        """What a person wants to know when a run has ended."""
        if not app.talks():
            return
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, value in result["metrics"].items():
            table.add_row(name, "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value))
        speed = f", {result['steps_per_s']:.1f} steps/s" if result["steps_per_s"] else ""
        made, cached = (now - before for now, before in zip(programs(), self._programs, strict=True))
        kept = f", {cached} of {made} programs from the cache" if cached else ""
        Console(markup=False).print(table)
        spent = f"trained {result['train_s']:.1f} s{speed}, compiled {result['compile_s']:.1f} s{kept}"
        app.say(f"{result['status']} at step {result['step']:,}: {spent}")
        if result["expect"]:
            app.say(f"expected {_band(result['expect'])}: {'met' if result['expect']['met'] else 'MISSED'}")
        if getattr(self, "text", None):
            app.say(f"\na sample:\n{self.text}\n")
        folder = shlex.quote(os.fspath(self.path))
        if self.config.logger.figures:
            app.say(f"curves: {folder}/figures/curves.png")
        if result["status"] == "interrupted":
            app.say(f"to go on: {_again(self.path, self.config)}")
        app.say(f"next: python -m research.evaluate run={folder}")
        predict = 'prompt="…"' if self.dataset.preprocessor.tokenizer else "input=PATH"
        app.say(f"      python -m research.predict run={folder} {predict}")


def _teacher(config: DictConfig, objective: Any, dataset: Dataset) -> tuple[Tree, Tree, Tree, Any] | None:
    """(params, extra, frozen, hyper) of the run that the objective learns from; None where it learns from none. The config then holds its hash.

    Raises:  ConfigError: a teacher is missing, not wanted, or has other outputs.  CheckpointError: its weights are not those of before.
    """
    link = config.get("teacher") or {}
    path = link.get("run")
    if not hasattr(objective, "taught"):
        if path:
            name = type(objective).__name__
            raise ConfigError(
                f"teacher.run={path!r}: {name} learns from no teacher; a student is made by research.compress run={path} method=distill"
            )
        return None
    if not path:
        raise ConfigError("teacher.run=null: distillation needs the run of a teacher")
    teacher = Run(path)
    for name in ("classes", "vocabulary", "outputs"):
        if (there := teacher.spec.get(name)) != (here := dataset.spec.get(name)):
            raise ConfigError(f"teacher.run={path!r} has other outputs: {name}={there} there, {name}={here} in this run's data")
    if teacher.tokenizer is not None and teacher.tokenizer.pieces != getattr(dataset.preprocessor.tokenizer, "pieces", None):
        raise ConfigError(f"teacher.run={path!r} has other outputs: its tokens are not those of this run's data")
    weights = teacher.weights(link.get("checkpoint", "best"), link.get("weights", "auto"))
    _, params, frozen = student(resolved(teacher.config), weights.params, weights.frozen)  # a teacher that was a student itself
    digest = sha256({"params": weights.params, "extra": weights.extra}, weights.frozen)
    if link.get("sha256") not in (None, digest):
        raise CheckpointError(f"teacher.run={path!r} holds other weights than teacher.sha256 says: {digest[:12]}… there, {link['sha256'][:12]}… here")
    with open_dict(config):
        config.teacher.sha256 = digest
    like = jax.eval_shape(objective.teacher.init, jax.random.key(0), abstract_batch(dataset.spec, 1))
    arrays = []
    for tree, wanted in zip((params, weights.extra), like, strict=True):  # stacked or not, as the config of the student says
        _require_same(unstack(tree), unstack(wanted), teacher.path)
        arrays.append(restack(paths(unstack(tree)), wanted))
    return *arrays, frozen, weights.hyper


def _check_batch(batch: int, config: DictConfig) -> None:
    """Refuses a batch that cannot be cut into equal parts for every device and microbatch.

    Raises:  ConfigError: naming the numbers and the nearest batch that can be cut.
    """
    count, accumulate = parts(config), config.train.accumulate
    if batch % count:
        near = max(round(batch / count), 1) * count
        raise ConfigError(
            f"data.batch={batch} cannot be cut into train.accumulate={accumulate} x {count // accumulate} devices; the nearest that can is {near}"
        )


def _expected(expect: DictConfig | None, metrics: Mapping[str, float | None]) -> dict[str, Any] | None:
    """The band that an experiment must reach, and whether it did."""
    if not expect:
        return None
    low, high = expect.band
    value = metrics.get(expect.metric)
    met = value is not None and (low is None or value >= low) and (high is None or value <= high)
    return {"metric": expect.metric, "band": [low, high], "met": met}


def _band(expect: Mapping[str, Any]) -> str:
    """The band in words."""
    metric, (low, high) = expect["metric"], expect["band"]
    if low is None or high is None:
        return f"{metric} of at {f'least {low}' if high is None else f'most {high}'}"
    return f"{metric} from {low} to {high}"


def _kinds(tree: Any) -> tuple[tuple[str, str], ...]:
    """Shapes and types, as something that can be compared."""
    return tuple(sorted(_shapes(tree).items()))


def _shapes(tree: Any) -> dict[str, str]:
    return {path: f"{tuple(leaf.shape)} {leaf.dtype}" for path, leaf in paths(tree).items()}


def _require_same(old: Any, new: Any, path: epath.Path) -> None:
    """Refuses weights of another model.

    Raises:  CheckpointError: naming the first leaf that differs and both shapes.
    """
    there, here = _shapes(old), _shapes(new)
    different = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    if different:
        shown = "; ".join(f"{name} is {there.get(name, 'nothing')} there, {here.get(name, 'nothing')} here" for name in different[:3])
        raise CheckpointError(f"{os.fspath(path)} holds another model: {shown}")


if __name__ == "__main__":
    raise SystemExit(main())
