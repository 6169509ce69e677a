"""The log: records that survive a crash and a resume, events for TensorBoard, and a terminal that is left alone."""

import contextlib
import io
import json

import numpy as np
import pytest
from etils import epath

from research.core.errors import ConfigError
from research.training.log import Log, read


@pytest.fixture
def opened(tmp_path):
    """opened(start, **options): a log of 100 steps in tmp_path, closed after the test."""
    with contextlib.ExitStack() as stack:

        def call(start=0, **options):
            log = Log(epath.Path(tmp_path), start, 100, **{"progress": "none", **options})
            stack.callback(log.close)
            return log

        yield call


def test_records_are_on_disk_at_once_and_hold_no_nan(opened, tmp_path):
    opened().scalars(5, {"train/loss": float("nan"), "validation/loss": np.float32(0.5), "count": np.int32(3), "none": None})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record.pop("time_s") > 1e9
    assert record == {"step": 5, "train/loss": None, "validation/loss": 0.5, "count": 3, "none": None}


def test_a_resumed_log_drops_what_is_made_again(opened, tmp_path):
    log = opened()
    for step in range(10, 60, 10):
        log.scalars(step, {"train/loss": 1.0 * step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 60, "train/lo')  # killed in the middle of a line
    assert [record["step"] for record in read(epath.Path(tmp_path))] == [10, 20, 30, 40, 50]
    log = opened(start=30)
    assert [record["step"] for record in read(epath.Path(tmp_path))] == [10, 20, 30]
    for step in range(40, 70, 10):
        log.scalars(step, {"train/loss": -1.0 * step})
    assert [record["train/loss"] for record in read(epath.Path(tmp_path))] == [10, 20, 30, -40, -50, -60]


def test_no_file_no_records(tmp_path):
    assert read(epath.Path(tmp_path)) == []


def test_events_hold_scalars_histograms_images_texts_and_settings(opened, tmp_path, read_events):
    log = opened()
    log.scalars(5, {"train/loss": 0.25, "validation/loss": None, "learning_rate": float("inf")})
    log.histograms(5, {"params/kernel": np.array([[1.0, np.nan], [3.0, -2.0]]), "params/empty": np.zeros(0), "params/bad": np.full(2, np.nan)})
    log.image(5, "examples", np.zeros((4, 6, 3), np.uint8))
    log.text(5, "sample", "To be")
    log.hparams(9, {"learning_rate": 1e-3, "values": ("a", "b")}, {"test/accuracy": 0.5, "train/loss": 7.0, "test/loss": None})
    values = {value.tag: value for event in read_events(tmp_path) for value in event.summary.value}
    assert {name for name in values if "/" in name and "hparams" not in name} == {
        "train/loss",
        "params/kernel",
        "sample/text_summary",
        "test/accuracy",
    }
    assert (values["train/loss"].simple_value, values["test/accuracy"].simple_value) == (0.25, 0.5)  # the first was logged before
    assert (values["params/kernel"].histo.num, values["params/kernel"].histo.min, values["params/kernel"].histo.max) == (3, -2, 3)
    assert (values["examples"].image.height, values["examples"].image.width) == (4, 6)
    assert values["sample/text_summary"].tensor.string_val == [b"To be"]
    assert any(name.endswith("session_start_info") for name in values)


def test_without_tensorboard_there_is_no_event_file(opened, tmp_path):
    log = opened(tensorboard=False)
    log.scalars(1, {"x": 1.0})
    log.histograms(1, {"x": np.ones(3)})
    log.image(1, "x", np.zeros((2, 2, 3), np.uint8))
    log.text(1, "x", "x")
    log.hparams(1, {"x": 1}, {"x": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(("progress", "shown"), [("auto", "step 5: [loss] 1\n"), ("lines", "step 5: [loss] 1\n"), ("none", "")])
def test_where_there_is_no_terminal_there_is_no_bar(opened, progress, shown):
    with contextlib.redirect_stderr(io.StringIO()) as err:
        log = opened(progress=progress)
        log.progress(5, "loss 1")
        log.line("step 5: [loss] 1")  # no markup
        log.close()
    assert err.getvalue() == shown


def test_a_bar_tells_loss_and_steps(opened, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # for rich, this is a terminal
    with contextlib.redirect_stderr(io.StringIO()) as err:
        log = opened(start=20, progress="bar")
        log.progress(50, "loss 0.125")
        log.close()
    assert "50/100" in err.getvalue()
    assert "loss 0.125" in err.getvalue()


def test_an_unknown_progress_is_refused_before_a_file_is_made(tmp_path):
    with pytest.raises(ConfigError, match=r"logger.progress='line' is unknown; did you mean 'lines'"):
        Log(epath.Path(tmp_path), 0, 1, progress="line")
    assert not list(tmp_path.iterdir())


def test_closing_twice_is_safe(opened):
    log = opened()
    log.close()
    log.close()
