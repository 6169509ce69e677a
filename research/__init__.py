"""Ontogeny: the whole life of a network as one step function over one run folder."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from research.core.memory import pause_garbage

if TYPE_CHECKING:
    from research.core.config import compose
    from research.explanation.result import Attribution
    from research.run import Run

__all__ = ["Attribution", "Run", "__version__", "compose"]
__version__ = "0.1.0"

_HOMES = {"compose": "research.core.config", "Run": "research.run", "Attribution": "research.explanation.result"}


def __getattr__(name: str) -> Any:
    """`research.compose` and `research.Run`, imported at first use: `import research` alone loads neither JAX nor Hydra."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


if sys.argv[:1] == ["-m"] and any(word.startswith(f"{__name__}.") for word in sys.orig_argv):  # Python looks for the verb that it will run
    pause_garbage()
