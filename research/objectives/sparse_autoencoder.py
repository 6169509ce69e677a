"""A sparse autoencoder: a dictionary of directions of which few add up to what a trained model holds at one tap."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.core.axis import psum
from research.core.errors import ConfigError, nearest
from research.core.types import Batch, Decoder, Edits, Hyper, Objective, Tally, Tree
from research.metrics.average import average

FEATURES, RECONSTRUCTION, READ = "dictionary/features", "dictionary/reconstruction", "dictionary/input"  # the taps that it adds
SCORES = ("loss", "accuracy")  # of the explained model, with and without the reconstruction in place
EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class SparseAutoencoder:
    """Features f = relu(encoder (x - center) + bias) of each vector x at a tap, and its reconstruction decoder f + center.

    loss = mean over entries of (x - reconstruction)² + sparsity x sum of the features + revival x (what dead features leave of the error), each the
    mean over the valid items. Every direction of the decoder has length 1: the parameters hold it at any length, and it is divided by it.

    The explained model stands still in `frozen`, copied into the run, so that the run needs no other. `predict` is that model's with the
    reconstruction in the tap's place; an edit of `dictionary/features` therefore steers it. In evaluation the model also runs as it is and with
    zeros in the tap's place: `recovered` = (loss with zeros - loss with the reconstruction) / (loss with zeros - its own loss).

    Args:    teacher: the objective of the explained model; None: that of the run that `teacher.run` names.  at: the tap that is read.
             features: directions in the dictionary.  active: how many features of a vector may be above 0, the largest (TopK); None: any number.
             sparsity: coefficient of the sum of the features; None: read from hyper.
             normalize: read each vector less its mean and divided by its deviation, and undo that to the reconstruction.
             revival: coefficient of the auxiliary loss of dead features; 0: none.  dead_after: valid items without it after which a feature is dead.
    Raises:  ValueError: a value out of range, or nothing that makes the features sparse.
    Source:  Bricken et al. 2023 (sum of the features, center taken off first), Gao et al. 2024 (TopK, normalized input, decoder as the encoder's
             transpose at the start, revival by AuxK with k = half the width). Bricken's resampling is not here: revival takes its place.
    """

    teacher: Objective | None = None
    at: str = "input"
    features: int = 512
    active: int | None = 16
    sparsity: float | None = 0.0
    normalize: bool = True
    revival: float = 1 / 32
    dead_after: int = 100_000
    batch_coupled: ClassVar[bool] = False
    keeps_teacher: ClassVar[bool] = True  # in its own folder: predicting needs it

    def __post_init__(self):
        if self.features < 1:
            raise ValueError(f"features={self.features} must be at least 1")
        if self.active is not None and not 1 <= self.active <= self.features:
            raise ValueError(f"active={self.active} must be from 1 to features={self.features}, or null")
        for name in ("sparsity", "revival"):
            if (value := getattr(self, name)) is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} must be a number not below 0")
        if self.active is None and self.sparsity == 0.0:
            raise ValueError("active=null and sparsity=0: nothing makes the features sparse; give one of them")
        if self.dead_after < 1:
            raise ValueError(f"dead_after={self.dead_after} must be at least 1")

    @property
    def coefficients(self) -> tuple[tuple[str, float], ...]:
        """The terms of the loss that are in use."""
        terms = {"reconstruction": 1.0}
        if self.sparsity != 0.0:
            terms["sparsity"] = self.sparsity or 0.0
        if self.revival:
            terms["revival"] = self.revival
        return tuple(terms.items())

    def init(self, key: jax.Array, batch: Batch) -> tuple[Tree, Tree]:
        """({"encoder", "decoder", "center"}, {"idle": items since each feature was last above 0})."""
        width = self._shape(batch)[-1]
        directions = _unit(jax.random.normal(key, (self.features, width), jnp.float32))
        encoder = {"kernel": directions.T, "bias": jnp.zeros(self.features, jnp.float32)}
        params = {"encoder": encoder, "decoder": {"kernel": directions}, "center": {"bias": jnp.zeros(width, jnp.float32)}}
        return params, {"idle": jnp.zeros(self.features, jnp.float32)}

    def still(self, key: jax.Array, batch: Batch) -> Tree:
        """{"params", "extra", "frozen"} of the explained model."""
        params, extra = self._model.init(key, batch)
        return {"params": params, "extra": extra, "frozen": self._model.still(key, batch)}

    def taught(self, frozen: Tree, params: Tree, extra: Tree, still: Tree, hyper: Hyper) -> Tree:
        """`frozen` with this model in it; its numbers are those of its own config, so `hyper` is not needed."""
        return {"params": params, "extra": extra, "frozen": still}

    def apply(
        self, params: Tree, extra: Tree, frozen: Tree, batch: Batch, key: jax.Array | None, hyper: Hyper, *, train: bool, edits: Edits | None = None
    ) -> tuple[Any, dict[str, Array], Tree]:
        """(outputs, taps, extra): the model with the reconstruction in the tap's place; the taps are those of that pass, and the dictionary's."""
        x = self._read(frozen, batch, edits)
        features, reconstruction, _ = self._coded(params, x, edits)
        outputs, taps = self._run(frozen, batch, {**(edits or {}), self.at: (jnp.ones((), bool), reconstruction)})
        return outputs, {**taps, READ: x, FEATURES: features, RECONSTRUCTION: reconstruction}, extra

    def weights(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """The number of valid items of each term."""
        count: Array = batch["mask"].sum(dtype=jnp.float32)
        return dict.fromkeys((name for name, _ in self.coefficients), count)

    def __call__(
        self, params: Tree, extra: Tree, frozen: Tree, batch: Batch, key: jax.Array | None, hyper: Hyper, *, train: bool
    ) -> tuple[Tally, Tree]:
        """(tally, extra): the sums of one microbatch.

        Raises:  ConfigError: the batch holds cached outputs in place of the model's insides.
        """
        if "teacher" in batch:
            raise ConfigError("teacher.cache=true: cached outputs hold no insides of the model; use teacher.cache=false")
        mask = batch["mask"]
        x = jax.lax.stop_gradient(self._read(frozen, batch, None))
        read, _ = self._normalized(x)
        features, reconstruction, (before, guess) = self._coded(params, x, None)
        losses = {"reconstruction": ((read - guess) ** 2).mean(-1), "sparsity": features.sum(-1)}
        if self.revival:
            losses["revival"] = self._revival(params, extra, before, read - guess)
        sums = {name: average(_per_item(loss, mask.ndim), mask) for name, loss in losses.items()}
        used = {name: sums[name] for name, _ in self.coefficients}
        metrics = {name: sums[name] for name in ("reconstruction", "sparsity")}
        terms = jnp.stack([hyper.get(name, value) * used[name][0] for name, value in self.coefficients])
        metrics["loss"] = terms.sum(), sums["reconstruction"][1]
        metrics["active"] = average(_per_item((features > 0).sum(-1).astype(jnp.float32), mask.ndim), mask)
        seen = _items(features > 0, mask).sum(0)  # m
        if train:
            count = psum(mask.sum(dtype=jnp.float32) * math.prod(x.shape[mask.ndim : -1]))
            extra = {"idle": jnp.where(psum(seen) > 0, 0.0, extra["idle"] + count)}
        else:
            metrics |= self._scores(frozen, batch, x, reconstruction, seen)
        return Tally({name: total for name, (total, _) in used.items()}, metrics), extra

    def predict(
        self, params: Tree, extra: Tree, frozen: Tree, batch: Batch, key: jax.Array | None, hyper: Hyper, *, edits: Edits | None = None
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """What the model predicts with the reconstruction in the tap's place, and the taps."""
        outputs, taps, _ = self.apply(params, extra, frozen, batch, key, hyper, train=False, edits=edits)
        return {self._plain.output: outputs}, taps

    def derived(self, means: dict[str, float | None]) -> dict[str, float]:
        """Of an evaluation: explained_variance, dead (the share of features never above 0) and recovered (the share of the model's loss)."""
        found = {}
        known: dict[str, Any] = means
        if known.get("density") is not None:
            found["dead"] = sum(share == 0 for share in known["density"]) / len(known["density"])
        if known.get("moments") is not None:
            *center, square, error = known["moments"]
            if (variance := square - sum(value**2 for value in center)) > 0:
                found["explained_variance"] = 1 - error / variance
        own, spliced, ablated = (known.get(f"{name}_loss") for name in ("model", "spliced", "ablated"))
        if own is not None and ablated is not None and ablated != own:
            found["recovered"] = (ablated - spliced) / (ablated - own)
        return found

    def decoder(self) -> Decoder | None:
        """None: texts are made by the model itself, not by its reconstruction."""
        return None

    @property
    def _model(self) -> Objective:
        if self.teacher is None:
            raise ConfigError("objective.teacher=null: a sparse autoencoder needs a trained run; give teacher.run=PATH")
        return self.teacher

    @property
    def _plain(self) -> Any:
        """The objective that makes sums of the model's outputs: that of a compressed or penalised model lies within."""
        found: Any = self._model
        while not hasattr(found, "tally"):
            found = found.objective
        return found

    def _shape(self, batch: Batch) -> tuple[int, ...]:
        """The shape of the tap for a batch like this."""

        def taps(key, batch):
            params, extra = self._model.init(key, batch)
            return self._model.apply(params, extra, self._model.still(key, batch), batch, None, {}, train=False)[1]

        found = jax.eval_shape(taps, jax.random.key(0), batch)
        if self.at not in found:
            raise ConfigError(f"objective.at={self.at!r} is no tap of the model{nearest(self.at, found)}")
        if (shape := found[self.at].shape)[: batch["mask"].ndim] != batch["mask"].shape or len(shape) <= batch["mask"].ndim:
            raise ConfigError(f"objective.at={self.at!r} has the shape {shape}: a dictionary reads a tap with a vector for each item")
        return shape

    def _run(self, frozen: Tree, batch: Batch, edits: Edits | None) -> tuple[Any, dict[str, Array]]:
        """(outputs, taps) of the model, which stands still."""
        arrays = jax.lax.stop_gradient((frozen["params"], frozen["extra"], frozen["frozen"]))
        outputs, taps, _ = self._model.apply(*arrays, batch, None, {}, train=False, edits=edits)
        return outputs, taps

    def _read(self, frozen: Tree, batch: Batch, edits: Edits | None) -> Float[Array, "b ... d"]:
        own = {name: edit for name, edit in (edits or {}).items() if name not in (READ, FEATURES, RECONSTRUCTION)}
        x = self._run(frozen, batch, own or None)[1][self.at].astype(jnp.float32)
        return _edited(edits, READ, x)

    def _normalized(self, x: Float[Array, "b ... d"]) -> tuple[Float[Array, "b ... d"], tuple[Array, Array]]:
        """(each vector less its mean over its deviation, (mean, deviation)); as it is where that is not wanted."""
        if not self.normalize:
            return x, (jnp.zeros_like(x[..., :1]), jnp.ones_like(x[..., :1]))
        mean = x.mean(-1, keepdims=True)
        deviation = jnp.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + EPSILON)
        return (x - mean) / deviation, (mean, deviation)

    def _coded(self, params: Tree, x: Float[Array, "b ... d"], edits: Edits | None) -> tuple[Array, Array, tuple[Array, Array]]:
        """(features, reconstruction, (features before the choice of the largest, reconstruction as it is compared with the normalized input))."""
        read, (mean, deviation) = self._normalized(x)
        before = (read - _wide(params["center"]["bias"], x.ndim)) @ params["encoder"]["kernel"] + _wide(params["encoder"]["bias"], x.ndim)
        features = _edited(edits, FEATURES, _largest(jax.nn.relu(before), self.active))
        guess = features @ _unit(params["decoder"]["kernel"]) + _wide(params["center"]["bias"], x.ndim)
        return features, _edited(edits, RECONSTRUCTION, guess * deviation + mean), (before, guess)

    def _revival(self, params: Tree, extra: Tree, before: Array, error: Array) -> Float[Array, "b ..."]:
        """What the dead features with the largest pre-activations leave of the error, relative to no attempt; 0 where none is dead."""
        dead = extra["idle"] > self.dead_after  # m
        count = min(max(error.shape[-1] // 2, 1), self.features)

        def left() -> Array:
            alone = jnp.where(_wide(dead, before.ndim), before, -jnp.inf)
            least = jax.lax.top_k(jax.lax.stop_gradient(alone), count)[0][..., -1:]
            chosen = jnp.where((alone >= least) & (alone > -jnp.inf), before, 0.0)  # below 0 too: a rectified one would have no gradient
            return ((jax.lax.stop_gradient(error) - chosen @ _unit(params["decoder"]["kernel"])) ** 2).mean(-1)

        return jax.lax.cond(dead.any(), left, lambda: jnp.zeros_like(error[..., 0]))

    def _scores(self, frozen: Tree, batch: Batch, x: Array, reconstruction: Array, seen: Array) -> dict[str, Any]:
        """What an evaluation adds: the model's scores as it is, spliced and ablated; sums from which the rest derives."""
        mask = batch["mask"]
        true = jnp.ones((), bool)
        passes = {"model": None, "spliced": {self.at: (true, reconstruction)}, "ablated": {self.at: (true, jnp.zeros_like(x))}}
        metrics: dict[str, Any] = {}
        for name, edits in passes.items():
            tally = self._plain.tally(self._run(frozen, batch, edits)[0], batch, {}, train=False)
            metrics |= {f"{name}_{score}": tally.metrics[score] for score in SCORES if score in tally.metrics}
        items, errors = _items(x, mask), _items(x - reconstruction, mask)
        count = jnp.broadcast_to(_wide(mask, x.ndim, left=True), (*x.shape[:-1], 1)).sum(dtype=jnp.float32)
        sums = jnp.concatenate([items.sum(0), (items**2).sum()[None], (errors**2).sum()[None]])
        return metrics | {"moments": (sums, jnp.full_like(sums, count)), "density": (seen, jnp.full_like(seen, count))}


def _unit(directions: Float[Array, "m d"]) -> Float[Array, "m d"]:
    """Each row at length 1."""
    return directions / jnp.sqrt((directions**2).sum(-1, keepdims=True) + 1e-12)


def _largest(features: Float[Array, "... m"], count: int | None) -> Float[Array, "... m"]:
    """All but so many of the largest set to 0."""
    if count is None or count >= features.shape[-1]:
        return features
    least = jax.lax.top_k(jax.lax.stop_gradient(features), count)[0][..., -1:]
    return jnp.where(features >= least, features, 0.0)


def _edited(edits: Edits | None, path: str, x: Array) -> Array:
    """x with the edit of that path, as `tap` applies it."""
    edit: Any = (edits or {}).get(path)
    if edit is None:
        return x
    if isinstance(edit, tuple | list):
        mask, value = edit
        return jnp.where(mask, jnp.asarray(value, x.dtype), x)
    return x + jnp.asarray(edit, x.dtype)


def _wide(x: Array, ndim: int, left: bool = False) -> Array:
    """x with axes of length 1 before its own (or after them), so that it has so many."""
    missing = (1,) * (ndim - x.ndim)
    return x.reshape(*x.shape, *missing) if left else x.reshape(*missing, *x.shape)


def _items(x: Array, mask: Array) -> Float[Array, "n d"]:
    """The vectors one below the other, 0 where masked."""
    kept = jnp.where(_wide(mask, x.ndim, left=True), x.astype(jnp.float32), 0.0)
    return kept.reshape(-1, x.shape[-1])


def _per_item(values: Array, items: int) -> Array:
    """The mean over all axes but the first ones, which the mask has."""
    return values.mean(tuple(range(items, values.ndim)))
