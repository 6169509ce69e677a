"""The body of `hydra/launcher=compiled`: jobs of one program are compiled once, and run one or two at a time, side by side, or over devices."""

import collections
import contextlib
import contextvars
import copy
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from research.core import app
from research.core.config import COMPARED, LEARNING_RATE, fingerprint
from research.core.errors import ConfigError, ResearchError, nearest
from research.core.shared import shared, sharing
from research.core.spec import abstract_batch
from research.data.dataset import open_data
from research.data.loader import Loader
from research.data.on_device import place
from research.sweep.ledger import DONE, FAILED, Ledger
from research.sweep.trial import FREE
from research.training import trials
from research.training.assembly import Assembly, assemble
from research.training.interrupt import Interrupt
from research.training.parallel import Jit
from research.training.preflight import abstract_state, memory_bytes, residual_bytes

MODES = ("auto", "reuse", "vmap", "shard")
SHARE = 0.5  # of the device's memory, for the trials of one program
WORTH_S = 2.0  # training of a group that is shorter than this is not worth a second compilation to find something faster
CPU_WORTH_S = 20.0  # likewise on CPU, where small trials side by side gain a fifth at the very best, and two at a time by themselves as much
PROBE_S = 0.3  # of timing each way
BESIDE = 0.1  # of a trial's time, spent on other things than training, as waiting for the disk: from here on two trials at a time take less
_TOLD_AS_ONE = {
    "logger.progress": "none",
    "logger.figures": False,
    "logger.histograms": 0,
    "logger.sample": False,
}  # by `research.report`, unless a trial's own are asked for
_COMMON = ("cache", "debug", "hosts")  # what belongs to the process


@dataclasses.dataclass(frozen=True)
class Ready:
    """A job and its config, in which nothing depends on Hydra any more."""

    number: int
    overrides: tuple[str, ...]
    config: DictConfig


@dataclasses.dataclass(frozen=True)
class Way:
    """How the jobs of one program are run.

    Args:    name: reuse | vmap.  rows: trials in one program.  why: what was measured, in words.
    """

    name: str
    rows: int = 1
    why: str = ""


def launch(jobs: app.Jobs, ready: Sequence[Ready], *, mode: str = "auto", rows: int | None = None) -> list[Any]:
    """What the verb returns for each job, in order; None where it failed.

    Jobs whose programs are equal, which differ in seeds and in the numbers of `train.values` alone, make a group, whatever their order.

    Args:    mode: reuse: one after another, short ones two at a time, each with the very numbers of a lone run (but for the times, since two share
             the machine).  vmap: side by side in one program.  shard: side by side on each of the local devices.  auto: reuse or vmap as measured,
             over all devices where there are several.
             rows: trials in one program; None: as many as fit into half of the device's memory.
    Raises:  ConfigError: an unknown mode, one device to shard over, or jobs that want different processes.  KeyboardInterrupt: asked to stop.
    """
    if mode not in MODES:
        raise ConfigError(f"hydra.launcher.mode={mode!r} is unknown{nearest(mode, MODES)}")
    if rows is not None and (type(rows) is not int or rows < 1):
        raise ConfigError(f"hydra.launcher.rows={rows!r}: must be a number of trials, or null for as many as fit")
    for name in _COMMON:
        if any(job.config.get(name) != ready[0].config.get(name) for job in ready):
            raise ConfigError(f"{name} differs between the jobs, which share one process; use hydra/launcher=basic")
    for job in ready:
        _told_as_one(job)
    results: dict[int, Any] = {}
    with app.prepared(ready[0].config), sharing(), _Board(ready) as board:
        devices = jax.local_devices()
        if mode == "shard" and len(devices) == 1:
            raise ConfigError(f"hydra.launcher.mode=shard: this machine has one device ({devices[0].device_kind}); use auto, vmap or reuse")

        def attempt(job: Ready) -> Any:
            with app.silence(), board.running(job) as ended:
                results[job.number] = ended(jobs.attempt(job.config, job.overrides, job.number))
            return results[job.number]

        told = {job.number for job in ready if _is_told(job)}
        for job in ready:
            if job.number in told:
                attempt(job)
        for group in _groups([job for job in ready if job.number not in told]):
            way = _way(group, mode, rows)
            over = devices if mode in ("auto", "shard") and len(group) > 1 and len(devices) > 1 and _alone(group[0].config) is None else devices[:1]
            board.say(_told(group, way, len(over)))
            if len(over) == 1:
                _run(group, way, attempt, board.say)
            else:
                shares = [group[i :: len(over)] for i in range(len(over))]
                _threads([_on(device, _run, share, way, attempt, board.say) for device, share in zip(over, shares, strict=True) if share])
    return [results.get(job.number) for job in ready]


