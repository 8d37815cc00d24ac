"""Speculative decoding: what is stored is the KV of accepted tokens, and the answers are the same.

The speculating engine has a process of its own: ngram speculation imports numba, after which no
other engine starts.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

SCRIPT = """
import json
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import numpy as np
from conftest import run_engine

model, prompts, folder = Path(sys.argv[2]), json.loads(sys.argv[3]), Path(sys.argv[4])
extra = {"tiers": f"host:64MiB,disk:{folder / 'kv'}:64MiB"}
speculation = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 2,
}
with run_engine(model, extra, speculative_config=speculation) as engine:
    cold = engine.ask(prompts, max_tokens=160)
    at_once = engine.counters()["stored_blocks"]
    engine.forget()
    warm = engine.ask(prompts, max_tokens=160)
    engine.wait_idle()
    for number, (prompt, answer) in enumerate(zip(prompts, cold)):
        _, blocks = engine.stored([*prompt, *answer.tokens[:-1]])
        np.save(folder / f"{number}.npy", np.array([np.frombuffer(b, np.float32) for b in blocks]))
    counted = {}
    for metric in engine.llm.get_metrics():
        if metric.name.startswith("vllm:spec_decode_num_") and hasattr(metric, "value"):
            counted[metric.name] = counted.get(metric.name, 0) + metric.value
said = {
    "cold": [answer.tokens for answer in cold],
    "warm": [answer.tokens for answer in warm],
    "kept": [answer.tokens_from for answer in warm],
    "at_once": at_once,
    "counted": counted,
}
(folder / "said.json").write_text(json.dumps(said))
"""


def test_only_accepted_tokens_are_stored(engine_on, make_llama, tmp_path):
    import numpy as np

    luck = random.Random(5)
    prompts = [[luck.randrange(3, 512) for _ in range(100)] for _ in range(3)]
    model = make_llama(tmp_path / "model", spread=0.06)
    with engine_on({"tiers": "host:64MiB"}, model=model) as engine:
        plain = engine.ask(prompts, max_tokens=160)
        computed = []
        for prompt, answer in zip(prompts, plain, strict=True):
            _, blocks = engine.stored([*prompt, *answer.tokens[:-1]])
            computed.append(np.array([np.frombuffer(block, np.float32) for block in blocks]))
    here = str(Path(__file__).parent)
    arguments = [here, str(model), json.dumps(prompts), str(tmp_path)]
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"NUMBA_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    said = json.loads((tmp_path / "said.json").read_text())
    counted = said["counted"]
    drafted = counted["vllm:spec_decode_num_draft_tokens"]
    accepted = counted["vllm:spec_decode_num_accepted_tokens"]
    assert 20 < accepted < 0.9 * drafted, "some drafts must be right and some wrong"
    right = [list(answer.tokens) for answer in plain]
    assert said["cold"] == said["warm"] == right
    # 100 tokens of prompt, 160 of answer of which the last is computed by nobody.
    assert said["at_once"] == 12, "a last step's blocks do not wait for the next request"
    assert [kept["host"] for kept in said["kept"]] == [64, 64, 64], "what its prompt has in it"
    for number, expected in enumerate(computed):
        found = np.load(tmp_path / f"{number}.npy")
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max(), number
    # Another engine that does not speculate goes on with them, from disk.
    longer = [
        [*prompt, *answer.tokens[:156]] for prompt, answer in zip(prompts, plain, strict=True)
    ]
    with engine_on({"tiers": f"host:64MiB,disk:{tmp_path / 'kv'}:64MiB"}, model=model) as engine:
        continued = engine.ask(longer, max_tokens=4)
    assert [answer.tokens for answer in continued] == [tuple(each[156:]) for each in right]
    assert [answer.tokens_from["disk"] for answer in continued] == [256, 256, 256]
