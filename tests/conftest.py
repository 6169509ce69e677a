"""Strict numerics and checked shapes for every test, and one compilation cache for the whole run."""

import contextlib
import hashlib
import importlib
import io
import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jaxtyping.install_import_hook(["research.layers", "research.losses", "research.metrics", "research.models"], "beartype.beartype")


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """One folder for the processes that share the tests and, through the environment, for those that tests start."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compilation"
    settings = {"compilation_cache_dir": str(folder), "persistent_cache_min_compile_time_secs": 0.0}
    for name, value in settings.items():
        jax.config.update(f"jax_{name}", value)
        os.environ[f"JAX_{name.upper()}"] = str(value)


@pytest.fixture(scope="module", autouse=True)
def programs():
    """Lets go of a module's compiled programs: each holds memory maps, of which Linux gives a process 65,530, and dies of the next one."""
    yield
    jax.clear_caches()


QUIET = ("logger.figures=false", "logger.tensorboard=false", "logger.progress=none", "logger.sample=false")
SHORT = ("train.steps=4", "train.eval_every=2", "train.log_every=2")
FAMILIES = {  # a new family takes its place here
    "mlp": ("experiment=digits_mlp", "train.chunk=1", "model.width=16", "model.depth=1"),
    "cnn": ("experiment=digits_cnn", "model.channels=[8,8,8]", "model.hidden=[16]", "train.epochs=null"),
    "gpt": (
        *("experiment=quickstart", "data.time=16", "data.batch=4", "data.validation=0.002", "schedule.warmup=0"),
        *("model.width=16", "model.depth=2", "model.heads=2", "model.hidden=16", "model.scan=true"),
    ),
    "resnet": (
        *("experiment=cifar10_resnet18", "data=digits", "data.batch=64", "train.epochs=null", "schedule.warmup=0"),
        *("model.blocks=[1,1]", "model.channels=[4,8]"),
    ),
    "lstm": (
        *("experiment=shakespeare_char_lstm", "data=python_docs", "data.time=16", "data.batch=4", "data.validation=0.002", "schedule.warmup=0"),
        *("model.width=16", "model.depth=2"),
    ),
}


class Told(NamedTuple):
    """What a command leaves with its caller."""

    code: int
    out: str
    err: list[str]  # lines


@pytest.fixture(scope="session")
def command() -> Callable[..., Told]:
    """command("train", "seed=1"): a verb in this process, as from the command line."""

    def call(verb: str, *argv: str) -> Told:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = importlib.import_module(f"research.{verb}").main(list(argv))
        return Told(code, out.getvalue(), err.getvalue().splitlines())

    return call


@pytest.fixture(scope="session")
def parent(command, tmp_path_factory):
    """parent(family): a run folder, trained once for a few steps; not to be changed."""
    held = {}

    def make(family):
        if family not in held:
            held[family] = tmp_path_factory.mktemp("runs") / family
            told = command("train", *FAMILIES[family], *SHORT, *QUIET, f"run_dir={held[family]}")
            assert told.code == 0, told.err
        return held[family]

    return make


@pytest.fixture(scope="session")
def snapshot() -> Callable[[pathlib.Path], dict[str, str]]:
    """snapshot(folder): the sha256 of every file in it, but for the lock."""

    def take(folder: pathlib.Path) -> dict[str, str]:
        files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    return take


def pytest_configure(config: pytest.Config):
    """Without the slow tests LLVM takes its short way: programs that run for milliseconds would else be compiled for most of the suite's time."""
    flag, flags = "--xla_backend_optimization_level=1", os.environ.get("XLA_FLAGS", "")
    if config.option.markexpr == "not slow" and flag not in flags:  # a process that shares the tests has it from the one that started it
        os.environ["XLA_FLAGS"] = f"{flag} {flags}".strip()


def pytest_generate_tests(metafunc: pytest.Metafunc):
    """A test that takes `every_family` runs for each of `FAMILIES`: the contracts that a model must keep."""
    if "every_family" in metafunc.fixturenames:
        metafunc.parametrize("every_family", FAMILIES)


def pytest_addoption(parser: pytest.Parser):
    """The one option of this suite's own."""
    parser.addoption("--golden-write", action="store_true", help="write the loss curves of tests/golden anew")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """In CI a skipped test is a failure: a proof that did not run proves nothing."""
    report = yield
    if report.skipped and os.environ.get("CI"):
        report.outcome, report.longrepr = "failed", f"{item.nodeid} was skipped in CI: {report.longrepr}"
    return report
