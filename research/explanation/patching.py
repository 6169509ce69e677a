"""What matters inside: activations exchanged between two runs of a model, along one path or all, and heads taken out."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from research.core.errors import ConfigError
from research.core.progress import track
from research.core.tree import matches
from research.core.types import Batch
from research.explanation.model import INPUT, Examples, Model, outputs_of, replaced
from research.explanation.result import Finding, at_least
from research.explanation.stream import HEADS, OUTPUT, another, blocks, by_head, chosen, difference, grid, labels, seen, short
from research.explanation.vectors import last, splits
from research.figures import explanation as draw
from research.losses.cross_entropy import cross_entropy

ROWS = 256  # examples in one call of the model
CORRUPT = "corrupt"
By: TypeAlias = Literal["position", "head", "channel", "whole"]


@dataclasses.dataclass(frozen=True)
class Site:
    """A tap, cut into the units that are exchanged one by one.

    Args:    tap: its path.  by: what a unit is: one position, one head, one channel of the last axis, or all there is.  count: units.
    """

    tap: str
    by: By
    count: int

    def masks(self, rank: int) -> Bool[np.ndarray, "n ..."]:
        """For each unit, where of the tap it is: n 1 ... of this rank after n."""
        shape = [1] * rank
        shape[{"position": 1, "head": 1, "channel": -1, "whole": 0}[self.by]] = self.count
        return np.eye(self.count, dtype=bool).reshape(self.count, *shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """What methods share that compare an example with a corrupt one.

    Scores are the target's logit, less that of another output, so scaled that 0 is the corrupt run and 1 the clean one.

    Args:    corrupt: a text; the number of an example of the run's own data, in the split that `index` counts in by default; None: the next
             example of the batch, the first after the last.
             against: the other output; "corrupt": what the corrupt run finds likeliest, where that is not the target; None: none.
             into: "corrupt": units of the clean run are put into the corrupt one, which shows what suffices; "clean": the other way round, which
             shows what is needed.
             rows: examples in one call of the model.
    Raises:  ValueError: less than one row, or another word for `into`.
    """

    corrupt: int | str | None = None
    against: Any = CORRUPT
    into: str = CORRUPT
    rows: int = ROWS
    reads: ClassVar[str] = "examples"

    def __post_init__(self):
        at_least(self, rows=1)
        if self.into not in (CORRUPT, "clean"):
            raise ValueError(f"into={self.into!r}: choose from: corrupt, clean")

    def runs(self, model: Model, examples: Examples) -> tuple[Batch, Batch, Int[np.ndarray, "b"], np.ndarray, np.ndarray]:
        """(clean batch, corrupt batch, the other output of each or -1, clean scores, corrupt scores).

        Raises:  ConfigError: no corrupt example, one of another length, or one that the model answers as the clean one.
        """
        clean = dict(examples.batch)
        corrupt = {**clean, model.field: _corrupted(model, examples, self.corrupt)}
        if self.against == CORRUPT:
            values = np.asarray(model.read(corrupt)[0])
            if examples.target.shape[1] > 1:
                values = values[np.arange(len(examples)), examples.target[:, 0]]
            likeliest = values.argmax(-1).astype(np.int32)
            against = np.where(likeliest == examples.target[:, -1], np.int32(-1), likeliest)
            if not ("classes" in model.spec or "vocabulary" in model.spec):
                against = np.full(len(examples), -1, np.int32)  # a regression's outputs do not compete
        else:
            against = another(model, examples, self.against)
        scores = [np.asarray(_scores(model.objective, model.arrays, batch, examples.target, against)) for batch in (clean, corrupt)]
        for i, name in enumerate(examples.names):
            if abs(scores[0][i] - scores[1][i]) <= 1e-6 * max(1.0, abs(scores[0][i])):
                raise ConfigError(f"{name}: the model answers the corrupt example as it does the clean one, so there is nothing to restore")
        return clean, corrupt, against, scores[0], scores[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patching(Pair):
    """Activation patching: unit by unit, a run of the corrupt example is given what the clean run held there.

    Args:    at: globs of taps; (): of a Transformer the embedding, each block's output and heads; of other models every tap before the output.
             by: what is exchanged at a time: a "position" of a stream of tokens, a "head", a "channel" of the last axis, the "whole" tap; None: by
             position and head where there are such, else as a whole.
    Raises:  ValueError: as of all pairs, or another word for `by`.
    Source:  Meng et al. 2022 (causal tracing); Heimersheim and Nanda 2024.
    """

    at: tuple[str, ...] = ()
    by: By | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.by is not None and self.by not in get_args(By):
            raise ValueError(f"by={self.by!r}: choose from: {', '.join(get_args(By))}")

    def fits(self, model: Model) -> str | None:
        """None: every model has taps."""
        return None

    def __call__(self, model: Model, examples: Examples, key: jax.Array) -> Finding:
        """The score of each unit, and of each tap as a whole."""
        clean, corrupt, against, high, low = self.runs(model, examples)
        base, source = (corrupt, clean) if self.into == CORRUPT else (clean, corrupt)
        taps = chosen(model, self.at) if self.at else _default(model)
        _, values = model.read(source, taps)
        sites = [_site(model, tap, values[tap], base, self.by) for tap in taps]
        every = [*sites, *(Site(site.tap, "whole", 1) for site in sites if site.by != "whole")]
        raw, _ = sweep(model, base, examples.target, against, every, values, rows=self.rows, what="patching")
        scores = {site: (raw[site] - low) / (high - low) for site in every}
        whole = {site.tap: scores[site].mean(1)[0] for site in every if site.by == "whole"}
        explained = _explained(model, examples, against)
        each = [_panels(model, examples, i, sites, scores, corrupt, what) for i, what in enumerate(explained)]
        kept = {f"{site.tap}/{site.by}".replace("/", "."): scores[site].T for site in every}
        numbers = {
            "explained": explained,
            "clean": high,
            "corrupt": low,
            "target": examples.target[:, -1],
            "against": against,
            "whole": {k: float(v) for k, v in whole.items()},
        }
        drawn = []
        if len(examples) > 1:
            if any(site.by == "head" for site in sites):
                drawn.append(_heads([site for site in sites if site.by == "head"], {site: score.mean(1) for site, score in scores.items()}, "mean"))
            drawn.append(draw.Bars([short(tap) for tap in whole], np.array(list(whole.values())), "the tap as a whole, mean", ordered=False))
        return Finding(drawn, numbers, kept, each, _lines(model, examples, against, high, low))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PathPatching(Pair):
    """Path patching: a head's output is exchanged, but only one reader may notice.

    All other heads keep what they held, so what reaches the reader from the head came straight along the residual stream, and through the MLPs
    between unless they are held too. Then the run is repeated with the reader alone given what it saw.

    Args:    receivers: globs of the taps that may notice, as block_1/attention/key; (): the last block's output, that is the outputs directly.
             head: of a receiver with heads, the only one that notices; None: all.  hold_mlps: MLPs keep what they held as well.
    Source:  Wang et al. 2023 (IOI), section 3.1; Goldowsky-Dill et al. 2023.
    """

    receivers: tuple[str, ...] = ()
    head: int | None = None
    hold_mlps: bool = False

    def fits(self, model: Model) -> str | None:
        """A model without attention heads does not."""
        return None if blocks(model) else "it has no tap of attention weights"

    def __call__(self, model: Model, examples: Examples, key: jax.Array) -> Finding:
        """The score of each head as a sender to each receiver."""
        clean, corrupt, against, high, low = self.runs(model, examples)
        base, source = (corrupt, clean) if self.into == CORRUPT else (clean, corrupt)
        found = blocks(model)
        senders = [block.at(HEADS) for block in found]
        receivers = chosen(model, self.receivers) if self.receivers else [found[-1].at(OUTPUT)]
        hidden = [block.at("mlp/hidden") for block in found if self.hold_mlps and block.at("mlp/hidden") in model.taps]
        held, (_, given) = model.read(base, (*senders, *hidden))[1], model.read(source, tuple(senders))
        sites = [Site(name, "head", block.heads) for name, block in zip(senders, found, strict=True)]
        kept, drawn, each = {}, [], [[] for _ in examples.names]
        for receiver in receivers:
            only = self._notices(model, receiver)
            run = functools.partial(_along, model.objective, receiver, model.arrays, base, examples.target, against, held, given, only)
            raw = _each(sites, {name: value.ndim for name, value in given.items()}, run, self.rows // len(examples), f"paths to {short(receiver)}")
            scores = {site: (raw[site] - low) / (high - low) for site in sites}
            kept[f"to.{receiver}".replace("/", ".")] = np.stack([grid([scores[site][:, i] for site in sites]) for i in range(len(examples))])
            title = f"paths to {short(receiver)}{'' if self.head is None else f' head {self.head}'}"
            for i, panels in enumerate(each):
                panels.append(_heads(sites, {site: score[:, i] for site, score in scores.items()}, title))
            if len(examples) > 1:
                drawn.append(_heads(sites, {site: score.mean(1) for site, score in scores.items()}, f"{title}, mean"))
        numbers = {"explained": _explained(model, examples, against), "clean": high, "corrupt": low}
        numbers |= {"target": examples.target[:, -1], "against": against, "receivers": receivers}
        return Finding(drawn, numbers, kept, each, _lines(model, examples, against, high, low))

    def _notices(self, model: Model, receiver: str) -> Bool[np.ndarray, "..."]:
        """Where of the receiver the change is let in."""
        shape = model.taps[receiver].shape
        if self.head is None:
            return np.ones([1] * len(shape), bool)
        if len(shape) != 4:
            raise ConfigError(f"method.head={self.head}: {receiver} has no heads; leave it out, or give method.receivers as **/attention/query")
        if not 0 <= self.head < shape[1]:
            raise ConfigError(f"method.head={self.head}: {receiver} has the heads 0 to {shape[1] - 1}")
        return (np.arange(shape[1]) == self.head).reshape(1, -1, 1, 1)


@dataclasses.dataclass(frozen=True)
class HeadAblation:
    """What the output loses when a head is silenced: the explained output with the head less without it.

    Where the examples come with the right tokens, as those of `index` do, also how much the loss rises on them, and what is left of the accuracy.

    Args:    value: what takes the place of the head's output: "zero", or "mean": its own mean over the examples and their positions.
             rows: examples in one call of the model.
    Raises:  ValueError: another value, or less than one row.
    Source:  Michel et al. 2019; mean ablation as in Wang et al. 2023.
    """

    value: str = "zero"
    rows: int = ROWS
    reads: ClassVar[str] = "examples"

    def __post_init__(self):
        if self.value not in ("zero", "mean"):
            raise ValueError(f"value={self.value!r}: choose from: zero, mean")
        at_least(self, rows=1)

    def fits(self, model: Model) -> str | None:
        """A model without attention heads does not."""
        return None if blocks(model) else "it has no tap of attention weights"

    def __call__(self, model: Model, examples: Examples, key: jax.Array) -> Finding:
        """What each head is worth, and each layer's heads together."""
        batch, found = dict(examples.batch), blocks(model)
        names = [block.at(HEADS) for block in found]
        _, taps = model.read(batch, names)
        values = {name: jnp.zeros_like(taps[name]) if self.value == "zero" else _mean(taps[name], examples.mask) for name in names}
        sites = [Site(name, "head", block.heads) for name, block in zip(names, found, strict=True)]
        layers = [Site(name, "whole", 1) for name in names]
        nobody, truth = np.full(len(examples), -1, np.int32), _truth(model, examples)
        raw, right = sweep(model, batch, examples.target, nobody, [*sites, *layers], values, rows=self.rows, truth=truth, what="silencing heads")
        output = np.asarray(_scores(model.objective, model.arrays, batch, examples.target, nobody))
        lost = {site: output - raw[site] for site in (*sites, *layers)}
        each = [[_heads(sites, {site: lost[site][:, i] for site in sites}, "what the output loses without the head")] for i in range(len(examples))]
        kept = {"lost": np.stack([grid([lost[site][:, i] for site in sites]) for i in range(len(examples))])}
        numbers: dict[str, Any] = {"explained": _explained(model, examples, nobody), "output": output, "target": examples.target[:, -1]}
        numbers["layers"] = {short(site.tap): float(lost[site].mean()) for site in layers}
        drawn, lines = [by_head(kept["lost"].mean(0), "what the output loses, mean")], []
        if truth is not None:
            loss, accuracy = (float(np.mean(x)) for x in _right(model.objective, model.arrays, batch, truth))
            rises = grid([right[site][0].mean(1) - loss for site in sites])
            left = grid([right[site][1].mean(1) for site in sites])
            drawn += [
                by_head(rises, f"how much the loss rises, from {loss:.4f}"),
                by_head(left, f"what is left of the accuracy, {accuracy:.4f}", signed=False),
            ]
            kept |= {"loss": rises, "accuracy": left}
            whole = {short(site.tap): float(right[site][1].mean()) for site in layers}
            numbers |= {
                "loss": loss,
                "accuracy": accuracy,
                "loss_rises": rises.tolist(),
                "accuracy_left": left.tolist(),
                "accuracy_without_layer": whole,
            }
            layer, head = np.unravel_index(np.nanargmax(rises), rises.shape)
            lines.append(f"without layer {layer} head {head} the loss rises most, from {loss:.4f} by {rises[layer, head]:.4f}")
            lines += [f"without all heads of {name} the accuracy is {value:.4f}, with them {accuracy:.4f}" for name, value in whole.items()]
        return Finding(drawn, numbers, kept, each, lines)


