"""A run folder as an object: the Python API that notebooks and verbs share."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath
from omegaconf import DictConfig, OmegaConf, open_dict

from research.compression.distill import student
from research.core.build import build
from research.core.config import resolved, split_values, unscanned
from research.core.errors import ConfigError, nearest
from research.core.tree import unstack
from research.core.types import Batch, Hyper, Objective, State, Tree
from research.data.dataset import Dataset, Source, open_data
from research.data.loader import Loader
from research.data.preprocess import Preprocessor
from research.data.text import Windows
from research.data.tokenizers import Tokenizer
from research.explanation.model import Model, Past, examples
from research.inference.decode import generate, start_token
from research.inference.predict import predict
from research.inference.sample import Sampling
from research.training import log, run
from research.training.assembly import Assembly, assemble
from research.training.checkpoint import Checkpoints

if TYPE_CHECKING:
    from research.explanation.result import Result


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a pure function of the model needs, predict(params, extra, frozen, batch, key, hyper), and whence it comes.

    Args:    step: updates made before.  kind: "raw", or "ema" for the running average.
    """

    params: Tree
    extra: Tree
    frozen: Tree
    hyper: Hyper
    step: int
    kind: str


class Run:
    """A finished or running run, opened for reading; nothing but its folder is needed.

    Args:    path: the run folder.
    Raises:  ConfigError: the folder holds no run; the message names the nearest one that does.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = epath.Path(path)
        saved = run.saved_config(self.path)
        if saved is None:
            raise ConfigError(f"run={os.fspath(self.path)!r} is no run folder: it holds no {run.CONFIG}{_nearest_run(self.path)}")
        self.config: DictConfig = saved
        self._held: tuple[Any, Weights] | None = None
        self._model: tuple[Any, Model] | None = None

    def __repr__(self) -> str:
        return f"Run({os.fspath(self.path)!r})"

    @functools.cached_property
    def preprocessor(self) -> Preprocessor:
        """From raw inputs to a batch, as in training."""
        return Preprocessor.load(self.path / "data")

    @property
    def spec(self) -> dict[str, Any]:
        """The shapes and sizes of the data."""
        return dict(self.preprocessor.spec)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Text to numbers and back; None where the run does not read text."""
        return self.preprocessor.tokenizer

    @functools.cached_property
    def assembly(self) -> Assembly:
        """The step and what is around it, built from the run's config."""
        return assemble(self.config, training=False)

    @property
    def objective(self) -> Objective:
        """The model and its loss."""
        return self.assembly.step.objective

    @property
    def result(self) -> dict[str, Any]:
        """result.json; {} while the run goes on, resumed or not."""
        return run.read_result(self.path)

    @property
    def figures(self) -> dict[str, epath.Path]:
        """The run's pictures by name."""
        folder = self.path / "figures"
        return {path.stem: path for path in sorted(folder.glob("*.png"))} if folder.exists() else {}

    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl, oldest first."""
        return log.read(self.path)

    def state(self, checkpoint: str | int = "best") -> State:
        """The state of a checkpoint, verified before it is read.

        Args:    checkpoint: "best", "latest" or a step.
        Raises:  CheckpointError: there is none, or it is damaged or another model's.
        """
        with Checkpoints(self.path, read_only=True) as checkpoints:
            state, _ = checkpoints.restore(checkpoint, self.assembly.abstract())
        return state

    def frozen(self) -> Tree:
        """What stands still beside the state; None for most runs.

        Raises:  CheckpointError: it is missing, damaged or another model's.
        """
        with Checkpoints(self.path, read_only=True) as checkpoints:
            return checkpoints.frozen(self.assembly.still())

    def weights(self, checkpoint: str | int = "best", which: str = "auto") -> Weights:
        """The weights that evaluate and predict use.

        Args:    checkpoint: "best", "latest" or a step.  which: "auto": the running average where the run has one; "raw"; "ema".
        Raises:  ConfigError: "ema" where the run has none.
        """
        return select(self.assembly, self.state(checkpoint), self.frozen(), which)

    def dataset(self, changes: Mapping[str, Any] | None = None) -> Dataset:
        """The run's own data, read with its tokenizer and statistics; of all that is here, this alone needs more than the run folder.

        Args:    changes: keys of the run's data config that differ here, as {"root": FOLDER} where the files have moved.
        Raises:  ConfigError: a key that the run's data does not have.  DataError: data that is missing, or not what the run was trained on.
        """
        return open_data(self.data_config(changes), self.preprocessor)

    def data_config(self, changes: Mapping[str, Any] | None = None) -> DictConfig:
        """The config of the run's own data, with these keys changed; its spec is left open, since other data may have other numbers of examples.

        Raises:  ConfigError: a key that the run's data does not have.
        """
        for name in changes or {}:
            if name not in self.config.data:
                raise ConfigError(f"data.{name}: the run's data has no such key{nearest(str(name), map(str, self.config.data))}")
        node = OmegaConf.merge(self.config.data, dict(changes or {}))
        assert isinstance(node, DictConfig)
        node.spec = {}
        return node

    def model(self, checkpoint: str | int = "best", which: str = "auto", *, data: Mapping[str, Any] | None = None) -> Model:
        """The trained model as explanation sees it, each block on its own.

        Args:    checkpoint, which: as of `weights`.  data: as `changes` of `dataset`, which is opened only when a method asks for it.
        """
        weights = self.weights(checkpoint, which)
        config = unscanned(resolved(self.config))
        objective = build(split_values(config)[0]["objective"], where="objective")
        arrays = unstack(weights.params), unstack(weights.extra), unstack(weights.frozen), weights.hyper
        pieces = None if self.tokenizer is None else self.tokenizer.pieces
        opened = functools.cache(functools.partial(self.dataset, data))
        kept = self._kept()
        history = functools.cache(functools.partial(_History, self, kept, opened)) if kept else None
        encode = None if self.tokenizer is None else self.tokenizer.encode
        statistics = self.preprocessor.statistics
        return Model(objective, *arrays, self.spec, self.preprocessor.classes, pieces, opened, history, statistics, _opened, encode)

    def history(self, *, data: Mapping[str, Any] | None = None) -> Sequence[Past]:
        """The checkpoints that `train.keep` asked to keep, oldest first, each read when it is asked for; none where it is latest.

        Args:    data: as `changes` of `dataset`.
        """
        return _History(self, self._kept(), functools.cache(functools.partial(self.dataset, data)))

    def _kept(self) -> list[int]:
        """The steps of those checkpoints."""
        word, _, period = str(self.config.train.keep).partition(":")
        if word == "latest":
            return []
        with Checkpoints(self.path, read_only=True) as checkpoints:
            return [step for step in checkpoints.steps() if step % int(period or 1) == 0]

    def explain(
        self,
        method: str,
        batch: Batch | None = None,
        target: Any = None,
        *,
        position: int | None = None,
        names: Sequence[str] | None = None,
        checkpoint: str | int = "best",
        seed: int = 0,
        **settings: Any,
    ) -> "Result":
        """What a method says about this model: an `Attribution` of each example, or a `Finding`; `.show()` draws it in a notebook.

        Args:    method: a name, as integrated_gradients.  batch: fields as `preprocessor` or a loader gives them; None for a method that needs none.
                 target: which output: a number, a class or a token, one for all or one each; None: what the model finds likeliest.
                 position: of a text: after which token.  names: of the examples.  seed: of what is drawn by lot.  settings: of the method.
        Raises:  ConfigError: a method that does not exist or does not fit this run, a target out of range.
        """
        if self._model is None or self._model[0] != checkpoint:
            self._model = (checkpoint, self.model(checkpoint))
        model = self._model[1]
        found = None if batch is None else examples(model, batch, names, target, position)
        from research.explanation import methods  # here: they draw, and matplotlib takes half a second to load

        return methods.explain(model, method, methods.node(method, settings), found, seed)

    def predict(self, batch: Batch, checkpoint: str | int = "best") -> dict[str, np.ndarray]:
        """The model's outputs for a batch that is ready for it: {"logits": ...} or {"value": ...}.

        Args:    batch: fields as `preprocessor` or a loader gives them.
        """
        weights = self._weights(checkpoint)
        return predict(self.objective, weights.params, weights.extra, weights.frozen, weights.hyper, [dict(batch)])

    def generate(self, prompt: str = "", checkpoint: str | int = "best", **options: Any) -> str:
        """The prompt and what the language model makes of it.

        Args:    options: tokens, temperature, top_k, top_p, seed, as of `research.predict`.
        Raises:  ConfigError: the run is no language model, or an option is out of range.
        """
        return prompt + "".join(self.stream(prompt, checkpoint, **options))

    def stream(
        self,
        prompt: str = "",
        checkpoint: str | int = "best",
        *,
        tokens: int = 200,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> Iterator[str]:
        """The continuation of a prompt, piece by piece as it is made; an empty prompt begins after a line break."""
        sampling = Sampling(temperature, top_k, top_p)
        return text(self.objective, self._weights(checkpoint), self.preprocessor, prompt, tokens=tokens, sampling=sampling, seed=seed)

    def _weights(self, checkpoint: str | int) -> Weights:
        """The weights of the checkpoint that was asked for last, so that a notebook does not read it again for each call."""
        with Checkpoints(self.path, read_only=True) as checkpoints:  # a run that goes on has a new latest, and perhaps a new best
            latest = checkpoints.latest()
            named: dict[str | int, int | None] = {"best": checkpoints.best() or latest, "latest": latest}
        step = named.get(checkpoint, checkpoint)
        if self._held is None or self._held[0] != (checkpoint, step):
            self._held = ((checkpoint, step), self.weights(checkpoint))
        return self._held[1]


class _History(Sequence[Past]):
    """Kept checkpoints, each read when it is asked for."""

    def __init__(self, run: Run, steps: Sequence[int], data: Callable[[], Dataset]):
        self._run, self._steps, self._data = run, steps, data

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return _History(self._run, self._steps[i], self._data)
        state, step = self._run.state(self._steps[i]), self._run.assembly.step
        extra = {name: value for name, value in state.extra.items() if name != "skipped"}
        rate = float(state.hyper["learning_rate"] * step.schedule(state.step, step.steps))
        return Past(self._steps[i], unstack(state.params), unstack(extra), rate, self._seen(self._steps[i]))

    def _seen(self, step: int) -> np.ndarray | None:
        """The examples of the update that followed a checkpoint; None where the run ended there."""
        with Checkpoints(self._run.path, read_only=True) as checkpoints:
            if step == checkpoints.latest():
                return None
        config = self._run.config
        return np.asarray(Loader(self._data().split("train"), config.data.batch, seed=config.seed).indices(step))


def select(assembly: Assembly, state: State, frozen: Tree = None, which: str = "auto") -> Weights:
    """The weights of a state that evaluate and predict use.

    Args:    frozen: what stands still beside the state.  which: "auto": the running average where there is one; "raw"; "ema".
    Raises:  ConfigError: "ema" where there is none, or another word.
    """
    if which not in ("auto", "raw", "ema"):
        raise ConfigError(f"weights={which!r}: choose from: auto, raw, ema")
    average = assembly.step.optimizer.average(state.opt)
    if which == "ema" and average is None:
        raise ConfigError("weights=ema: this run kept no running average (train.ema is null); use weights=raw")
    raw = average is None or which == "raw" or int(state.step) == 0
    extra = {name: value for name, value in state.extra.items() if name != "skipped"}
    return Weights(state.params if raw else average, extra, frozen, state.hyper, int(state.step), "raw" if raw else "ema")


def judging(objective: Objective, source: Source) -> Objective:
    """The objective to score a split with: it counts the bytes of that split's own tokens where it reports bits per byte."""
    known: Any = objective
    if (inner := getattr(known, "objective", None)) is not None:  # a wrapper
        return dataclasses.replace(known, objective=judging(inner, source))
    if not isinstance(source, Windows) or getattr(known, "bytes_per_token", None) in (None, source.bytes_per_token):
        return objective
    return dataclasses.replace(known, bytes_per_token=source.bytes_per_token)


