"""The demo's parts that need no daemon: its model, its prompts, and its engine process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("safetensors", reason="no engine installed, and what comes with it")
pytest.importorskip("tokenizers", reason="no engine installed, and what comes with it")

from tokenizers import Tokenizer

from kvstrata.apps.cli.demo.conversation import TURNS_MAX, USER_TEXTS, Conversation
from kvstrata.apps.cli.demo.engine import EngineProcess, kill_descendants
from kvstrata.apps.cli.demo.model import CONTEXT_TOKENS_MAX, make_model
from kvstrata.core.config import BLOCK_TOKENS_DEFAULT
from kvstrata.core.errors import ConfigError

pytestmark = pytest.mark.engine

ANSWER_TOKENS = 20
"""As many as the demo asks for, with which the lengths of the prompts are fixed."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model, made once."""
    target = tmp_path_factory.mktemp("demo") / "model"
    make_model(target)
    return target


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[EngineProcess]:
    """An engine process, killed with all that descends from it."""
    process = EngineProcess("plain", tmp_path)
    yield process
    process.kill()
    kill_descendants(tmp_path)


def _prompts(model: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    conversation = Conversation(lambda text: tokenizer.encode(text).ids)
    prompts = []
    for text in USER_TEXTS:
        prompts.append(conversation.ask(text))
        conversation.hear([10] * ANSWER_TOKENS)
    return prompts


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def test_the_same_seed_makes_the_same_weights(model: Path, tmp_path: Path) -> None:
    make_model(tmp_path)
    for path in sorted(model.iterdir()):
        assert _digest(path) == _digest(tmp_path / path.name), path.name


def test_prompts_are_what_the_chat_template_renders(model: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    first = _prompts(model)[0]
    system = tokenizer.decode(first).split("<|system|>")[1].split("<|end|>")[0]
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": USER_TEXTS[0]},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.encode(rendered, add_special_tokens=False) == first


def test_each_prompt_extends_the_one_before(model: Path) -> None:
    prompts = _prompts(model)
    assert len(prompts) == TURNS_MAX
    for shorter, longer in pairwise(prompts):
        assert longer[: len(shorter)] == shorter
    assert 2200 < len(prompts[-1]) < CONTEXT_TOKENS_MAX - ANSWER_TOKENS


def test_no_prompt_ends_with_a_block(model: Path) -> None:
    # At least one token must be computed, so a prompt of whole blocks could not hit all of them.
    assert all(len(prompt) % BLOCK_TOKENS_DEFAULT for prompt in _prompts(model))


@pytest.mark.slow
def test_an_engine_answers_twice_the_same(model: Path, engine: EngineProcess) -> None:
    prompt = _prompts(model)[0]
    engine.begin_build(model, None)
    engine.wait_built()
    assert engine.daemon_pid is None
    first = engine.generate(prompt, ANSWER_TOKENS)
    engine.reset_prefix_cache()
    again = engine.generate(prompt, ANSWER_TOKENS)
    cached = engine.generate(prompt, ANSWER_TOKENS)
    engine.shutdown()
    assert first.token_ids == again.token_ids == cached.token_ids
    assert len(first.token_ids) == ANSWER_TOKENS
    assert len(set(first.token_ids)) > ANSWER_TOKENS // 2, "a degenerate answer compares nothing"
    assert first.cached_tokens == again.cached_tokens == 0
    assert cached.cached_tokens == len(prompt) // 32 * 32
    assert first.tokens_from == {}
    assert 0 < cached.ttft_s < first.ttft_s


def test_an_engine_that_cannot_start_says_why(tmp_path: Path, engine: EngineProcess) -> None:
    engine.begin_build(tmp_path / "nothing", None)
    with pytest.raises(ConfigError, match="`plain` failed"):
        engine.wait_built()


def test_killing_an_engine_twice_is_harmless(engine: EngineProcess) -> None:
    engine.kill()
    engine.kill()
    with pytest.raises(ConfigError, match="it ended"):
        engine.wait_built()
