"""The console scripts: `research-train` runs the verb `research.train`, `research-evaluate` the verb `research.evaluate`, and so on."""

import importlib
import pathlib
import sys

from research.core import app
from research.core.memory import pause_garbage


def main() -> int:
    """The exit code of the verb that the script is named after; for tab completion the verb is not imported, since loading JAX takes seconds."""
    name = pathlib.Path(sys.argv[0]).stem.removeprefix("research-")
    if {"-sc", "--shell-completion"} & set(sys.argv):
        return app.main(lambda config: None, name)
    pause_garbage()
    try:
        verb = importlib.import_module(f"research.{name}")
    except KeyboardInterrupt:
        print("error: interrupted; nothing had been saved", file=sys.stderr)
        return 75
    return verb.main()
