"""The process that holds an engine: JSON lines in on stdin, JSON lines out on what was stdout.

    python -m kvstrata.apps.cli.demo.engine_child ENGINE

Started by `engine.EngineProcess`, which sets the environment that engines read at import. What an
engine or its libraries print goes to stderr, which the parent has pointed at a log file. End of
input ends the process, so that it does not outlive its parent. One thread; one request at a time.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import IO

from kvstrata.apps.cli.demo.engines import ENGINES, DemoEngine

__all__ = ["main", "serve"]


def serve(lines: IO[str], answers: IO[str], build: Callable[..., DemoEngine]) -> None:
    """Answer each command line with one line: the command's result, or `{"error": sentence}`.

    The first command is `build`; the last is `shutdown` or the end of the input.
    """
    engine: DemoEngine | None = None
    for line in lines:
        arguments = json.loads(line)
        command = arguments.pop("command")
        try:
            if command == "build":
                engine = build(**arguments)
                result = engine.info()
            else:
                assert engine is not None, "`build` comes first"
                result = getattr(engine, command)(**arguments)
        except Exception as error:  # noqa: BLE001 - the outermost loop; the parent raises it again
            result = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(result) + "\n")
        answers.flush()
        if command == "shutdown":
            return


def main() -> None:
    """Take stdin and stdout for the protocol, import the engine early, and serve."""
    kind = ENGINES[sys.argv[1]]
    commands = os.fdopen(os.dup(0), "r", encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123 - a device, and only its number is used
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    importlib.import_module(kind.early)  # seconds, while the parent makes the model
    serve(commands, answers, kind.make)


if __name__ == "__main__":
    main()
