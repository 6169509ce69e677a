"""Distillation: a student learns what a teacher answers, beside what is true."""

import dataclasses
import functools
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.core.errors import ConfigError, nearest
from research.core.types import Batch, Decoder, Edits, Hyper, Objective, Tally, Tree
from research.losses.distillation import HIDDEN, attention_loss, soft_loss
from research.losses.regression import squared_error
from research.metrics.average import average

Pairs = tuple[tuple[str, str], ...]  # (tap of the student, tap of the teacher)
PROJECTIONS = "projections"  # beside the student's own parameters


@dataclasses.dataclass(frozen=True)
class Distill:
    """The student's own loss, and how far its answers and its insides are from a teacher's.

    loss = hard x (the student's terms) + soft x T² KL(teacher ‖ student) + hidden x (distance of hidden states) + attention x (distance of
    attention weights); each of the last three is a sum over the valid items of the batch, divided by their number. A regressor's soft loss is
    the mean squared difference of the values.

    `frozen` is {"student": the student's own, "teacher": {"params", "extra", "frozen", "hyper"}}. Without a teacher, as where the run is only
    read, the metrics are the student's alone. Where the batch has the field `teacher`, those outputs are used and the teacher does not run.

    Args:    objective: the student's.  teacher: the teacher's.  temperature: T, above 0, that divides both logits.
             hard, soft, hidden, attention: coefficients; None: read from hyper.
             hidden_layers, attention_layers: pairs of taps. Where hidden states differ in width, a linear map of the student's is learned beside it.
             hidden_loss: "mse"; "cosine" (Sanh et al. 2019, DistilBERT); or "patient": the squared distance of states of length 1 (Sun et al. 2019).
    Raises:  ValueError: a value out of range, or layers with coefficient 0 and the reverse.
    Source:  Hinton, Vinyals and Dean 2015, section 2.
    """

    objective: Objective
    teacher: Objective
    temperature: float | None = 2.0
    hard: float | None = 0.5
    soft: float | None = 0.5
    hidden: float | None = 0.0
    attention: float | None = 0.0
    hidden_layers: Pairs = ()
    attention_layers: Pairs = ()
    hidden_loss: Literal["mse", "cosine", "patient"] = "mse"
    batch_coupled: ClassVar[bool] = False

    def __post_init__(self):
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0")
        for name in ("hard", "soft", "hidden", "attention"):
            if (value := getattr(self, name)) is not None and not (0 <= value < math.inf):
                raise ValueError(f"{name}={value} must be a number not below 0")
        for name in ("hidden", "attention"):
            if (getattr(self, name) == 0.0) != (not getattr(self, f"{name}_layers")):
                raise ValueError(f"{name}={getattr(self, name)} and {name}_layers={getattr(self, f'{name}_layers')}: give both or neither")
        if self.objective.batch_coupled:
            raise ValueError(f"{type(self.objective).__name__} couples the whole batch, so its items cannot be distilled one by one")

    @property
    def terms(self) -> tuple[str, ...]:
        """Those that need a teacher."""
        return tuple(name for name in ("soft", "hidden", "attention") if getattr(self, name) != 0.0)

    @property
    def coefficients(self) -> tuple[tuple[str, float], ...]:
        """The student's, whose sums are scaled by `hard` already, and those of the terms that need a teacher."""
        return (*self.objective.coefficients, *((name, getattr(self, name) or 0.0) for name in self.terms))

    def init(self, key: jax.Array, batch: Batch) -> tuple[Tree, Tree]:
        """(the student's parameters, and `projections` where hidden states differ in width; extra)."""
        params, extra = self.objective.init(key, batch)
        made = self.projections(jax.random.fold_in(key, 1), batch)
        return ({**params, PROJECTIONS: made} if made else params), extra

    def projections(self, key: jax.Array, batch: Batch) -> dict[str, Tree]:
        """{place among the hidden layers: {"kernel"}} of the pairs that differ in width, normal with deviation 1 / sqrt(inputs)."""
        if not self.hidden_layers:
            return {}
        here, there = (jax.eval_shape(functools.partial(_taps, objective), key, batch) for objective in (self.objective, self.teacher))
        made = {}
        for i, (student, teacher) in enumerate(self.hidden_layers):
            width, wanted = _named(here, student, "student").shape[-1], _named(there, teacher, "teacher").shape[-1]
            if width != wanted:
                made[str(i)] = {"kernel": jax.random.normal(jax.random.fold_in(key, i), (width, wanted), jnp.float32) / math.sqrt(width)}
        return made

    def still(self, key: jax.Array, batch: Batch) -> Tree:
        """{"student": the student's own, "teacher": None}: predicting needs no teacher."""
        return {"student": self.objective.still(key, batch), "teacher": None}

    def taught(self, frozen: Tree, params: Tree, extra: Tree, still: Tree, hyper: Hyper) -> Tree:
        """`frozen` with this teacher in it.

        Args:    frozen: of this objective.  params, extra, still, hyper: what the teacher's objective is called with.
        """
        return {**frozen, "teacher": {"params": params, "extra": extra, "frozen": still, "hyper": hyper}}

    def apply(
        self, params: Tree, extra: Tree, frozen: Tree, batch: Batch, key: jax.Array | None, hyper: Hyper, *, train: bool, edits: Edits | None = None
    ) -> tuple[Any, dict[str, Array], Tree]:
        """(outputs, taps, extra) of the student."""
        return self.objective.apply(_own(params), extra, frozen["student"], batch, key, hyper, train=train, edits=edits)

    def weights(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """The student's denominators, and the number of valid items."""
        count: Array = batch["mask"].sum(dtype=jnp.float32)
        return self.objective.weights(batch) | dict.fromkeys(self.terms, count)

    def __call__(
        self, params: Tree, extra: Tree, frozen: Tree, batch: Batch, key: jax.Array | None, hyper: Hyper, *, train: bool
    ) -> tuple[Tally, Tree]:
        """(tally, extra): the sums of one microbatch.

        Raises:  ConfigError: training without a teacher.
        """
        outputs, taps, changed = self.apply(params, extra, frozen, batch, key, hyper, train=train)
        tally = self._plain.tally(outputs, batch, hyper, train=train)
        if frozen["teacher"] is None and "teacher" not in batch:
            if train:
                raise ConfigError("teacher.run=null: distillation needs the run of a teacher")
            return tally, changed
        sums: dict[str, Any] = self._sums(params.get(PROJECTIONS, {}), outputs, taps, frozen["teacher"], batch, hyper)
        hard = self._value("hard", hyper)
        terms = {name: hard * total for name, total in tally.terms.items()}
        return Tally(terms | {name: total for name, (total, _) in sums.items()}, tally.metrics | sums), changed

    def predict(
        self, params: Tree, extra: Tree, frozen: Tree, batch: Batch, key: jax.Array | None, hyper: Hyper, *, edits: Edits | None = None
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """What the student predicts, and its taps."""
        return self.objective.predict(_own(params), extra, frozen["student"], batch, key, hyper, edits=edits)

    def derived(self, means: dict[str, float | None]) -> dict[str, float]:
        """The student's."""
        return self.objective.derived(means)

    def decoder(self) -> Decoder | None:
        """The student's."""
        inner = self.objective.decoder()
        return None if inner is None else StudentDecoder(inner)

    def _sums(self, projections, outputs, taps, teacher, batch, hyper):
        """{term: (sum over valid items, their number)}."""
        wanted, there = self._asked(teacher, batch)
        items = batch["mask"].ndim
        sums = {}
        if "soft" in self.terms:
            if self._plain.output == "value":
                loss = _per_item(squared_error(outputs, wanted), items)
            else:
                loss = soft_loss(outputs, wanted, self._value("temperature", hyper))
            sums["soft"] = average(loss, batch["mask"])
        if "hidden" in self.terms:
            total = jnp.zeros(batch["mask"].shape, jnp.float32)
            for i, (student, other) in enumerate(self.hidden_layers):
                x = _named(taps, student, "student")
                if (projection := projections.get(str(i))) is not None:
                    x = x @ projection["kernel"].astype(x.dtype)
                total = total + _per_item(HIDDEN[self.hidden_loss](x, _named(there, other, "teacher")), items)
            sums["hidden"] = average(total, batch["mask"])
        if "attention" in self.terms:
            total = jnp.zeros(batch["mask"].shape, jnp.float32)
            for student, other in self.attention_layers:
                total = total + _per_item(attention_loss(_named(taps, student, "student"), _named(there, other, "teacher")), items)
            sums["attention"] = average(total, batch["mask"])
        return sums

    def _asked(self, teacher, batch):
        """(the teacher's outputs, its taps)."""
        if "teacher" in batch:
            if terms := [name for name in self.terms if name != "soft"]:
                raise ConfigError(f"objective.{terms[0]}: cached outputs hold no insides of the teacher; use teacher.cache=false")
            return batch["teacher"], {}
        model = jax.lax.stop_gradient((teacher["params"], teacher["extra"], teacher["frozen"]))
        outputs, taps, _ = self.teacher.apply(*model, batch, None, teacher["hyper"], train=False)
        return outputs, taps

    @property
    def _plain(self) -> Any:
        """The objective that makes sums of the student's outputs: that of a compressed student lies within."""
        return getattr(self.objective, "plain", self.objective)

    def _value(self, name: str, hyper: Hyper) -> Any:
        return hyper[name] if getattr(self, name) is None else getattr(self, name)


@dataclasses.dataclass(frozen=True)
class StudentDecoder:
    """The student's decoder over the parameters of the whole.

    Args:    decoder: the student's.
    """

    decoder: Decoder

    def begin(self, params: Tree, extra: Tree, frozen: Tree, batch: Batch, length: int, hyper: Hyper) -> Tree:
        """As the student's."""
        return self.decoder.begin(_own(params), extra, frozen["student"], batch, length, hyper)

    def advance(self, params: Tree, extra: Tree, frozen: Tree, cache: Tree, tokens: Array, hyper: Hyper) -> tuple[Array, Tree]:
        """As the student's."""
        return self.decoder.advance(_own(params), extra, frozen["student"], cache, tokens, hyper)

    def rewind(self, cache: Tree, length: Array) -> Tree:
        """As the student's."""
        return self.decoder.rewind(cache, length)


def _own(params: Tree) -> Tree:
    """The student's parameters."""
    return {name: value for name, value in params.items() if name != PROJECTIONS}


def _taps(objective: Objective, key: jax.Array, batch: Batch) -> dict[str, Array]:
    """A model's taps; for their shapes alone."""
    params, extra = objective.init(key, batch)
    return objective.apply(params, extra, objective.still(key, batch), batch, None, {}, train=False)[1]


def _named(taps: dict[str, Array], path: str, whose: str) -> Array:
    if path not in taps:
        raise ConfigError(f"objective: {path!r} is no tap of the {whose}{nearest(path, taps)}")
    return taps[path]


def _per_item(values: Array, items: int) -> Array:
    """The mean over all axes but the first ones, which the mask has."""
    return values.mean(tuple(range(items, values.ndim)))
