"""Configs: composed in Python, compared on resume, saved without secrets, and freed of the numbers that enter a program as values."""

import contextlib
import copy
import enum
import hashlib
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml
from etils import epath
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from research.core import folder
from research.core.errors import ConfigError, ResearchError
from research.core.nodes import descend, leaves, near
from research.core.overrides import Composer, explain

LEARNING_RATE = "optimizer.learning_rate"
COMPARED = (  # what makes a resumed run another run; the rest may change
    "model",
    "data",
    "objective",
    "optimizer",
    "schedule",
    "seed",
    "train.steps",
    "train.epochs",
    "train.accumulate",
    "train.chunk",
    "train.precision",
    "train.clip",
    "train.sparsify",
    "train.ema",
    "train.key",
    "train.values",
)
FREE = ("data.root",)  # parts of these that may change all the same: the files may have moved
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|\$\{", re.IGNORECASE)  # a variable whose own name is computed is taken for one
_VARIABLE = re.compile(r"\$\{\s*oc\.env\s*:\s*(.*)")


def compose(overrides: Sequence[str] = (), verb: str = "train", *, conf: str | None = None) -> DictConfig:
    """The config that the command `python -m research.<verb> <overrides>` would run.

    Leaves Hydra's global state as it is, so it can be called any number of times, in notebooks and inside a running Hydra app. What depends
    on opened data, `${data.spec.…}`, stays unresolved.

    Args:    overrides: as on the command line, `["experiment=quickstart", "train.steps=100"]`.  conf: another folder of primary configs.
    Raises:  ConfigError: an unknown group, option or key, or a fault in a YAML file; the message names it and the nearest right one.
    """
    composer = Composer(verb, conf)
    return settled(composer.load(composer.check(overrides)))


def settled(config: DictConfig) -> DictConfig:
    """The composed config itself without Hydra's node, what is read from there written in: `${hydra:…}` is known now and never again."""
    for path, written in leaves(config):
        if isinstance(written, str) and "${hydra:" in written and not path.startswith("hydra."):
            OmegaConf.update(config, path, written.replace("${hydra:", "${hydra."))
            OmegaConf.update(config, path, OmegaConf.select(config, path))
    with open_dict(config):
        del config["hydra"]
    return config


def fingerprint(config: DictConfig, keys: Iterable[str] = COMPARED) -> str:
    """A hash, in hexadecimal digits, of what makes a run this run: of two composed configs it is equal where `differences` finds nothing.

    What only opened data can tell, `${data.spec.…}`, counts as it is written, and secrets by the names of their variables.

    Args:    keys: the parts that count.
    """
    tree, known, keys = _masked(config), {}, tuple(keys)
    for path, written in leaves(tree):
        if _within(path, keys) and not _within(path, (*FREE, "data.spec")):
            known[path] = written
            if isinstance(written, str) and ("${" in written or written == "???"):  # asking for each of the others takes longer than all else
                with contextlib.suppress(OmegaConfBaseException):
                    known[path] = OmegaConf.select(tree, path)
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()


def split_values(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """(the resolved config with null at every path in `train.values`, {last name of the path: its number}).

    What is built from the config then holds None there and reads `hyper[name]`: a value of the compiled program, not a constant of it. The
    learning rate is always among them. A node that repeats a changed group elsewhere (`objective.module: ${model}`) changes with it.

    Args:    config: composed and resolvable, or read from a run folder.
    Raises:  ConfigError: a path that is not in the config, two with the same last name, no finite number there, a negative learning rate.
    """
    tree = resolved(config)
    hyper: dict[str, float] = {}
    for path in dict.fromkeys((LEARNING_RATE, *tree["train"]["values"])):
        value, rest = descend(tree, path)
        name = path.rpartition(".")[2]
        if rest:
            raise ConfigError(f"train.values lists {path!r}, which is not in the config{near(path, tree)}")
        if name in hyper:
            raise ConfigError(f"train.values lists {path!r}, but another path there ends in {name!r} too")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            why = "" if path == LEARNING_RATE else ", since train.values lists it"
            raise ConfigError(f"{path}={value!r}: must be a finite number{why}")
        if path == LEARNING_RATE and value < 0:
            raise ConfigError(f"{path}={value} is negative: the update would climb the loss")
        hyper[name] = float(value)
        group = path.partition(".")[0]
        before = copy.deepcopy(tree[group])
        _set(tree, path, None)
        tree = exchanged(tree, before, tree[group])
    return tree, hyper


def _set(tree: dict[str, Any], path: str, value: Any) -> None:
    parent, _, name = path.rpartition(".")
    descend(tree, parent)[0][name] = value


def remodelled(config: Mapping[str, Any], **arguments: Any) -> dict[str, Any]:
    """The config with these arguments of its model changed, in every place where the objective repeats the model."""
    model = {**config["model"], **arguments}
    return {**config, "model": model, "objective": exchanged(config["objective"], config["model"], model)}


def unscanned(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with each block of its model on its own: tap paths then equal parameter paths, and blocks may differ in form."""
    return remodelled(config, scan=False) if config["model"].get("scan") else dict(config)


def exchanged(node: Any, old: Any, new: Any) -> Any:
    """The config node with every mapping in it that equals `old` replaced by a copy of `new`."""
    if node == old and isinstance(node, Mapping):
        return copy.deepcopy(new)
    if isinstance(node, Mapping):
        return {name: exchanged(value, old, new) for name, value in node.items()}
    return [exchanged(value, old, new) for value in node] if isinstance(node, list) else node


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], keys: Iterable[str] = COMPARED, free: Iterable[str] = FREE
) -> list[tuple[str, Any, Any]]:
    """[(path, value in old, value in new)] of every leaf below the keys that differs; None stands for a path that one of them lacks.

    Secrets are compared, and shown, by the name of their variable.

    Args:    old, new: configs, resolved here.  keys: the parts that are compared.  free: parts of those that may differ.
    """
    before, after = dict(leaves(resolved(_masked(old)))), dict(leaves(resolved(_masked(new))))
    compared, free = tuple(keys), tuple(free)
    names = [name for name in dict.fromkeys((*before, *after)) if _within(name, compared) and not _within(name, free)]
    return [(name, before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)]


def _within(path: str, roots: Iterable[str]) -> bool:
    return any(f"{path}.".startswith(f"{root}.") for root in roots)


def resolved(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as plain dicts and lists with every interpolation resolved.

    Raises:  ConfigError: an interpolation names a key that is not there; the nearest is named.
    """
    try:
        tree = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else copy.deepcopy(dict(config))
    except OmegaConfBaseException as error:
        raise explain(error, config) from error
    assert isinstance(tree, dict)
    return {str(name): value for name, value in tree.items()}


def save_config(config: Mapping[str, Any], path: epath.PathLike) -> None:
    """Writes the config resolved, but without secrets.

    A value that comes from an environment variable whose name says secret (TOKEN, KEY, SECRET, PASSWORD), straight or through another key,
    is written as the interpolation that it is, null where the variable is not set: `${oc.env:HF_TOKEN,null}`.

    Raises:  ConfigError: an interpolation that cannot be resolved.  ResearchError: the file cannot be written.
    """
    text = yaml.dump(resolved(_masked(config)), Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)
    folder.write_text(path, text)


_Fastest: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _Dumper(_Fastest):
    """Writes what OmegaConf reads back as the same values, by libyaml where it is there: every trial of a sweep writes one."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: Any, text: str) -> Any:
    """OmegaConf reads 1e-3 as a number, where YAML by itself does not."""
    try:
        float(text)
    except ValueError:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'")


_Dumper.add_representer(str, _text)
_Dumper.add_multi_representer(pathlib.PurePath, lambda dumper, path: _text(dumper, os.fspath(path)))
_Dumper.add_multi_representer(enum.Enum, lambda dumper, member: _text(dumper, member.name))


def _masked(config: Mapping[str, Any]) -> DictConfig:
    """To be read only: the config, where it names secrets a copy in which each is an escaped interpolation, that resolves to its own text."""
    config = config if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
    secrets = {name: written for name, written in leaves(config) if isinstance(written, str) and _is_secret(written)}
    if not secrets:
        return config  # copying takes longer than all that is done with it
    masked = copy.deepcopy(config)
    OmegaConf.set_readonly(masked, False)
    for name, written in secrets.items():
        optional = re.sub(r"(\$\{\s*oc\.env\s*:[^,{}]+)\}", r"\1,null}", written)
        OmegaConf.update(masked, name, optional.replace("${", "\\${"))
    return masked


def _is_secret(written: str) -> bool:
    variable = _VARIABLE.search(written)
    return variable is not None and _SECRET.search(variable[1]) is not None


def read_config(path: epath.PathLike) -> DictConfig:
    """The config in a YAML file.

    Raises:  ResearchError: the file cannot be read.  ConfigError: it is not YAML, not a mapping, or uses aliases, which `save_config` never writes
             and which can make a small file expand without limit.
    """
    try:
        text = epath.Path(path).read_text()
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ConfigError(f"{path} uses YAML aliases, which no config of a run has")
        config = OmegaConf.create(text)
    except OSError as error:
        raise ResearchError(f"cannot read {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} is not a config: {' '.join(str(error).split())}") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{path} is not a config: it holds no mapping")
    return config