def _run(group: Sequence[Ready], way: Way, attempt: Callable[[Ready], Any], say: Callable[[str], None]) -> None:
    """Runs jobs of one program on one device."""
    if way.name == "reuse":
        waiting, count = collections.deque(group), 1
        while waiting and count == 1:
            first, began = len(waiting) == len(group), time.perf_counter()
            told = attempt(waiting.popleft())
            if told is not None and not first and _shares(group[0].config):  # the first one compiles and reads for all
                count = _at_once(told, time.perf_counter() - began)
        if waiting:
            say(f"from here on {count} at a time: one trains while another reads, writes and evaluates")
            _lanes(waiting, count, attempt)
        return
    for start in range(0, len(group), way.rows):
        part = group[start : start + way.rows]
        together = trials.Together(way.rows)
        members = [together.member(i) for i in range(len(part))]

        def side_by_side(member: trials.Member, job: Ready) -> None:
            with member.taking_part():
                attempt(job)

        _threads([lambda m=member, j=job, run=side_by_side: run(m, j) for member, job in zip(members, part, strict=True)])


def _shares(config: DictConfig) -> bool:
    """Whether a run may have another one beside it: not where both would wait for all devices, nor where the machine's energy is measured."""
    return _alone(config) is None and not OmegaConf.select(config, "logger.energy")


def _at_once(told: dict[str, Any], seconds: float) -> int:
    """How many trials are under way at a time: two, where one can train while the other reads, writes and evaluates.

    Args:    told: the result of one that ran alone; the seconds in it count from the run's beginning, so one that was resumed does not tell.
             seconds: that it took now, in all.
    """
    if told["status"] != "finished":
        return 1
    beside = seconds - told["train_s"] - told["compile_s"]
    return 2 if beside > BESIDE * (beside + told["train_s"]) and 2 * told["peak_bytes"] < memory_bytes() else 1


def _lanes(waiting: "collections.deque[Ready]", count: int, attempt: Callable[[Ready], Any]) -> None:
    """Runs jobs, so many at a time, until none is left or one of them or a signal wants the sweep to stop."""
    stopped, signal = threading.Event(), Interrupt()

    def lane() -> None:
        while not stopped.is_set() and signal.asked is None:
            try:
                job = waiting.popleft()
            except IndexError:
                return
            try:
                attempt(job)
            except BaseException:
                stopped.set()
                raise

    _threads([lane] * count, signal)


def _on(device: Any, run: Callable[..., None], *arguments: Any) -> Callable[[], None]:
    def there() -> None:
        with jax.default_device(device):
            run(*arguments)

    return there


def _threads(work: Sequence[Callable[[], None]], signal: Interrupt | None = None) -> None:
    """Does each piece in a thread of its own, with this thread's context; the first error is raised when all have ended.

    A signal that asks to stop reaches the loops of all; where none was in its loop any more, it is raised in the end.

    Args:    signal: what hears it; None: one that nobody else asks.
    Raises:  KeyboardInterrupt: asked to stop.
    """
    signal = signal or Interrupt()
    errors: list[BaseException] = []
    device = getattr(jax.config, "jax_default_device")  # noqa: B009  # the checker does not know it; it is not a part of the context

    def guarded(piece: Callable[[], None]) -> None:
        try:
            with jax.default_device(device):
                piece()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=contextvars.copy_context().run, args=(guarded, piece)) for piece in work]
    with signal.listening(patient=True):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    if signal.asked is not None:
        raise KeyboardInterrupt


