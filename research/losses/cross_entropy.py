"""Cross-entropy of integer labels, per element."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "..."],
    label: Int[Array, "..."],
    *,
    label_smoothing: float | Float[Array, ""] = 0.0,
    class_weights: Float[Array, "n"] | None = None,
    axis: int = -1,
) -> Float[Array, "..."]:
    """-log softmax(logits)[label] of each element, in nats and float32.

    Smoothed: (1 - s) w[label] nll[label] + s / n sum_c w[c] nll[c]. For torch's weighted mean divide the sum by the sum of w[label].

    Args:    logits: unnormalised, any floating type.  label: class numbers, without the class axis; in range (a gather clamps silently).
             label_smoothing: share s of the target spread over all classes, in [0, 1).  class_weights: weight of each class; None: all 1.
             axis: the class axis of logits.
    Source:  Szegedy et al. 2016, section 7 (smoothing); weighted as torch.nn.functional.cross_entropy.
    """
    logits = jnp.moveaxis(logits, axis, -1).astype(jnp.float32)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    loss = normalizer - jnp.take_along_axis(logits, label[..., None], axis=-1)[..., 0]
    if class_weights is not None:
        loss = loss * class_weights[label]
    if isinstance(label_smoothing, float) and label_smoothing == 0.0:
        return loss
    each = jnp.ones(logits.shape[-1]) if class_weights is None else class_weights
    spread = (normalizer * each.sum() - logits @ each) / logits.shape[-1]
    return (1.0 - label_smoothing) * loss + label_smoothing * spread


def z_loss(logits: Float[Array, "..."], *, axis: int = -1) -> Float[Array, "..."]:
    """log(sum(exp(logits)))^2 of each element: keeps the softmax's normaliser near 1, and so the logits from drifting.

    Source:  Chowdhery et al. 2022 (PaLM), section 5; coefficient 1e-4 there.
    """
    return jnp.square(jax.nn.logsumexp(logits.astype(jnp.float32), axis=axis))
