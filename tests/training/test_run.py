"""The run folder: one writer, what stands in it, and which command may go on with it."""

import json
import os

import pytest
from etils import epath
from omegaconf import OmegaConf

from research.core.config import compose
from research.core.errors import ConfigError, FolderInUseError, ResearchError
from research.training import run

SPEC = {"classes": 10, "outputs": 10, "image": [8, 8, 1]}


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path) / "a run"


def test_new_folders_never_share_a_name():
    paths = {run.new_path("runs", "some") for _ in range(50)}
    assert len(paths) == 50
    assert {path.parent for path in paths} == {epath.Path("runs/some")}
    assert all(path.name[8] == "-" and path.name[15] == "-" for path in paths)  # 20261123-194500-abcdef


def test_a_folder_has_one_writer(folder):
    with run.claimed(folder):
        with pytest.raises(FolderInUseError, match=f"is in use by host .*, pid {os.getpid()}"), run.claimed(folder):
            pass
        assert (folder / run.LOCK).read_text().endswith(f"pid {os.getpid()}\n")
    with run.claimed(folder):  # let go of
        pass
    with pytest.raises(KeyError), run.claimed(folder):
        raise KeyError
    with run.claimed(folder):
        pass


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResearchError, match=r"run_dir='.*file' cannot be written: File exists"), run.claimed(epath.Path(tmp_path) / "file"):
        pass


def with_spec(*overrides):
    config = compose([*overrides])
    OmegaConf.set_struct(config, False)
    config.data.spec = SPEC
    return config


def test_a_config_comes_back_as_it_was_written(folder):
    assert run.saved_config(folder) is None
    run.write_config(folder, with_spec("seed=3"))
    saved = run.saved_config(folder)
    assert saved.seed == 3
    run.compare(saved, compose(["seed=3"]), folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("seed=1", "seed: 0 there, 1 here"),
        ("model.width=9", "model.width: 128 there, 9 here"),
        ("data.batch=9", "data.batch: 64 there, 9 here"),
        ("data.seed=9", "data.seed: 0 there, 9 here"),
        ("optimizer=sgd", "optimizer._target_: "),
        ("objective.label_smoothing=0.1", "objective.label_smoothing: 0.0 there, 0.1 here"),
        ("schedule.warmup=5", "schedule.warmup: 0 there, 5 here"),
        ("train.precision=bfloat16", "train.precision: "),
        ("train.accumulate=2", "train.accumulate: 1 there, 2 here"),
        ("train.ema=0.9", "train.ema: null there, 0.9 here"),
    ],
)
def test_what_makes_it_another_run(folder, change, told):
    with pytest.raises(ConfigError) as error:
        run.compare(with_spec(), compose([change]), folder)
    assert told in str(error.value)
    assert "a run' holds another run (" in str(error.value)
    assert "objective.module" not in str(error.value)  # the model is told once


@pytest.mark.parametrize("change", ["train.steps=7", "train.log_every=3", "train.keep=all", "train.patience=4", "run_dir=x", "paths.data=elsewhere"])
def test_what_may_change(folder, change):
    run.compare(with_spec(), compose([change]), folder)


def test_a_result_has_every_key_and_no_nan(folder):
    result = run.write_result(folder, status="finished", metrics={"test/loss": float("nan")})
    read = run.read_result(folder)
    assert read["metrics"] == {"test/loss": None}
    assert set(read) == set(result) >= {"reason", "experiment", "step", "best", "expect", "train_s", "peak_bytes", "state_sha256"}
    assert read["best"] is None
    assert run.read_result(folder / "other") == {}


def test_each_command_is_appended_to_the_environment(folder):
    run.write_environment(folder)
    run.write_environment(folder, parent={"run": "there", "result": None})
    first, second = json.loads((folder / run.ENVIRONMENT).read_text())
    assert "parent" not in first
    assert second["parent"] == {"run": "there", "result": None}
    assert first["versions"]["jax"]
    assert first["devices"]["count"] >= 1


def test_the_machine_is_named_and_measured():
    assert run.peak_bytes() > 10_000_000
    assert "CPU cores" in run.device_name()
