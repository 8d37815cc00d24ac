"""Models with recurrent states (Qwen3-Next): a hit needs the state at its very end."""

from __future__ import annotations

import contextlib
import random
import time
from pathlib import Path

import pytest
from kit import SharedDaemon, write_qwen3_next

from kvstrata.runtime.admin import AdminClient

pytestmark = pytest.mark.engine

PAGE = 96
"""vLLM makes pages of attention as long as states are."""
LENGTHS = (1, 60, 95, 96, 97, 98, 120, 150, 180, 191, 192, 193, 200, 240, 287, 288, 289, 300)
LENGTHS += (350, 383, 384, 385, 400, 450, 480, 481, 530, 600, 671, 672)
HITS = [(length - 1) // PAGE * PAGE for length in LENGTHS]
"""All but the last token may be loaded, up to where a state was kept: the last end of a block."""
NOTHING = [0] * len(LENGTHS)
UNSTORED = {"extra_args": {"kv_transfer_params": {"kvstrata": {"store": False}}}}
TIE = 0.13
"""Logits are of 16-bit floats, two or four steps of which are this."""
OPTIONS = {"dtype": "bfloat16", "max_model_len": 1024}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return write_qwen3_next(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def prompts():
    luck = random.Random(0)
    return [[luck.randrange(3, 512) for _ in range(length)] for length in LENGTHS]


@pytest.fixture(scope="module")
def longer(prompts):
    """Prompts that go on where others ended, and such that end at the state of another."""
    longer = [prompt + [7 + place % 300 for place in range(250)] for prompt in prompts[5:24:6]]
    return [*longer, prompts[6][:96], prompts[12][:192], prompts[18][:288]]


@pytest.fixture(scope="module")
def alone(engine_on, qwen, prompts, longer):
    """What vLLM answers without kvstrata: to the prompts, and to the longer ones in two ways."""
    with engine_on(model=qwen, **OPTIONS) as engine:
        answers = _tokens(engine.ask(prompts, 8))
        engine.forget()
        more = _with_odds(engine, longer, 8)
        engine.forget()
        engine.ask(prompts[5:24:6], 8)
        own = [_with_odds(engine, [prompt], 8) for prompt in longer[:4]]  # on vLLM's own hits
    assert len(set(answers)) == len(answers), "answers that are all the same show nothing"
    return answers, more, own


def _with_odds(engine, prompts, max_tokens):
    """Answers as tokens, each with the log probabilities of the most likely ones in its place."""
    from vllm import SamplingParams

    greedy = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, logprobs=5
    )
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = [output.outputs[0] for output in engine.llm.generate(inputs, greedy, use_tqdm=False)]
    return [
        (
            tuple(output.token_ids),
            [{token: each.logprob for token, each in place.items()} for place in output.logprobs],
        )
        for output in outputs
    ]


def _assert_same(answers, expected):
    """Every answer is the expected one, or parts from it where two tokens are as likely.

    vLLM's kernels for states need 16-bit floats, and round otherwise where a step ends elsewhere:
    alone, too, it then answers otherwise at a tie.
    """
    parted = 0
    for answer, (tokens, odds) in zip(answers, expected, strict=True):
        for place, (mine, theirs) in enumerate(zip(answer.tokens, tokens, strict=True)):
            if mine != theirs:
                distance = odds[place][theirs] - odds[place].get(mine, -99.0)
                assert distance < TIE, (place, mine, theirs)
                parted += 1
                break
    assert parted <= len(expected) // 3, "ties are rare"


def _tokens(answers):
    return [answer.tokens for answer in answers]


def _from(answers, tier):
    return [answer.tokens_from.get(tier, 0) for answer in answers]


def _failing(engine, prompts, monkeypatch):
    """Ask while a state of the first prompt and a block of the last are given away and filled."""
    from kvstrata.connectors.vllm.worker import WorkerHalf

    real_load = WorkerHalf.load
    loads = []

    def load(self, plan):
        self._follow(plan)
        for job in plan.loads:
            state = next(at for at, group in enumerate(job.copy.groups) if group != 3)
            block = job.copy.groups.index(3)
            slot = job.copy.slots[{0: state, 2: block}.get(len(loads), 0)]
            if len(loads) != 1:
                self._arena.generations[slot] += 1
                self._arena.slot(slot)[:] = bytes(len(self._arena.slot(slot)))
            loads.append(job.request)
        real_load(self, plan)

    with monkeypatch.context() as patch:
        patch.setattr(WorkerHalf, "load", load)
        return [engine.ask([prompt], 8)[0] for prompt in prompts], len(loads)


def test_host_then_disk_after_restart(
    engine_on, qwen, prompts, longer, alone, tmp_path, monkeypatch
):
    answers, more, own = alone

    @contextlib.contextmanager
    def running():
        """An engine on a daemon that offers all it keeps: the tiny model computes so fast."""
        tiers = f"host:128MiB,disk:{tmp_path}:128MiB"
        with (
            contextlib.closing(
                SharedDaemon(tmp_path, tiers=tiers, limits={"weigh_costs": False})
            ) as daemon,
            engine_on({"address": daemon.address}, model=qwen, **OPTIONS) as engine,
        ):
            yield engine

    with running() as engine:
        cold = engine.ask(prompts, 8)
        engine.forget()
        warm = engine.ask(prompts, 8)
        engine.forget()
        single = [engine.ask([prompt], 8)[0] for prompt in prompts[4::5]]
        engine.forget()
        extended = engine.ask(longer, 8, sampling=UNSTORED)
        engine.forget()
        ours = [_with_odds(engine, [prompt], 8) for prompt in longer[:4]]
        engine.forget()
        failed, loads = _failing(engine, prompts[-3:], monkeypatch)
        salted = engine.ask(prompts[10:20], 8, cache_salt="another")
        engine.forget()
        engine.wait_idle()
        assert engine.counters()["corrupt_blocks"] == 0
    assert _tokens(cold) == _tokens(warm) == answers
    assert _tokens(single) == answers[4::5]
    assert _from(cold, "host") == NOTHING
    assert _from(warm, "host") == HITS
    assert _from(single, "host") == HITS[4::5]
    _assert_same(extended, more)
    assert ours == own, "on the same hits no bit differs"
    shorter = [0, 0, 0]  # vLLM computes the last token, and no state goes back before it
    assert _from(extended, "host") == HITS[5:24:6] + shorter, "where the other had its state"
    assert _tokens(failed) == answers[-3:]
    assert _from(failed, "host") == [0, HITS[-2], 0], "computed whole, and not asked for again"
    assert loads == 3
    assert _tokens(salted) == answers[10:20]
    assert sum(_from(salted, "host")) == 0
    with running() as engine:
        restarted = engine.ask(prompts, 8)
        engine.wait_idle()
        engine.forget()
        assert _forget(engine, _keys(engine, longer[2])[1]) == 3, "of three groups, on disk"
        cut = engine.ask(longer[2:4], 8)
        engine.wait_idle()
        assert _forget(engine, _keys(engine, longer[3])[0]) == 8, "with its states, in two tiers"
    assert _tokens(restarted) == answers
    assert _from(restarted, "disk") == HITS
    _assert_same(cut, more[2:4])
    kept = [sum(answer.tokens_from.values()) for answer in cut]
    assert kept == [HITS[17], 672], "attention's blocks without a state at their end are no hit"


def _keys(engine, prompt):
    """Return the keys of a prompt's last block and of the first state behind it."""
    from kvstrata.connectors.vllm.states import chains
    from kvstrata.tokens import lineage_digests, sequence_hashes
    from kvstrata.tokens.namespace import ModelKey, salted_key

    scheduler = engine.connector._scheduler
    key = salted_key(ModelKey(scheduler.session.welcome.model_key), "")
    hashes = sequence_hashes(key, lineage_digests(prompt, PAGE))
    blocks = len(hashes)
    return hashes[-1], chains(scheduler._cache, hashes)[2 * blocks - 1]


def _forget(engine, key):
    """Evict a block and what hangs on it; return how many copies there were."""
    from kvstrata.runtime import messages as wire

    return engine.connector._scheduler.session.call(wire.Forget(key), wire.Cleared).blocks


def test_a_router_learns_from_events_where_states_are(
    engine_on, qwen, prompts, router_at, tmp_path
):
    """Attention's blocks and states are told of in groups of their own, and a hit needs both."""
    from vllm.config import KVEventsConfig

    address = f"ipc://{tmp_path}/events.sock"
    published = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=address)
    first, second = prompts[LENGTHS.index(200)], prompts[LENGTHS.index(300)]
    with (
        engine_on(
            {"tiers": "host:128MiB"}, model=qwen, kv_events_config=published, **OPTIONS
        ) as engine,
        router_at(address) as router,
    ):

        def ask(*asked):
            """Return how many tokens of each answer were loaded, after events have come."""
            answers = engine.ask(asked, 8)
            engine.forget()
            time.sleep(0.15)  # the daemon is asked again
            engine.ask([[7] * 5], max_tokens=2)
            router.received()
            with AdminClient(engine.connector.daemon_address) as admin:
                host = admin.stats()["node"]["tiers"]["host"]
            believed = sum(map(len, router.held.values()))
            assert believed == host["total"] - host["free"], "each block and each state"
            return _from(answers, "host")

        def believed(*asked):
            return [router.tokens(prompt, "kvstrata.host") for prompt in asked]

        assert ask(first, second) == [0, 0]
        kinds = sorted(kind for kind, size, _ in router.groups.values() if size == PAGE)
        assert kinds == ["full_attention", "mamba", "mamba", "mamba"]
        (full,) = (group for group, said in router.groups.items() if said[0] != "mamba")
        held = {group: len(router.held["kvstrata.host", group]) for group in router.groups}
        assert held == {group: 5 if group == full else 2 for group in router.groups}
        shorter = [*second[:200], 5]  # attention's blocks of it are there, but no state
        assert believed(first, second, shorter) == [192, 288, 0]
        assert ask(first, second) == [192, 288], "as a router believed"
        _forget(engine, _keys(engine, first)[1])
        ask([5] * 20)
        assert len(router.held["kvstrata.host", full]) == 5
        assert believed(first, second, shorter) == [0, 288, 0]
        assert ask(first, second) == [0, 288], "and as it believed again"
        assert engine.llm.reset_prefix_cache(reset_connector=True)
        assert ask([5] * 20) == [0]
        assert not any(router.held.values())


