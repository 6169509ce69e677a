"""Which earlier tokens each token of a generated text was made from."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from research.core.errors import ConfigError
from research.core.progress import track
from research.explanation.gradient import InputXGradient, IntegratedGradients
from research.explanation.model import Examples, Model, outputs_of
from research.explanation.result import Finding, at_least
from research.explanation.stream import seen
from research.figures import explanation as draw


@dataclasses.dataclass(frozen=True)
class Generation:
    """The model goes on with the text, and each new token's logit is attributed to the tokens before it.

    The text of an example goes up to the explained position, which `position` sets. Of one new token after another the logit is explained by
    input x gradient or, with points, by integrated gradients, whose rows sum to the logit less that of an empty embedding.

    Args:    tokens: how many to make.  temperature: 0: always the likeliest; above: drawn from softmax(logits / temperature).
             points: of the quadrature of integrated gradients; 0: input x gradient.
    Raises:  ValueError: numbers out of range.
    """

    tokens: int = 20
    temperature: float = 0.0
    points: int = 0
    reads: ClassVar[str] = "examples"

    def __post_init__(self):
        at_least(self, tokens=1, temperature=0, points=0)

    def fits(self, model: Model) -> str | None:
        """A model that does not go on with tokens does not."""
        return (
            None
            if model.field == "tokens" and len(model.outputs) == 2 and "vocabulary" in model.spec
            else "it does not go on with a sequence of tokens"
        )

    def __call__(self, model: Model, examples: Examples, key: jax.Array) -> Finding:
        """A matrix an example: a row for each new token, a column for each token before the last."""
        context, longest = model.spec["time"], int(examples.target[:, 0].max()) + 1
        if longest + self.tokens > context + 1:  # the last one is made, not read
            room = context + 1 - longest
            more = f"make at most method.tokens={room}" if room > 0 else "give a shorter one, or an earlier position"
            raise ConfigError(f"method.tokens={self.tokens}: the text has {longest} of the {context} tokens that the model reads; {more}")
        method = IntegratedGradients(points=self.points) if self.points else InputXGradient()
        each, kept = [], {}
        for i, name in track(list(enumerate(examples.names)), "attributing"):
            count = int(examples.target[i, 0]) + 1
            row = np.zeros((1, context), np.int32)
            row[0, :count] = np.asarray(examples.batch["tokens"])[i, :count]
            made = np.asarray(
                _continued(model.objective, self.tokens, model.arrays, row, count, np.float32(self.temperature), jax.random.fold_in(key, i))
            )
            whole = np.concatenate([row[0, :count], made])
            read = np.broadcast_to(whole[:-1], (self.tokens, len(whole) - 1))
            places = np.arange(count - 1, len(whole) - 1, dtype=np.int32)
            before = np.arange(len(whole) - 1, dtype=np.int32)[None] <= places[:, None]
            batch = {"tokens": read, "mask": before, "index": np.arange(self.tokens, dtype=np.int32)}
            asked = Examples(batch, [f"{name}, token {place + 1}" for place in places], np.stack([places, made], axis=1))
            found = method(model, asked, key)
            kept |= {f"values_{i}": found.values, f"tokens_{i}": whole, f"output_{i}": found.output}
            text = [model.token(int(token)) for token in whole]
            heat = draw.Heat(
                found.values,
                [seen(t) for t in text[count:]],
                [seen(t) for t in text[:-1]],
                "each new token, by the tokens before it",
                x="read",
                y="made",
            )
            total = draw.Tokens(text, np.concatenate([found.values.sum(0), [0.0]]), "what all new tokens together were made from")
            each.append((total, heat))
        return Finding(numbers={"tokens": self.tokens}, kept=kept, each=each)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _continued(objective, tokens, arrays, row, count, temperature, key):
    """The tokens that the model adds to the first `count` of the row."""

    def step(row, n):
        batch = {"tokens": row, "mask": jnp.ones(row.shape, bool), "index": jnp.zeros(1, jnp.int32)}
        logits = outputs_of(objective, arrays, batch)[0][0, count + n - 1]
        lot = jax.random.categorical(jax.random.fold_in(key, n), logits / jnp.maximum(temperature, 1e-6))
        new = jnp.where(temperature > 0, lot, logits.argmax(-1)).astype(row.dtype)
        return row.at[0, count + n].set(new, mode="drop"), new

    return jax.lax.scan(step, row, jnp.arange(tokens, dtype=jnp.int32))[1]
