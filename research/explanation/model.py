"""A trained model as explanation sees it: a pure function with taps and edits, and what its numbers mean."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from research.core.errors import ConfigError, nearest
from research.core.spec import Spec, abstract_batch
from research.core.types import Batch, Edits, Hyper, Objective, Tree

INPUT = "input"  # every model's first tap: the continuous input, or the summed embedding of tokens
FIELDS = ("image", "features", "audio", "tokens")  # of a batch that can be a model's input


class Data(Protocol):
    """The run's data, as far as explanation reads it."""

    @property
    def splits(self) -> Mapping[str, Any]:
        """Split -> source of examples: len(source), source.take(indices) -> fields."""
        ...


@dataclasses.dataclass(frozen=True)
class Past:
    """A checkpoint that the run kept.

    Args:    step: updates made before.  params, extra: as they were then.  rate: learning rate of the update that followed.
             seen: numbers of the training examples of that update, in the order of the loader; None: none followed.
    """

    step: int
    params: Tree
    extra: Tree
    rate: float
    seen: Int[np.ndarray, "n"] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A trained model, unscanned, so that tap paths equal parameter paths.

    Args:    objective: its pure function.  params, extra, frozen, hyper: what that is called with.
             spec: shapes of the data.  classes: their names, by number; empty where there are none.
             pieces: UTF-8 bytes of each token; None for a model that reads no text.
             data: opens the run's data; None: there is none.  history: the run's kept checkpoints, oldest first; None: it kept none.
             statistics: `<field>_mean` and `<field>_std` of what was standardised, to tell numbers in the data's own units.
             open: the model of another run, by its path; None: others cannot be reached.
             encode: from text to tokens; None for a model that reads no text.
    """

    objective: Objective
    params: Tree
    extra: Tree
    frozen: Tree
    hyper: Hyper
    spec: Spec
    classes: Sequence[str] = ()
    pieces: Sequence[bytes] | None = None
    data: Callable[[], Data] | None = None
    history: Callable[[], Sequence[Past]] | None = None
    statistics: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    open: Callable[[str], "Model"] | None = None
    encode: Callable[[str], np.ndarray] | None = None

    @functools.cached_property
    def arrays(self) -> tuple[Tree, Tree, Tree, Hyper]:
        """What the objective is called with, in its order, on the device."""
        return jax.device_put((self.params, self.extra, self.frozen, self.hyper))

    @functools.cached_property
    def field(self) -> str:
        """The batch's input field: image, features, audio or tokens."""
        return next(name for name in FIELDS if name in self.spec["fields"])

    @functools.cached_property
    def taps(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every tap for one example, without computing anything; in the order in which they are recorded."""
        order: list[str] = []

        def recorded(arrays, batch):
            taps = outputs_of(self.objective, arrays, batch, None)[1]
            order.extend(taps)
            return taps

        found = jax.eval_shape(recorded, self.arrays, abstract_batch(self.spec, 1))  # a tree comes back sorted by name
        return {name: found[name] for name in order}

    @functools.cached_property
    def outputs(self) -> tuple[int, ...]:
        """The shape of the outputs of one example: (classes,), (time, vocabulary) or (targets,)."""
        predicted = jax.eval_shape(functools.partial(outputs_of, self.objective), self.arrays, abstract_batch(self.spec, 1), None)[0]
        return predicted.shape[1:]

    def read(self, batch: Batch, names: Sequence[str] = (), edits: Edits | None = None) -> tuple[Float[Array, "b ..."], dict[str, Array]]:
        """(outputs, {tap: value} of the named taps): one compiled program for each batch shape, set of names and set of edited taps.

        Raises:  ConfigError: an unknown tap.
        """
        self.require(*names, *(edits or {}))
        return _read(self.objective, tuple(names), self.arrays, dict(batch), edits)

    def require(self, *names: str) -> None:
        """Refuses names that are no taps.

        Raises:  ConfigError: naming the first and the nearest right one.
        """
        for name in names:
            if name not in self.taps:
                raise ConfigError(f"{name!r} is no tap of this model{nearest(name, self.taps)}")

    def token(self, i: int) -> str:
        """A token as text."""
        return str(i) if self.pieces is None else self.pieces[i].decode("utf-8", "replace")

    def name(self, i: int) -> str:
        """An output as a person knows it: a class's name, a token in quotes, a number."""
        if self.pieces is not None:
            return repr(self.token(i))
        return str(self.classes[i]) if self.classes else str(i)

    def explained(self, target: Int[np.ndarray, "k"], against: int = -1) -> str:
        """What is explained of an example as a person knows it: an output, its place where there are several, less another where that is not -1."""
        name = self.name(int(target[-1])) + (f" less {self.name(int(against))}" if against >= 0 else "")
        return name if len(target) < 2 else f"{name} after position {int(target[0])}"


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Inputs to explain, and which output of each.

    Args:    batch: fields as the model reads them, with `mask` and `index`; never padded with whole rows.  names: of the examples.
             target: the number of the output, b 1; for an output at each position (position, number), b 2.
             scored: of a text, the positions whose next token the data asks about; `mask` also has those before, which the model reads. None: all.
    """

    batch: Batch
    names: Sequence[str]
    target: Int[np.ndarray, "b k"]
    scored: Bool[np.ndarray, "b t"] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def row(self, i: int) -> "Examples":
        """One of them."""
        scored = None if self.scored is None else self.scored[i : i + 1]
        return Examples({name: x[i : i + 1] for name, x in self.batch.items()}, self.names[i : i + 1], self.target[i : i + 1], scored)

    @property
    def mask(self) -> np.ndarray:
        """Which positions of each example count: b t; of an input without positions: b."""
        return np.asarray(self.batch["mask"])

    def length(self, i: int) -> int:
        """Positions of an example that count, from the first on."""
        return int(self.mask[i].sum())


def examples(model: Model, batch: Batch, names: Sequence[str] | None = None, target: Any = None, position: int | None = None) -> Examples:
    """Examples with their targets resolved.

    Args:    target: an output's number, a class's name or a token's text, one for all or a list of one each; None: what the model finds likeliest,
             the first output of a regression.  position: of a model with an output at each: where to look; None: the last one that counts.
    Raises:  ConfigError: a target or a position out of range, a name that is no class, an input of another shape, a mask that covers nothing.
    """
    rows = len(batch["mask"])
    batch = {"index": np.arange(rows, dtype=np.int32), **batch}
    _check_shape(model, batch)
    scored = None
    if model.field == "tokens":
        scored = np.asarray(batch["mask"])
        batch["mask"] = np.arange(scored.shape[1]) < _read_until(scored)[:, None]
    known = names or [f"example {i}" for i in range(rows)]
    covered = np.asarray(batch["mask"])
    covered = covered.any(tuple(range(1, covered.ndim)))
    if not covered.all():
        raise ConfigError(f"{known[int(covered.argmin())]}: its mask covers nothing, so there is nothing to explain")
    values = np.asarray(model.read(batch)[0])
    sequential = len(model.outputs) == 2
    places = None
    if sequential:
        places = _places(np.asarray(batch["mask"]), position)
        values = values[np.arange(rows), places]
    elif position is not None:
        raise ConfigError(f"position={position}: this model has one output an example, not one at each position")
    each = list(target) if isinstance(target, list | tuple | np.ndarray) else [target] * rows
    if len(each) != rows:
        raise ConfigError(f"target lists {len(each)} outputs for {rows} examples")
    likeliest = values.argmax(-1) if _classes(model) else np.zeros(rows, np.int64)
    chosen = np.array([int(best) if one is None else _number(model, one) for one, best in zip(each, likeliest, strict=True)], np.int32)
    return Examples(batch, known, np.stack([places, chosen], 1) if places is not None else chosen[:, None], scored)


def replaced(value: Any) -> tuple[Any, Any]:
    """The edit that puts this value in the place of a tap's."""
    return jnp.ones((), bool), value


def pick(outputs: Float[Array, "b ..."], target: Int[Array, "b k"]) -> Float[Array, "b"]:
    """The one output of each example that is explained."""
    return outputs[(jnp.arange(len(outputs), dtype=jnp.int32), *target.T)]


def outputs_of(
    objective: Objective, arrays: tuple[Tree, Tree, Tree, Hyper], batch: Batch, edits: Edits | None = None
) -> tuple[Float[Array, "b ..."], dict[str, Array]]:
    """(outputs, taps), a pure function: what `Model.read` compiles, for programs that need more than it gives."""
    params, extra, frozen, hyper = arrays
    predicted, taps = objective.predict(params, extra, frozen, batch, None, hyper, edits=edits)
    return next(iter(predicted.values())), taps


def with_input(value: Array, edits: Edits | None) -> Edits:
    """The edits with this value as the input's own: what they do to the input, they do to it."""
    edit = (edits or {}).get(INPUT)
    if isinstance(edit, tuple | list):
        value = jnp.where(edit[0], jnp.asarray(edit[1], value.dtype), value)
    elif edit is not None:
        value = value + jnp.asarray(edit, value.dtype)
    return {**(edits or {}), INPUT: replaced(value)}


def score(
    objective: Objective, arrays: tuple[Tree, Tree, Tree, Hyper], batch: Batch, target: Int[Array, "b k"], edits: Edits | None = None
) -> tuple[Float[Array, "b"], dict[str, Array]]:
    """(the output to explain of each example, taps), a pure function: differentiate it with respect to the edits, never to the batch."""
    outputs, taps = outputs_of(objective, arrays, batch, edits)
    return pick(outputs, target), taps


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(objective, names, arrays, batch, edits):
    outputs, taps = outputs_of(objective, arrays, batch, edits)
    return outputs, {name: taps[name] for name in names}


def _classes(model: Model) -> bool:
    return "classes" in model.spec or "vocabulary" in model.spec


def _check_shape(model: Model, batch: Batch) -> None:
    wanted = tuple(model.spec["fields"][model.field]["shape"])
    if model.field not in batch:
        raise ConfigError(f"this model reads {model.field!r}; the batch has {', '.join(sorted(batch))}")
    found = np.shape(batch[model.field])[1:]
    if model.field != "tokens" and found != wanted:
        raise ConfigError(f"an example has the shape {found}, and the model reads {wanted}")
    if model.field == "tokens" and not 0 < found[0] <= wanted[0]:
        raise ConfigError(f"a text of {found[0]} tokens: this model reads 1 to {wanted[0]}")


def _read_until(scored: np.ndarray) -> np.ndarray:
    """How many positions of each row go up to the last that counts: some data asks about some tokens only, but the model reads all before."""
    return np.where(scored.any(1), scored.shape[1] - scored[:, ::-1].argmax(1), 0)


def _places(mask: np.ndarray, position: int | None) -> np.ndarray:
    """The position of each row whose output is explained: as asked, from the end where negative, or the last that counts."""
    count = mask.sum(1)
    place = np.full(len(mask), -1 if position is None else position)
    place = np.where(place < 0, count + place, place)
    if ((place < 0) | (place >= count)).any():
        raise ConfigError(f"position={position}: the text has {int(count.min())} tokens, 0 to {int(count.min()) - 1}")
    return place.astype(np.int32)


def _number(model: Model, target: Any) -> int:
    """The number of an output that is named by number, class or token."""
    count = model.outputs[-1]
    text = str(target)
    if text in model.classes:
        return list(model.classes).index(text)
    if model.pieces is not None and isinstance(target, str) and (piece := text.encode()) in model.pieces:
        return list(model.pieces).index(piece)
    if isinstance(target, int | np.integer) or text.lstrip("-").isdigit():
        if not 0 <= int(text) < count:
            raise ConfigError(f"target={text}: this model has the outputs 0 to {count - 1}")
        return int(text)
    kind = "token" if model.pieces is not None else "class"
    choices = list(model.classes) or [piece.decode("utf-8", "replace") for piece in (model.pieces or ())]
    raise ConfigError(f"target={text!r} is no {kind} of this run{nearest(text, choices)}")