@pytest.fixture(scope="module")
def tight(qwen):
    """So few pages that requests are preempted, and steps shorter than a page."""
    return {
        "model": qwen,
        **OPTIONS,
        "max_num_batched_tokens": 64,
        "num_gpu_blocks_override": 34,
        "prefix_cache_retention_interval": PAGE,  # a state at each end of a page
    }


def test_pressure_preempts_evicts_and_answers_the_same(engine_on, prompts, tight, tmp_path):
    many = [prompts[-1][start : start + 170 + start] for start in range(0, 96, 16)]
    with engine_on(**tight) as engine:
        expected = _with_odds(engine, many, 70)
    extra = {"tiers": f"host:6MiB,disk:{tmp_path}:64MiB"}
    with engine_on(extra, **tight) as engine:
        for _ in range(2):
            _assert_same(engine.ask(many, max_tokens=70), expected)
            engine.wait_idle()
            engine.forget()
        # What was computed while decoding is kept, too.
        spoken = [*many[0], *expected[0][0], 5]
        assert sum(engine.ask([spoken], 1)[0].tokens_from.values()) == 192
        values = {m.name: m.value for m in engine.llm.get_metrics() if hasattr(m, "value")}
        counters = engine.counters()
    assert values["vllm:num_preemptions"] > 0
    assert counters["hit_blocks_staged"] > 0
    assert counters["corrupt_blocks"] == 0


