"""What a data config opens: named splits of random-access examples, and all that inference needs to know about them."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from etils import epath
from jaxtyping import Int
from omegaconf import OmegaConf

from research.core.build import build
from research.core.errors import ConfigError, DataError, nearest
from research.core.shared import shared
from research.core.spec import Spec, check_spec
from research.data.checks import check_finite, check_labels
from research.data.preprocess import Preprocessor


class Source(Protocol):
    """One split: examples by number, gathered a whole batch at a time.

    A source whose examples overlap also has `draws`, how many of them make an epoch, and `whole`, the source of the same data without overlap.
    """

    def __len__(self) -> int:
        """The number of examples."""
        ...

    def take(self, indices: Int[np.ndarray, "b"]) -> Mapping[str, Any]:
        """The fields of these examples, batch axis first, ready for the model; `mask` only where it is finer than one bit an example."""
        ...

    def check(self, spec: Spec, where: str) -> None:
        """Raises DataError where an example is not what the spec says; `where` names the split in its message."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
    """A source that holds its raw examples in memory and preprocesses what is taken.

    Args:    raw: name -> array, example axis first, all of one length; images as bytes.  preprocessor: from raw arrays to fields.
    """

    raw: Mapping[str, np.ndarray]
    preprocessor: Preprocessor

    def __len__(self) -> int:
        return len(next(iter(self.raw.values())))

    def take(self, indices: Int[np.ndarray, "b"]) -> dict[str, np.ndarray]:
        """The fields of these examples."""
        return self.preprocessor({name: array[indices] for name, array in self.raw.items()})

    def check(self, spec: Spec, where: str) -> None:
        """Refuses labels that are no class, and real numbers that are not finite.

        Raises:  DataError: naming the first one and its example.
        """
        for name, array in self.raw.items():
            if name == "label":
                check_labels(array, spec["classes"], "example {}".format, where)
            elif np.issubdtype(array.dtype, np.floating):
                values = array.reshape(len(array), -1)
                check_finite(values, range(values.shape[1]), "example {}".format, f"{where}, {name}")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Opened data.

    Args:    splits: "train", "validation", "test" (the last two where there are any) -> source.
             preprocessor: spec, tokenizer, statistics, class names: fitted on the training part only, saved in the run folder.
             indices: split -> row numbers in the original files, where the split was drawn here; saved as split.json.
    """

    splits: Mapping[str, Source]
    preprocessor: Preprocessor
    indices: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def spec(self) -> Spec:
        """The shapes and sizes that a model is built from, as plain JSON values."""
        return self.preprocessor.spec

    def split(self, name: str) -> Source:
        """The source of a split.

        Raises:  DataError: naming the splits that there are.
        """
        if name not in self.splits:
            raise DataError(f"the data has no split {name!r}{nearest(name, self.splits)}")
        return self.splits[name]

    def save(self, folder: epath.PathLike) -> None:
        """Writes what the preprocessor holds and, where the split was drawn here, split.json: the `data` folder of a run."""
        self.preprocessor.save(folder)
        if self.indices:
            rows = {name: np.asarray(indices).tolist() for name, indices in self.indices.items()}
            (epath.Path(folder) / "split.json").write_text(json.dumps(rows))


def open_data(node: Any, fitted: Preprocessor | None = None) -> Dataset:
    """The data of a config node, compared with the spec that the node declares, and its examples with the spec that was found.

    Args:    node: the config's `data`: a target with its arguments, and `batch`, `spec` and `split`, which are not the target's.
             fitted: of an existing run: its tokenizer, statistics and classes are used as they are; None: fit anew, once for all runs of a sweep.
    Raises:  ConfigError: a node that cannot be built.  DataError: data that is missing, unreadable, empty, or not what the spec says.
    """
    if fitted is None:
        content = OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node
        return shared(("data", repr(content)), lambda: _opened(node, None))
    return _opened(node, fitted)


def _opened(node: Any, fitted: Preprocessor | None) -> Dataset:
    if "_target_" not in node:
        raise ConfigError("data names no data of its own: data=of_teacher goes with teacher.run=PATH and an objective that looks into that run")
    dataset = build(node, where="data", without=("batch", "spec", "split"), fitted=fitted)
    check_spec(node.get("spec") or {}, dataset.spec)
    for name, source in dataset.splits.items():
        if not len(source):
            raise DataError(f"the {name} split is empty")
        source.check(dataset.spec, f"{name} split")
    return dataset
