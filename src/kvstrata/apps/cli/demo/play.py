"""The walk of `kvstrata demo`: one conversation, four times, without a network or a GPU.

    reference       an engine without kvstrata gives the prompts and the answers to compare with
    cold            kvstrata attached, everything forgotten before each turn
    warm            only the engine's own cache is forgotten: blocks come from the host tier
    after_restart   engine and daemon killed with SIGKILL, the host tier emptied before each turn
    from_object     with an object store: both killed again and the slab deleted, host and disk
                    emptied before each turn

Both engines start side by side, and the model is made meanwhile; measured turns run alone.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from kvstrata.apps.cli.demo.conversation import TURNS_MAX, USER_TEXTS, Conversation
from kvstrata.apps.cli.demo.engine import Answer, EngineProcess, kill_descendants, kill_process
from kvstrata.apps.cli.demo.engines import engine_kind
from kvstrata.apps.cli.demo.report import Phase, Turn, print_report, write_json
from kvstrata.core.config import TierConfig
from kvstrata.core.errors import ConfigError
from kvstrata.core.tier import TierKind
from kvstrata.runtime.admin import AdminClient
from kvstrata.storage.opening import check_keyed

__all__ = ["ObjectPlace", "run_demo"]

_ANSWER_TOKENS: Final = 20
_WRITES_TIMEOUT_S: Final = 60.0


def run_demo(
    json_path: Path | None,
    *,
    keep_dir: Path | None = None,
    turns: int = TURNS_MAX,
    object_url: str | None = None,
    engine: str = "vllm",
) -> int:
    """Play the conversation on `engine`, print what was found; 0 if every answer was the same.

    Everything lives in a temporary directory, or in `keep_dir`, which then stays, and, with an
    `object_url`, below a prefix of its own there; its blocks are deleted at the end.
    """
    _check(turns, json_path)
    kind = engine_kind(engine)
    place = None if object_url is None else ObjectPlace.below(object_url)
    with ExitStack() as stack:
        stack.enter_context(_termination_unwinds())
        directory = stack.enter_context(_directory(keep_dir))
        stack.callback(kill_descendants, directory)
        progress = stack.enter_context(_progress(turns * (4 if place is None else 5)))
        phases = _Stage(engine, directory, stack, progress, turns, place).play()
    print_report(phases, Console(highlight=False), kind)
    if json_path is not None:
        write_json(phases, json_path)
    return 0 if all(turn.identical for phase in phases for turn in phase.turns) else 1


class _Stage:
    """One demo under way: its directory, its engines, and what the reference said."""

    def __init__(  # what the demo was called with, each once
        self,
        engine: str,
        directory: Path,
        stack: ExitStack,
        progress: Progress,
        turns: int,
        place: ObjectPlace | None,
    ) -> None:
        self._engine = engine
        self._place = place
        self._model = directory / "model"
        self._disk = directory / "disk"
        self._directory = directory
        self._stack = stack
        self._progress = progress
        self._task = progress.tasks[0].id
        self._texts = USER_TEXTS[:turns]
        self._reference: list[tuple[list[int], Answer]] = []

    def play(self) -> list[Phase]:
        """Play every phase in order."""
        self._say("starting two engines, making the model")
        plain = self._start("reference")
        engine = self._start("kvstrata")
        conversation = self._make_model()
        plain.begin_build(self._model, None)
        self._build(engine)
        plain.wait_built()
        self._play_reference(plain, conversation)
        plain.kill()
        self._say("waiting for the engine with kvstrata")
        with self._admin(engine) as admin:
            phases = [
                self._play_phase("cold", engine, admin, admin.clear),
                self._play_phase("warm", engine, admin, lambda: None),
            ]
        self._say("killing engine and daemon, starting both again")
        self._kill_both(engine)
        engine = self._start("kvstrata-again")
        self._build(engine)
        with self._admin(engine) as admin:
            phases.append(
                self._play_phase("after_restart", engine, admin, lambda: self._leave_disk(admin))
            )
        if self._place is not None:
            phases.append(self._play_from_object(engine))
        else:
            engine.shutdown()
        return phases

    def _play_from_object(self, engine: EngineProcess) -> Phase:
        """Kill everything once more, delete the slab, and play from what the bucket holds."""
        self._say("killing engine and daemon, deleting the slab, starting again")
        self._kill_both(engine)
        shutil.rmtree(self._disk)
        engine = self._start("kvstrata-from-object")
        self._build(engine)
        with self._admin(engine) as admin:
            phase = self._play_phase(
                "from_object", engine, admin, lambda: admin.clear(("host", "disk"))
            )
            admin.clear()
            admin.wait_idle(_WRITES_TIMEOUT_S)
        engine.shutdown()
        return phase

    def _kill_both(self, engine: EngineProcess) -> None:
        if engine.daemon_pid is not None:  # first: it ends in good order when its engine dies
            kill_process(engine.daemon_pid)
        engine.kill()

    def _build(self, engine: EngineProcess) -> None:
        """Let the engine be built with kvstrata; where blocks outlive the disk, the secret does."""
        place = None if self._place is None else self._place.keep(self._directory)
        engine.begin_build(self._model, self._disk, place)

    def _start(self, name: str) -> EngineProcess:
        engine = EngineProcess(name, self._directory, self._engine)
        self._stack.callback(engine.kill)
        return engine

    def _make_model(self) -> Conversation:
        # Not at the top: these need packages that come with an engine, which is looked for first.
        from tokenizers import Tokenizer

        from kvstrata.apps.cli.demo.model import make_model

        self._disk.mkdir(exist_ok=True)
        make_model(self._model)
        tokenizer = Tokenizer.from_file(str(self._model / "tokenizer.json"))
        return Conversation(lambda text: tokenizer.encode(text).ids)

    @contextmanager
    def _admin(self, engine: EngineProcess) -> Iterator[AdminClient]:
        engine.wait_built()
        assert engine.daemon_address is not None, "the engine was built with kvstrata"
        with AdminClient(engine.daemon_address) as admin:
            yield admin

    def _play_reference(self, engine: EngineProcess, conversation: Conversation) -> None:
        for number, text in enumerate(self._texts, 1):
            self._say(f"reference, turn {number}")
            prompt = conversation.ask(text)
            engine.reset_prefix_cache()
            answer = engine.generate(prompt, _ANSWER_TOKENS)
            conversation.hear(answer.token_ids)
            self._reference.append((prompt, answer))
            self._progress.advance(self._task)

    def _play_phase(
        self,
        name: str,
        engine: EngineProcess,
        admin: AdminClient,
        forget: Callable[[], object],
    ) -> Phase:
        """Play all turns, calling `forget` before each, when no write is under way."""
        turns = []
        for number, (prompt, reference) in enumerate(self._reference, 1):
            self._say(f"{name}, turn {number}")
            admin.wait_idle(_WRITES_TIMEOUT_S)
            forget()
            engine.reset_prefix_cache()
            turns.append(_turn(prompt, engine.generate(prompt, _ANSWER_TOKENS), reference))
            self._progress.advance(self._task)
        admin.wait_idle(_WRITES_TIMEOUT_S)
        return Phase(name, tuple(turns))

    def _leave_disk(self, admin: AdminClient) -> None:
        """Forget every copy above the disk: the host tier, and the system's cache of our files."""
        admin.clear(("host",))
        if not hasattr(os, "posix_fadvise"):
            return  # such systems may serve the "disk" from memory
        for path in self._disk.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())  # only what is on the disk can be dropped
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _say(self, stage: str) -> None:
        self._progress.update(self._task, description=stage)


