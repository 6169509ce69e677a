"""Distillation: a new student of a run, which is then trained to answer as the run does."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax

from research.compression.subject import Subject, moved, put
from research.core.build import build, thaw
from research.core.config import exchanged, split_values
from research.core.errors import ConfigError
from research.core.tree import UNSTACKED, paths
from research.core.types import Tree

OBJECTIVE = "research.objectives.distill.Distill"
PROJECTIONS = "projections"  # what that objective keeps beside the student's parameters
_SHARED = ("outputs", "vocabulary", "time", "dtype")  # arguments that a student of another family has from its teacher where it says nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill:
    """A student with random parameters, or with some of its teacher's, under the objective that lets it learn from the teacher.

    Args:    student: arguments of the teacher's model that the student has otherwise, as {depth: 2}; with a `_target_`, a model of any family;
             None: a student of the same form (self-distillation). As pairs, as `freeze` gives them.
             temperature, hard, soft, hidden, attention, hidden_layers, attention_layers, hidden_loss: as of `research.objectives.distill.Distill`.
             copy: start from the teacher's parameters where path and shape agree.
             blocks: with copy, pairs (block of the student, block of the teacher) that are copied; empty: each from the block of its own number.
             cache: keep the teacher's answers for the training split in memory; not for windows of a text.
             seed: of the student's parameters.
    Source:  Hinton, Vinyals and Dean 2015; self-distillation: Furlanello et al. 2018; copied layers: Sanh et al. 2019, section 3.
    """

    student: tuple[tuple[str, Any], ...] | None = None
    temperature: float = 2.0
    hard: float = 0.5
    soft: float = 0.5
    hidden: float = 0.0
    attention: float = 0.0
    hidden_layers: tuple[tuple[str, str], ...] = ()
    attention_layers: tuple[tuple[str, str], ...] = ()
    hidden_loss: Literal["mse", "cosine", "patient"] = "mse"
    copy: bool = False
    blocks: tuple[tuple[int, int], ...] = ()
    cache: bool = False
    seed: int = 0
    trains: ClassVar[bool] = True

    def __post_init__(self):
        if self.blocks and not self.copy:
            raise ConfigError(f"method.blocks={[list(pair) for pair in self.blocks]}: blocks are copied with copy=true alone")

    def __call__(self, subject: Subject) -> Subject:
        """The student; its config names the subject's run as the teacher.

        Raises:  ConfigError: a student that cannot be built, taps that are not there, or blocks that do not fit.
        """
        config = taught(self._student(subject.config), subject.config["objective"], subject.origin, self._settings(), cache=self.cache)
        changed = subject.replace(config=config)
        params, extra = changed.objective.init(jax.random.key(self.seed), subject.batches[0])
        if self.copy:
            params = copied(params, subject.params, self.blocks)
        return dataclasses.replace(changed, params=params, extra=extra, frozen={"student": None, "teacher": None})

    def _settings(self) -> dict[str, Any]:
        """The arguments of the objective, for a config."""
        names = ("temperature", "hard", "soft", "hidden", "attention", "hidden_layers", "attention_layers", "hidden_loss")
        return {name: _plain(getattr(self, name)) for name in names}

    def _student(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config of the student alone."""
        node = config["objective"]
        while "objective" in node:  # a compressed teacher's own form is no part of the student
            node = node["objective"]
        old, asked = config["model"], _plain(thaw(self.student or ())) or {}
        model = {name: old[name] for name in _SHARED if name in old} | asked if "_target_" in asked else {**old, **asked}
        build(split_values({**config, "model": model})[0]["model"], where="method.student")
        return {**config, "model": model, "objective": exchanged(node, old, model)}


def copied(params: Tree, teacher: Tree, blocks: tuple[tuple[int, int], ...] = ()) -> Tree:
    """A student's parameters with those of the teacher in their place, where path and shape agree.

    Args:    blocks: pairs (block of the student, block of the teacher); other blocks keep what they have. (): each is copied from its own number.
    Raises:  ConfigError: a block that the teacher lacks, or nothing that fits.
    """
    there, source = paths(teacher), dict(blocks)
    leaves = {}
    for path, leaf in paths(params).items():
        other = path
        if (block := re.match(rf"{UNSTACKED}(\d+)/", path)) and source:
            if (number := int(block[1])) not in source:
                continue
            other = f"{UNSTACKED}{source[number]}/{path[block.end() :]}"
            if other not in there:
                raise ConfigError(f"method.blocks: the teacher has no {UNSTACKED}{source[number]}")
        if other in there and there[other].shape == leaf.shape:
            leaves[path] = there[other]
    if not leaves:
        raise ConfigError("method.copy=true: no parameter of the student has the path and shape of one of the teacher's")
    return put(params, leaves)


def taught(
    config: Mapping[str, Any], teacher: Mapping[str, Any], link: Mapping[str, Any], settings: Mapping[str, Any], cache: bool = False
) -> dict[str, Any]:
    """The config of a run, its objective put under that of distillation.

    Args:    config: of the student's run.  teacher: the teacher's `objective` node.
             link: {run, step, weights, sha256}: where the teacher's arrays come from.  settings: the other arguments of the objective.
             cache: whether the teacher's answers are kept in memory.
    """
    node = {"_target_": OBJECTIVE, "objective": config["objective"], "teacher": teacher, **settings}
    source = {"run": link["run"], "checkpoint": link["step"], "weights": link["weights"], "sha256": link["sha256"]}
    return {
        **config,
        "objective": node,
        "teacher": {**source, "cache": cache},
        "train": moved(config["train"], "objective.", "objective.objective."),
    }


def student(config: Mapping[str, Any], params: Tree, frozen: Tree) -> tuple[dict[str, Any], Tree, Tree]:
    """(config, params, frozen) of the student alone; of a run that is not distilled, as they were."""
    if config["objective"]["_target_"] != OBJECTIVE:
        return dict(config), params, frozen
    plain = {**config, "objective": config["objective"]["objective"], "teacher": None}
    plain["train"] = moved(config["train"], "objective.objective.", "objective.")
    return plain, {name: value for name, value in params.items() if name != PROJECTIONS}, frozen["student"]


def _plain(value: Any) -> Any:
    """Tuples as the lists that a config has."""
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
