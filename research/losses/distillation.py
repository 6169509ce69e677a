"""How far a student's answers, hidden states and attention are from a teacher's, per element."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.losses.regression import squared_error


def soft_loss(logits: Float[Array, "*b n"], teacher: Float[Array, "*b n"], temperature: float | Float[Array, ""]) -> Float[Array, "*b"]:
    """T² KL(softmax(teacher / T) ‖ softmax(logits / T)) of each element, in nats.

    The factor T² keeps the gradient's size as T grows: for T -> infinity it tends to that of half the variance over classes of the difference
    of the logits, that is, of their squared error once both are centred.

    Args:    temperature: T, above 0.
    Source:  Hinton, Vinyals and Dean 2015, sections 2 and 2.1.
    """
    student = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    wanted = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature)
    return temperature**2 * (jnp.exp(wanted) * (wanted - student)).sum(-1)


def cosine_distance(x: Float[Array, "*b d"], y: Float[Array, "*b d"]) -> Float[Array, "*b"]:
    """1 - cos(x, y) over the last axis.

    Source:  Sanh et al. 2019 (DistilBERT), section 3.
    """
    return 1.0 - (_unit(x) * _unit(y)).sum(-1)


def patient_distance(x: Float[Array, "*b d"], y: Float[Array, "*b d"]) -> Float[Array, "*b"]:
    """|x / |x| - y / |y||² over the last axis.

    Source:  Sun et al. 2019 (patient knowledge distillation), equation 7.
    """
    return jnp.square(_unit(x) - _unit(y)).sum(-1)


def attention_loss(weights: Float[Array, "b h t s"], teacher: Float[Array, "b g t s"]) -> Float[Array, "b t"]:
    """KL(teacher ‖ student) over the keys of each query: the mean over heads; where their numbers differ, of the weights averaged over heads.

    Source:  Wang et al. 2020 (MiniLM), equation 2.
    """
    student, wanted = weights.astype(jnp.float32), teacher.astype(jnp.float32)
    if student.shape[1] != wanted.shape[1]:
        student, wanted = student.mean(1, keepdims=True), wanted.mean(1, keepdims=True)
    seen = wanted > 0  # a masked key has the weight 0 in both
    ratio = jnp.log(jnp.where(seen, wanted, 1.0)) - jnp.log(jnp.where(seen, jnp.maximum(student, 1e-30), 1.0))
    return (wanted * ratio).sum(-1).mean(1)


HIDDEN = {"mse": squared_error, "cosine": cosine_distance, "patient": patient_distance}


def _unit(x):
    """x at length 1 over the last axis; at 0 it stays 0, with a gradient of 0."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))
