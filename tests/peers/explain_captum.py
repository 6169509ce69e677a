"""Times integrated gradients, 64 points on 256 test images of an mnist_cnn run, beside Captum on the same weights: in turn, in one process.

    PYTHONPATH=FOLDER_OF_CAPTUM python tests/peers/explain_captum.py RUN [--root DATA] [--rows 32 64 128 256 512 1024] [--repeats 5]

Prints the median of each, their ratio, and how far the two attributions differ. Captum gets the number of rows a call that suits it best.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import jax
import numpy as np
import torch
from captum.attr import IntegratedGradients
from cnn_torch import network
from rich.console import Console
from rich.table import Table

from research.explanation import gradient
from research.explanation.model import Examples, Model, examples
from research.run import Run

BAR = 10.0  # seconds, on two cores


def peer(model: Model) -> torch.nn.Module:
    """The run's network in torch, with its weights."""
    module = model.objective.module  # type: ignore[attr-defined]  # an mnist_cnn run's objective has one
    made = network(list(model.spec["image"]), list(module.channels), module.kernel, list(module.pool), list(module.hidden), module.outputs)
    layers = [layer for layer in made if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)]
    names = [*(f"conv_{i}" for i in range(len(module.channels))), *(f"dense_{i}" for i in range(len(module.hidden))), "head"]
    for layer, name in zip(layers, names, strict=True):
        kernel, bias = (np.array(model.params[name][part]) for part in ("kernel", "bias"))
        if name == "dense_0":  # ours flattens y x c, torch's c y x
            kernel = kernel.reshape(-1, module.channels[-1], kernel.shape[1])
            kernel = kernel.transpose(1, 0, 2).reshape(-1, kernel.shape[2])
        layer.weight.data = torch.tensor(np.ascontiguousarray(kernel.T if kernel.ndim == 2 else kernel.transpose(3, 2, 0, 1)))
        layer.bias.data = torch.tensor(bias)  # type: ignore[union-attr]  # each layer here has one
    return made.eval()


def ours(model: Model, given: Examples, rows: int) -> Callable[[], np.ndarray]:
    method = gradient.IntegratedGradients(rows=rows)
    return lambda: method(model, given, jax.random.key(0)).values


def captum(made: torch.nn.Module, given: Examples, rows: int, layout: torch.memory_format) -> Callable[[], np.ndarray]:
    method = IntegratedGradients(made.to(memory_format=layout))
    image = torch.tensor(given.batch["image"].transpose(0, 3, 1, 2)).contiguous(memory_format=layout)
    target = torch.tensor(given.target[:, 0].astype(np.int64))

    def run() -> np.ndarray:
        values = method.attribute(image, 0.0, target=target, n_steps=64, method="gausslegendre", internal_batch_size=rows)
        return values.detach().numpy().transpose(0, 2, 3, 1)

    return run


def timed(programs: dict[str, Callable[[], np.ndarray]], repeats: int) -> dict[str, float]:
    """Median seconds of each, after one call that is not counted, in turn."""
    taken: dict[str, list[float]] = {name: [] for name in programs}
    for program in programs.values():
        program()
    for _ in range(repeats):
        for name, program in programs.items():
            start = time.perf_counter()
            program()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--root")
    parser.add_argument("--rows", type=int, nargs="+", default=[gradient.ROWS])
    parser.add_argument("--captum-rows", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    model = Run(args.run).model(data={"root": args.root} if args.root else None)
    assert model.data is not None
    images = model.data().splits["test"].take(np.arange(args.images))["image"]
    given = examples(model, {"image": images, "mask": np.ones(len(images), bool)})
    programs = {f"ours, {rows} rows": ours(model, given, rows) for rows in args.rows}
    layouts = {"": torch.contiguous_format, ", channels last": torch.channels_last}
    for name, layout in layouts.items():
        programs |= {f"Captum, {rows} rows{name}": captum(peer(model), given, rows, layout) for rows in args.captum_rows}
    few = examples(model, {"image": images[:16], "mask": np.ones(len(images[:16]), bool)})
    first, other = ours(model, few, 256)(), captum(peer(model), few, 256, torch.contiguous_format)()
    median = timed(programs, args.repeats)
    best = min(seconds for name, seconds in median.items() if name.startswith("Captum"))
    table = Table("integrated gradients", "median s", "of Captum's best", box=None, header_style="bold", pad_edge=False)
    for name, seconds in median.items():
        table.add_row(name, f"{seconds:.2f}", f"{seconds / best:.2f}")
    Console().print(table)
    fastest = min(seconds for name, seconds in median.items() if name.startswith("ours"))
    print(f"largest difference {np.abs(first - other).max():.1e} of {np.abs(other).max():.2f}; ours / Captum {fastest / best:.2f}")
    return int(fastest > BAR or fastest > best)


if __name__ == "__main__":
    raise SystemExit(main())
