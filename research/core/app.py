"""The one wrapper of every verb: overrides checked, Hydra run, errors turned into one line and an exit code."""

import contextlib
import contextvars
import dataclasses
import functools
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from research.core import folder, hosts
from research.core.cache import cached_programs
from research.core.errors import ConfigError, Interrupted, ResearchError
from research.core.memory import keep_freed_memory, resume_garbage
from research.core.nodes import leaves, plain
from research.core.overrides import COMPOSING, Composer, explain
from research.core.workers import take_part

SHOWN = 5  # failed jobs of a multirun that its last line lists
Verb = Callable[[DictConfig], Any]
Arrange = Callable[[Composer, list[str], bool], tuple[list[str], bool]]
_quiet: contextvars.ContextVar[bool] = contextvars.ContextVar("quiet", default=False)
_job: "contextvars.ContextVar[Job | None]" = contextvars.ContextVar("job", default=None)


@dataclasses.dataclass(frozen=True)
class Job:
    """One job of a multirun: its number, and its overrides as Hydra hands them out."""

    number: int
    overrides: tuple[str, ...]


def job() -> Job | None:
    """The job of a multirun that is under way in this thread; None in a command that runs one thing."""
    return _job.get()


def say(text: str) -> None:
    """Prints a line for the person at the terminal, at once."""
    if talks():
        print(text, flush=True)


def talks() -> bool:
    """Whether what a person reads is printed here: by the first of several hosts, and not by the trials of a sweep that is told as one."""
    return hosts.first() and not _quiet.get()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keeps `say` silent inside, in this thread."""
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)


def main(verb: Verb, name: str, argv: Sequence[str] | None = None, arrange: Arrange | None = None) -> int:
    """Runs a verb as a Hydra app; returns the exit code: 0 done, else that of the worst error (core/errors.py).

    Overrides are checked before Hydra composes. Whatever goes wrong ends in one line on stderr that starts with `error:`; the traceback is
    shown with `debug=true`. In a multirun a failing job does not end the others. Leaves sys.argv, logging and Hydra's global state as they
    were, so it can be called in process, any number of times.

    Args:    verb: takes the composed config, in which no value is missing.  name: the primary config, as "train".
             argv: the arguments after the program's name; None: those of this process.
             arrange: (composer, overrides, whether -m was given) -> the overrides checked, whether several jobs are to run.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    program = sys.argv[0] if argv is None else f"research-{name}"
    resume_garbage()
    jobs = Jobs(verb)
    try:
        with _isolated():
            _launch(jobs, name, program, arguments, arrange)
        error = jobs.worst()
    except SystemExit as stop:  # --help and its like have done what they were asked to
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        error = jobs.worst() or Interrupted("interrupted; nothing had been saved")
    except Exception as failure:
        if {"debug=true", "debug.traceback=true"} & set(arguments):
            traceback.print_exception(failure)
        error = failure
    if error is None:
        return 0
    code, line = outcome(error)
    print(f"error: {line}", file=sys.stderr, flush=True)
    if not isinstance(error, Interrupted):
        hosts.leave(code)
    return code


def outcome(error: BaseException, config: DictConfig | None = None) -> tuple[int, str]:
    """(exit code, message in one line) of an error; one that is not ours shows its type.

    Args:    config: where the nearest right name is looked up when an interpolation failed.
    """
    if isinstance(error, COMPOSING):
        error = explain(error, config)
    text = " ".join(str(error).split())
    if isinstance(error, ResearchError):
        return error.exit_code, text
    return 1, f"{type(error).__name__}: {text}" if text else type(error).__name__


def _launch(jobs: "Jobs", name: str, program: str, arguments: list[str], arrange: Arrange | None) -> None:
    parser = get_args_parser()
    parser.error = _refuse
    args = parser.parse_intermixed_args(arguments)
    if args.config_path and not os.path.isabs(args.config_path):
        raise ConfigError(f"--config-path={args.config_path} must be absolute")
    if not (args.shell_completion or args.hydra_help):
        extra = args.config_dir and os.path.abspath(args.config_dir)
        composer = Composer(args.config_name or name, args.config_path, extra)
        checked, multirun = (arrange or _checked)(composer, args.overrides, args.multirun)
        flags = [argument for argument in arguments if argument not in args.overrides]
        flags += ["-m"] if multirun and not args.multirun else []
        arguments = [*flags, *checked]  # Hydra's own parser gives up on `seed=0 -m data=digits,mnist`

    @functools.wraps(jobs.verb)  # Hydra names the app after it
    def job(config: DictConfig) -> Any:
        return jobs.run(config)

    job.jobs = jobs  # type: ignore[attr-defined]  # for a launcher that runs several at once
    sys.argv = [program, *arguments]
    hydra.main(version_base="1.3", config_path=str(folder.conf()), config_name=name)(job)()


def _checked(composer: Composer, overrides: list[str], multirun: bool) -> tuple[list[str], bool]:
    return composer.check(overrides, multirun=multirun), multirun


def _refuse(message: str) -> NoReturn:
    raise ConfigError(f"command line: {message}; see --help")


