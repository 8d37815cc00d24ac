"""The parent's end of `engine_child`: start it, talk to it, and leave nothing of it behind.

Each child is a process group of its own. The daemon that a connector starts is in none of our
groups, so everything that descends from a demo carries the demo's directory in its environment,
and `kill_descendants` finds it by that. One thread per child reads its answers, named after it;
it ends with the child, whose end closes the pipe.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvstrata.core.errors import ConfigError

__all__ = ["Answer", "EngineProcess", "kill_descendants", "kill_process"]

_MARK: Final = "KVSTRATA_DEMO_DIRECTORY"
_START_TIMEOUT_S: Final = 300.0
_COMMAND_TIMEOUT_S: Final = 120.0
_END_TIMEOUT_S: Final = 10.0
_THREADS_MAX: Final = 4  # more would make the small model's prefill too quick to show anything
_ENVIRONMENT: Final = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine made of one prompt."""

    token_ids: tuple[int, ...]
    """The greedy answer."""
    ttft_s: float
    """From handing the prompt to the engine until its first token."""
    cached_tokens: int
    """Prompt tokens that were not computed, wherever their KV came from."""
    tokens_from: dict[str, int]
    """The part of `cached_tokens` that kvstrata gave, by tier."""


class EngineProcess:
    """One `engine_child`. Commands are strictly one after the other, `begin_build` first."""

    def __init__(self, name: str, directory: Path, engine: str = "vllm") -> None:
        """Start a child called `name` for one of `engines.ENGINES`; it logs into `directory`."""
        self._name = name
        self._log_path = directory / f"{name}.log"
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603  # our own module
                [sys.executable, "-m", "kvstrata.apps.cli.demo.engine_child", engine],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(directory),
                cwd=directory,
                start_new_session=True,
                encoding="utf-8",
            )
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name=f"demo-{name}", daemon=True)
        self._reader.start()
        self._killed = False
        self.daemon_pid: int | None = None
        self.daemon_address: str | None = None

    def begin_build(
        self,
        model_directory: Path,
        disk_directory: Path | None,
        place: tuple[str, str] | None = None,
    ) -> None:
        """Let the child build its engine, with kvstrata if there is a `disk_directory`.

        `place` is the URL of an object tier behind the disk and the path of the cluster secret.
        """
        disk = None if disk_directory is None else str(disk_directory)
        self._send("build", model_directory=str(model_directory), disk_directory=disk, place=place)

    def wait_built(self) -> None:
        """Block until the engine is ready; its daemon is known from then on."""
        info = self._receive(_START_TIMEOUT_S)
        self.daemon_pid = info["daemon_pid"]
        self.daemon_address = info["daemon_address"]

    def generate(self, prompt_token_ids: Sequence[int], max_tokens: int) -> Answer:
        """Return the engine's greedy answer of `max_tokens` tokens."""
        self._send("generate", prompt_token_ids=list(prompt_token_ids), max_tokens=max_tokens)
        result = self._receive(_COMMAND_TIMEOUT_S)
        return Answer(
            token_ids=tuple(result["token_ids"]),
            ttft_s=result["ttft_s"],
            cached_tokens=result["cached_tokens"],
            tokens_from=dict(result["tokens_from"]),
        )

    def reset_prefix_cache(self) -> None:
        """Empty the engine's own prefix cache, so that every hit is kvstrata's."""
        self._send("reset_prefix_cache")
        self._receive(_COMMAND_TIMEOUT_S)

    def shutdown(self) -> None:
        """End the engine and its process in good order; kill what does not end in time."""
        self._send("shutdown")
        self._receive(_COMMAND_TIMEOUT_S)
        with suppress(subprocess.TimeoutExpired):  # the engine has ended; a busy machine is slow
            self._process.wait(_END_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        """SIGKILL the child's process group. Harmless when it has ended, or was killed before."""
        if self._killed:
            return  # its number may belong to somebody else by now
        self._killed = True
        with suppress(ProcessLookupError):  # already gone, with all of its own children
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(_END_TIMEOUT_S)
        self._reader.join(_END_TIMEOUT_S)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None, "both are pipes"
            with suppress(BrokenPipeError):  # a command that the dead child will never read
                pipe.close()

    def _send(self, command: str, **arguments: object) -> None:
        assert self._process.stdin is not None, "stdin is a pipe"
        try:
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure("it ended") from None

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise self._failure(f"no answer in {timeout_s:.0f} s") from None
        if not line:
            raise self._failure("it ended")
        result: dict[str, Any] = json.loads(line)
        if "error" in result:
            raise self._failure(result["error"])
        return result

    def _read(self) -> None:
        assert self._process.stdout is not None, "stdout is a pipe"
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _failure(self, reason: str) -> ConfigError:
        lines = self._log_path.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
        return ConfigError(
            f"The demo's engine `{self._name}` failed: {reason}.",
            hint=f"its log ends with: {last[:300]}; play in a directory that stays to read it all.",
        )


def kill_process(pid: int) -> None:
    """SIGKILL one process that the demo started; harmless when it has ended."""
    with suppress(ProcessLookupError):  # it ended by itself
        os.kill(pid, signal.SIGKILL)


def kill_descendants(directory: Path) -> None:
    """SIGKILL every process that descends from the demo in `directory`, daemons included.

    Looks into /proc, so it finds nothing on systems without; there, only known processes are ended.
    """
    mark = f"{_MARK}={directory}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # another user's process, or one that has just ended
        if mark in variables:
            kill_process(int(entry.name))


def _environment(directory: Path) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = str(min(cores or 1, _THREADS_MAX))
    return {**os.environ, **_ENVIRONMENT, "OMP_NUM_THREADS": threads, _MARK: str(directory)}