def test_beside_another_connector_we_serve_as_alone(engine_on, qwen, prompts, alone, monkeypatch):
    from vllm.config import KVTransferConfig

    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    ours = {
        "kv_connector": "KvstrataConnector",
        "kv_connector_module_path": "kvstrata.connectors.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"tiers": "host:64MiB"},
    }
    sibling = {
        "kv_connector": "HybridSiblingConnector",
        "kv_connector_module_path": "sibling",
        "kv_role": "kv_both",
    }
    transfer = KVTransferConfig(
        kv_connector="MultiConnector",
        kv_role="kv_both",
        kv_load_failure_policy="fail",  # is overwritten: a cache must not fail a request
        kv_connector_extra_config={"connectors": [sibling, ours]},
    )
    few, answers = prompts[12:16], alone[0][12:16]
    with engine_on(model=qwen, kv_transfer_config=transfer, **OPTIONS) as engine:
        engine.ask([[5] * 40], max_tokens=2)
        cold = engine.ask(few, 8)
        engine.forget()
        warm = engine.ask(few, 8)
        engine.forget()
        failed, loads = _failing(engine, few[:3], monkeypatch)
    assert _tokens(cold) == _tokens(warm) == answers
    assert [answer.cached for answer in warm] == HITS[12:16]
    assert (_tokens(failed), loads) == (answers[:3], 3)
    assert [answer.tokens_from["host"] for answer in failed] == [0, HITS[13], 0]


