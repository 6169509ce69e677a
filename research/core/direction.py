"""Which scores are looked at first, and which way each is better."""

from typing import Literal

HEADLINES = ("bits_per_byte", "perplexity", "accuracy", "r2", "mae")  # the first that was evaluated stands for a run beside its loss
RISING = ("accuracy", "r2", "f1", "precision", "recall", "top_")  # higher is better; of everything else lower is


def direction(name: str) -> Literal["min", "max"]:
    """Which value of this score is best: "max" for accuracy and its like, "min" for losses, errors and perplexities.

    Args:    name: of the score, with its split or without, as "validation/accuracy".
    """
    return "max" if name.rpartition("/")[2].startswith(RISING) else "min"
