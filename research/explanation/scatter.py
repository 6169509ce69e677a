"""A tap's vectors as points in the plane."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from jaxtyping import Float

from research.core.errors import ConfigError
from research.explanation.model import Examples, Model
from research.explanation.result import Finding
from research.explanation.vectors import deepest, drawn, last, read, sequential, vector_taps
from research.figures.explanation import Points

OTHERS = "others"
GROUPS = 12  # colours; of more groups the rarer ones are one


@dataclasses.dataclass(frozen=True)
class EmbeddingMap:
    """The vectors of a tap in two dimensions, coloured by what their items are.

    Args:    at: the tap; None: the last one before the outputs.  how: "pca": the two directions in which the vectors differ most, "tsne":
             neighbours stay neighbours, distances mean little (scikit-learn).  examples: of the split.  each: positions of every text.
             split: train | validation | test; None: the last that there is.  perplexity: of t-SNE: how many neighbours count, about.
    Raises:  ValueError: fewer than 3 examples, or a perplexity not above 0.
    Source:  Pearson 1901; van der Maaten and Hinton 2008.
    """

    at: str | None = None
    how: Literal["pca", "tsne", "both"] = "both"
    examples: int = 1000
    each: int = 1
    split: str | None = None
    perplexity: float = 30.0
    reads: ClassVar[str] = "nothing"

    def __post_init__(self):
        if self.examples < 3 or self.each < 1:
            raise ValueError(f"examples={self.examples} must be at least 3, each={self.each} at least 1")
        if not self.perplexity > 0:
            raise ValueError(f"perplexity={self.perplexity} must be above 0")

    def fits(self, model: Model) -> str | None:
        """It needs the data."""
        return "it has no data to draw" if model.data is None else None

    def __call__(self, model: Model, examples: Examples | None, key: jax.Array) -> Finding:
        """One map, or both.

        Raises:  ConfigError: an unknown tap, or one with fewer than two numbers; too few items for the perplexity.
        """
        at = self.at or deepest(model)
        vector_taps(model, at)
        lot, places, seed = jax.random.split(key, 3)
        items = read(model, drawn(model, self.split or last(model), self.examples, lot), [at], places, self.each if sequential(model) else None)
        vectors = items.values[at]
        if min(vectors.shape) < 2:
            raise ConfigError(f"method.at={at!r}: {vectors.shape[0]} vectors of {vectors.shape[1]} numbers make no map")
        groups, what = _groups(model, items)
        order = sorted(range(len(groups)), key=lambda i: (groups[i] == OTHERS, groups[i]))  # the legend names groups as they come
        shown = [groups[i] for i in order]
        panels, kept, numbers = [], {}, {"at": at, "items": len(items)}
        if self.how in ("pca", "both"):
            kept["pca"], shares = pca(vectors)
            names = [f"direction {i + 1}: {share:.1%} of the variance" for i, share in enumerate(shares)]
            panels.append(Points(kept["pca"][order], shown, f"PCA of {at}{what}", *names))
            numbers["variance_shares"] = shares.tolist()
        if self.how in ("tsne", "both"):
            kept["tsne"] = tsne(vectors, self.perplexity, int(jax.random.randint(seed, (), 0, 2**31 - 1)))
            panels.append(Points(kept["tsne"][order], shown, f"t-SNE of {at}{what}"))
        return Finding(panels, numbers, kept)


def pca(vectors: Float[np.ndarray, "n d"]) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, "2"]]:
    """(places along the two directions of largest variance, their shares of it); the largest loading of a direction is positive."""
    centered = vectors.astype(np.float64) - vectors.mean(0, dtype=np.float64)
    left, sizes, directions = np.linalg.svd(centered, full_matrices=False)
    signs = np.sign(directions[[0, 1], np.abs(directions[:2]).argmax(1)])
    total = max(float((sizes**2).sum()), 1e-30)
    return (left[:, :2] * sizes[:2] * signs).astype(np.float32), (sizes[:2] ** 2 / total).astype(np.float32)


def tsne(vectors: Float[np.ndarray, "n d"], perplexity: float, seed: int) -> Float[np.ndarray, "n 2"]:
    """Places by t-SNE, started at the PCA, so that the same seed gives the same map.

    Raises:  ConfigError: as many neighbours as vectors.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    if perplexity >= len(vectors):
        raise ConfigError(f"method.perplexity={perplexity}: must be below the number of items, {len(vectors)}")
    with threadpool_limits(1):  # its threads wait for each other by spinning, which takes minutes where other work has the cores
        return TSNE(perplexity=perplexity, init="pca", learning_rate="auto", random_state=seed).fit_transform(vectors).astype(np.float32)


def _groups(model: Model, items: Any) -> tuple[list[str], str]:
    """(what each item is, in words for the title): its class, its token, or the quarter that its target lies in."""
    if "label" in items.batch:
        names, what = [model.name(int(i)) for i in items.field("label")], ", by class"
    elif sequential(model):
        names, what = [repr(model.token(int(i))) for i in items.field("tokens")], ", by token"
    else:
        target = items.field("target").reshape(len(items), -1)[:, 0]
        quarter = np.digitize(target, np.quantile(target, (0.25, 0.5, 0.75)))
        return [("quarter 1", "quarter 2", "quarter 3", "quarter 4")[i] for i in quarter], ", by target"
    values, counts = np.unique(names, return_counts=True)
    kept = set(values if len(values) <= GROUPS else values[np.argsort(-counts, kind="stable")[: GROUPS - 1]])
    return [name if name in kept else OTHERS for name in names], what