def sweep(
    model: Model,
    batch: Batch,
    target: Int[np.ndarray, "b k"],
    against: Int[np.ndarray, "b"],
    sites: Sequence[Site],
    values: Mapping[str, Array],
    *,
    rows: int = ROWS,
    truth: tuple[np.ndarray, np.ndarray] | None = None,
    what: str = "",
) -> tuple[dict[Site, Float[np.ndarray, "n b"]], dict[Site, tuple[np.ndarray, np.ndarray]]]:
    """(the score with each unit of each site replaced, {site: (loss, accuracy) of the same}): one compiled program for all of them.

    Args:    values: what takes the place of each tap, of its own shape, or 1 where an axis does not matter.
             truth: (right outputs, which of them count); None: no loss is told.
    """
    run = functools.partial(_edited, model.objective, model.arrays, batch, target, against, dict(values), truth)
    made = _each(sites, {name: value.ndim for name, value in values.items()}, run, rows // len(target), what)
    if truth is None:
        return made, {}
    return {site: value[0] for site, value in made.items()}, {site: (value[1], value[2]) for site, value in made.items()}


def _each(sites: Sequence[Site], ranks: Mapping[str, int], run: Any, at_once: int, what: str) -> dict[Site, Any]:
    """run(masks of some units) for all units of all sites, always as many at once: {site: what came of its units}."""
    total = sum(site.count for site in sites)
    at_once = max(1, min(at_once, total))
    padded = -(-total // at_once) * at_once
    taps = list(dict.fromkeys(site.tap for site in sites))
    masks = {}
    for tap in taps:
        own = [site.masks(ranks[tap]) if site.tap == tap else np.zeros((site.count, *[1] * ranks[tap]), bool) for site in sites]
        wide = np.broadcast_shapes(*(x.shape[1:] for x in own))
        masks[tap] = np.zeros((padded, *wide), bool)
        masks[tap][:total] = np.concatenate([np.broadcast_to(x, (len(x), *wide)) for x in own])
    parts = [
        jax.tree.map(np.asarray, run({tap: mask[i : i + at_once] for tap, mask in masks.items()})) for i in track(range(0, padded, at_once), what)
    ]
    made = jax.tree.map(lambda *each: np.concatenate(each), *parts)
    ends = np.cumsum([site.count for site in sites])
    return {site: jax.tree.map(lambda x, a=end - site.count, b=end: x[a:b], made) for site, end in zip(sites, ends, strict=True)}


def _default(model: Model) -> list[str]:
    """The taps to exchange where none are named."""
    if found := blocks(model):
        return [*([INPUT] if INPUT in model.taps else []), *(block.at(OUTPUT) for block in found), *(block.at(HEADS) for block in found)]
    return list(model.taps)[:-1]


def _site(model: Model, tap: str, value: Array, batch: Batch, by: By | None) -> Site:
    """The tap, cut as asked, or as it best is.

    Raises:  ConfigError: a tap that cannot be cut so.
    """
    possible: list[By] = ["whole"]
    if value.ndim == 4 and matches(tap, ["**/attention/*"]):
        possible.insert(0, "head")
    elif model.field == "tokens" and value.ndim == 3 and value.shape[1] == np.shape(batch["tokens"])[1]:
        possible.insert(0, "position")
    if value.ndim > 1:
        possible.append("channel")
    by = possible[0] if by is None else by
    if by not in possible:
        raise ConfigError(f"method.by={by}: {tap} of the shape {value.shape} cannot be cut so, only by {', '.join(possible)}")
    return Site(tap, by, 1 if by == "whole" else value.shape[{"channel": -1}.get(by, 1)])


def _corrupted(model: Model, examples: Examples, corrupt: int | str | None) -> np.ndarray:
    """The input of each example's corrupt counterpart."""
    clean = np.asarray(examples.batch[model.field])
    if corrupt is None:
        if len(clean) == 1:
            raise ConfigError("one example has nothing to be compared with: give method.corrupt=TEXT or a number of the data, or two examples")
        return np.roll(clean, -1, axis=0)
    if isinstance(corrupt, str):
        if model.encode is None:
            raise ConfigError(f"method.corrupt={corrupt!r}: this run reads no text; give the number of an example")
        found = np.asarray(model.encode(corrupt))
    else:
        if model.data is None:
            raise ConfigError(f"method.corrupt={corrupt}: the run's data is not known")
        source = splits(model)[last(model)]
        if not 0 <= corrupt < len(source):
            raise ConfigError(f"method.corrupt={corrupt}: the data has the examples 0 to {len(source) - 1}")
        found = np.asarray(source.take(np.array([corrupt]))[model.field])[0]
    if found.shape != clean.shape[1:]:
        what = (
            f"{len(found)} tokens, the clean example {clean.shape[1]}"
            if model.field == "tokens"
            else f"the shape {found.shape}, the clean one {clean.shape[1:]}"
        )
        raise ConfigError(f"method.corrupt={corrupt!r} has {what}: they must be of one size, position for position")
    return np.broadcast_to(found, clean.shape).astype(clean.dtype)


def _truth(model: Model, examples: Examples) -> tuple[np.ndarray, np.ndarray] | None:
    """(right outputs, which count), where the examples come with right tokens."""
    if "target" not in examples.batch or len(model.outputs) != 2 or "vocabulary" not in model.spec:
        return None
    counts = examples.mask if examples.scored is None else examples.scored
    return np.asarray(examples.batch["target"]), np.asarray(counts)


def _explained(model: Model, examples: Examples, against: Int[np.ndarray, "b"]) -> list[str]:
    """What the scores of each example are of, as a person knows it."""
    return [model.explained(target, other) for target, other in zip(examples.target, against, strict=True)]


def _lines(model: Model, examples: Examples, against: Int[np.ndarray, "b"], high: np.ndarray, low: np.ndarray) -> list[str]:
    """What each example's 1 and 0 are."""
    told = _explained(model, examples, against)
    return [f"{name}: {told[i]} is {high[i]:.4g} clean, {low[i]:.4g} corrupt" for i, name in enumerate(examples.names)]


def _panels(
    model: Model, examples: Examples, i: int, sites: Sequence[Site], scores: Mapping[Site, np.ndarray], corrupt: Batch, what: str
) -> list[draw.Panel]:
    """Layer x position, layer x head, and bars of what is exchanged as a whole."""
    panels: list[draw.Panel] = []
    note = "1: as clean, 0: as corrupt"
    if placed := [site for site in sites if site.by == "position"]:
        tokens = [seen(token) for token in labels(model, examples, i)]
        others = [seen(model.token(int(t))) for t in np.asarray(corrupt["tokens"])[i][: len(tokens)]]
        columns = [a if a == b else f"{a}/{b}" for a, b in zip(tokens, others, strict=True)]
        values = np.stack([scores[site][: len(tokens), i] for site in placed])
        panels.append(draw.Heat(values, [short(site.tap) for site in placed], columns, f"residual stream: {what}", x=f"clean/corrupt; {note}"))
    if headed := [site for site in sites if site.by == "head"]:
        heads = _heads(headed, {site: scores[site][:, i] for site in headed}, f"heads: {what}")
        panels.append(dataclasses.replace(heads, x=f"head; {note}"))
    if whole := [site for site in sites if site.by == "whole"]:
        values = np.array([scores[site][0, i] for site in whole])
        panels.append(draw.Bars([short(site.tap) for site in whole], values, f"as a whole: {what}", note, ordered=False))
    for site in (site for site in sites if site.by == "channel"):
        panels.append(draw.Bars([str(n) for n in range(site.count)], scores[site][:, i], f"channels of {short(site.tap)}: {what}", note))
    return panels


def _heads(sites: Sequence[Site], values: Mapping[Site, np.ndarray], title: str) -> draw.Heat:
    """Layer x head."""
    return dataclasses.replace(by_head(grid([values[site] for site in sites]), title), rows=[short(site.tap) for site in sites])


def _mean(read: Float[Array, "b h t k"], mask: np.ndarray) -> Float[Array, "1 h 1 k"]:
    """The mean over the positions that count."""
    weight = jnp.asarray(mask, read.dtype)[:, None, :, None]
    return (read * weight).sum((0, 2), keepdims=True) / weight.sum()


@functools.partial(jax.jit, static_argnums=0)
def _scores(objective, arrays, batch, target, against):
    return difference(outputs_of(objective, arrays, batch)[0], target, against)


def _judged(outputs, truth):
    """(mean loss, accuracy) of each example."""
    target, counts = truth
    weight = jnp.asarray(counts, jnp.float32)
    share = weight / jnp.maximum(weight.sum(-1, keepdims=True), 1.0)
    hit = jnp.asarray(outputs.argmax(-1) == target, jnp.float32)
    return (cross_entropy(outputs, target) * share).sum(-1), (hit * share).sum(-1)


@functools.partial(jax.jit, static_argnums=0)
def _right(objective, arrays, batch, truth):
    return _judged(outputs_of(objective, arrays, batch)[0], truth)


@functools.partial(jax.jit, static_argnums=0)
def _edited(objective, arrays, batch, target, against, values, truth, masks):
    """The scores with the values where the masks say; with a truth also loss and accuracy."""

    def one(mask):
        outputs, _ = outputs_of(objective, arrays, batch, {tap: (mask[tap], values[tap]) for tap in mask})
        told = difference(outputs, target, against)
        return told if truth is None else (told, *_judged(outputs, truth))

    return jax.vmap(one)(masks)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _along(objective, receiver, arrays, batch, target, against, held, given, only, masks):
    """The scores with what the receiver sees of the senders in the masks, all others held."""

    def one(mask):
        edits = {tap: replaced(jnp.where(mask[tap], given[tap], held[tap]) if tap in mask else held[tap]) for tap in held}
        noticed = outputs_of(objective, arrays, batch, edits)[1][receiver]
        return difference(outputs_of(objective, arrays, batch, {receiver: (only, noticed)})[0], target, against)

    return jax.vmap(one)(masks)
