"""Random numbers to fit: the smallest data set that a regressor can be timed and checked on."""

import numpy as np

from research.core.errors import ConfigError
from research.core.spec import fields
from research.data.dataset import Arrays, Dataset
from research.data.preprocess import Preprocessor
from research.data.split import Share, draw


def random_regression(
    rows: int = 100, features: int = 10, outputs: int = 1, seed: int = 0, validation: Share = 0, test: Share = 0, fitted: Preprocessor | None = None
) -> Dataset:
    """Normal features and independent normal targets: there is nothing to learn but the rows themselves.

    Args:    rows, features, outputs: sizes.  seed: of the numbers and the split.  validation, test: rows, or a share of them.
             fitted: unused, nothing is fitted.
    Raises:  ConfigError: a size below 1, or parts that leave nothing to train on.
    """
    if min(rows, features, outputs) < 1:
        raise ConfigError(f"data.rows={rows}, data.features={features}, data.outputs={outputs} must be at least 1")
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    raw = {name: generator.standard_normal((rows, size)).astype(np.float32) for name, size in (("features", features), ("target", outputs))}
    parts = draw(rows, seed, validation=validation, test=test)
    spec = {
        "fields": fields(features=((features,), "float32"), target=((outputs,), "float32")),
        "features": features,
        "outputs": outputs,
        "examples": {name: len(part) for name, part in parts.items()},
    }
    preprocessor = Preprocessor(spec)
    return Dataset(
        {name: Arrays({key: array[part] for key, array in raw.items()}, preprocessor) for name, part in parts.items()}, preprocessor, parts
    )
