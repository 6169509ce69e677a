"""Random examples in place of a data set that is not on this machine: for timing, which their content does not change."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from research.core.errors import ConfigError
from research.data.classification import labelled_images
from research.data.dataset import Dataset
from research.data.text import split_text

EXAMPLES = 4096
VOCABULARY = 65  # different characters, as many as Tiny Shakespeare has


def random_data(node: Mapping[str, Any]) -> Dataset:
    """A training split of the shapes that a data config declares: labelled images, or text.

    Args:    node: the config's `data`; its `spec` says what is known without reading the data.
    Raises:  ConfigError: the spec says too little.
    """
    generator, spec = np.random.default_rng(0), node["spec"]
    if "image" in spec and "classes" in spec:
        images = generator.integers(0, 256, (EXAMPLES, *spec["image"]), np.uint8)
        labels = generator.integers(0, spec["classes"], EXAMPLES)
        return labelled_images({"train": (images, labels)}, [str(i) for i in range(spec["classes"])], {})
    if "time" in spec:
        letters = [chr(ord("!") + i) for i in range(VOCABULARY)]
        content = "".join(letters + generator.choice(letters, EXAMPLES * spec["time"]).tolist())
        return split_text(content, "char", VOCABULARY, None, spec["time"], 0.0, 0.0, None, where="random text")
    raise ConfigError("data.spec names neither images and classes nor a context, so random data cannot stand in for it")
