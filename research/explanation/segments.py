"""Features of an input: which of its entries come and go together."""

import heapq
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Num

from research.core.errors import ConfigError, nearest
from research.explanation.model import Examples, Model

KINDS = ("superpixels", "grid")
COMPACTNESS = 10.0  # weight of place against colour, whose range counts as 100, as lightness does in Achanta et al.


def check_segments(segments: int, features: str) -> None:
    """Refuses a number or a kind of segments that cannot be.

    Raises:  ConfigError: fewer than one segment, or an unknown kind.
    """
    if segments < 1:
        raise ConfigError(f"method.segments={segments}: must be at least 1")
    if features not in KINDS:
        raise ConfigError(f"method.features={features!r} is unknown{nearest(features, KINDS)}")


def features_of(model: Model, examples: Examples, segments: int, features: str = "superpixels") -> list[Int[np.ndarray, "..."]]:
    """The feature number of each position of each example, from 0; -1 where there is none.

    A column is a feature, and so is a token that counts. Pixels form about `segments` superpixels or cells of a grid, and never more; times
    of an audio form spans.

    Args:    segments: how many are wanted.  features: of an image: superpixels | grid.
    Raises:  ConfigError: more segments than positions, an example of which no position counts.
    """
    if model.field == "tokens":
        return [_counted(mask, examples.names[i]) for i, mask in enumerate(examples.mask)]
    values = np.asarray(examples.batch[model.field])
    if model.field == "features":
        return [np.arange(math.prod(values.shape[1:]), dtype=np.int32).reshape(values.shape[1:])] * len(values)
    if model.field == "image" and features == "superpixels":
        return [superpixels(image, segments) for image in values]
    places = values.shape[1:3] if model.field == "image" else values.shape[1:2]
    cells = grid(places, segments)
    if examples.mask.ndim == 1:
        return [cells] * len(values)
    return [_renumbered(np.where(mask, cells, -1), examples.names[i]) for i, mask in enumerate(examples.mask)]


def grid(places: Sequence[int], segments: int) -> Int[np.ndarray, "..."]:
    """Cells of nearly equal size, about `segments` of them and never more, as square as they can be.

    Args:    places: positions along each of one or two axes.
    Raises:  ConfigError: more segments than positions.
    """
    counts = _counts(places, segments)
    axes = [np.arange(size) * count // size for size, count in zip(places, counts, strict=True)]
    cell = np.zeros((1,) * len(places), np.int64)
    for axis, count in enumerate(counts):
        cell = cell * count + axes[axis].reshape([-1 if a == axis else 1 for a in range(len(places))])
    return cell.astype(np.int32)


def superpixels(image: Num[np.ndarray, "y x c"], segments: int, compactness: float = COMPACTNESS) -> Int[np.ndarray, "y x"]:
    """Connected patches of like colour, about `segments` of them and never more.

    They grow from the middles of a grid's cells: the pixel beside a patch that is nearest to its mean colour and place joins next.

    Args:    image: of any range.  compactness: weight of place against colour; the larger, the squarer.
    Raises:  ConfigError: more segments than pixels.
    Source:  Achanta and Süsstrunk 2017 (SNIC), which is their SLIC made connected; here colours are compared as the image holds them.
    """
    high, wide = image.shape[:2]
    start = grid((high, wide), segments)
    count = int(start.max()) + 1
    colour = image.reshape(high * wide, -1).astype(np.float64)
    span = np.ptp(colour)
    place = np.moveaxis(np.indices((high, wide)), 0, -1).reshape(-1, 2) * (compactness / math.sqrt(start.size / count))
    points = np.concatenate([colour * (100.0 / span if span > 0 else 0.0), place], 1).tolist()
    sums = [[0.0] * len(points[0]) for _ in range(count)]
    sizes, label = [0] * count, [-1] * start.size
    waiting = [(0.0, int(pixel), number) for number, pixel in enumerate(_middles(start))]
    while waiting:
        _, pixel, number = heapq.heappop(waiting)
        if label[pixel] >= 0:
            continue
        label[pixel], sizes[number] = number, sizes[number] + 1
        total = sums[number] = [a + b for a, b in zip(sums[number], points[pixel], strict=True)]
        mean = [a / sizes[number] for a in total]
        y, x = divmod(pixel, wide)
        for beside, there in ((pixel - wide, y > 0), (pixel + wide, y < high - 1), (pixel - 1, x > 0), (pixel + 1, x < wide - 1)):
            if there and label[beside] < 0:
                distance = sum((a - b) ** 2 for a, b in zip(points[beside], mean, strict=True))
                heapq.heappush(waiting, (distance, beside, number))
    return np.array(label, np.int32).reshape(high, wide)


def spread(numbers: Float[np.ndarray, "n"], groups: Int[np.ndarray, "..."], shape: Sequence[int]) -> Float[np.ndarray, "..."]:
    """Each feature's number shared evenly among its entries, so that the entries sum to what the features do; 0 where there is no feature.

    Args:    groups: the feature of each position.  shape: of the result, which may have more axes than the groups, as channels.
    """
    sizes = np.bincount(groups[groups >= 0], minlength=len(numbers)) * math.prod(shape[groups.ndim :])
    each = np.append(numbers / sizes, 0.0)  # -1 is the last one
    return np.broadcast_to(each[groups].reshape(groups.shape + (1,) * (len(shape) - groups.ndim)), shape).astype(np.float32)


def _counts(places: Sequence[int], segments: int) -> tuple[int, ...]:
    """Cells along each axis."""
    if segments > math.prod(places):
        raise ConfigError(f"method.segments={segments}: the input has {math.prod(places)} positions, so some would cover nothing")
    if len(places) == 1:
        return (segments,)
    high, wide = places
    rows = min(max(round(math.sqrt(segments * high / wide)), 1), high, segments)
    return rows, min(max(segments // rows, 1), wide)


def _middles(cells: Int[np.ndarray, "y x"]) -> Int[np.ndarray, "n"]:
    """The pixel in the middle of each cell of a grid."""
    flat = cells.ravel()
    sizes = np.bincount(flat)
    high, wide = (np.bincount(flat, axis.ravel()) / sizes for axis in np.indices(cells.shape))
    return high.astype(np.int64) * cells.shape[1] + wide.astype(np.int64)


def _counted(mask: np.ndarray, name: str) -> Int[np.ndarray, "t"]:
    if not mask.any():
        raise ConfigError(f"{name}: its mask covers nothing, so there is nothing to explain")
    return np.where(mask, np.cumsum(mask) - 1, -1).astype(np.int32)


def _renumbered(cells: Int[np.ndarray, "..."], name: str) -> Int[np.ndarray, "..."]:
    """The same features without those of which nothing counts."""
    used = np.unique(cells[cells >= 0])
    if not used.size:
        raise ConfigError(f"{name}: its mask covers nothing, so there is nothing to explain")
    return np.where(cells < 0, -1, np.searchsorted(used, cells)).astype(np.int32)