def _is_told(job: Ready) -> bool:
    """Whether the ledger has the end of this trial already, so that there is nothing to run."""
    if job.config.get("sweep_dir") is None:
        return False
    name = fingerprint(job.config)[:12]
    states = {trial.state for trial in shared(("ledger", job.config.sweep_dir), Ledger(job.config.sweep_dir).trials) if trial.trial == name}
    return bool(states & {*DONE, *(() if job.config.retry else FAILED)})


def _groups(ready: Sequence[Ready]) -> list[list[Ready]]:
    groups: dict[str, list[Ready]] = {}
    for job in ready:
        groups.setdefault(_program(job.config), []).append(job)
    return list(groups.values())


def _program(config: DictConfig) -> str:
    """What decides on the program of a run and on its data: equal for jobs that can share both."""
    probe = copy.deepcopy(config)
    OmegaConf.update(probe, "seed", 0)
    for path in (LEARNING_RATE, *(config.train.get("values") or ())):
        if OmegaConf.select(probe, path) is not None:
            OmegaConf.update(probe, path, 0.0)
    return fingerprint(probe, (*COMPARED, "train", "parallel", "teacher", "resume", "checkpoint", "check"))


def _alone(config: DictConfig) -> str | None:
    """Why a run cannot share its steps with others; None where it can."""
    parallel = OmegaConf.select(config, "parallel._target_") or ""
    if not parallel.endswith(".Jit"):
        return "its steps run on several devices"
    if OmegaConf.select(config, "teacher.run"):
        return "it learns from another run"
    if OmegaConf.select(config, "debug.nans") or OmegaConf.select(config, "debug.disable_jit"):
        return "it is being debugged"
    return None


