"""What a compression method takes and returns: a model with its config, and the data that the method may look at."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax

from research.compression.linear import Kind, Linear, Model, linear_layers
from research.core.build import build
from research.core.config import split_values
from research.core.errors import ConfigError, nearest
from research.core.tree import matches
from research.core.types import Batch, Hyper, Objective, Tree


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A model that is being compressed.

    Args:    config: of its run, plain and resolved, the data's spec included. A method that changes the model's form changes the nodes `model`
             and `objective`; one that trains, `train`.
             objective: what the config describes.  params, extra, frozen, hyper: what it is called with; canonical, never stacked.
             batches: calibration data of the training split, ready for the model, of one shape.
             origin: {run, step, weights, sha256}: where the arrays come from.
             others: parameters of other runs of the same model, for methods that average.
             notes: kernel path -> {what was noticed there: number}, for the ledger.
    """

    config: Mapping[str, Any]
    objective: Objective
    params: Tree
    extra: Tree
    frozen: Tree
    hyper: Hyper
    batches: Sequence[Batch]
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    others: Sequence[Tree] = ()
    notes: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)

    @property
    def model(self) -> Model:
        """The arrays that the objective is called with, in its order."""
        return self.params, self.extra, self.frozen, self.hyper

    @functools.cached_property
    def layers(self) -> dict[str, Linear]:
        """The linear layers by the path of their kernel, in the order in which they run."""
        return linear_layers(self.objective, self.model, self.batches[0])

    def replace(self, **changes: Any) -> "Subject":
        """A copy with these fields changed; with a new `config` the objective is built anew.

        Raises:  ConfigError: a config that cannot be built.
        """
        if "config" in changes and "objective" not in changes:
            changes["objective"] = build(split_values(changes["config"])[0]["objective"], where="objective")
        return dataclasses.replace(self, **changes)

    def wrapped(self, target: str, **arguments: Any) -> dict[str, Any]:
        """The config with its objective wrapped: `{_target_: target, objective: <as it was>, **arguments}`."""
        objective = {"_target_": target, "objective": self.config["objective"], **arguments}
        return {**self.config, "objective": objective, "train": moved(self.config["train"], "objective.", "objective.objective.")}

    def chosen(
        self, only: Sequence[str] = ("**",), skip: Sequence[str] = (), kinds: Sequence[Kind] = ("dense", "conv"), partial: bool = False
    ) -> dict[str, Linear]:
        """The layers that a method works on: those whose kernel's path fits `only` and not `skip`.

        Args:    only, skip: path globs.  kinds: that the method knows.
                 partial: leave out what it does not know, where this was asked for; False: refuse. Layers that only the glob "**" names are left
                 out without a word.
        Raises:  ConfigError: a glob that fits no layer, with the nearest name; a layer of another kind, named; nothing left to do.
        """
        known = self.layers
        for name, globs in (("only", only), ("skip", skip)):
            for glob in globs:
                if glob != "**" and not any(matches(path, [glob]) for path in known):
                    raise ConfigError(f"method.{name}: {glob!r} fits no layer{nearest(glob, known)}")
        fitting = {path: layer for path, layer in known.items() if matches(path, only) and not matches(path, skip)}
        named = [path for path in fitting if matches(path, [glob for glob in only if glob != "**"])]
        unknown = [path for path in named if fitting[path].kind not in kinds]
        if unknown and not partial:
            raise ConfigError(
                f"method.only: {unknown[0]} is a layer of kind {known[unknown[0]].kind!r}, which this method does not know ({', '.join(kinds)}); "
                "method.partial=true leaves it as it is"
            )
        left = {path: layer for path, layer in fitting.items() if layer.kind in kinds}
        if not left:
            raise ConfigError(f"method: no layer is left to work on; the model's are {', '.join(f'{path} ({x.kind})' for path, x in known.items())}")
        return left


class Method(Protocol):
    """A frozen dataclass with the method's settings."""

    trains: ClassVar[bool]  # whether what comes out must be trained to be of any use

    def __call__(self, subject: Subject) -> Subject:
        """The compressed model; the subject is left as it is.

        Raises:  ConfigError: settings that do not fit the model.
        """
        ...


def moved(train: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """The `train` group with the values that it lists below `old` under `new`, where a node has moved."""
    return {**train, "values": [new + path.removeprefix(old) if path.startswith(old) else path for path in train["values"]]}


def get(tree: Tree, path: str) -> jax.Array:
    """The leaf at a canonical path."""
    for name in path.split("/"):
        tree = tree[name]
    return tree


def put(tree: Tree, leaves: Mapping[str, Any]) -> Tree:
    """The tree of dicts with the leaves at these canonical paths replaced or added; None removes one, and the dicts that it leaves empty."""
    tree = dict(tree)
    heads: dict[str, dict[str, Any]] = {}
    for path, leaf in leaves.items():
        head, _, tail = path.partition("/")
        if tail:
            heads.setdefault(head, {})[tail] = leaf
        elif leaf is None:
            tree.pop(head, None)
        else:
            tree[head] = leaf
    for head, below in heads.items():
        changed = put(tree.get(head, {}), below)
        if changed:
            tree[head] = changed
        else:
            tree.pop(head, None)
    return tree
