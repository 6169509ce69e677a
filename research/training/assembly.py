"""From a resolved config to the step that it describes."""

import dataclasses
from collections.abc import Hashable, Mapping
from fractions import Fraction
from typing import Any

import jax
from omegaconf import DictConfig

from research.core import mup
from research.core.build import build, freeze
from research.core.config import remodelled, split_values
from research.core.errors import ConfigError, nearest
from research.core.shared import shared
from research.core.spec import abstract_batch, zero_batch
from research.core.types import Batch, State, Tree
from research.training.loop import Settings
from research.training.optimizer import Optimizer
from research.training.parallel import Jit, Parallel, abstract_state
from research.training.step import Step


@dataclasses.dataclass(frozen=True)
class Assembly:
    """What a config says, built.

    Args:    step: the pure step.  hyper: starting values of the numbers that are values of the program.  settings: the `train` group.
             parallel: where the step runs.  spec: shapes of the data.  seed: of parameters, dropout and batch order.
    """

    step: Step
    hyper: dict[str, float]
    settings: Settings
    parallel: Parallel
    spec: Mapping[str, Any]
    seed: int

    def state(self) -> State:
        """The state before the first step."""
        self.parallel.check()
        return self.parallel.create(self.step, self._key(), zero_batch(self.spec, 1), self.hyper)

    def abstract(self) -> State:
        """The shapes and dtypes of the state, and where its arrays lie; nothing is computed."""

        def traced() -> State:
            return abstract_state(self.step, self._key(), abstract_batch(self.spec, 1), self.hyper)

        return self.parallel.abstract(shared(("abstract", *self._kind()), traced))

    def still(self) -> Tree:
        """The shapes and dtypes of what stands still beside the state, as far as predicting needs it; None for most runs."""
        return jax.eval_shape(self.step.objective.still, self._key(), abstract_batch(self.spec, 1))

    def check(self, batch: int, frozen: Tree = None) -> None:
        """Traces one update on abstract values: an error of shapes or types is found before anything is compiled.

        Args:    batch: examples.  frozen: what stands still beside the state.
        Raises:  ConfigError: the objective reads what the data does not have, or `train.monitor` names no metric.
        """
        part = batch // self.parallel.count
        example, (still, treedef) = abstract_batch(self.spec, part), jax.tree.flatten(frozen)
        shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in still)
        # on one device, the very program of the run, which keeps what is traced here
        program = self.parallel.train(self.step) if isinstance(self.parallel, Jit) else dataclasses.replace(self.step, axis=None)
        try:
            names = shared(("checked", *self._kind(), part, treedef, shapes), lambda: self._names(program, frozen, example))
        except KeyError as error:
            raise ConfigError(_missing(error.args[0], self.spec, type(self.step.objective).__name__)) from error
        known = [f"{split}/{name}" for split in ("train", "validation") for name in names]
        if self.settings.monitor not in known:
            raise ConfigError(f"train.monitor={self.settings.monitor!r} is no metric of this run{nearest(self.settings.monitor, known)}")

    def _names(self, program: Any, frozen: Tree, example: Batch) -> set[str]:
        _, metrics = jax.eval_shape(program, self.abstract(), frozen, example)
        return {*metrics, *self.step.objective.derived(dict.fromkeys(metrics, 1.0))}

    def _kind(self) -> tuple[Hashable, ...]:
        """What shapes depend on: equal for the runs of one program."""
        return self.step, self.settings.key, freeze(self.spec), tuple(sorted(self.hyper))

    def _key(self) -> jax.Array:
        return jax.random.key(self.seed, impl={"threefry": "threefry2x32", "rbg": "rbg"}[self.settings.key])


def settings(config: DictConfig) -> Settings:
    """The `train` group of a config.

    Raises:  ConfigError: a value of the wrong type or out of range.
    """
    return build(config.train, where="train")


def parts(config: DictConfig) -> int:
    """Into how many parts of one size a batch is cut: microbatches times devices."""
    return settings(config).accumulate * build(config.parallel, where="parallel").count


def assemble(config: DictConfig, *, batches: int | None = None, training: bool = True) -> Assembly:
    """The step and everything around it; the config must hold the data's spec.

    Args:    batches: of one epoch of the training split; None: the config gives steps.
             training: False: for reading a run on any machine, whatever devices it was trained on.
    Raises:  ConfigError: any part of the config that cannot be built, or a schedule that does not fit into the run.
    """
    plain, hyper = split_values(config)
    model = build(plain["model"], where="model")  # the objective builds its own; this one tells a bad value under the name that the user knows
    train = settings(config).resolved(batches or 1)
    parallel = build(plain["parallel"], where="parallel") if training else Jit()
    prefix = "optimizer."
    values = tuple(sorted({path.removeprefix(prefix) for path in train.values if path.startswith(prefix)} | {"learning_rate"}))
    sparsify = None if train.sparsify is None else dataclasses.replace(train.sparsify, steps=train.steps or 1)
    optimizer = Optimizer.from_config(plain["optimizer"], values=values, clip=train.clip, sparsify=sparsify, ema=train.ema)
    if training and getattr(model, "base", None) is not None:
        found = mup.rates(widening(plain), mup.multiplier(model), optimizer.rule)
        optimizer = dataclasses.replace(optimizer, rates=tuple((path, rate) for path, rate in found.items() if rate != 1))
    step = Step(
        objective=build(plain["objective"], where="objective"),
        optimizer=optimizer,
        schedule=build(plain["schedule"], where="schedule"),
        steps=train.steps or 0,
        accumulate=train.accumulate,
        axis=parallel.axis,
        stability=train.stability,
    )
    step.schedule.check(step.steps)
    step.optimizer.check(hyper)
    parallel = parallel.fit(step.objective, abstract_batch(plain["data"]["spec"], 1))
    if train.chunk > 1:
        parallel.train_chunk(step)  # nothing is compiled; a layout that has none says so
    return Assembly(step, hyper, train, parallel, plain["data"]["spec"], config.seed)


def widening(config: Mapping[str, Any]) -> dict[str, str]:
    """{path: how it grows with the model's width, as `mup.kinds` says} of the parameters that the model has in its objective.

    What an objective trains beside the model, as the features of a sparse autoencoder, is not among them.

    Args:    config: as `split_values` gives it.
    """
    model, batch = build(config["model"], where="model"), abstract_batch(config["data"]["spec"], 1)

    def shapes(config: Mapping[str, Any]) -> Tree:
        objective: Any = build(config["objective"], where="objective")
        while hasattr(objective, "objective"):  # what wraps another adds to its loss, or takes its parameters apart
            objective = objective.objective
        same = getattr(objective, "module", None) == build(config["model"], where="model")
        return jax.eval_shape(objective.init, jax.random.key(0), batch)[0] if same else {}

    return mup.kinds(shapes(config), shapes(remodelled(config, **mup.resized(model, Fraction(2)))))


def _missing(name: str, spec: Mapping[str, Any], objective: str) -> str:
    """What to tell where a name is in neither the batch nor the state's values."""
    fields = [name for name in spec["fields"] if name not in ("mask", "index")]
    fitting = "language_model" if "tokens" in fields else "classify" if "label" in fields else "regress"
    hint = f"; for this data: objective={fitting}" if name in ("label", "target", "tokens") else ""
    return f"{objective} or its model reads {name!r}, which is no field of the data ({', '.join(fields)}) and is not listed in train.values{hint}"
