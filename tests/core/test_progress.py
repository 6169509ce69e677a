"""The bar on the terminal: the items come through as they are, and nothing is written where there is no terminal."""

import io
import sys

from research.core.progress import track


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def test_no_terminal_no_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(track(iter("abc"), "letters")) == ["a", "b", "c"]
    assert sys.stderr.getvalue() == ""


def test_a_terminal_shows_what_is_done_and_how_far(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    assert list(track(range(3), "[letters]")) == [0, 1, 2]
    assert "[letters]" in sys.stderr.getvalue()
    assert "3/3" in sys.stderr.getvalue()
