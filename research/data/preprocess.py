"""From raw inputs to what a model reads: fitted on the training part, stored in the run folder, the same in training and prediction."""

import dataclasses
import functools
import io
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Float32, Num, UInt8

from research.core.errors import DataError
from research.data.rows import read_arrays
from research.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Preprocessor:
    """All that inference needs to know about the data.

    Args:    spec: shapes and sizes, as plain JSON values.
             tokenizer: text to numbers and back, for text.
             statistics: `<field>_mean` and `<field>_std` of the training part, for `image` (per channel, pixels in [0, 1]), `features` and
             `target` (per column); a field without them is not standardised.
             classes: the names of the classes, in the order of their numbers.
    """

    spec: Mapping[str, Any]
    tokenizer: Tokenizer | None = None
    statistics: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    classes: tuple[str, ...] = ()

    def __call__(self, raw: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The fields of a batch from raw arrays: `image` bytes, `features` and real `target` are standardised, the rest passes through."""
        fields = dict(raw)
        if "image" in raw:
            fields["image"] = self.image(raw["image"])
        for name in ("features", "target"):
            if name in raw:
                fields[name] = self._standard(name, raw[name])
        return fields

    def image(self, pixels: UInt8[np.ndarray, "b y x c"]) -> Float32[np.ndarray, "b y x c"]:
        """Pixels in 0 to 255 as numbers in [0, 1], less the mean of their channel, over its deviation."""
        scale, shift = self._affine
        values = pixels.reshape(len(pixels), math.prod(pixels.shape[1:])).astype(
            np.float32
        )  # b yxc: numpy is 20 times slower where the last axis is short
        values *= scale
        values += shift
        return values.reshape(pixels.shape)

    @functools.cached_property
    def _affine(self) -> tuple[Float32[np.ndarray, "yxc"], Float32[np.ndarray, "yxc"]]:
        """Scale and shift of every pixel of one image."""
        y, x, c = self.spec["image"]
        mean = self.statistics.get("image_mean", np.zeros(c))
        std = self.statistics.get("image_std", np.ones(c))
        return np.tile(1 / (255 * std), y * x).astype(np.float32), np.tile(-mean / std, y * x).astype(np.float32)

    def _standard(self, name: str, values: Float[np.ndarray, "b f"]) -> Float32[np.ndarray, "b f"]:
        if f"{name}_mean" in self.statistics:
            values = (values - self.statistics[f"{name}_mean"]) / self.statistics[f"{name}_std"]
        return values.astype(np.float32)

    def restore(self, value: Float[np.ndarray, "b o"]) -> Float[np.ndarray, "b o"]:
        """Predicted targets in the units of the data: the inverse of the standardisation."""
        if "target_mean" not in self.statistics:
            return value
        return value * self.statistics["target_std"].astype(np.float32) + self.statistics["target_mean"].astype(np.float32)

    def save(self, folder: epath.PathLike) -> None:
        """Writes spec.json and, where there are such, tokenizer.json, statistics.npz and classes.json."""
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "spec.json").write_text(json.dumps(self.spec, indent=1))
        if self.tokenizer is not None:
            self.tokenizer.save(folder / "tokenizer.json")
        if self.statistics:
            buffer = io.BytesIO()
            np.savez(buffer, allow_pickle=False, **self.statistics)
            (folder / "statistics.npz").write_bytes(buffer.getvalue())
        if self.classes:
            (folder / "classes.json").write_text(json.dumps(self.classes, ensure_ascii=False))

    @staticmethod
    def load(folder: epath.PathLike) -> "Preprocessor":
        """What `save` wrote.

        Raises:  DataError: a file that is missing or damaged.
        """
        folder = epath.Path(folder)
        present = {path.name for path in folder.iterdir()} if folder.exists() else set()
        if "spec.json" not in present:
            raise DataError(f"{folder} holds no spec.json, so it is not the data folder of a run")
        spec = _json(folder / "spec.json")
        tokenizer = Tokenizer.load(folder / "tokenizer.json") if "tokenizer.json" in present else None
        statistics = read_arrays(folder / "statistics.npz") if "statistics.npz" in present else {}
        classes = _json(folder / "classes.json") if "classes.json" in present else ()
        return Preprocessor(spec, tokenizer, statistics, tuple(classes))


def _json(path: epath.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}") from error


def standardise(name: str, values: Num[np.ndarray, "n ..."]) -> dict[str, np.ndarray]:
    """The mean and deviation of a field over all axes but the last, under the names that `Preprocessor` reads.

    A constant column has deviation 1, so that it becomes 0. Pixels (bytes) count as numbers in [0, 1].

    Args:    name: the field.  values: its training part.
    """
    if values.dtype == np.uint8:
        mean, std = _pixel_moments(values)
    else:
        rows = values.reshape(-1, values.shape[-1]).astype(np.float64)
        mean, std = rows.mean(0), rows.std(0)
    return {f"{name}_mean": mean, f"{name}_std": np.where(std > 1e-12 * (1 + np.abs(mean)), std, 1.0)}


def _pixel_moments(values: UInt8[np.ndarray, "n y x c"]) -> tuple[Float[np.ndarray, "c"], Float[np.ndarray, "c"]]:
    """Mean and deviation of each channel, by sums of whole numbers: exact, and without a float copy of the data."""
    channels = values.shape[-1]
    flat = values.reshape(len(values), -1)
    total, squares = np.zeros(flat.shape[1], np.int64), np.zeros(flat.shape[1], np.int64)
    for start in range(0, len(flat), 512):
        block = flat[start : start + 512].astype(np.int32)
        total += block.sum(0)
        squares += (block * block).sum(0)
    count = values.size // channels
    mean = total.reshape(-1, channels).sum(0) / count
    variance = squares.reshape(-1, channels).sum(0) / count - mean**2
    return mean / 255, np.sqrt(np.maximum(variance, 0)) / 255
