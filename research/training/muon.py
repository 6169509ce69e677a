"""Muon: momentum whose update is made orthogonal, for the matrices of hidden layers; Adam for everything else."""

import math
from collections.abc import Callable, Hashable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from research.core.tree import map_paths, matches
from research.core.types import Tree
from research.training.optimizer import require_matches

_SHARED_ADAM = ("**/head/kernel",)


def muon(
    learning_rate: float | Array,
    momentum: float | Array = 0.95,
    nesterov: bool = True,
    iterations: int = 5,
    rms: float | None = 0.2,
    b1: float | Array = 0.9,
    b2: float | Array = 0.95,
    eps: float | Array = 1e-8,
    weight_decay: float | Array = 0.0,
    mask: Callable[[Tree], Tree] | None = None,
    adam: tuple[str, ...] = _SHARED_ADAM,
    heads: tuple[str, ...] = ("**/query/kernel", "**/key/kernel", "**/value/kernel"),
) -> optax.GradientTransformation:
    """Muon on every kernel of rank 2 or more, Adam on embeddings, norms, biases and what `adam` names; one learning rate for both.

    A kernel is read as one matrix from its inputs to its outputs: the last axis is the output, all before it are inputs (y, x, c of a
    convolution; h, k of attention's output), except under `heads`, where the output is the last two axes (d -> h, k).

    Args:    momentum: decay of the accumulated gradient.  nesterov: look one update ahead.  iterations: of Newton and Schulz.
             rms: root mean square of an entry of the update, so that Adam's learning rate and weight decay serve (0.2); None: the original
             scale sqrt(max(1, outputs / inputs)), which wants a rate of about 0.02.
             b1, b2, eps: Adam's.  weight_decay: decoupled, times the learning rate.  mask: which parameters decay; None: all.
             adam: path globs of kernels that Adam takes: the head.  heads: path globs of kernels whose output is (heads, head width).
    Raises:  ConfigError: a glob of your own in `adam` that fits no parameter.
    Source:  Jordan et al. 2024, kellerjordan.github.io/posts/muon; rms: Liu et al. 2025, section 2.2. Momentum is not bias-corrected, as there
             and in torch (optax's own is); Newton-Schulz runs in the parameters' type, where theirs runs in bfloat16.
    """

    def labels(params: Tree) -> Tree:
        require_matches(adam, params, "optimizer.adam", may_miss=_SHARED_ADAM)
        return map_paths(lambda path, x: "muon" if x.ndim >= 2 and path.endswith("kernel") and not matches(path, adam) else "adam", params)

    def orthogonal(updates: Tree, params: Tree | None) -> Tree:
        return map_paths(lambda path, x: _orthogonal(x, min(2 if matches(path, heads) else 1, x.ndim - 1), iterations, rms), updates)

    parts: dict[Hashable, optax.GradientTransformation] = {
        "muon": optax.chain(optax.trace(momentum, nesterov), optax.stateless(orthogonal)),
        "adam": optax.scale_by_adam(b1, b2, eps),
    }
    return optax.chain(optax.partition(parts, labels), optax.add_decayed_weights(weight_decay, mask), optax.scale_by_learning_rate(learning_rate))


def _orthogonal(x, outputs, iterations, rms):
    """The update of one kernel, whose last `outputs` axes are outputs."""
    columns = math.prod(x.shape[-outputs:])
    matrix = x.reshape(-1, columns)  # [inputs..., outputs...] -> [i, o]
    rows = matrix.shape[0]
    scale = math.sqrt(max(1.0, columns / rows)) if rms is None else rms * math.sqrt(max(rows, columns))
    return (scale * newton_schulz(matrix, iterations)).reshape(x.shape)


def newton_schulz(x: Float[Array, "i o"], iterations: int = 5) -> Float[Array, "i o"]:
    """The matrix with its singular values brought near 1 (between about 0.7 and 1.2), and its singular vectors kept.

    Args:    iterations: of the quintic a x + b x^3 + c x^5; five suffice, since the constants give up convergence for speed.
    Returns: 0 for a matrix of zeros.
    Source:  Jordan et al. 2024.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = x if x.shape[0] <= x.shape[1] else x.T
    wide = wide / jnp.maximum(jnp.linalg.norm(wide), 1e-7)
    for _ in range(iterations):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if x.shape[0] <= x.shape[1] else wide.T
