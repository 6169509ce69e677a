"""The configs of many jobs of one sweep: those that differ in plain values alone are composed once."""

import copy
from collections.abc import Sequence
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, open_dict

from research.core.config import settled


class Once:
    """Hydra's loader of configs, which composes each choice of files once and sets plain values in copies.

    Composing takes a tenth of a second, a copy with other values a hundredth. Values are set last, as Hydra sets them; a job in which one
    override names a part of what another one names is composed by itself, since there the order counts.

    Hydra's sweeper composes each job only to see that it can be; what that made waits for `job`.

    Args:    loader: Hydra's own; all else is left to it.
    """

    def __init__(self, loader: ConfigLoaderImpl) -> None:
        self._loader = loader
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        self._made: dict[tuple[str, ...], DictConfig] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: Sequence[str]) -> DictConfig:
        """The config of one job, as Hydra composes it; the configs of one sweep have one master.

        Args:    as Hydra's loader.
        """
        made = self._made[tuple(sweep_overrides)] = self._load(master_config, sweep_overrides)
        return made

    def job(self, master_config: DictConfig, sweep_overrides: Sequence[str]) -> DictConfig:
        """The same, for a caller who may change it: what `load_sweep_config` made of these overrides, once, else another."""
        made = self._made.pop(tuple(sweep_overrides), None)
        return self._load(master_config, sweep_overrides) if made is None else made

    def _load(self, master_config: DictConfig, sweep_overrides: Sequence[str]) -> DictConfig:
        overrides = OverridesParser.create(self._loader).parse_overrides(list(sweep_overrides))
        values = [override for override in overrides if _is_value(override, self._loader)]
        if not _apart(values, overrides):
            values = []
        late = {override.input_line for override in values}
        base = tuple(line for line in sweep_overrides if line not in late)
        if base not in self._composed:
            self._composed[base] = self._loader.load_sweep_config(master_config, list(base))
        config = copy.deepcopy(self._composed[base])
        ConfigLoaderImpl._apply_overrides_to_config(values, config)
        with open_dict(config):
            config.hydra.overrides.task = list(sweep_overrides)
        return config


def compose_jobs(loader: Once, master: DictConfig, jobs: Sequence[Sequence[str]]) -> list[DictConfig]:
    """The config of each job, as Hydra's own launchers compose it, without Hydra's node; `${hydra:…}` is written in.

    Args:    loader, master: as a launcher is given them.  jobs: the overrides of each.
    """
    return [_settled(loader.job(master, lines)) for lines in jobs]


def _is_value(override: Override, loader: ConfigLoaderImpl) -> bool:
    """Whether the override sets a plain value and chooses no file of a group."""
    return override.package is None and not override.is_delete() and not loader.repository.group_exists(override.key_or_group)


def _apart(values: Sequence[Override], all_overrides: Sequence[Override]) -> bool:
    """Whether no value stands at, above or below the key of another override."""
    keys = [f"{override.key_or_group}." for override in all_overrides]
    return all(sum(key.startswith(f"{v.key_or_group}.") or f"{v.key_or_group}.".startswith(key) for key in keys) == 1 for v in values)


def _settled(config: DictConfig) -> DictConfig:
    before = HydraConfig.instance().cfg
    try:
        HydraConfig.instance().set_config(config)
        return settled(config)
    finally:
        HydraConfig.instance().cfg = before
