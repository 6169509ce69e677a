"""What an explanation is: an attribution of one output to the parts of an input, or a finding about the model as a whole."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax
import numpy as np
from jaxtyping import Float, Int

from research.explanation.model import Examples, Model
from research.figures import explanation as draw
from research.figures.explanation import Panel


@dataclasses.dataclass(frozen=True, eq=False)
class Attribution:
    """How much each part of an input contributed to one output.

    Args:    values: one number for each entry of the tap, batch first: b y x c for an image, b f for features; b t for tokens.
             baseline: what the input was compared with, shaped as the tap; None for a method that compares with nothing.
             delta: of each example, the sum of the values less (the output here - the output at the baseline): 0 where the method is complete;
             None for a method that promises no such sum.
             output: the explained output of each example.  target: which output, as `Examples.target`.
             method: its name.  settings: its arguments.  at: the tap that is explained.
             numbers: more that is worth telling: name -> a number, or one for each example.  kept: more that is worth keeping: name -> array.
             names: of the examples.  subject: the model and the examples, for pictures; None: `show` draws bare values.
    """

    values: Float[np.ndarray, "b ..."]
    baseline: np.ndarray | None
    delta: Float[np.ndarray, "b"] | None
    output: Float[np.ndarray, "b"]
    target: Int[np.ndarray, "b k"]
    method: str = ""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    at: str = "input"
    numbers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kept: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    names: Sequence[str] = ()
    subject: tuple[Model, Examples] | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """What is worth keeping as arrays."""
        own = {"values": self.values, "baseline": self.baseline, "delta": self.delta, "output": self.output, "target": self.target}
        return {name: np.asarray(x) for name, x in {**own, **self.kept}.items() if x is not None}

    def summary(self) -> dict[str, Any]:
        """What is worth keeping as numbers."""
        told = None if self.subject is None else [self.explained(i) for i in range(len(self.output))]
        named = {
            "at": self.at,
            "target": self.target[:, -1],
            "explained": told,
            "output": self.output,
            "completeness_delta": self.delta,
            **self.numbers,
        }
        if self.target.shape[1] > 1:
            named["position"] = self.target[:, 0]
        return {name: value for name, value in named.items() if value is not None}

    def explained(self, i: int) -> str:
        """What the values of one example are about, as a person knows it: a class, a token and its place, a column."""
        if (unit := self.settings.get("of")) is not None:
            return f"{unit.get('tap')} {list(unit['unit'])}" if unit.get("unit") else str(unit.get("tap"))
        if self.subject is not None:
            return self.subject[0].explained(self.target[i])
        name = f"output {int(self.target[i, -1])}"
        return name if self.target.shape[1] < 2 else f"{name} after position {int(self.target[i, 0])}"

    def panels(self, i: int) -> tuple[Panel, ...]:
        """What to draw of one example."""
        values = np.asarray(self.values[i])
        title = f"{self.method}: {self.explained(i)}" if self.method else self.explained(i)
        if self.subject is None:
            return (draw.Heat(values.reshape(values.shape[0], -1), title=title),)
        model, examples = self.subject
        batch = examples.batch
        count = examples.length(i) if examples.mask.ndim > 1 else 0
        if model.field == "image" and values.ndim in (2, 3):
            flat = values.sum(-1) if values.ndim == 3 else values
            return (draw.Overlay(np.asarray(batch["image"][i]), flat, title=title),)
        if model.field == "tokens" and values.ndim == 1:
            return (draw.Tokens([model.token(int(t)) for t in batch["tokens"][i][:count]], values[:count], title=title),)
        if model.field == "tokens" and values.ndim == 2:
            return (draw.Heat(values[:count].T, columns=[model.token(int(t)) for t in batch["tokens"][i][:count]], title=title, y="unit"),)
        if values.ndim == 1:
            columns = model.spec.get("columns") if self.at == "input" else None
            return (draw.Bars(columns or [str(j) for j in range(len(values))], values, title=title),)
        return (draw.Heat(values.reshape(values.shape[0], -1), title=title),)

    def show(self, i: int = 0) -> Any:
        """The picture of one example, for a notebook."""
        return draw.figure((*self.pictured(i), *self.panels(i)), title=self.names[i] if self.names else "")

    def pictured(self, i: int) -> tuple[Panel, ...]:
        """One example as it is, where that is a picture."""
        if self.subject is None or self.subject[0].field != "image":
            return ()
        return (draw.Pictures(np.asarray(self.subject[1].batch["image"][i : i + 1]), title="what the model sees"),)


@dataclasses.dataclass(frozen=True, eq=False)
class Finding:
    """What was found out about a model: figures, tables, numbers, not one number for each part of an input.

    Args:    drawn: panels of the whole.  numbers: name -> number, list or mapping.  kept: name -> array.
             each: panels of each example, where there are some.  method, settings: as of `Attribution`.  lines: what to say on the terminal.
    """

    drawn: Sequence[Panel] = ()
    numbers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kept: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    each: Sequence[Sequence[Panel]] = ()
    lines: Sequence[str] = ()
    method: str = ""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    names: Sequence[str] = ()

    def arrays(self) -> dict[str, np.ndarray]:
        """What is worth keeping as arrays."""
        return {name: np.asarray(x) for name, x in self.kept.items()}

    def summary(self) -> dict[str, Any]:
        """What is worth keeping as numbers."""
        return dict(self.numbers)

    def panels(self, i: int) -> tuple[Panel, ...]:
        """What to draw of one example."""
        return tuple(self.each[i]) if self.each else ()

    def show(self, i: int | None = None) -> Any:
        """The picture of the whole, or of one example, for a notebook."""
        return draw.figure(tuple(self.drawn) if i is None or not self.each else self.panels(i), title=self.method)


Result = Attribution | Finding
NUMBERED = ("target", "position", "against")  # by number what `explained` says in words


def at_least(method: Any, **least: int) -> None:
    """Refuses settings below these; None is none.

    Raises:  ValueError: naming the first.
    """
    for name, bound in least.items():
        if (value := getattr(method, name)) is not None and value < bound:
            raise ValueError(f"{name}={value} must be at least {bound}")


def one_each(result: Result) -> dict[str, Sequence[float] | Sequence[str]]:
    """{name: values} of what the summary holds as one number for each example; what is explained in words, where there are some."""

    def numbers(value: Any) -> bool:
        listed = isinstance(value, list | tuple | np.ndarray) and len(value) == len(result.names) > 0
        return listed and all(isinstance(x, int | float | np.integer | np.floating) and not isinstance(x, bool) for x in value)

    summary = result.summary()
    found = {name: value for name, value in summary.items() if numbers(value)}
    if "explained" not in summary:
        return found
    return {"explained": summary["explained"], **{name: value for name, value in found.items() if name not in NUMBERED}}


def beside(results: Sequence[Result], i: int = 0) -> Any:
    """What several methods say about one example in one picture, for a notebook."""
    first = next((result for result in results if isinstance(result, Attribution)), None)
    shown = (*(first.pictured(i) if first else ()), *(panel for result in results for panel in result.panels(i)))
    return draw.figure(shown, title=first.names[i] if first and first.names else "")


class Method(Protocol):
    """A frozen dataclass with the method's settings, one file in conf/method/ each."""

    reads: ClassVar[
        str
    ]  # "examples": it explains those that it is given; "nothing": the model as a whole, from the run's own data where it needs some

    def fits(self, model: Model) -> str | None:
        """Why this method cannot explain this model, as "it has no tap of attention weights"; None: it can."""
        ...

    def __call__(self, model: Model, examples: Examples | None, key: jax.Array) -> Result:
        """The explanation of a whole batch, by one compiled program for each shape.

        Args:    examples: None where the method reads nothing.  key: of all that is drawn by lot.
        Raises:  ConfigError: settings that do not fit the model or the examples.
        """
        ...