def _way(group: Sequence[Ready], mode: str, rows: int | None) -> Way:
    """How to run a group: as asked, or as measured."""
    if len(group) == 1 or mode == "reuse":
        return Way("reuse")
    if (reason := _alone(group[0].config)) is not None:
        return Way("reuse", why=reason)
    devices = len(jax.local_devices()) if mode in ("auto", "shard") else 1
    share = -(-len(group) // devices)
    try:
        assembly, source = _assembled(group[0].config)
        most = min(share, rows or _fitting(assembly, group[0].config))
        if mode != "auto":
            return Way("vmap", most)
        return _measured(assembly, source, group[0].config, most, share)
    except ResearchError:  # each job will say by itself what is wrong with it
        return Way("reuse")


def _assembled(config: DictConfig) -> tuple[Assembly, Any]:
    """A run's step, and its training split."""
    config = copy.deepcopy(config)
    dataset = open_data(config.data)
    source = dataset.split("train")
    with open_dict(config):
        config.data.spec = dict(dataset.spec)
    return assemble(config, batches=len(Loader(source, config.data.batch, seed=0))), source


def _fitting(assembly: Assembly, config: DictConfig) -> int:
    """How many trials of a program fit into the device's memory, by the shapes of state and activations."""
    state, batch = abstract_state(assembly), config.data.batch
    each = 6 * Jit().bytes_per_device(state)  # before and after, each by itself and beside the others', gradients, and the update
    if isinstance(batch, int):
        each += residual_bytes(assembly.step.objective, state, None, abstract_batch(assembly.spec, batch // assembly.step.accumulate))
    return max(int(SHARE * memory_bytes() / each), 1)


def _measured(assembly: Assembly, source: Any, config: DictConfig, rows: int, count: int) -> Way:
    """The faster way for this many trials on this device, by running a few steps of each."""
    steps, chunk = assembly.step.steps, trials.common_chunk(assembly.settings)
    try:
        source = place(source, chunk)
    except ConfigError:
        if assembly.settings.chunk > 1:
            return Way("reuse")  # each job is refused likewise, and says why
        chunk = 1
    loader = Loader(source, config.data.batch, seed=0)
    step, state = assembly.step, assembly.state()
    own = assembly.settings.chunk
    if own > 1:
        held, picks = next(iter(loader.chunks(0, own, own)))
        alone = _seconds(lambda given: Jit().train_chunk(step)(given, None, held, picks)[0], _copied(state)) / own
    else:
        alone = _seconds(lambda given: Jit().train(step)(given, None, loader[0])[0], _copied(state))
    left = f"{1e3 * alone:.2g} ms a step alone"
    if count * steps * alone < (CPU_WORTH_S if jax.default_backend() == "cpu" else WORTH_S):
        return Way("reuse", why=left)
    if chunk > 1:
        held, picks = next(iter(loader.chunks(0, chunk, chunk)))
        several = lambda given: trials.rows_of(trials.chunks(step, given, None, held, (picks,) * rows)[0], rows)  # noqa: E731  # one of two forms
    else:
        several = lambda given: trials.rows_of(trials.steps(step, given, None, (loader[0],) * rows)[0], rows)  # noqa: E731  # the other
    shared = _seconds(several, tuple(_copied(state) for _ in range(rows))) / (chunk * rows)
    why = f"{left}, {1e3 * shared:.2g} ms of {rows} side by side"
    return Way("vmap", rows, why) if shared < alone else Way("reuse", why=why)


def _copied(state: Any) -> Any:
    return jax.tree.map(jnp.copy, state)


def _seconds(call: Callable[[Any], Any], state: Any) -> float:
    """Of one call, compilation left out; its state is donated."""
    state = jax.block_until_ready(call(state))
    calls, began = 0, time.perf_counter()
    while not calls or time.perf_counter() - began < PROBE_S:
        state = jax.block_until_ready(call(state))
        calls += 1
    return (time.perf_counter() - began) / calls


def _told(group: Sequence[Ready], way: Way, devices: int) -> str:
    size = f"{len(group)} trial{'s' if len(group) > 1 else ''} of one program"
    how = "one after another" if way.name == "reuse" else f"{way.rows} side by side"
    where = f" on each of {devices} devices" if devices > 1 else ""
    return f"{size}: {how}{where} ({way.name}{': ' + way.why if way.why else ''})"


def _told_as_one(job: Ready) -> None:
    asked = {line.lstrip("+").partition("=")[0] for line in job.overrides}
    with open_dict(job.config):
        for name, value in _TOLD_AS_ONE.items():
            if name not in asked:
                OmegaConf.update(job.config, name, value)


class _Board:
    """The terminal of a sweep: a bar, and a line for each trial that has ended."""

    def __init__(self, ready: Sequence[Ready]):
        common = set(ready[0].overrides).intersection(*(job.overrides for job in ready)) if len(ready) > 1 else set()
        own = {job.number: [line for line in job.overrides if line not in common and not FREE.match(line)] for job in ready}
        self._names = {number: " ".join(lines) or "the trial" for number, lines in own.items()}
        self._first = ready[0].number
        self._console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self._console, transient=True, refresh_per_second=4, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("trials", total=len(ready))
        self._count = len(ready)
        self._lock = threading.Lock()

    def __enter__(self) -> "_Board":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """A line above the bar."""
        if app.talks():
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def running(self, job: Ready) -> Iterator[Callable[[Any], Any]]:
        """Around a trial; what is yielded is told the result and gives it back."""
        began, told, text = time.perf_counter(), [], "failed"
        try:
            yield lambda result: told.append(result) or result
        except BaseException:
            text = "interrupted"
            raise
        finally:
            if told and told[0] is not None:
                text = f"{told[0]['status'].replace('_', ' ')}: {_score(told[0])}"
            line = f"trial {job.number - self._first + 1} of {self._count} [{self._names[job.number]}] {text} ({time.perf_counter() - began:.1f} s)"
            with self._lock:
                self._bar.advance(self._task)
                self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def _score(result: dict[str, Any]) -> str:
    """The best score that the run was watched by, else its last scores."""
    if (best := result.get("best")) is not None:
        return f"{best['metric']} {best['value']:.4g} at step {best['step']:,}"
    return "  ".join(f"{name} {value:.4g}" for name, value in (result.get("metrics") or {}).items() if value is not None) or f"step {result['step']}"
