"""Blocks of timed steps on request: what the torch programs of this folder share."""

import json
import sys
import time
from collections.abc import Callable

import torch

TRIALS, TRIAL_STEPS = 3, 10  # blocks of steps, by the fastest of which the fastest variant is chosen


def serve(variants: dict[str, Callable[[], float]], steps: int, parameters: int) -> None:
    """Prints one JSON line about the fastest variant, then one more, of a new block of steps, for each line that comes in.

    Args:    variants: name -> one training step that returns its loss as a number.  steps: of a block.
    """
    working = {}
    for name, step in variants.items():
        start = time.perf_counter()
        try:
            block(step, 3)
            working[name] = time.perf_counter() - start
        except Exception as error:  # torch.compile needs a C++ compiler; eager torch is a fair peer without it
            if name == "eager":
                raise
            print(f"{name} does not work here: {type(error).__name__}", file=sys.stderr)
    trials = {name: [] for name in working}
    for _ in range(TRIALS):
        for name, times in trials.items():
            times += block(variants[name], TRIAL_STEPS)
    best = min(trials, key=lambda name: min(trials[name]))
    facts = {"variant": best, "parameters": parameters, "version": torch.__version__, "threads": torch.get_num_threads()}
    facts |= {"variants": {name: round(min(times) * 1e3, 3) for name, times in trials.items()}, "compile_s": round(working[best], 2)}
    print(json.dumps({**facts, "seconds": trials[best]}), flush=True)
    for _ in sys.stdin:
        print(json.dumps({**facts, "seconds": block(variants[best], steps)}), flush=True)


def block(step: Callable[[], float], steps: int) -> list[float]:
    """The seconds of each step."""
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return times


def count(model: torch.nn.Module) -> int:
    """The number of learned scalars; a tied one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def averager(model: torch.nn.Module, decay: float | None) -> Callable[[], None]:
    """Adds the present weights to their running average; does nothing where there is no decay."""
    if decay is None:
        return lambda: None
    parameters = [parameter.detach() for parameter in model.parameters()]
    averages = [parameter.clone() for parameter in parameters]
    return lambda: torch._foreach_lerp_(averages, parameters, 1 - decay)
