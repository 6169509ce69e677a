"""The run's training examples: which there are, in chunks of one size, and how a person sees them."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int

from research.core.types import Batch
from research.explanation.model import Model
from research.figures import explanation as draw


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Examples of the run's training split.

    Args:    source: take(indices) -> fields.  indices: the numbers of those that count here.
    """

    source: Any
    indices: Int[np.ndarray, "n"]

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: Int[np.ndarray, "b"]) -> Batch:
        """These examples as a batch."""
        return {"mask": np.ones(len(indices), bool), "index": np.asarray(indices, np.int32), **self.source.take(indices)}

    def chunks(self, rows: int) -> Iterator[tuple[slice, Batch]]:
        """(places in `indices`, a batch of `rows` examples): the last batch is filled up with examples that have no place."""
        for start in range(0, len(self), rows):
            places = slice(start, min(start + rows, len(self)))
            yield places, self.batch(np.resize(self.indices[places], rows))


def counted(batch: Batch, places: slice) -> Bool[np.ndarray, "b ..."]:
    """What counts of a chunk: its mask, less the examples that fill it up."""
    mask = np.asarray(batch["mask"])
    return mask & (np.arange(len(mask)) < places.stop - places.start).reshape(-1, *[1] * (mask.ndim - 1))


def training_split(model: Model, sample: int | None, key: jax.Array) -> Split:
    """The training split, each part of a text once.

    Args:    sample: so many examples, drawn by lot; None: all.
    """
    assert model.data is not None
    source = model.data().splits["train"]
    source = getattr(source, "whole", source)
    indices = np.arange(len(source))
    if sample is not None and sample < len(source):
        indices = np.sort(np.asarray(jax.random.permutation(key, len(source)))[:sample])
    return Split(source, indices)


def described(model: Model, batch: Batch, i: int) -> str:
    """The right answer of an example where it has one in a word: its label, or the target of a regression; "" elsewhere."""
    if "label" in batch:
        return model.name(int(batch["label"][i]))
    if "target" in batch and model.field != "tokens":
        return ", ".join(f"{value:.3g}" for value in np.ravel(batch["target"][i])[:3])
    return ""


def shown(
    model: Model, batch: Batch, names: Sequence[str], title: str, value: str = "", values: Sequence[float] | np.ndarray | None = None
) -> draw.Panel:
    """Examples side by side: pictures with a line below each, or a table.

    Args:    names: of the examples.  value: what the numbers are called.  values: one number each; None: there are none.
    """
    numbers = [""] * len(names) if values is None else [f"{number:.3g}" for number in values]
    answers = [described(model, batch, i) for i in range(len(names))]
    if model.field == "image":
        said = ([part for part in pair if part] for pair in zip(answers, numbers, strict=True))
        captions = [f"{name}: {', '.join(parts)}" if parts else name for name, parts in zip(names, said, strict=True)]
        return draw.Pictures(np.asarray(batch["image"]), captions, title)
    inputs = np.asarray(batch[model.field])
    if model.field == "tokens":
        texts = ["".join(model.token(int(token)) for token in row[counts]) for row, counts in zip(inputs, batch["mask"], strict=True)]
        return draw.Rows(("example", value, "text"), list(zip(names, numbers, texts, strict=True)), title)
    columns = [str(name) for name in model.spec.get("columns") or ()] or [str(i) for i in range(inputs[0].size)]
    cells = [[names[i], numbers[i], answers[i], *map(float, inputs[i].ravel())] for i in range(len(names))]
    return draw.Rows(("example", value, "answer", *columns), cells, title)
