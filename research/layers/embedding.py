"""Embeddings of tokens and of positions."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.core.axis import constrain, name_axes

POSITIONS = ("learned", "sinusoidal", "rotary")


class Embedding(nn.Module):
    """A learned vector for each of `size` numbers.

    Args:    size: how many numbers there are; larger ones are read as the last (a gather clamps).  width: length of a vector.
             scale: standard deviation of the initial values.  dtype: compute type.  axis: logical name of the axis of the numbers.
    """

    size: int
    width: int
    scale: float = 0.02
    dtype: str = "float32"
    axis: str | None = "vocabulary"

    def setup(self):
        name_axes(self, "embedding", self.axis, "width")
        self.embedding = self.param("embedding", nn.initializers.normal(self.scale), (self.size, self.width), jnp.float32)

    def __call__(self, numbers: Int[Array, "*b"]) -> Float[Array, "*b d"]:
        """The vectors of these numbers."""
        whole = constrain(self.embedding, self.axis, None)  # vectors in one piece: the partitioner cannot look up parts of them for parts of a batch
        return jnp.take(whole, numbers, axis=0, mode="clip").astype(self.dtype)

    def attend(self, x: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """The dot product of x with every vector: the logits of a tied head."""
        return x @ self.embedding.astype(self.dtype).T


def sinusoidal(positions: Int[Array, "b t"], width: int) -> Float[Array, "b t d"]:
    """Sines, then cosines, of the positions at wavelengths from 2 pi to 10,000 x 2 pi.

    Args:    width: even.
    Source:  Vaswani et al. 2017, section 3.5, with sines and cosines side by side rather than interleaved.
    """
    angle = _angles(positions, width)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def rotate(x: Float[Array, "b h t k"], positions: Int[Array, "#b t"]) -> Float[Array, "b h t k"]:
    """Queries or keys turned by an angle that grows with the position, so that their dot products depend on distances alone.

    The two halves of k are the two coordinates of the planes, as in Llama; the paper interleaves them, a permutation of k.

    Args:    x: k is even.
    Source:  Su et al. 2021 (RoFormer), section 3.4.
    """
    angle = _angles(positions, x.shape[-1])[:, None]  # 1 t k/2
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _angles(positions, width):
    """Position times frequency, b t d/2: frequencies fall from 1 to almost 1 / 10,000."""
    frequency = 10_000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    return positions[..., None].astype(jnp.float32) * frequency[None, None]
