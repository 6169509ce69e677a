"""How gradients become updates: any optax factory, its arguments, and the values that may change while the program stays."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from research.core.build import build, thaw
from research.core.errors import ConfigError, nearest
from research.core.tree import STACKED, map_paths, matches, paths
from research.core.types import Hyper, Tree
from research.training.sparsify import Masks, Sparsify

_NOT_NEGATIVE = ("learning_rate", "weight_decay", "weight_decay_rate", "eps", "eps_root")
_SHARES = ("momentum", "b1", "b2", "decay")  # decay rates of running averages: in [0, 1)


class Average(NamedTuple):
    """The running average of the weights, and how many updates are in it."""

    count: Int[Array, ""]
    params: Tree


class OptimizerState(NamedTuple):
    """What an optimizer carries from step to step."""

    hyperparams: dict[str, Float[Array, ""]]  # the values of the last update, so that a checkpoint tells its step's learning rate
    inner: Tree  # the optax state
    average: Average | None
    masks: Masks | None = None  # which weights live, where that is restricted


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optax factory with its arguments, equal and hashable by content.

    The values named in `values` are arguments of each update; every other argument is a constant of the program. This is what
    `optax.inject_hyperparams` does, said explicitly: nothing is guessed from an argument's type, and the values live in one place.

    Optax sees one layer of a stacked tree at a time: LAMB's and Adafactor's norms, Muon's matrices and every path glob are about one layer's
    tensor, so a scanned model takes the same steps as the same model unscanned, by a program that does not grow with depth.

    Args:    factory: returns an `optax.GradientTransformation`.  arguments: its constant arguments as sorted pairs.
             values: the names of its arguments that are given at each update; always holds "learning_rate".
             clip: largest global norm of the gradient; None: no clipping.
             sparsify: which weights live; the others are exactly zero after each update. None: all.
             ema: decay of the running average of the weights; None: none.
             rates: (path, what the learning rate of this parameter is multiplied by), of those whose is not 1; decoupled or not, its weight decay is
             that of all others: learning rate x decay.
    """

    factory: Callable[..., optax.GradientTransformation]
    arguments: tuple[tuple[str, Any], ...] = ()
    values: tuple[str, ...] = ("learning_rate",)
    clip: float | None = None
    sparsify: Sparsify | None = None
    ema: float | None = None
    rates: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        _check({name: value for name, value in self.arguments if value is not None})
        if self.clip is not None and not self.clip > 0:
            raise ConfigError(f"train.clip={self.clip}: must be larger than 0, or null for no clipping")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"train.ema={self.ema}: must be in (0, 1), as 0.999, or null for no average")

    @classmethod
    def from_config(
        cls,
        node: Mapping[str, Any],
        values: tuple[str, ...] = ("learning_rate",),
        clip: float | None = None,
        sparsify: Sparsify | None = None,
        ema: float | None = None,
    ) -> "Optimizer":
        """The optimizer that a config node describes.

        Args:    node: the plain mapping with `_target_`; what it holds under a name in `values` is not read.
        Raises:  ConfigError: an unknown target or argument, or a value out of range; the message names it.
        """
        partial = build({**node, "_partial_": True}, where="optimizer", without=tuple(values))
        known = inspect.signature(partial.func).parameters
        for name in values:
            if name not in known:
                raise ConfigError(f"optimizer.{name}: {partial.func.__name__} takes no {name!r}{nearest(name, known)}")
        optimizer = cls(partial.func, tuple(sorted(partial.keywords.items())), tuple(values), clip, sparsify, ema)
        try:
            made = optimizer._transform(dict.fromkeys(values, 0.0))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"optimizer: {partial.func.__name__}: {str(error).splitlines()[0]}") from error
        if not isinstance(made, optax.GradientTransformation):
            raise ConfigError(f"optimizer._target_={node['_target_']!r} is no optimizer: it returns {type(made).__name__}")
        return optimizer

    def check(self, hyper: Mapping[str, Any]) -> None:
        """Refuses starting values that no optimizer can use.

        Args:    hyper: name -> number; only this optimizer's values are looked at.
        Raises:  ConfigError: naming the value and what it must be.
        """
        _check({name: hyper[name] for name in self.values})

    def init(self, params: Tree) -> OptimizerState:
        """The state before the first update."""
        zeros = {name: jnp.zeros((), jnp.float32) for name in self.values}
        inner = _per_layer(self._transform(zeros).init, params)
        average = None if self.ema is None else Average(jnp.zeros((), jnp.int32), params)
        return OptimizerState(zeros, inner, average, None if self.sparsify is None else self.sparsify.init(params))

    def update(self, grads: Tree, opt: OptimizerState, params: Tree, hyper: Hyper, learning_rate: Float[Array, ""]) -> tuple[Tree, OptimizerState]:
        """(updates to add to the parameters, the next state).

        Args:    hyper: holds the other names of `values`.  learning_rate: this update's rate, schedule included.
        """
        values = {name: learning_rate if name == "learning_rate" else hyper[name] for name in self.values}
        masks = None if self.sparsify is None or opt.masks is None else self.sparsify.update(opt.masks, grads, params)
        if masks is not None:
            grads = masks.keep(grads)  # moments and norms are those of a model that has no other weights
        if self.clip is not None:
            grads, _ = optax.clip_by_global_norm(self.clip).update(grads, optax.EmptyState())
        updates, inner = _per_layer(self._transform(values).update, grads, opt.inner, self._rated(params, -1))  # only weight decay reads those
        updates = self._rated(updates, 1)
        if masks is not None:
            updates = masks.land(updates, params)
        average = self._averaged(opt.average, optax.apply_updates(params, updates))
        if masks is not None and average is not None:
            average = average._replace(params=masks.keep(average.params))  # it still holds what has gone by now
        return updates, OptimizerState(values, inner, average, masks)

    def average(self, opt: OptimizerState) -> Tree | None:
        """The running average of the weights, shaped as the parameters; None where there is none."""
        return None if opt.average is None else opt.average.params

    @property
    def rule(self) -> str:
        """How its updates grow with the gradient, a name in `mup.RULES`.

        Raises:  ConfigError: an optimizer of which that is not known.
        """
        if self.factory not in _RULES:
            known = ", ".join(sorted(factory.__name__ for factory in _RULES))
            raise ConfigError(f"optimizer: no maximal-update rule is known for {self.factory.__name__}, only for {known}; or use model.base=null")
        return _RULES[self.factory]

    def _rated(self, tree, power):
        """The tree with each leaf times its rate to this power."""
        rates = dict(self.rates)
        return map_paths(lambda path, x: x * rates[path] ** power if path in rates else x, tree) if rates else tree

    def _transform(self, values):
        return self.factory(**dict(self.arguments), **values)

    def _averaged(self, average, params):
        """The average after one more update: mean of the weights seen so far, the k-th last weighing ema ** k.

        The bias is corrected by the share (1 - ema) / (1 - ema ** count), which is 1 at the first update: the random start never enters. An
        average that starts at the initial weights still holds 90 % of them after 100 updates at 0.999, and its early evaluations mean nothing.
        """
        if average is None or self.ema is None:
            return None
        count = average.count + 1
        log = math.log(self.ema)  # expm1: 1 - 0.9999 ** count would lose three digits
        share = math.expm1(log) / jnp.expm1(log * count.astype(jnp.float32))
        return Average(count, jax.tree.map(lambda old, new: old + share.astype(old.dtype) * (new - old), average.params, params))


