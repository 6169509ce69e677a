import json

import pytest

from research.sweep.ledger import Ledger

DIGITS = (
    "experiment=digits_mlp",
    "train.chunk=1",
    "model.width=16",
    "model.depth=1",
    "data.batch=32",
    "train.steps=20",
    "train.eval_every=10",
    "train.log_every=10",
)
QUIET = ("logger.tensorboard=false", "logger.figures=false", "logger.progress=none", "check=false", "expect=null")


@pytest.fixture
def sweep(command, tmp_path):
    """sweep("seed=0,1", …): a multirun of digits_mlp made small, in a folder of this test; (what it told, {trial: its last line})."""

    def run(*argv, folder="sweep"):
        told = command("train", "-m", *DIGITS, *QUIET, f"sweep_dir={tmp_path / folder}", *argv)
        return told, Ledger(tmp_path / folder).trials()

    run.path = tmp_path / "sweep"  # type: ignore[attr-defined]  # for the tests to look into
    return run


@pytest.fixture(scope="session")
def typed():
    """The overrides that every command of `sweep` has."""
    return (*DIGITS, *QUIET)


@pytest.fixture(scope="session")
def result():
    """result(run folder): what result.json says."""
    return lambda folder: json.loads((folder / "result.json").read_text())
