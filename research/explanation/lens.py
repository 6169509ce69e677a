"""What a language model would say if it stopped after each block."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from research.core.errors import ConfigError
from research.core.progress import track
from research.explanation.model import INPUT, Examples, Model, outputs_of, replaced
from research.explanation.result import Finding, at_least
from research.explanation.stream import OUTPUT, blocks, labels, seen, short, unfit
from research.figures import explanation as draw

TOP = 5  # tokens that a table names
CHUNK = 8  # sequences on which a trained lens is measured at once


@dataclasses.dataclass(frozen=True)
class LogitLens:
    """The logits that follow when a block's output is put in the place of the last block's: after the last block they are the model's own.

    Args:    top: tokens to name after each block.
    Source:  nostalgebraist 2020, "interpreting GPT: the logit lens".
    """

    top: int = TOP
    reads: ClassVar[str] = "examples"

    def __post_init__(self):
        at_least(self, top=1)

    def fits(self, model: Model) -> str | None:
        """A model without a residual stream, or without an output at each token, does not."""
        return unfit(model)

    def __call__(self, model: Model, examples: Examples, key: jax.Array) -> Finding:
        """For each block the logits at the explained position, and at every position how far it is from the model's last word."""
        layers = _layers(model)
        read = _lens(model.objective, layers, None, min(self.top, model.outputs[-1]), model.arrays, examples.batch, examples.target)
        return _finding(model, examples, layers, {name: np.asarray(value) for name, value in read.items()})


