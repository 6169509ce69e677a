"""`hydra/sweeper=search`: a sweep whose trials are chosen by what the earlier ones gave."""

import dataclasses
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclasses.dataclass
class SearchConf:
    """What `hydra.sweeper.…` can set."""

    _target_: str = "hydra_plugins.ontogeny.search.SearchSweeper"
    sampler: str = "tpe"  # tpe | random | grid: all values of choices and ranges | cmaes: numbers only | sobol: evenly spread
    trials: int | None = None  # in all, those of earlier commands included; null: every combination of a grid, else 32
    at_once: int = 1  # trials that are handed to the launcher together; tpe and cmaes learn between such batches
    seed: int = 0  # of the sampler: the same seed and scores choose the same trials, however often the search was stopped
    metric: Any = None  # a score, or a key of result.json as params; a list of them looks for the trade-off; null: train.monitor
    direction: Any = None  # min | max, a list for several metrics; null: max for accuracy and its like and for speeds, min for losses and costs
    startup: int = 10  # trials before tpe stops to draw at random, and before median prunes
    pruner: str | None = None  # null | median | asha | hyperband: ends a trial where others did better at the same step
    rung: int | None = None  # updates before the first decision of a pruner; null: train.eval_every
    reduction: int = 3  # asha, hyperband: one of so many trials goes on from a rung to the next, which is so many times as far
    storage: str | None = None  # a file that ends in .journal, or a URL such as sqlite:///search.db; null: <sweep>/search.journal
    params: dict[str, Any] | None = None  # searched values as a mapping, for the file of an experiment


ConfigStore.instance().store(group="hydra/sweeper", name="search", node=SearchConf, provider="ontogeny")


class SearchSweeper(Sweeper):
    """Hands the sweep to `research.sweep.search`, which asks Optuna for trials and the chosen launcher to run them.

    Args:    settings: the fields of `SearchConf`.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Takes what Hydra gives every sweeper, and makes the launcher."""
        self.loader: Any = hydra_context.config_loader
        self.task_config = config
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> None:
        """Runs the search; its study, its ledger and its trials lie in the folder of the sweep.

        Args:    arguments: the overrides of the command that are not Hydra's own.
        """
        from research.core.errors import ConfigError  # here, since Hydra imports this file in every app of the environment

        try:
            from research.sweep import search
        except ModuleNotFoundError as error:
            raise ConfigError(f"hydra/sweeper=search needs {error.name}: pip install 'ontogeny[sweeps]'") from error
        search.Search(self.launcher, self.loader, self.task_config, arguments, **self.settings).run()