def _per_layer(function: Callable[..., Any], *trees: Tree) -> Any:
    """function(*trees), where every stacked leaf, `blocks/…`, shows one layer: mapped over the layers of each stack in turn."""
    stacks = {head + f"/{STACKED}/" for head, found, _ in (f"/{path}".partition(f"/{STACKED}/") for path in paths(trees[0])) if found}

    def belongs(path: str, stack: str) -> bool:  # of /blocks/ and /encoder/blocks/, a leaf below the second belongs to the second alone
        return max((s for s in stacks if s in f"/{path}"), key=len, default="") == stack

    for stack in sorted(stacks):
        function = _mapped(function, functools.partial(belongs, stack=stack))
    # Optax mixes its own float32 counters and Python numbers with the parameters: even plain adamw fails under strict promotion.
    with jax.numpy_dtype_promotion("standard"):
        return function(*trees)


def _mapped(function, inside):
    """The function mapped over the first axis of every leaf whose path is `inside`, in its arguments and in its results."""

    def axes(tree):
        return map_paths(lambda path, _: 0 if inside(path) else None, tree)

    def layer(tree):
        return map_paths(lambda path, x: jax.ShapeDtypeStruct(x.shape[1:] if inside(path) else x.shape, x.dtype), tree)

    def mapped(*trees):
        results = jax.eval_shape(function, *map(layer, trees))
        try:
            return jax.vmap(function, tuple(map(axes, trees)), axes(results))(*trees)
        except ValueError as error:  # an unmapped result depends on mapped leaves; whatever else is wrong, eval_shape has already raised
            raise ConfigError("optimizer: a transform mixes the layers of a scanned model, as a global norm does; use model.scan=false") from error

    return mapped


