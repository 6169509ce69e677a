"""Overrides such as `model=gpt` or `train.steps=100`, checked before Hydra composes: it takes a misspelt `+group=…` for a new key and runs."""

import difflib
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString, ValueType
from hydra.core.utils import setup_globals
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from research.core import folder
from research.core.direction import direction
from research.core.errors import ConfigError, nearest
from research.core.nodes import below_call, descend, is_call, near, plain

COMPOSING = (HydraException, OmegaConfBaseException, yaml.YAMLError)  # what goes wrong between YAML and config
_TEXT = ("prompt", "command", "tpu.setup", "slurm.setup")  # keys whose value is what a person says or a shell reads, commas and all
_KEY = re.compile(r"[+~]{0,2}[\w.@/\[\]]+")
_FUNCTIONS = "choice|range|interval|glob|sort|shuffle|tag|extend_list|int|float|str|bool|json_str"
_SYNTAX = re.compile(rf"""[\[{{'"]|({_FUNCTIONS})\(""")  # how a value begins that is Hydra's own syntax and no plain text
_EXPERIMENT, _SWEEPER = "experiment", "hydra/sweeper"


class Composer:
    """The configs of one verb: `load(overrides)` composes, `check(overrides)` says first what is wrong with them.

    Works on Hydra's loader alone and leaves its global state as it is: any number of times, and inside a running app.

    Args:    verb: name of the primary config.  conf: folder of the primary configs; None: this project's.  extra: one that is searched too.
    """

    def __init__(self, verb: str, conf: str | None = None, extra: str | None = None):
        setup_globals()  # the resolvers ${now:} and ${hydra:}
        OmegaConf.register_new_resolver("direction", direction, replace=True)
        OmegaConf.register_new_resolver("draw", draw, replace=True)
        OmegaConf.register_new_resolver("described", _described, replace=True)  # for --help
        self.verb = verb
        path = create_config_search_path(conf or str(folder.conf()))
        if extra:
            path.prepend("command-line", f"file://{extra}", SearchPathQuery(provider="schema"))
        self._loader = ConfigLoaderImpl(path)
        self._parser = OverridesParser.create(self._loader)
        self._loaded: dict[tuple[str, ...], DictConfig] = {}

    def load(self, overrides: Sequence[str] = ()) -> DictConfig:
        """The composed config, Hydra's own node included.

        Raises:  ConfigError: whatever Hydra or YAML found wrong, in one line.
        """
        if (key := tuple(overrides)) not in self._loaded:
            try:
                self._loaded[key] = self._loader.load_configuration(self.verb, list(overrides), RunMode.RUN, from_shell=False)
            except (*COMPOSING, ValueError) as error:
                raise explain(error) from error
        return self._loaded[key]

    def check(self, overrides: Sequence[str], multirun: bool = False) -> list[str]:
        """The overrides as Hydra should read them, after each was found to name something that exists.

        Free text is quoted, `debug=true` becomes `debug.traceback=true`, `group=null` becomes `~group`, and a key below an empty mapping,
        which is there to be filled, gets the `++` that Hydra asks for.

        Args:    multirun: whether an override may list several values; each of a group's is checked.
        Raises:  ConfigError: an unknown group, option or key, whatever its prefix, or a fault in a YAML file that they choose.
        """
        parsed = [self._parse(line) for line in overrides]
        groups = [override for override in parsed if self._is_group(override)]
        for override in parsed:
            if override.is_sweep_override() and not multirun:
                raise ConfigError(f"override {override.input_line!r} lists several values: add -m to run each, or quote the value")
            if override.is_discrete_sweep() and not _values(override):
                raise ConfigError(f"override {override.input_line!r} holds no value: {_empty(override)}")
        for override in groups:
            self._check_option(override)
        try:
            for job in self._jobs(groups):
                self._check_experiment(job)
        except ConfigError as error:
            for override in groups:
                self._check_group(override)  # knows the verb's groups, which Hydra does not name
            chosen = next((o.input_line for o in groups if o.key_or_group == _EXPERIMENT), None)
            if chosen:
                raise ConfigError(f"{chosen}: {error}") from error
            raise
        composed = self.load([*next(self._jobs(groups)), *(o.input_line or "" for o in parsed if o.key_or_group == _SWEEPER)])
        if composed.hydra.runtime.choices[_SWEEPER] == "basic":
            for override in parsed:
                if override.is_interval_sweep():
                    raise ConfigError(f"override {override.input_line!r}: an interval has no end of values; list some, or add {_SWEEPER}=search")
        tree = plain(composed)
        return [override.input_line or "" if override in groups else self._check_key(override, tree) for override in parsed]

    def first(self, overrides: Sequence[str]) -> list[str]:
        """The overrides of a sweep's first job; a key that has only a range of values is left out."""
        parsed = [self._parse(line) for line in overrides]
        plain = [o for o in parsed if not o.is_sweep_override() or o.is_discrete_sweep()]
        return [f"{o.get_key_element()}={next(iter(_values(o)))}" if o.is_sweep_override() else o.input_line or "" for o in plain]

    def _parse(self, line: str) -> Override:
        """The override as Hydra reads it, its value quoted where Hydra's grammar would trip over plain text."""
        key, equals, value = line.partition("=")
        if not key:
            raise ConfigError(f"override {line!r} names no key")
        if key == "debug" and value.lower() in ("true", "false"):
            line = f"debug.traceback={value}"
        if value == "null" and self._loader.repository.group_exists(key):
            line = f"~{key}"
        quoted = f"{key}={QuotedString(value, Quote.single).with_quotes()}"
        if key in _TEXT and value != "null" and value[:1] not in ("'", '"'):
            return self._parser.parse_overrides([quoted])[0]
        try:
            return self._parser.parse_overrides([line])[0]
        except OverrideParseException as error:
            if not equals or not _KEY.fullmatch(key) or (_SYNTAX.match(value) and key not in _TEXT):
                raise ConfigError(f"override {line!r} is not KEY=VALUE, as in seed=1 or model.width=[64,64]") from error
            return self._parser.parse_overrides([quoted])[0]

    def _is_group(self, override: Override) -> bool:
        """Whether the override chooses a file of a group; `model={…}` sets a key."""
        known = self._loader.repository.group_exists(override.key_or_group) and not override.is_hydra_override()
        return known and not isinstance(override.value(), dict)

    def _check_option(self, override: Override) -> None:
        """Refuses a choice that no file answers to."""
        line, group = override.input_line, override.key_or_group
        if override.is_add() or override.is_force_add():
            raise ConfigError(f"override {line!r}: {group} is chosen without a plus, as {group}=NAME")
        for option in _values(override):
            if option is not None and not self._loader.repository.config_exists(f"{group}/{option}"):
                raise ConfigError(f"override {line!r}: there is no {group} {option!r}{nearest(option, self._loader.get_group_options(group))}")

    def _check_group(self, override: Override) -> None:
        """Refuses a group that the verb does not have."""
        key, choices = override.get_key_element().lstrip("+~"), self.load().hydra.runtime.choices
        if key not in choices:
            known = [name for name in choices if not name.startswith("hydra/")]
            raise ConfigError(f"override {override.input_line!r}: {self.verb} has no group {key!r}{nearest(key, known)}")

    def _check_experiment(self, job: Sequence[str]) -> None:
        """Refuses an experiment that sets a key which no other config file has: nobody would read it."""
        composed = self.load(job)
        choices = composed.hydra.runtime.choices
        if (name := choices.get(_EXPERIMENT)) is None:
            return
        others = {group: option for group, option in choices.items() if option and group != _EXPERIMENT and not group.startswith("hydra/")}
        known = plain(self.load([f"{group}={option}" for group, option in others.items()]))
        for path in _added(plain(composed), known):
            raise ConfigError(f"experiment {name!r} sets {path!r}, which {self.verb} does not have{near(path, known)}")

    def _check_key(self, override: Override, tree: Any) -> str:
        """The override's line; refuses a key that no config file has."""
        line, path = override.input_line or "", override.key_or_group
        parent, rest = descend(tree, path)
        argument = below_call(tree, path)
        if override.is_hydra_override() or not rest or (argument and (override.is_add() or override.is_force_add())):
            return line  # an argument that the file leaves at its default is checked when the object is built
        if parent == {} and not override.is_delete():
            return f"++{line.lstrip('+')}"
        hint = f" (+{path}=… passes an argument that the file does not list)" if is_call(parent) else ""
        raise ConfigError(f"override {line!r}: {self.verb} has no key {path!r}{near(path, tree)}{hint}")

    def _jobs(self, groups: Sequence[Override]) -> Iterator[list[str]]:
        """Enough single jobs of a sweep to see every option of every group: the first of each, then each other option in turn."""
        lines = [[f"{o.get_key_element()}={value}" for value in _values(o)] if o.is_sweep_override() else [o.input_line or ""] for o in groups]
        first = [options[0] for options in lines]
        yield first
        for i, options in enumerate(lines):
            for option in options[1:]:
                yield [*first[:i], option, *first[i + 1 :]]


