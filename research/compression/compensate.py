"""Compressing a matrix input by input, each error made up for by the inputs that are still to come: what SparseGPT and GPTQ share."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.core.errors import ConfigError

Decide = Callable[[Int[Array, ""], Float[Array, "g o"]], Any]
Rule = Callable[[Any, Int[Array, ""], Float[Array, "o"]], Float[Array, "o"]]


def check(block: int, damp: float) -> None:
    """Refuses settings that no compensation can use.

    Raises:  ConfigError: naming the setting and what it must be.
    """
    if block < 1:
        raise ConfigError(f"method.block={block}: must be at least 1")
    if damp < 0:
        raise ConfigError(f"method.damp={damp}: must not be negative, as 0.01")


def inverse_cholesky(hessian: Float[Array, "i i"], damp: float = 0.01) -> Float[Array, "i i"]:
    """The upper triangular U with UᵀU = (H + damp mean(diag H) 1)⁻¹: row i says how the inputs after i make up for an error at i.

    An input that is always zero gets 1 on the diagonal, so that H can be inverted; its weights do nothing, and the caller sets them to zero. One
    Cholesky factor of H, read backwards, is inverted: the inverse of H itself, which costs half the digits, is never formed.

    Args:    hessian: of the squared error, 2/n sum of x xᵀ over n rows.  damp: share of the mean of the diagonal that is added to it.
    Returns: float32; NaN where H, with what was added, is not positive definite.
    Source:  Frantar et al. 2022 (GPTQ), section 3, step 3.
    """
    hessian = hessian.astype(jnp.float32)
    diagonal = jnp.diagonal(hessian)
    diagonal = jnp.where(diagonal == 0, 1.0, diagonal)
    hessian = jnp.fill_diagonal(hessian, diagonal + damp * diagonal.mean(), inplace=False)
    factor = jnp.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]  # upper: H = R Rᵀ, so U = R⁻¹
    return jax.scipy.linalg.solve_triangular(factor, jnp.eye(len(hessian), dtype=jnp.float32), lower=False)


def compensate(
    matrix: Float[Array, "i o"], factor: Float[Array, "i i"], decide: Decide, rule: Rule, *, group: int | None = None, block: int = 128
) -> Float[Array, "i o"]:
    """The matrix with every input's weights compressed in turn, the later inputs changed so that the product with the data stays near.

    With w the weights of input i by then, q what they become and e = (w - q) / U_ii, each later input j loses U_ij e. Within a block the later
    inputs are changed at once; those after it wait for the block's end, since one matrix product is much faster than many outer ones.

    Args:    matrix: inputs first, float32.  factor: `inverse_cholesky` of the Hessian.
             decide: (the group's first input, its weights by then) -> any tree of arrays, as a mask or scales: what the group's inputs have in
             common, chosen once when its first input's turn comes. A choice made beforehand is simply closed over: `lambda *_: ()`.
             rule: (what `decide` returned, the input's place in its group, its weights by then) -> its compressed weights.
             group: inputs that are decided together; None: a whole block. It divides `block`, and the matrix's inputs unless it is the block itself,
             where the last group is what is left.
             block: inputs between two updates of the rest; changes rounding alone where `group` is given.
    Raises:  ValueError: a group that does not divide the block or the inputs.
    Source:  Frantar and Alistarh 2023 (SparseGPT), algorithm 1; Frantar et al. 2022 (GPTQ), algorithm 1.
    """
    inputs = matrix.shape[0]
    group = block if group is None else group
    if block % group or (group != block and inputs % group):
        raise ValueError(f"group={group} must divide block={block} and the {inputs} inputs")
    step = functools.partial(_block, factor=factor, decide=decide, rule=rule, group=group)
    whole = inputs // block
    if whole:
        matrix = jax.lax.fori_loop(0, whole, lambda i, matrix: step(matrix, i * block, size=block), matrix)
    if inputs % block:
        matrix = step(matrix, jnp.asarray(whole * block), size=inputs % block)
    return matrix


def _block(matrix, start, size, factor, decide, rule, group):
    """The matrix with inputs start … start + size - 1 compressed and the later ones changed."""
    group = min(group, size)
    inner = jax.lax.dynamic_slice(factor, (start, start), (size, size))
    diagonal = jnp.diagonal(inner)

    def compress(i, carry, decision, first):
        weights, done, errors = carry
        old = weights[i]
        new = rule(decision, i - first, old)
        error = (old - new) / diagonal[i]
        return weights - jnp.outer(inner[i], error), done.at[i].set(new), errors.at[i].set(error)

    def compress_group(g, carry):
        first = g * group
        decision = decide(start + first, jax.lax.dynamic_slice_in_dim(carry[0], first, group))
        return jax.lax.fori_loop(first, first + group, lambda i, carry: compress(i, carry, decision, first), carry)

    weights = jax.lax.dynamic_slice_in_dim(matrix, start, size)
    _, done, errors = jax.lax.fori_loop(0, size // group, compress_group, (weights, jnp.zeros_like(weights), jnp.zeros_like(weights)))
    rows = jax.lax.dynamic_slice_in_dim(factor, start, size)  # b i
    later = jnp.arange(matrix.shape[0]) >= start + size
    change = jnp.matmul(jnp.where(later[None], rows, 0.0).T, errors, precision="highest")
    return jax.lax.dynamic_update_slice_in_dim(matrix - change, done, start, 0)