@dataclasses.dataclass(frozen=True)
class TunedLens:
    """The logit lens through an affine map of each block's output, trained so that what follows comes close to the model's own logits.

    The maps start at the identity and are trained on the run's own data to lower KL(model || lens); no parameter of the model changes.

    Args:    steps: updates.  batch: sequences an update.  rate: learning rate, falling to 0 by a cosine.  top: tokens to name.
             held: sequences on which the KL before and after is measured, of the validation split where there is one.
    Raises:  ValueError: a number that is not above 0.
    Source:  Belrose et al. 2023, with Adam in the place of SGD.
    """

    steps: int = 250
    batch: int = 8
    rate: float = 1e-3
    held: int = 32
    top: int = TOP
    reads: ClassVar[str] = "examples"

    def __post_init__(self):
        for name in ("steps", "batch", "rate", "held", "top"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")

    def fits(self, model: Model) -> str | None:
        """As of the logit lens; and the run's data must be known."""
        return unfit(model) or (None if model.data is not None else "its data is not known, on which a lens is trained")

    def __call__(self, model: Model, examples: Examples, key: jax.Array) -> Finding:
        """As of the logit lens; and the KL to the model's logits after each block, untrained and trained."""
        assert model.data is not None
        splits = model.data().splits
        held = splits.get("validation", splits["train"])
        held = getattr(held, "whole", held)
        layers, order, measured = _layers(model), *(jax.random.split(key))
        width = model.taps[layers[0]].shape[-1]
        lens = {"kernel": jnp.zeros((len(layers), width, width)), "bias": jnp.zeros((len(layers), width))}
        optimizer = optax.adam(optax.cosine_decay_schedule(self.rate, self.steps))
        state = optimizer.init(lens)
        rows = np.asarray(jax.random.randint(order, (self.steps, self.batch), 0, len(splits["train"])))
        for indices in track(rows, "training the lens"):
            lens, state = _update(model.objective, layers, self.rate, self.steps, model.arrays, lens, state, _batch(splits["train"], indices))
        tests = np.asarray(jax.random.permutation(measured, len(held)))[: self.held]
        before, after = (self._measure(model, layers, held, tests, each) for each in (jax.tree.map(jnp.zeros_like, lens), lens))
        read = _lens(model.objective, layers, lens, min(self.top, model.outputs[-1]), model.arrays, examples.batch, examples.target)
        made = _finding(model, examples, layers, {name: np.asarray(value) for name, value in read.items()})
        names = [short(name) for name in layers]
        compared = draw.Lines(
            {"logit lens": (range(len(names)), before), "tuned lens": (range(len(names)), after)},
            "KL to the model's own prediction, held-out text",
            x="after block (0: the embedding)",
            y="nats a token",
        )
        numbers = {"kl_before": dict(zip(names, before.tolist(), strict=True)), "kl_after": dict(zip(names, after.tolist(), strict=True))}
        lines = tuple(f"{name}: KL {old:.4f} by the logit lens, {new:.4f} tuned" for name, old, new in zip(names, before, after, strict=True))
        kept = {**made.kept, "kernel": np.asarray(lens["kernel"]), "bias": np.asarray(lens["bias"]), "kl_before": before, "kl_after": after}
        return dataclasses.replace(made, drawn=(compared,), numbers={**made.numbers, **numbers}, kept=kept, lines=lines)

    def _measure(self, model: Model, layers: tuple[str, ...], source: Any, indices: np.ndarray, lens: Any) -> Float[np.ndarray, "l"]:
        """The mean KL a token after each block."""
        total, count = np.zeros(len(layers)), 0.0
        for start in range(0, len(indices), CHUNK):
            taken = indices[start : start + CHUNK]
            batch = _batch(source, np.resize(taken, CHUNK))
            batch["mask"] = batch["mask"] & (np.arange(CHUNK) < len(taken))[:, None]
            kl, tokens = _divergence(model.objective, layers, model.arrays, lens, batch)
            total += np.asarray(kl, np.float64)
            count += float(tokens)
        if not count:
            raise ConfigError("the held-out examples hold no token that counts; give more by method.held")
        return total / count


def _layers(model: Model) -> tuple[str, ...]:
    """The input and the blocks' outputs."""
    return (*((INPUT,) if INPUT in model.taps else ()), *(block.at(OUTPUT) for block in blocks(model)))


def _batch(source: Any, indices: np.ndarray) -> dict[str, np.ndarray]:
    fields = source.take(np.asarray(indices))
    return {"mask": np.ones(fields["tokens"].shape, bool), **fields, "index": np.asarray(indices, np.int32)}


def _finding(model: Model, examples: Examples, layers: tuple[str, ...], read: dict[str, np.ndarray]) -> Finding:
    """The tables and maps of each example from what `_lens` gives, layer first."""
    names = [short(name) for name in layers]
    each = []
    for i in range(len(examples)):
        tokens, place, target = [seen(token) for token in labels(model, examples, i)], int(examples.target[i, 0]), int(examples.target[i, 1])
        said = [[seen(model.token(int(t))) for t in row[i, : len(tokens)]] for row in read["likeliest"]]
        heat = draw.Heat(
            read["log_prob"][:, i, : len(tokens)], names, tokens, "log-probability of the model's own prediction", x="after", signed=False
        )
        rows = [
            [names[n], *(f"{seen(model.token(int(t)))} {p:.1%}" for t, p in zip(read["top"][n, i], read["probability"][n, i], strict=True))]
            for n in range(len(names))
        ]
        ranks = ["likeliest", *(f"{n + 1}." for n in range(1, read["top"].shape[-1]))]
        logits = read["logits"][:, i, target]
        curve = draw.Lines(
            {model.token(target): (range(len(names)), logits)},
            f"logit of {model.token(target)!r} after token {place}",
            x="after block (0: the embedding)",
        )
        words = [[str(t), tokens[t], *(row[t] for row in said)] for t in range(len(tokens))]
        each.append(
            (
                heat,
                curve,
                draw.Rows(["after", *ranks], rows, f"what is said after token {place}, {tokens[place]!r}" if place < len(tokens) else "what is said"),
                draw.Rows(["", "token", *names], words, "what is said after each token"),
            )
        )
    kept = {name: read[name] for name in ("logits", "likeliest", "log_prob", "kl")}
    target = {"explained": [model.explained(each) for each in examples.target], "target": examples.target[:, 1], "position": examples.target[:, 0]}
    return Finding(
        numbers={"layers": names, **target, "kl": {n: float(k.mean()) for n, k in zip(names, read["kl"], strict=True)}}, kept=kept, each=each
    )


def _through(objective, layers, arrays, lens, batch, each):
    """(the model's logits, each(logits after one layer, the model's logits), stacked): one layer's logits at a time are in memory."""
    final, taps = outputs_of(objective, arrays, batch)
    stacked = jnp.stack([taps[name] for name in layers])

    def one(values):
        stream, maps = values
        if maps is not None:
            stream = stream + (stream @ maps["kernel"] + maps["bias"].reshape(1, 1, -1)).astype(stream.dtype)
        return each(outputs_of(objective, arrays, batch, {layers[-1]: replaced(stream)})[0], final)

    return jax.lax.map(one, (stacked, lens))


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def _lens(objective, layers, lens, top, arrays, batch, target):
    def each(logits, final):
        log_probs, theirs = jax.nn.log_softmax(logits), jax.nn.log_softmax(final)
        rows = jnp.arange(len(target), dtype=jnp.int32)
        here = logits[rows, target[:, 0]]
        values, tokens = jax.lax.top_k(jax.nn.softmax(here), top)
        said = jnp.take_along_axis(log_probs, final.argmax(-1)[..., None], -1)[..., 0]
        kl = (jnp.exp(theirs) * (theirs - log_probs)).sum(-1)[rows, target[:, 0]]
        return {"logits": here, "likeliest": logits.argmax(-1), "log_prob": said, "top": tokens, "probability": values, "kl": kl}

    return _through(objective, layers, arrays, lens, batch, each)


def _sums(objective, layers, arrays, lens, batch):
    """(the sum over the tokens that count of KL(model || lens), for each layer; how many they are)."""

    def each(logits, final):
        mine, theirs = jax.nn.log_softmax(logits), jax.nn.log_softmax(final)
        return jnp.where(batch["mask"], (jnp.exp(theirs) * (theirs - mine)).sum(-1), 0.0).sum()

    return _through(objective, layers, arrays, lens, batch, each), batch["mask"].sum(dtype=jnp.float32)


_divergence = functools.partial(jax.jit, static_argnums=(0, 1))(_sums)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=(5, 6))
def _update(objective, layers, rate, steps, arrays, lens, state, batch):
    """(the lens, the optimizer's state) after one more step."""

    def loss(lens):
        kl, count = _sums(objective, layers, arrays, lens, batch)
        return kl.sum() / jnp.maximum(count, 1.0)

    with jax.numpy_dtype_promotion("standard"):  # optax counts in int32 and scales in float32
        changes, state = optax.adam(optax.cosine_decay_schedule(rate, steps)).update(jax.grad(loss)(lens), state)
        return optax.apply_updates(lens, changes), state