def text(
    objective: Objective, weights: Weights, preprocessor: Preprocessor, prompt: str, *, tokens: int, sampling: Sampling, seed: int
) -> Iterator[str]:
    """What a language model makes of a prompt, piece by piece.

    Raises:  ConfigError: the model is no language model, or an option is out of range.  DataError: a character outside the vocabulary.
    """
    tokenizer = preprocessor.tokenizer
    if tokenizer is None:
        raise ConfigError("prompt: this run is no language model; give input=PATH instead")
    ids = tokenizer.encode(prompt).tolist()
    start = start_token(tokenizer.pieces)
    model = (weights.params, weights.extra, weights.frozen, weights.hyper)
    made = generate(objective, *model, [ids], preprocessor.spec, tokens=tokens, sampling=sampling, seed=seed, start=start)
    return tokenizer.stream(int(token[0]) for token in made)


def looked_into(config: DictConfig) -> Run | None:
    """The run that this one looks into, whose data, model and objective the config then has, but for what the command says of the data.

    Returns: None where the objective looks into no run, or its config says all.
    Raises:  ConfigError: no such run, or a key that its data does not have.
    """
    if "teacher" not in config.objective or config.objective.teacher is not None:
        return None
    link, own = config.teacher.run, run.saved_config(epath.Path(config.run_dir)) if config.get("run_dir") else None
    if own is not None and OmegaConf.select(own, "objective.teacher") is not None:  # to go on, the run needs no other
        if link not in (None, own.teacher.run):
            raise ConfigError(
                f"teacher.run={link!r}: run_dir={config.run_dir!r} holds a run that looks into {own.teacher.run!r}: choose another run_dir"
            )
        source = Run(config.run_dir)
        known = resolved(own)
        model, teacher = known["model"], known["objective"]["teacher"]
        with open_dict(config):
            config.teacher = own.teacher
    elif link:
        source = Run(link)
        plain, *_ = student(unscanned(resolved(source.config)), {}, {"student": None})
        model, teacher = plain["model"], plain["objective"]
    else:
        raise ConfigError(f"teacher.run=null: {config.objective._target_.rpartition('.')[2]} looks into a trained run; give teacher.run=PATH")
    data = source.data_config({str(name): value for name, value in config.data.items() if value is not None})
    with open_dict(config):
        config.data, config.model, config.objective.teacher = data, model, teacher
    return source


def _opened(path: str) -> Model:
    """The model of another run as explanation sees it.

    Raises:  ConfigError: there is none.
    """
    return Run(path).model()


def _nearest_run(path: epath.Path) -> str:
    siblings = [p.name for p in path.parent.iterdir() if (p / run.CONFIG).exists()] if path.parent.exists() else []
    return nearest(path.name, siblings) if siblings else ""
