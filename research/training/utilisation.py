"""How much of the hardware a step uses: the model's operations by the formula of the field, over what a large matrix product reaches."""

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from research.core.cost import Cost, cost, flops_per_example
from research.core.errors import ConfigError
from research.core.spec import abstract_batch
from research.core.tree import paths, unstack
from research.core.types import Tree
from research.training.assembly import Assembly

SIZES = {"cpu": (512, 1024, 2048)}  # of the square matrices that are multiplied; an accelerator needs larger ones
LARGE = (2048, 4096, 8192, 16384)
PATIENCE = 0.5  # seconds for each size; a size whose first product takes longer is the last
_NO_MATRICES = ("embedding", "bias", "scale")  # a bias of attention has two axes as well


class ModelFlops(NamedTuple):
    """What a training step has to compute for one item, however it is computed.

    Args:    flops: floating-point operations, a multiplication and an addition as two.  formula: as it is printed, with its numbers.
    """

    flops: float
    formula: str


def model_flops(assembly: Assembly) -> ModelFlops:
    """The operations that one item, a token or an example, needs in training: one forward pass and a backward pass of twice that.

    For a text, 6 N + 6 A T per token. N: entries of the matrices that a token is multiplied with: tables that are only looked up are left out,
    a table of tokens that is the head as well counts once. A: heads x head width, added over the layers of attention; T: the context. A token
    sees half of the context on average, so causal attention counts once: 2 A T for scores and values. For anything else, and beside frozen
    arrays, three times the products of a forward pass as `core/cost.py` counts them. What is computed again in the backward pass is left out.

    Source:  Kaplan et al. 2020, section 2.1; Chowdhery et al. 2022, appendix B, whose 12 A T counts the masked half too.
    """
    objective, spec = assembly.step.objective, assembly.spec
    params, extra = _shapes(assembly)
    if "time" not in spec or assembly.still() is not None:
        hyper = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in assembly.hyper}
        forward = flops_per_example(objective, (params, extra, assembly.still(), hyper), abstract_batch(spec, 1))
        items = spec.get("time", 1)
        return ModelFlops(3 * forward / items, f"3 x {forward / items:,.0f} FLOPs of a forward pass")
    leaves = paths(unstack(params))
    matrices = sum(leaf.size for path, leaf in leaves.items() if leaf.ndim > 1 and path.rpartition("/")[2] not in _NO_MATRICES)
    if not any(path.endswith("head/kernel") for path in leaves):
        matrices += sum(leaf.size for path, leaf in leaves.items() if path.endswith("token/embedding"))
    attention = sum(math.prod(leaf.shape[1:]) for path, leaf in leaves.items() if path.endswith("attention/query/kernel"))
    seen = f" + 6 x {attention:,} A x {spec['time']:,} T" if attention else ""
    return ModelFlops(6 * matrices + 6 * attention * spec["time"], f"6 x {matrices:,} N{seen}")


def step_flops(assembly: Assembly, batch: int, frozen: Tree = None) -> Cost:
    """The products and convolutions of a whole step as it is written, what is computed again included: traced, not run.

    Args:    batch: examples.
    """
    step = dataclasses.replace(assembly.step, axis=None)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), assembly.abstract())
    return cost(step.__call__, state, frozen, abstract_batch(assembly.spec, batch), as_written=True)


def peak(dtype: str, named: Any = None) -> tuple[float, str]:
    """(floating-point operations per second of all devices together, where the number is from).

    Args:    dtype: that the run computes in.  named: TFLOP/s of one device; None: the best of a few large square matrix products, here and now.
    Raises:  ConfigError: as `check_peak`.
    """
    check_peak(named)
    devices = 1 if jax.default_backend() == "cpu" else jax.device_count()  # those of a CPU share its cores
    if named is not None:
        return named * 1e12 * devices, f"named, {named:g} TFLOP/s a device"
    best, size = max((_product(dtype, size), size) for size in _affordable(dtype))
    return best * devices, f"measured, {best / 1e12:.4g} TFLOP/s a device: {dtype} product of {size} x {size}"


def check_peak(named: Any) -> None:
    """Refuses what is no speed of a device.

    Raises:  ConfigError: naming it.
    """
    if named is not None and (isinstance(named, bool) or not isinstance(named, int | float) or not 0 < named < math.inf):
        raise ConfigError(f"peak={named!r}: must be the TFLOP/s of one device, as 989 for an H100 in bfloat16, or null to measure")


def _affordable(dtype: str) -> list[int]:
    """The sizes up to the first that takes too long."""
    sizes = []
    for size in SIZES.get(jax.default_backend(), LARGE):
        sizes.append(size)
        if 2 * size**3 / _product(dtype, size, seconds=0.0) > PATIENCE:
            break
    return sizes


def _product(dtype: str, size: int, seconds: float = PATIENCE) -> float:
    """FLOP/s of one product in the best of some rounds, several products being in flight at once, as in a step.

    Args:    seconds: to go on for; 0: one product.
    """
    keys = jax.random.split(jax.random.key(0))
    x, y = (jax.random.normal(key, (size, size), jnp.float32).astype(dtype) for key in keys)  # zeros would draw less power, and run faster
    multiply = jax.jit(jnp.matmul)
    jax.block_until_ready(multiply(x, y))

    def rate(times: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready([multiply(x, y) for _ in range(times)])
        return times * 2 * size**3 / (time.perf_counter() - start)

    best, start, times = rate(1), time.perf_counter(), 1 if jax.default_backend() == "cpu" else 8
    while time.perf_counter() - start < seconds:
        best = max(best, rate(times))
    return best


def _shapes(assembly: Assembly) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """(params, extra) as the objective makes them."""
    state = assembly.abstract()
    return state.params, {name: value for name, value in state.extra.items() if name != "skipped"}