def draw(seed: int, name: str, choices: Sequence[Any]) -> Any:
    """One of the choices by lot, the same for the same seed and name: `${draw:${seed},width,[64,128]}` makes a random search of `-m seed=range(16)`.

    Raises:  ValueError: there is no choice.
    """
    if not choices:
        raise ValueError(f"draw: {name} has no choice")
    return choices[int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big") % len(choices)]


def _described(group: str, room: str) -> str:
    """The options of a group that belong to a room, a line each, with what their files say first."""
    options = folder.described(group, room)
    width = max(map(len, options), default=0)
    return "\n".join(f"  {name:{width}}  {text}".rstrip() for name, text in options.items())


def explain(error: Exception, config: Any = None) -> ConfigError:
    """What Hydra, OmegaConf or YAML complain of, as one line with the nearest right name.

    Args:    error: one of `COMPOSING`.  config: where the names that would have been right are looked up.
    """
    if isinstance(error, MissingConfigException) and error.options:
        name = (error.missing_cfg_file or "").rpartition("/")[2]
        return ConfigError(_line(error) + nearest(name, error.options))
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return ConfigError(f"{mark.name}, line {mark.line + 1}: {error.problem}")
    text = _line(error) or (_line(error.__cause__) if error.__cause__ else type(error).__name__)
    if isinstance(error, OmegaConfBaseException):
        wanted = re.search(r"Interpolation key '(.+?)' not found", text)
        hint = _meant(wanted[1], plain(config)) if wanted and config is not None else ""
        return ConfigError(f"{error.full_key}: {text}{hint}" if error.full_key else text + hint)
    cause = error.__cause__
    return ConfigError(f"{text.rstrip('.')}: {_line(cause)}" if isinstance(cause, OmegaConfBaseException) and _line(cause) != text else text)


def _meant(path: str, tree: Any) -> str:
    """A hint at the key that an interpolation should have named; what the data does not give is seldom a misspelling."""
    group, _, name = path.rpartition(".")
    given, rest = descend(tree, group)
    if group != "data.spec" or rest or difflib.get_close_matches(name, given, n=1, cutoff=0.8):
        return near(path, tree)
    return f": this data gives {', '.join(given) or 'nothing'}; choose a model and an objective that fit it"


def _added(tree: Any, known: Any, prefix: str = "") -> Iterator[str]:
    """The paths of the tree that `known` has not, except where any name is allowed: below a call, or below an empty mapping."""
    if isinstance(tree, Mapping) and isinstance(known, Mapping) and known and not is_call(tree):
        for name, value in tree.items():
            if name in known:
                yield from _added(value, known[name], f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"


def _values(override: Override) -> list[Any]:
    if override.is_discrete_sweep():
        return list(override.sweep_string_iterator())
    value = override.value()
    return value if isinstance(value, list) else [value]


def _empty(override: Override) -> str:
    """Why a list of values is empty."""
    if override.is_range_sweep():
        return "range(START,STOP) needs START below STOP"
    return f"no option of {override.key_or_group} has such a name" if override.value_type is ValueType.GLOB_CHOICE_SWEEP else "give at least one"


def _line(error: BaseException) -> str:
    """The first line of a message that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")
