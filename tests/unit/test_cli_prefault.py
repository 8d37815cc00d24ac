"""The progress of prefaulting: a bar for people at a terminal, lines for a log."""

from __future__ import annotations

import io
import logging
import threading

from rich.console import Console

from kvstrata.apps.cli.prefault import Prefault


def test_a_bar_on_a_terminal_that_ends_with_the_work():
    screen = io.StringIO()
    with Prefault(Console(file=screen, force_terminal=True, width=120)) as progress:
        progress(1 << 20, 4 << 20)
        progress(4 << 20, 4 << 20)
        assert "4.0/4.0 MiB" in screen.getvalue()
    assert "host memory" in screen.getvalue()


def test_the_bar_ends_when_it_was_interrupted(eventually):
    before = set(threading.enumerate())  # some may be about to end
    with Prefault(Console(file=io.StringIO(), force_terminal=True)) as progress:
        progress(1 << 20, 4 << 20)
        assert len(set(threading.enumerate()) - before) == 1
    eventually(lambda: not set(threading.enumerate()) - before)


def test_at_most_ten_lines_elsewhere(caplog):
    caplog.set_level(logging.INFO, "kvstrata.prefault")
    screen = io.StringIO()
    with Prefault(Console(file=screen)) as progress:
        for done in range(1, 101):
            progress(done, 100)
    assert len(caplog.messages) == 10
    assert caplog.messages[-1] == "took 100 of 100 bytes of host memory"
    assert not screen.getvalue()