@dataclass(frozen=True, slots=True)
class ObjectPlace:
    """Where in an object store one demo keeps its blocks, and under which secret."""

    url: str
    """A prefix that nobody else uses."""
    secret: bytes = field(repr=False)
    """The cluster secret, 32 bytes."""

    @classmethod
    def below(cls, url: str) -> ObjectPlace:
        """Return a new place below `url`; raises ConfigError for one that cannot be used."""
        bucket, mark, options = url.partition("?")
        place = f"{bucket.rstrip('/')}/kvstrata-demo-{secrets.token_hex(4)}{mark}{options}"
        check_keyed(TierConfig(TierKind.OBJECT, 1, url=place))
        return cls(place, secrets.token_bytes(32))

    def keep(self, directory: Path) -> tuple[str, str]:
        """Write the secret below `directory` if it is not there; return URL and its path."""
        path = directory / "cluster-secret"
        if not path.exists():
            path.touch(mode=0o600)
            path.write_bytes(self.secret)
        return self.url, str(path)


def _check(turns: int, json_path: Path | None) -> None:
    if not 1 <= turns <= TURNS_MAX:
        raise ConfigError(
            f"`turns` is {turns}, but the conversation has 1 to {TURNS_MAX}.",
            hint=f"leave it out to play all {TURNS_MAX}.",
        )
    if json_path is not None and not json_path.absolute().parent.is_dir():
        raise ConfigError(
            f"`json` names {json_path}, whose directory does not exist.",
            hint="make the directory, or name a file elsewhere.",
        )


def _turn(prompt: list[int], answer: Answer, reference: Answer) -> Turn:
    given = dict(answer.tokens_from)
    device = max(0, answer.cached_tokens - sum(given.values()))
    return Turn(
        prompt_tokens=len(prompt),
        tokens_from={**given, "device": device},
        ttft_s=answer.ttft_s,
        identical=answer.token_ids == reference.token_ids,
    )


@contextmanager
def _directory(keep_dir: Path | None) -> Iterator[Path]:
    if keep_dir is not None:
        keep_dir.mkdir(parents=True, exist_ok=True)
        yield keep_dir.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="kvstrata-demo-") as name:
        yield Path(name).resolve()


@contextmanager
def _progress(total: int) -> Iterator[Progress]:
    columns = (
        SpinnerColumn(),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task("starting", total=total)
        yield progress


@contextmanager
def _termination_unwinds() -> Iterator[None]:
    """Let SIGTERM end the demo as an exception does, so that processes and files are removed."""

    def unwind(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
