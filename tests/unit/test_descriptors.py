"""A process without descriptors goes on without the cache: it is not ended by it."""

from __future__ import annotations

import subprocess
import sys

_CHILD = """
import os, resource, sys
from kvstrata.core.errors import DaemonGoneError
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.runtime.session import Session, SessionLimits
from kvstrata.storage.arena import Arena
from kvstrata.tokens import Namespace

layout = BlockLayout((Dimension("layer", 3), Dimension("channel", 1000)), "int8", 8, "test")
namespace = Namespace("m", "w", "", "int8", layout.geometry, 8)
arena = Arena.create(1 << 20, layout)
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
for free in range(40):
    session = Session(
        f"ipc://{sys.argv[1]}/n.sock", layout, namespace, SessionLimits(start_timeout_s=1)
    )
    taken = []
    while len(taken) < 128:
        try:
            taken.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            break
    for _ in range(free):
        os.close(taken.pop())
    assert not session.usable(), "nobody listens there"
    session.close()
    try:
        Arena.attach(arena.address, layout).close()
        attached = True
    except DaemonGoneError:
        attached = False
    for each in taken:
        os.close(each)
    assert attached == (free >= 2), (free, attached)
print("alive")
"""


def test_with_any_number_of_descriptors_left_there_is_an_answer(tmp_path):
    """ZeroMQ aborts its process where it finds none, and an engine asks again each second."""
    ran = subprocess.run(
        [sys.executable, "-c", _CHILD, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, "alive"), ran.stderr
