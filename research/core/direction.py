"""Which way a score is better."""

from typing import Literal

RISING = ("accuracy", "r2", "f1", "precision", "recall", "top_")  # higher is better; of everything else lower is


def direction(name: str) -> Literal["min", "max"]:
    """Which value of this score is best: "max" for accuracy and its like, "min" for losses, errors and perplexities.

    Args:    name: of the score, with its split or without, as "validation/accuracy".
    """
    return "max" if name.rpartition("/")[2].startswith(RISING) else "min"
