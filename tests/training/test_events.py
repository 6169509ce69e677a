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


def test_numbers_of_one_step_are_one_event_with_the_names_that_tensorboardx_gives(tmp_path, read_events):
    values = {"train/loss": 0.25, "a name, [odd]": 1, "/rooted": 2.0}
    events = Events(epath.Path(tmp_path))
    events.scalars(values, 7)
    (event,) = [event for event in read_events(tmp_path) if event.summary.value]
    assert event.step == 7
    expected = [summary.scalar(name, value).value[0] for name, value in values.items()]
    assert [(value.tag, value.simple_value) for value in event.summary.value] == [(value.tag, value.simple_value) for value in expected]
    events.close()


def test_an_error_comes_where_it_is_made():
    with pytest.raises(OSError, match=r"."):
        Events(epath.Path("/proc/nowhere"))
