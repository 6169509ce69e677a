"""What a training step will need, told from shapes alone: bytes of the state and of what the backward pass keeps, on each device of any mesh."""

import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.core.errors import ConfigError
from research.core.spec import abstract_batch, zero_batch
from research.core.types import Batch, Objective, State, Tree
from research.training.assembly import Assembly
from research.training.parallel import Jit, Pmap
from research.training.step import divide

PROBE = 3  # steps that a probe times, after one that is not counted


def preflight(assembly: Assembly, batch: int, memory: int | None = None) -> dict[str, Any]:
    """Bytes that each device needs for a step, and the largest microbatch that would fit; nothing is computed and no device is asked for.

    `activation_bytes` is what the forward pass keeps for the backward pass, parameters left out: from the shapes of the residuals of `jax.vjp`.
    A compiler keeps less where it joins operations; what lives only for a moment comes on top: a probe tells both. On a mesh, activations
    are taken to be cut with the batch and with the context; what `tensor` saves of them is not counted.

    Args:    batch: examples of an update.  memory: bytes of a device; None: what this machine's has.
    Returns: state bytes by part and per device, gradient_bytes_per_device, activation_bytes, memory_bytes, largest_microbatch (examples of one
             update without accumulation on all devices together; 0 where the state alone is too large).
    """
    parallel, objective, spec = assembly.parallel, assembly.step.objective, assembly.spec
    state = abstract_state(assembly)
    frozen = assembly.still()
    whole = {name: Jit().bytes_per_device(getattr(state, name)) for name in ("params", "opt", "extra")}
    of_state, of_gradients, of_frozen = (parallel.bytes_per_device(tree) for tree in (state, state.params, frozen))
    layout = parallel.layout
    texts = 1 if layout is None else layout.parts("time")
    rows = max(batch // parallel.count // assembly.step.accumulate, 1)
    kept, twice = (residual_bytes(objective, state, frozen, abstract_batch(spec, n * rows)) for n in (1, 2))  # a form may depend on the size
    each = (twice - kept) // rows
    fixed = max(kept - each * rows, 0)
    limit = memory or memory_bytes()
    left = limit - of_state - of_gradients - of_frozen - fixed
    return {
        "batch": batch,
        "devices": parallel.size,
        "state_bytes": sum(whole.values()),
        **{f"{name}_bytes": size for name, size in whole.items()},
        "state_bytes_per_device": of_state,
        "gradient_bytes_per_device": of_gradients,
        "frozen_bytes_per_device": of_frozen,
        "activation_bytes_per_example": each,
        "activation_bytes_per_device": (fixed + each * rows) // texts,
        "memory_bytes": limit,
        "largest_microbatch": max(left * texts // max(each, 1), 0) * parallel.count,
    }


def abstract_state(assembly: Assembly) -> State:
    """The shapes of the state, on no device."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(assembly.step.create, key, abstract_batch(assembly.spec, 1), assembly.hyper)


def residual_bytes(objective: Objective, state: State, frozen: Tree, batch: Batch) -> int:
    """Bytes that the forward pass of one microbatch keeps for the backward pass, its arguments left out."""
    extra = {name: value for name, value in state.extra.items() if name != "skipped"}

    def kept(params: Tree, extra: Tree, frozen: Tree, batch: Batch, key: jax.Array, hyper: Any) -> Any:
        def loss(params: Tree) -> jax.Array:
            tally, _ = objective(params, extra, frozen, batch, key, hyper, train=True)
            return divide(tally, objective.weights(batch), objective.coefficients, hyper)

        return jax.vjp(loss, params)[1]

    residuals = jax.eval_shape(kept, state.params, extra, frozen, batch, state.key, state.hyper)
    given = [(x.shape, x.dtype) for x in jax.tree.leaves((state.params, extra, frozen, batch, state.hyper))]
    total = 0
    for leaf in jax.tree.leaves(residuals):
        if (kind := (leaf.shape, leaf.dtype)) in given:
            given.remove(kind)  # an argument itself, which is there anyway
        else:
            total += _bytes(leaf)
    return total


def probe(assembly: Assembly, batch: int) -> dict[str, Any]:
    """Compiles the step, where and as it would be trained, and runs it a few times on zeros: {compile_s, ms_per_step, temporary_bytes}.

    Args:    batch: examples.
    Returns: seconds of compiling, the median milliseconds of a step, and the bytes that each device needs beside the state and the batch.
    Raises:  ConfigError: the devices of this machine are not those of the layout, or pmap, whose memory nobody tells.
    """
    parallel = assembly.parallel
    parallel.check()
    if isinstance(parallel, Pmap):
        raise ConfigError("probe=true: parallel=pmap has no program that tells its memory; use parallel=data")
    zeros = {name: np.broadcast_to(x, (batch, *x.shape[1:])) for name, x in zero_batch(assembly.spec, 1).items()}
    zeros |= {"mask": np.ones(zeros["mask"].shape, bool), "index": np.arange(batch, dtype=np.int32)}
    began = time.perf_counter()
    state, given = parallel.place(assembly.state()), parallel.put(zeros)
    program = jax.jit(parallel.train(assembly.step), donate_argnums=0).lower(state, None, given).compile()
    compiled, needed, seconds = time.perf_counter() - began, program.memory_analysis(), []
    for _ in range(PROBE + 1):
        start = time.perf_counter()
        state, metrics = program(state, None, parallel.put(zeros))
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)
    return {
        "compile_s": compiled,
        "ms_per_step": float(np.median(seconds[1:])) * 1e3,
        "temporary_bytes": None if needed is None else int(needed.temp_size_in_bytes),
    }


def memory_bytes() -> int:
    """Bytes of this machine's first device: of an accelerator what JAX may use, of a CPU what the machine has."""
    stats: Mapping[str, int] = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(value: Any) -> None:
    """Refuses what is no number of bytes.

    Raises:  ConfigError: naming it.
    """
    if value is not None and (type(value) is not int or value < 1):
        raise ConfigError(f"memory={value!r}: must be a number of bytes, as 80_000_000_000, or null for what this machine has")


def _bytes(leaf: Any) -> int:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 0
    return int(np.prod(leaf.shape)) * leaf.dtype.itemsize
