"""Event files, read back by their own format."""

import pytest
from etils import epath
from tensorboardX import summary

from research.training.events import Events


def test_what_is_added_can_be_read_at_once(tmp_path, read_events):
    writer = Events(epath.Path(tmp_path))
    writer.add(summary.scalar("train/loss", 0.5), 7)
    header, event = read_events(tmp_path)
    assert header.file_version == "brain.Event:2"
    assert (event.step, event.summary.value[0].tag, event.summary.value[0].simple_value) == (7, "train/loss", 0.5)
    assert event.wall_time > 0
    writer.close()
    writer.close()


def test_a_resumed_run_hides_what_an_older_file_says_of_later_steps(tmp_path, read_events):
    for start in (0, 20):
        writer = Events(epath.Path(tmp_path), start)
        writer.add(summary.scalar("x", 1.0), start + 5)
        writer.close()
    assert len(list(tmp_path.iterdir())) == 2  # though both were made in one second
    assert [(event.step, event.session_log.status) for event in read_events(tmp_path)] == [(0, 0), (5, 0), (0, 0), (21, 1), (25, 0)]  # 1: START


def test_an_error_comes_where_it_is_made():
    with pytest.raises(OSError, match=r"."):
        Events(epath.Path("/proc/nowhere"))
