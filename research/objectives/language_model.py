"""Language modelling: the next token at each position."""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.core.errors import ConfigError
from research.core.types import Batch, Decoder, Hyper, Tally, Tree
from research.losses.cross_entropy import cross_entropy, z_loss
from research.metrics.average import average
from research.metrics.classification import accuracy
from research.objectives.supervised import Supervised


@dataclasses.dataclass(frozen=True)
class LanguageModel(Supervised):
    """Cross-entropy of `target` per valid token, with accuracy, perplexity and bits per byte.

    Args:    z_loss: coefficient of the squared log-normaliser, 1e-4 in PaLM; None: read from hyper.  `loss` leaves it out.
             bytes_per_token: bytes of text per predicted token of the validation split; None: bits per byte are not reported.
             chunk: positions of each text whose logits exist at one time; the backward pass computes them again, one more product with the head.
             None: all logits are kept. A vocabulary of 50,257 takes 200 KB of float32 logits a token, more than the rest of a small model.
    Raises:  ConfigError: a chunk below 1, or for a module that does not say what its head is.
    """

    z_loss: float | None = 0.0
    bytes_per_token: float | None = None
    chunk: int | None = None

    def __post_init__(self):
        if self.chunk is not None and self.chunk < 1:
            raise ConfigError(f"objective.chunk={self.chunk}: must be a number of positions from 1 on, or null for all at once")
        if self.chunk is not None and not hasattr(self.module, "head"):
            raise ConfigError(f"objective.chunk={self.chunk}: {type(self.module).__name__} has no head apart from its body; use null")

    @property
    def coefficients(self) -> tuple[tuple[str, float], ...]:
        """The terms of the loss; z_loss only where it is used."""
        return (("cross_entropy", 1.0),) if self.z_loss == 0.0 else (("cross_entropy", 1.0), ("z_loss", self.z_loss or 0.0))

    def weights(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """The number of valid tokens."""
        count = batch["mask"].sum(dtype=jnp.float32)
        return {name: count for name, _ in self.coefficients}

    def __call__(
        self, params: Tree, extra: Tree, frozen: Tree, batch: Batch, key: jax.Array | None, hyper: Hyper, *, train: bool
    ) -> tuple[Tally, Tree]:
        """(tally, extra): the sums of one microbatch, chunk by chunk where `chunk` is set."""
        if self.chunk is None or batch["target"].shape[1] <= self.chunk:
            return super().__call__(params, extra, frozen, batch, key, hyper, train=train)
        _, taps, extra = self.apply(params, extra, frozen, batch, key, hyper, train=train)  # its logits are not read, so not computed
        return self._tally_in_chunks(taps["normalized"], self._head(params), batch, hyper, train), extra

    def tally(self, outputs: Float[Array, "b t v"], batch: Batch, hyper: Hyper, *, train: bool) -> Tally:
        """Sums of the loss and of the right tokens."""
        target, mask = batch["target"], batch["mask"]
        loss, count = average(cross_entropy(outputs, target), mask)
        terms = {"cross_entropy": loss}
        metrics = {"loss": (loss, count), "accuracy": accuracy(outputs, target, mask)}
        if self.z_loss != 0.0:
            terms["z_loss"], _ = metrics["z_loss"] = average(z_loss(outputs), mask)
        if self.bytes_per_token is not None:
            metrics["bits_per_byte"] = (loss / math.log(2), count * self.bytes_per_token)
        return Tally(terms, metrics)

    def _head(self, params):
        """The matrix that makes logits of the tap `normalized`, in float32: so the chunks' gradients add in float32."""
        head: Any = self.module
        return head.head(params)

    def _tally_in_chunks(self, x, head, batch, hyper, train):
        """The sums of `tally` over the logits x @ head, one chunk of them at a time. Cut along time: the batch may lie on many devices."""
        padding = -x.shape[1] % (self.chunk or 1)

        def cut(y):  # b t ... -> chunks b t/chunks ...
            y = jnp.pad(y, ((0, 0), (0, padding), *((0, 0),) * (y.ndim - 2)))  # a mask of False: padded positions count nothing
            return y.reshape(y.shape[0], -1, self.chunk, *y.shape[2:]).swapaxes(0, 1)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def of_chunk(x, target, mask):
            logits = (x @ head.astype(x.dtype)).astype(jnp.float32)
            return self.tally(logits, {"target": target, "mask": mask}, hyper, train=train)

        chunks = tuple(map(cut, (x, batch["target"], batch["mask"])))
        shapes = jax.eval_shape(of_chunk, *(chunk[0] for chunk in chunks))
        zeros = jax.tree.map(lambda sum: jnp.zeros(sum.shape, sum.dtype), shapes)
        return jax.lax.scan(lambda sums, chunk: (jax.tree.map(jnp.add, sums, of_chunk(*chunk)), None), zeros, chunks)[0]

    def derived(self, means: dict[str, float | None]) -> dict[str, float]:
        """Perplexity, exp(loss)."""
        loss = means.get("loss")
        return {} if loss is None or loss > 700.0 else {"perplexity": math.exp(loss)}  # exp(710) is no float

    def decoder(self) -> Decoder | None:
        """Decoding with a cache, where the module offers an `empty_cache`."""
        return CachedDecoder(self.module) if hasattr(self.module, "empty_cache") else None


@dataclasses.dataclass(frozen=True)
class CachedDecoder:
    """Decoding by a module that keeps what it has read in the collection `cache`, batch axis first.

    Args:    module: has `empty_cache(rows, length)`, a dict whose `length` counts the positions that each row holds.
    """

    module: nn.Module

    def begin(self, params: Tree, extra: Tree, frozen: Tree, batch: Batch, length: int, hyper: Hyper) -> Tree:
        """A cache with room for `length` positions, filled with the prompt: tokens padded at the end, mask True where they count.

        For the logits after the prompt, rewind by one position and advance by the prompt's last token.
        """
        tokens = batch["tokens"]
        cache = self.module.empty_cache(tokens.shape[0], length)
        return self._run(params, extra, cache, tokens, hyper, mask=batch["mask"])[1]

    def advance(
        self, params: Tree, extra: Tree, frozen: Tree, cache: Tree, tokens: Int[Array, "b n"], hyper: Hyper
    ) -> tuple[Float[Array, "b n v"], Tree]:
        """(logits after each of the tokens, the longer cache)."""
        return self._run(params, extra, cache, tokens, hyper)

    def rewind(self, cache: Tree, length: Int[Array, "b"]) -> Tree:
        """The cache as it was when each row held `length` positions; later ones are overwritten by the next advance."""
        return {**cache, "length": length}

    def _run(self, params, extra, cache, tokens, hyper, **how):
        variables = {"params": params, **extra, "cache": cache}
        (logits, _), changed = self.module.apply(variables, tokens, hyper=hyper, train=False, mutable=["cache"], **how)
        return logits, changed["cache"]
