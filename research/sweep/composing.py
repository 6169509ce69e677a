"""The configs of many jobs of one sweep: those that differ in plain values alone are composed once."""

import copy
from collections.abc import Sequence

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, open_dict

from research.core.config import settled


def compose_jobs(loader: ConfigLoaderImpl, master: DictConfig, jobs: Sequence[Sequence[str]]) -> list[DictConfig]:
    """The config of each job, as Hydra's own launchers compose it, without Hydra's node; `${hydra:…}` is written in.

    Composing takes a tenth of a second, a copy with other values a hundredth. Values are set last, as Hydra sets them; a job in which one
    override names a part of what another one names is composed by itself, since there the order counts.

    Args:    loader, master: as a launcher is given them.  jobs: the overrides of each.
    """
    parser = OverridesParser.create(loader)
    common = set(jobs[0]).intersection(*jobs)
    composed: dict[tuple[str, ...], DictConfig] = {}
    configs = []
    for lines in jobs:
        values = [override for override in parser.parse_overrides([line for line in lines if line not in common]) if _is_value(override, loader)]
        if not _apart(values, parser.parse_overrides(list(lines))):
            values = []
        late = {override.input_line for override in values}
        base = tuple(line for line in lines if line not in late)
        if base not in composed:
            composed[base] = loader.load_sweep_config(master, list(base))
        config = copy.deepcopy(composed[base])
        ConfigLoaderImpl._apply_overrides_to_config(values, config)
        configs.append(_settled(config, lines))
    return configs


def _is_value(override: Override, loader: ConfigLoaderImpl) -> bool:
    """Whether the override sets a plain value and chooses no file of a group."""
    return override.package is None and not override.is_delete() and not loader.repository.group_exists(override.key_or_group)


def _apart(values: Sequence[Override], all_overrides: Sequence[Override]) -> bool:
    """Whether no value stands at, above or below the key of another override."""
    keys = [f"{override.key_or_group}." for override in all_overrides]
    return all(sum(key.startswith(f"{v.key_or_group}.") or f"{v.key_or_group}.".startswith(key) for key in keys) == 1 for v in values)


def _settled(config: DictConfig, lines: Sequence[str]) -> DictConfig:
    with open_dict(config):
        config.hydra.overrides.task = list(lines)
    before = HydraConfig.instance().cfg
    try:
        HydraConfig.instance().set_config(config)
        return settled(copy.deepcopy(config))
    finally:
        HydraConfig.instance().cfg = before
