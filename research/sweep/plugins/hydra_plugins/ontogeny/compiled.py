"""`hydra/launcher=compiled`: a sweep in one process that compiles each program once."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclasses.dataclass
class CompiledConf:
    """What `hydra.launcher.…` can set."""

    _target_: str = "hydra_plugins.ontogeny.compiled.CompiledLauncher"
    mode: str = "auto"  # auto | reuse: one or two at a time | vmap: side by side in one program | shard: side by side on each device
    rows: int | None = None  # trials in one program; null: as many as fit into half of the device's memory


ConfigStore.instance().store(group="hydra/launcher", name="compiled", node=CompiledConf, provider="ontogeny")


class CompiledLauncher(Launcher):
    """Hands all jobs of a sweep to `research.sweep.compiled`, which groups them by program.

    Args:    mode, rows: as `research.sweep.compiled.launch` takes them.
    """

    def __init__(self, mode: str = "auto", rows: int | None = None) -> None:
        self.mode, self.rows = mode, rows

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Takes what Hydra gives every launcher; the sweeper, which composes all jobs before any begins, gets the same loader."""
        from research.sweep import composing  # here, since Hydra imports this file in every app of the environment

        self.loader: Any = composing.Once(hydra_context.config_loader)  # type: ignore[arg-type]  # Hydra has no other
        hydra_context.config_loader = self.loader
        self.task_function, self.config = task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """One JobReturn for each job; a job that failed returns None, and `research.core.app` knows why."""
        from research.sweep import compiled, composing  # here, likewise

        setup_globals()
        jobs: Any = getattr(self.task_function, "jobs", None)
        composed = composing.compose_jobs(self.loader, self.config, job_overrides)
        ready = [
            compiled.Ready(initial_job_idx + i, tuple(overrides), config)
            for i, (overrides, config) in enumerate(zip(job_overrides, composed, strict=True))
        ]
        results = compiled.launch(jobs, ready, mode=self.mode, rows=self.rows)
        returns = []
        for job, result in zip(ready, results, strict=True):
            done = JobReturn(overrides=list(job.overrides), cfg=job.config, status=JobStatus.COMPLETED, task_name=jobs.verb.__name__)
            done.return_value = result
            returns.append(done)
        return returns