@dataclasses.dataclass
class Jobs:
    """A verb as Hydra calls it, once per job, and the jobs that failed."""

    verb: Verb
    process: int = dataclasses.field(default_factory=os.getpid)
    count: int = 0
    failed: list[tuple[str, int, str]] = dataclasses.field(default_factory=list)  # overrides, exit code, message

    def run(self, config: DictConfig) -> Any:
        """What the verb returns; None where it failed, so that a multirun goes on."""
        known = HydraConfig.get()
        overrides = tuple(plain(known.overrides.task))
        number = None
        if known.mode is RunMode.MULTIRUN:
            number = int(known.job.num)
            if os.getpid() != self.process and "joblib" in known.launcher.get("_target_", ""):  # others share the machine out themselves
                jobs = known.launcher.get("n_jobs", 1)
                take_part(known.sweep.dir, jobs if jobs > 0 else (os.cpu_count() or 1) + 1 + jobs)
            say(f"job {number}: {' '.join(_typed(overrides))}")
        return self.attempt(config, overrides, number, prepared(config))

    def attempt(
        self, config: DictConfig, overrides: Sequence[str], number: int | None, context: contextlib.AbstractContextManager[None] | None = None
    ) -> Any:
        """What the verb returns for one job; None where it failed.

        Args:    number: of the job in its multirun; None: it is alone.  context: what the verb runs in; None: `prepared` holds already.
        Raises:  KeyboardInterrupt: the person wants the terminal back.  Exception: as the verb, in a launcher's other process.
        """
        self.count += 1
        token = _job.set(None if number is None else Job(number, tuple(overrides)))
        try:
            missing = [path for path, value in leaves(config) if value == "???"]
            if missing:
                raise ConfigError(f"{missing[0]} is not given; add {missing[0]}=VALUE")
            with context or contextlib.nullcontext():
                return self.verb(config)
        except Exception as error:
            if os.getpid() != self.process and not getattr(error, "recorded", False):  # the launcher of the other process brings it home
                raise
            code, line = outcome(error, config)
            self.failed.append((" ".join(_typed(overrides)), code, line))
            if config.get("debug", {}).get("traceback"):
                traceback.print_exception(error)
            if isinstance(error, Interrupted):
                raise KeyboardInterrupt from error  # the person wants the terminal back: no further job either
            return None
        finally:
            _job.reset(token)

    def worst(self) -> ResearchError | None:
        """All failures as one error with the highest exit code."""
        if not self.failed:
            return None
        message = self.failed[0][2]
        if self.count > 1:
            listed = "; ".join(f"[{overrides}] {line} (exit code {code})" for overrides, code, line in self.failed[:SHOWN])
            more = f"; and {len(self.failed) - SHOWN} more" if len(self.failed) > SHOWN else ""
            message = f"{len(self.failed)} of {self.count} jobs failed: {listed}{more}"
        error = ResearchError(message)
        error.exit_code = max(code for _, code, _ in self.failed)
        return error


def _typed(overrides: Sequence[str]) -> list[str]:
    """The overrides that a person typed: without the folder that all jobs of a sweep share."""
    return [line for line in overrides if not line.startswith("sweep_dir=")]


@contextlib.contextmanager
def prepared(config: DictConfig) -> Iterator[None]:
    """Sets what JAX must know before it makes an array; takes back, at the end, what can be taken back."""
    import jax  # here, so that help and tab completion need not wait for it

    keep_freed_memory()
    debug = config.get("debug") or {}
    with contextlib.ExitStack() as stack:
        if (count := debug.get("cpu_devices")) is not None:
            if type(count) is not int or count < 1:
                raise ConfigError(f"debug.cpu_devices={count!r}: must be a whole number of at least 1")
            try:
                jax.config.update("jax_num_cpu_devices", count)
            except RuntimeError as error:
                raise ConfigError(f"debug.cpu_devices={count} comes too late: JAX already runs in this process") from error
        if (machines := config.get("hosts")) is not None:
            hosts.connect(machines)
        if debug.get("nans"):
            stack.enter_context(jax.debug_nans(True))
        if debug.get("disable_jit"):
            stack.enter_context(jax.disable_jit())
        stack.enter_context(cached_programs(config.get("cache")))
        yield


@contextlib.contextmanager
def _isolated() -> Iterator[None]:
    """Gives back, at the end, what Hydra changes for the whole process; makes it raise its errors instead of printing them."""
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    running, config = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    os.environ["HYDRA_FULL_ERROR"] = "1"
    GlobalHydra.instance().hydra = None
    try:
        with _own_logging():
            yield
    finally:
        sys.argv = argv
        GlobalHydra.instance().hydra, HydraConfig.instance().cfg = running, config
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


@contextlib.contextmanager
def _own_logging() -> Iterator[None]:
    """Sends warnings to the terminal, once, and hides the handlers that exist from what Hydra configures.

    Some libraries add a handler of their own when they are imported; and configuring closes every handler that logging knows of, upon which
    absl's closes the stream below it.
    """
    root, known = logging.getLogger(), logging._handlerList  # type: ignore[attr-defined]  # private: logging has no other list of them
    handlers, level, all_handlers = root.handlers[:], root.level, known[:]
    known.clear()
    terminal = logging.StreamHandler()
    terminal.setLevel(logging.WARNING)
    terminal.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    root.handlers[:] = [terminal, *(handler for handler in handlers if type(handler) is not logging.StreamHandler)]
    try:
        yield
    finally:
        root.handlers[:], known[:] = handlers, all_handlers
        root.setLevel(level)