_SHARED_SKIP = ("**/bias", "**/scale")


@dataclasses.dataclass(frozen=True)
class Decay:
    """The parameters that weight decay acts on, as a mask for optax: those that fit `only` and do not fit `skip`.

    By default all but biases and norms, as in nanoGPT: kernels and embeddings decay. A glob of the user's own that fits no parameter is a
    typing error and refused; the two defaults may fit nothing, since not every model has norms or biases.

    Args:    skip: path globs of what does not decay.  only: path globs of what may.
    """

    skip: tuple[str, ...] = _SHARED_SKIP
    only: tuple[str, ...] = ("**",)

    def __call__(self, params: Tree) -> Tree:
        """True where weight decay acts.

        Raises:  ConfigError: a glob that fits nothing, with the nearest name in the tree.
        """
        require_matches((*self.skip, *self.only), params, "optimizer.mask", may_miss=(*_SHARED_SKIP, "**"))
        return map_paths(lambda path, _: matches(path, self.only) and not matches(path, self.skip), params)


def require_matches(globs: tuple[str, ...], params: Tree, where: str, may_miss: tuple[str, ...] = ()) -> None:
    """Refuses a glob that fits no parameter.

    Args:    may_miss: globs that may fit nothing.
    Raises:  ConfigError: naming the glob and the nearest name in the tree.
    """
    known = list(paths(params))
    for glob in globs:
        if glob not in may_miss and not any(matches(path, [glob]) for path in known):
            words = {word for path in known for word in path.split("/")}
            raise ConfigError(f"{where}: {glob!r} fits no parameter{nearest(glob.split('/')[-1], words)}")


def sgd(
    learning_rate: float | Array,
    momentum: float | Array | None = None,
    nesterov: bool = False,
    weight_decay: float | Array = 0.0,
    mask: Callable[[Tree], Tree] | None = None,
) -> optax.GradientTransformation:
    """Stochastic gradient descent as in torch: weight decay is coupled, that is, added to the gradient before the momentum.

    Args:    momentum: decay of the accumulated gradient, in [0, 1); None: no momentum and no state.  nesterov: look one update ahead.
             weight_decay: added to the gradient times the parameter.  mask: which parameters decay; None: all.
    """
    if nesterov and momentum is None:
        raise ConfigError("optimizer.nesterov=True needs optimizer.momentum, as 0.9")
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask),
        optax.identity() if momentum is None else optax.trace(momentum, nesterov),
        optax.scale_by_learning_rate(learning_rate),
    )


def chain(learning_rate: float | Array, transforms: tuple[Any, ...]) -> optax.GradientTransformation:
    """Any optax transforms one after another, then the learning rate and the sign of descent.

    Args:    transforms: frozen config nodes, each with a `_target_` that returns a transform; frozen, so that an optimizer can be compared.
    Raises:  ConfigError: a node that cannot be built.
    """
    made = (build(thaw(node), where=f"optimizer.transforms[{i}]") for i, node in enumerate(transforms))
    return optax.chain(*made, optax.scale_by_learning_rate(learning_rate))


_RULES = {**dict.fromkeys((optax.adam, optax.adamw, optax.lion, optax.adagrad, optax.rmsprop), "adam"), sgd: "sgd"}


def _check(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if name not in (*_NOT_NEGATIVE, *_SHARES):
            continue
        top, what = (1, "in [0, 1)") if name in _SHARES else (math.inf, "a number not below 0")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < top:
            raise ConfigError(f"optimizer.{name}={value!r}: must be {what}")