# -- which states, and where to --------------------------------------------------------------------


def _cache():
    """Two groups of states and, as the middle one, attention."""
    from kvstrata.layout import GroupedCache, LayerGroup, PagedCache

    state = PagedCache(1, 1, 16, 32, "uint8", packing="state")
    attention = LayerGroup(PagedCache(1, 1, 16, 8, "float16"), (1,))
    return GroupedCache(
        (LayerGroup(state, (0,), 0, 500), attention, LayerGroup(state, (2,), 0, 500))
    )


def _found(offers, step):
    from vllm.v1.core.sched.output import KVConnectorBlockState

    from kvstrata.connectors.vllm.states import boundaries

    state = KVConnectorBlockState({"r"}, {}.__getitem__, {"r": offers, "s": [(0, 9, 16)]})
    return [tuple(each) for each in boundaries(_cache(), 16, state, "r", step)]


def test_a_state_is_believed_at_the_ends_of_a_step_only():
    both = [(0, 5, 32), (2, 6, 32)]
    assert _found(both, range(32)) == [(32, [5, 6])], "this step computes it"
    assert _found(both, range(32, 40)) == [(32, [5, 6])], "this step goes on in another page"
    assert _found(both, range(16, 48)) == [], "computed over"
    assert _found(both, range(33, 34)) == []
    assert _found(both, range(31)) == [], "not yet"
    assert _found(both[:1], range(32)) == [], "of one group only"
    assert _found([(0, 5, 32), (2, 0, 32)], range(32)) == [], "vLLM's null page"
    assert _found([(0, 5, 24), (2, 6, 24)], range(24)) == [], "at no end of a block"
    assert _found([(0, 3, 16), *both, (2, 4, 16)], range(16, 32)) == [(16, [3, 4]), (32, [5, 6])]
    assert _found([], range(16)) == []


def test_keys_of_states_name_their_layers_and_their_prefix():
    from kvstrata.connectors.vllm.states import chains
    from kvstrata.layout import GroupedCache

    hashes = [bytes([place]) * 16 for place in range(3)]
    keys = chains(_cache(), hashes)
    assert keys[:3] == hashes, "attention's are those of other models: forget and leases find them"
    assert len(set(keys)) == 9
    assert chains(_cache(), hashes[:2]) == [keys[place] for place in (0, 1, 3, 4, 6, 7)]
    turned = chains(GroupedCache(_cache().groups[::-1]), hashes)
    assert turned == keys[:3] + keys[6:] + keys[3:6], "whatever place vLLM gives a group"


def test_a_load_fills_attentions_pages_and_the_last_states():
    from kvstrata.connectors.vllm.grouped import load_copy

    tables = [[0, 0, 3, 0], [10, 11, 12, 13], [0, 0, 4, 0]]
    slots = [70, 71, 72, 80, 81]
    copy, lost = load_copy(_cache(), 16, tables, range(16, 48), slots)
    rows = list(zip(copy.groups, copy.slots, copy.pages, strict=True))
    assert rows == [(0, 80, 3), (1, 71, 11), (1, 72, 12), (2, 81, 4)]
    assert (copy.places, lost) == ([0] * 4, [])
    for other in ([], slots[:-1], [*slots, 82], [70, 71, 80, 81]):  # slots of another hit
        assert load_copy(_cache(), 16, tables, range(16, 48), other)[1] == [3, 11, 12, 4], other
    nowhere = [[0, 0, 0, 0], *tables[1:]]
    assert load_copy(_cache(), 16, nowhere, range(16, 48), slots)[1], "vLLM made no room for it"
