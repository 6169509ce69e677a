"""Blocks of timed steps on request: what the torch programs of this folder share."""

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

TRIALS, TRIAL_S = 3, 2.0  # blocks of each variant, at least, and seconds of its steps, by whose median the fastest is chosen
TRIAL_STEPS, SETTLING = 10, 2  # of a block, and before it: threads and caches are still the last variant's


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
    trials = {name: trial(variants[name]) for name in working}
    while len(next(iter(trials.values()))) < TRIALS * TRIAL_STEPS or min(map(sum, trials.values())) < TRIAL_S:
        for name, times in trials.items():
            times += trial(variants[name])
    medians = {name: statistics.median(times) for name, times in trials.items()}
    best = min(medians, key=medians.__getitem__)
    facts = {"variant": best, "parameters": parameters, "version": torch.__version__, "threads": torch.get_num_threads()}
    facts |= {"variants": {name: round(median * 1e3, 3) for name, median in medians.items()}, "compile_s": round(working[best], 2)}
    print(json.dumps({**facts, "seconds": trials[best]}), flush=True)
    for _ in sys.stdin:
        print(json.dumps({**facts, "seconds": block(variants[best], steps)}), flush=True)


def trial(step: Callable[[], float]) -> list[float]:
    """The seconds of each step of a block that has settled."""
    return block(step, SETTLING + TRIAL_STEPS)[SETTLING:]


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
