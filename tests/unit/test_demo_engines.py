"""Which engines the demo can play on, and what it says of one that is not there."""

from __future__ import annotations

import importlib
import io
import json

import pytest

from kvstrata.apps.cli.demo import engines
from kvstrata.apps.cli.demo.engine_child import serve
from kvstrata.apps.cli.demo.engines import ENGINES, engine_kind, tiers_of
from kvstrata.core.errors import ConfigError


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match="not on 'ollama'") as told:
        engine_kind("ollama")
    assert told.value.hint


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_that_is_missing_is_named_with_its_remedy(monkeypatch, name) -> None:
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda _: None)
    kind = ENGINES[name]
    with pytest.raises(ConfigError, match=f"{kind.package} is not installed here") as told:
        engine_kind(name)
    assert told.value.hint == kind.remedy


def test_an_engine_without_torch_is_missing(monkeypatch) -> None:
    real = importlib.util.find_spec
    found = object()
    monkeypatch.setattr(
        engines.importlib.util,
        "find_spec",
        lambda name: {"torch": None, "transformers": found}.get(name, real(name)),
    )
    with pytest.raises(ConfigError, match="torch is not installed here"):
        engine_kind("transformers")


def test_tiers_are_host_disk_and_what_lies_behind() -> None:
    assert tiers_of("/d", None) == ("host:512MiB,disk:/d:1GiB", None)
    assert tiers_of("/d", ["s3://b/p", "/secret"]) == (
        "host:512MiB,disk:/d:1GiB,object:s3://b/p:1GiB",
        "/secret",
    )


class Engine:
    """An engine of the protocol between the demo and its child."""

    def __init__(self, model_directory: str, disk_directory: str | None) -> None:
        self.told = {"daemon_pid": None, "daemon_address": disk_directory}
        if not model_directory:
            raise ValueError("no model")

    def info(self) -> dict:
        return self.told

    def generate(self, prompt_token_ids: list[int], max_tokens: int) -> dict:
        return {"token_ids": prompt_token_ids * max_tokens}

    def shutdown(self) -> dict:
        return {}


def said(*commands: dict) -> list[dict]:
    answers = io.StringIO()
    serve(io.StringIO("\n".join(map(json.dumps, commands))), answers, Engine)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_the_child_answers_each_command_until_it_is_told_to_end() -> None:
    build = {"command": "build", "model_directory": "m", "disk_directory": "d"}
    ask = {"command": "generate", "prompt_token_ids": [1, 2], "max_tokens": 2}
    bye = {"command": "shutdown"}
    assert said(build, ask, bye, ask) == [
        {"daemon_pid": None, "daemon_address": "d"},
        {"token_ids": [1, 2, 1, 2]},
        {},
    ]
    failed = said({**build, "model_directory": ""}, ask)
    assert failed[0] == {"error": "ValueError: no model"}
    assert "`build` comes first" in failed[1]["error"]
