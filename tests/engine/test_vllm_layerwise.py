"""Loads and saves beside the forward pass: `loading: layerwise`, `saving: layerwise`."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import wait

import pytest

from kvstrata.runtime import messages as wire

pytestmark = pytest.mark.engine

LAYERWISE = {"tiers": "host:64MiB", "loading": "layerwise", "saving": "layerwise"}
LAYERS = 4


def _copies():
    """The class that copies; its module imports vLLM, which must not be while tests are found."""
    from kvstrata.connectors.vllm.layerwise import LayerCopies

    return LayerCopies


@pytest.fixture(scope="module")
def engine(engine_on, reference):
    """One engine for this module; `reference` has run without kvstrata before it starts."""
    assert reference
    with engine_on(LAYERWISE) as running:
        running.ask([[7] * 40], max_tokens=1)  # a first pass, which asks for every layer
        yield running


@pytest.fixture
def kept_engine(engine, prompts, reference):
    """The engine, with the four prompts' blocks kept and vLLM's own cache empty."""
    assert engine.llm.reset_prefix_cache(reset_connector=True)
    assert [each.tokens for each in engine.ask(prompts)] == reference
    engine.wait_idle()  # until a block is sealed whoever wants it waits, a step with no pass
    engine.forget()
    yield engine
    assert engine.worker._copies._jobs == []
    assert engine.connector._scheduler._requests.keys() == set()
    from kvstrata.runtime.admin import AdminClient

    with AdminClient(engine.connector.daemon_address) as admin:
        assert admin.stats()["node"]["holds"] == 0


@pytest.fixture
def begun(monkeypatch):
    """Requests of every load that was begun beside a pass."""
    seen: list[str] = []
    real_begin = _copies().begin_loads

    def begin(self, jobs):
        seen.extend(job.request for job in jobs)
        real_begin(self, jobs)

    monkeypatch.setattr(_copies(), "begin_loads", begin)
    return seen


def test_a_hit_is_loaded_in_the_step_that_uses_it(kept_engine, prompts, reference, begun):
    core = kept_engine.llm.llm_engine
    from vllm import SamplingParams

    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    core.add_request("first", {"prompt_token_ids": prompts[2]}, one)
    (output,) = core.step()
    assert output.finished
    assert output.outputs[0].token_ids[0] == reference[2][0], "one step has loaded and answered"
    assert len(begun) == 1
    kept_engine.forget()
    answers = kept_engine.ask(prompts)
    assert [each.tokens for each in answers] == reference
    # Of the second prompt, kept whole, the last page is computed: some token has to be.
    assert [each.tokens_from["host"] for each in answers] == [64, 96, 256, 0]
    assert len(begun) == 4


def test_layers_are_copied_while_others_compute(kept_engine, prompts, reference, monkeypatch):
    """No copy of a layer but the first may begin before the pass has computed layer 0."""
    events: list[tuple[str, int]] = []
    first_computed = threading.Event()
    names = list(kept_engine.worker._copies._layers)
    assert len(names) == LAYERS
    real_load, real_save = _copies()._load_layer, _copies()._save_layer
    real_wait, real_computed = type(kept_engine.worker).wait_for, type(kept_engine.worker).computed

    def load(self, name, rows):
        if name != names[0]:
            assert first_computed.wait(4), "the pass waits for layers that it does not need yet"
        real_load(self, name, rows)
        events.append(("copied", names.index(name)))

    def wait_for(self, layer):
        real_wait(self, layer)
        events.append(("there", names.index(layer)))

    def computed(self, plan, layer):
        events.append(("computed", names.index(layer)))
        real_computed(self, plan, layer)
        first_computed.set()

    def save(self, name, rows):
        events.append(("save", names.index(name)))
        real_save(self, name, rows)

    with monkeypatch.context() as patch:
        patch.setattr(_copies(), "_load_layer", load)
        patch.setattr(_copies(), "_save_layer", save)
        patch.setattr(type(kept_engine.worker), "wait_for", wait_for)
        patch.setattr(type(kept_engine.worker), "computed", computed)
        longer = [*prompts[2], *prompts[0]]  # 4 blocks are loaded, a fifth is computed and saved
        answer = kept_engine.ask([longer], max_tokens=1)[0]
    assert answer.tokens_from["host"] == 256
    place = {event: events.index(event) for event in events}
    assert place["computed", 0] < place["copied", LAYERS - 1]
    for layer in range(LAYERS):
        assert place["copied", layer] < place["there", layer] < place["computed", layer]
        assert place["computed", layer] < place["save", layer]
    kept_engine.forget()
    assert kept_engine.ask([prompts[2]])[0].tokens == reference[2]


def test_copies_that_others_hold_up_are_not_taken_for_slow(kept_engine, prompts, monkeypatch):
    """Else the daemon finds that computing is faster, and kept blocks are not used."""
    import numpy as np

    class HeldUp(np.ndarray):
        def __getitem__(self, index):
            time.sleep(0.05)
            return np.asarray(super().__getitem__(index))

    layers = kept_engine.worker._copies._layers
    for name, (pages, slots) in list(layers.items()):
        monkeypatch.setitem(layers, name, (pages, slots.view(HeldUp)))
    found = []
    for _ in range(3):
        kept_engine.forget()
        found.append(kept_engine.ask([prompts[2]], max_tokens=1)[0].tokens_from["host"])
    assert found == [256] * 3


def test_a_layer_is_saved_before_the_last_is_computed(kept_engine, monkeypatch):
    """The last layer's pass waits here until the first layer is saved."""
    saved = threading.Event()
    names = list(kept_engine.worker._copies._layers)
    real_save, real_wait = _copies()._save_layer, type(kept_engine.worker).wait_for
    early = []

    def save(self, name, rows):
        real_save(self, name, rows)
        saved.set()

    def wait_for(self, layer):
        if layer == names[-1]:
            early.append(saved.wait(4))
        real_wait(self, layer)

    with monkeypatch.context() as patch:
        patch.setattr(_copies(), "_save_layer", save)
        patch.setattr(type(kept_engine.worker), "wait_for", wait_for)
        kept_engine.ask([[9] * 100], max_tokens=1)
    assert early == [True]
    (block,) = _stored(kept_engine, [9] * 64)
    kept_engine.forget()
    assert kept_engine.ask([[9] * 100], max_tokens=1)[0].tokens_from["host"] == 64
    assert len(block) == kept_engine.worker._layout.block_bytes


def test_what_is_saved_by_layers_is_what_is_saved_whole(kept_engine, prompts, monkeypatch):
    by_layers = _stored(kept_engine, prompts[2][:256])
    assert kept_engine.llm.reset_prefix_cache(reset_connector=True)
    monkeypatch.setattr(_copies(), "computed", lambda *_: None)
    kept_engine.ask(prompts, max_tokens=1)
    assert _stored(kept_engine, prompts[2][:256]) == by_layers


def test_a_pass_in_parts_is_saved_when_it_has_ended(kept_engine, prompts, monkeypatch):
    """Asked to save a layer twice, it cannot tell when the layer was whole."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    by_layers = _stored(kept_engine, prompts[2][:256])
    assert kept_engine.llm.reset_prefix_cache(reset_connector=True)
    names = list(kept_engine.worker._copies._layers)
    real_wait, early = type(kept_engine.worker).wait_for, []

    def wait_for(self, layer):
        real_wait(self, layer)
        if layer == names[0]:  # of the next one nothing is computed yet
            self.computed(get_kv_transfer_group()._plan(), names[1])
            early.extend(self._copies._saves.values())
            wait(early)

    with monkeypatch.context() as patch:
        patch.setattr(type(kept_engine.worker), "wait_for", wait_for)
        _scribble(kept_engine)
        kept_engine.ask(prompts, max_tokens=1)
    assert early
    assert _stored(kept_engine, prompts[2][:256]) == by_layers


def _scribble(engine):
    """Write over every page, as others would: what is right there has come since."""
    for pages, _ in engine.worker._copies._layers.values():
        pages[:] = 0x3F


def test_a_pass_waits_for_layers_that_come_late(kept_engine, prompts, reference, monkeypatch):
    """Also where it asks for one without a cache of its own, which reads another's pages."""
    real_load, real_wait = _copies()._load_layer, type(kept_engine.worker).wait_for
    names, done = list(kept_engine.worker._copies._layers), []

    def load(self, name, rows):
        time.sleep(0.05)
        real_load(self, name, rows)

    def wait_for(self, layer):
        if layer == names[1] and self._copies._jobs and not done:
            real_wait(self, "a layer that shares another's pages")
            done.extend(load.done() for load in self._copies._loads.values())
        real_wait(self, layer)

    with monkeypatch.context() as patch:
        patch.setattr(_copies(), "_load_layer", load)
        for _ in range(2):
            kept_engine.forget()
            _scribble(kept_engine)
            answer = kept_engine.ask([prompts[2]])[0]
            assert answer.tokens == reference[2]
            assert answer.tokens_from["host"] == 256
            patch.setattr(type(kept_engine.worker), "wait_for", wait_for)
    assert done == [True] * LAYERS


def test_slot_reused_under_the_copy_is_recomputed(
    kept_engine, prompts, reference, begun, monkeypatch
):
    """The slot is given away when two layers are there and the pass is at work on them."""
    real_load = _copies()._load_layer
    third = list(kept_engine.worker._copies._layers)[2]
    arena, before = kept_engine.worker._arena, {}

    def load(self, name, rows):
        if name == third:
            slot = rows.slots[rows.places == 0][2]
            before[slot] = bytes(arena.slot(slot))
            arena.generations[slot] += 1
            arena.slot(slot)[:] = bytes([0x5A]) * len(before[slot])
        real_load(self, name, rows)

    with monkeypatch.context() as patch:
        patch.setattr(_copies(), "_load_layer", load)
        answer = kept_engine.ask([prompts[2]])[0]
    assert len(begun) == 1
    assert answer.tokens == reference[2]
    assert answer.tokens_from == {"host": 128, "disk": 0}, "the good part of the prefix is kept"
    for slot, data in before.items():  # the daemon knows of no other owner
        arena.slot(slot)[:] = data
    again = kept_engine.ask([prompts[2]])[0]
    assert again.tokens == reference[2]
    assert again.tokens_from["host"] == 128, "vLLM has kept the good part in its own cache"


def _spoil_loads(patch, times=1):
    """Let the next loads write rubbish into the pages, and fail."""
    real_load, left = _copies()._load_layer, [times * LAYERS]

    def load(self, name, rows):
        if left[0] <= 0:
            real_load(self, name, rows)
            return
        left[0] -= 1
        pages, _ = self._layers[name]
        pages[rows.pages] = 0x3F
        raise OSError("the copy failed")

    patch.setattr(_copies(), "_load_layer", load)


def test_those_who_share_a_load_that_fails(kept_engine, prompts, reference, begun, monkeypatch):
    """They come in the same step, in which vLLM shows them the pages that are to be loaded."""
    tail = [prompts[3][:n] for n in (1, 2, 3, 5)]
    many = [prompts[2] + each for each in tail]
    expected = [each.tokens for each in kept_engine.ask(many)]
    kept_engine.forget()
    with monkeypatch.context() as patch:
        _spoil_loads(patch)
        answers = kept_engine.ask(many)
    assert begun
    assert [each.tokens for each in answers] == expected
    kept_engine.forget()
    assert kept_engine.ask([prompts[2]])[0].tokens == reference[2]


def test_pages_of_a_failed_load_are_not_found_again(kept_engine, prompts, reference, monkeypatch):
    """Its request is aborted before it has computed them anew."""
    from vllm import SamplingParams

    core = kept_engine.llm.llm_engine
    parameters = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    with monkeypatch.context() as patch:
        _spoil_loads(patch)
        core.add_request("aborted", {"prompt_token_ids": prompts[2]}, parameters)
        assert core.step() == []
        core.abort_request(["aborted"], internal=False)
        while core.has_unfinished_requests():
            core.step()
        answer = kept_engine.ask([prompts[2]])[0]
    assert answer.tokens == reference[2]
    assert answer.tokens_from["host"] == 256, "not from vLLM's own cache"


def test_nobody_shares_pages_before_they_are_loaded(kept_engine, prompts, monkeypatch):
    """Two come in one step; the load fails, and the first ends before it has made that good."""
    from vllm import SamplingParams

    second = [*prompts[2], 8]
    expected = kept_engine.ask([second])[0].tokens
    kept_engine.forget()
    core = kept_engine.llm.llm_engine
    parameters = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    with monkeypatch.context() as patch:
        _spoil_loads(patch)
        core.add_request("first", {"prompt_token_ids": prompts[2]}, parameters)
        core.add_request("second", {"prompt_token_ids": second}, parameters)
        outputs = core.step()
        core.abort_request(["first"], internal=False)
        while core.has_unfinished_requests():
            outputs += core.step()
    (tokens,) = [tuple(each.outputs[0].token_ids) for each in outputs if each.finished]
    assert tokens == expected


def test_what_a_failed_load_has_computed_is_not_kept(kept_engine, prompts, monkeypatch):
    longer = [*prompts[2][:256], *prompts[0][:65]]
    with monkeypatch.context() as patch:
        _spoil_loads(patch)
        failed = kept_engine.ask([longer])[0]
    blocks = _stored(kept_engine, longer[:320])
    assert kept_engine.llm.reset_prefix_cache(reset_connector=True)
    assert kept_engine.ask([longer])[0].tokens == failed.tokens
    cold = _stored(kept_engine, longer[:320])
    assert _differ(blocks, cold) < 1e-3


def _stored(engine, tokens):
    """The bytes of the blocks that are kept for tokens, once the daemon has sealed them."""
    engine.wait_idle()
    return engine.stored(tokens)[1]


def _differ(left, right):
    import numpy as np

    pairs = zip(left, right, strict=True)
    return max(
        float(np.abs(np.frombuffer(a, np.float32) - np.frombuffer(b, np.float32)).max())
        for a, b in pairs
    )


def _slow_copies(patch, engine, seconds):
    real_load = _copies()._load_layer

    def load(self, name, rows):
        time.sleep(seconds)
        real_load(self, name, rows)

    patch.setattr(_copies(), "_load_layer", load)
    patch.setattr(engine.worker._copies, "_timeout_s", 0.2)


def test_a_copy_past_its_deadline_is_recomputed(
    kept_engine, prompts, reference, monkeypatch, caplog
):
    with monkeypatch.context() as patch:
        _slow_copies(patch, kept_engine, 0.3)
        answer = kept_engine.ask([prompts[2]])[0]
    assert answer.tokens == reference[2]
    assert answer.tokens_from == {"host": 0, "disk": 0}
    assert "a load took more than 0.2 s" in caplog.text


def test_a_policy_that_fails_requests(kept_engine, prompts, reference, monkeypatch):
    """Ours is to recompute; whoever sets vLLM's own after the start has failed requests only."""
    scheduler = kept_engine.llm.llm_engine.engine_core.engine_core.scheduler
    assert scheduler.recompute_kv_load_failures
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    core = kept_engine.llm.llm_engine
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "recompute_kv_load_failures", False)
        _slow_copies(patch, kept_engine, 0.3)
        core.add_request("fails", {"prompt_token_ids": prompts[2]}, parameters)
        outputs = []
        while core.has_unfinished_requests():
            outputs += core.step()
        assert [each.outputs[0].finish_reason for each in outputs] == ["error"]
    answers = kept_engine.ask([prompts[2], prompts[1]])
    assert [each.tokens for each in answers] == [reference[2], reference[1]]
    assert answers[0].tokens_from["host"] == 256


def test_a_pass_that_does_not_ask_is_recomputed(kept_engine, prompts, reference, monkeypatch):
    """It may have read a layer before it was there."""
    names = list(kept_engine.worker._copies._layers)
    real_wait, struck = type(kept_engine.worker).wait_for, []

    def wait_for(self, layer):
        if layer == names[1] and not struck:
            struck.append(layer)
            return
        real_wait(self, layer)

    with monkeypatch.context() as patch:
        patch.setattr(type(kept_engine.worker), "wait_for", wait_for)
        answer = kept_engine.ask([prompts[2]])[0]
    assert struck
    assert answer.tokens == reference[2]
    assert answer.tokens_from == {"host": 0, "disk": 0}


def _abort_in_pass(patch, engine, layer):
    """Abort every request that runs when its pass asks for a layer; vLLM does behind the pass."""
    core = engine.llm.llm_engine.engine_core.engine_core
    real_wait, aborted = type(engine.worker).wait_for, []

    def wait_for(self, name):
        if name == layer and not aborted:
            aborted.extend(request.request_id for request in core.scheduler.running)
            core.aborts_queue.put_nowait(list(aborted))
        real_wait(self, name)

    patch.setattr(type(engine.worker), "wait_for", wait_for)
    return aborted


def _step(engine, prompt):
    """One step of a request that would go on."""
    from vllm import SamplingParams

    core = engine.llm.llm_engine
    parameters = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    core.add_request("one step", {"prompt_token_ids": prompt}, parameters)
    core.step()
    return core


def test_a_request_aborted_in_the_pass_whose_load_fails(
    kept_engine, prompts, reference, monkeypatch
):
    """It has no pages any more when the failure is told; vLLM's cache still has them."""
    names = list(kept_engine.worker._copies._layers)
    with monkeypatch.context() as patch:
        _spoil_loads(patch)
        aborted = _abort_in_pass(patch, kept_engine, names[0])
        _step(kept_engine, prompts[2]).abort_request(["one step"], internal=False)
        assert aborted
        answer = kept_engine.ask([prompts[2]])[0]
    assert answer.tokens == reference[2]
    assert answer.tokens_from["host"] == 256, "not from vLLM's own cache"


def test_a_request_preempted_before_it_has_recomputed(kept_engine, prompts, reference, monkeypatch):
    core = kept_engine.llm.llm_engine.engine_core.engine_core
    with monkeypatch.context() as patch:
        _spoil_loads(patch)
        llm = _step(kept_engine, prompts[2])
        (request,) = core.scheduler.running
        core.scheduler.running.remove(request)
        core.scheduler._preempt_request(request, time.monotonic())
        outputs = []
        while llm.has_unfinished_requests():
            outputs += llm.step()
    (tokens,) = [tuple(each.outputs[0].token_ids) for each in outputs if each.finished]
    assert tokens == reference[2]
    assert kept_engine.ask([prompts[2]])[0].tokens == reference[2]


def test_blocks_that_are_lost_before_they_are_held(
    kept_engine, prompts, reference, begun, monkeypatch
):
    """vLLM was promised them: their pages are reported, though there is nothing to copy."""
    session = type(kept_engine.connector._scheduler.session)
    real_acquire, struck = session.acquire, []

    def acquire(self, name, hashes, windows):
        if struck:
            return real_acquire(self, name, hashes, windows)
        struck.append(name)
        return real_acquire(self, name, hashes[:2], windows)

    with monkeypatch.context() as patch:
        patch.setattr(session, "acquire", acquire)
        answer = kept_engine.ask([prompts[2]])[0]
    assert len(begun) == len(struck) == 1
    assert answer.tokens == reference[2]
    assert answer.tokens_from["host"] == 128


def test_each_layer_is_saved_once(kept_engine, monkeypatch):
    """Neither whole behind the pass, nor by whoever computes when the step was reported."""
    from kvstrata.connectors.vllm.grouped import GroupedPages

    names = list(kept_engine.worker._copies._layers)
    real_save, real_end = _copies()._save_layer, type(kept_engine.worker).take_report
    layers, whole = [], []

    def save(self, name, rows):
        layers.append(name)
        real_save(self, name, rows)

    def take_report(self):
        for name in names:  # as a draft model's pass would
            self.computed(self._saved, name)
        self._copies.end_saves()
        return real_end(self)

    with monkeypatch.context() as patch:
        patch.setattr(_copies(), "_save_layer", save)
        patch.setattr(GroupedPages, "save", lambda _, copy: whole.append(copy))
        patch.setattr(type(kept_engine.worker), "take_report", take_report)
        kept_engine.ask([[9] * 100], max_tokens=1)
    assert layers == names
    assert whole == []
    assert len(_stored(kept_engine, [9] * 64)) == 1


def test_an_aborted_requests_save_ends_before_its_pages_go(kept_engine, prompts, monkeypatch):
    """It is complete, so it is kept; whoever has its pages next writes to them at once."""
    longer = [*prompts[1][:64], *prompts[3], *prompts[0]]
    names = list(kept_engine.worker._copies._layers)
    real_save = _copies()._save_layer

    def save(self, name, rows):
        time.sleep(0.05)
        real_save(self, name, rows)

    with monkeypatch.context() as patch:
        patch.setattr(_copies(), "_save_layer", save)
        aborted = _abort_in_pass(patch, kept_engine, names[-1])
        llm = _step(kept_engine, longer)
        assert kept_engine.worker._copies._saves == {}
    llm.abort_request(["one step"], internal=False)
    assert aborted
    _scribble(kept_engine)
    kept_engine.forget()
    saved = _stored(kept_engine, longer[:192])
    assert kept_engine.llm.reset_prefix_cache(reset_connector=True)
    kept_engine.ask([longer], max_tokens=1)
    assert _differ(saved, _stored(kept_engine, longer[:192])) < 1e-3


def test_slots_of_a_daemon_that_is_gone_are_not_sealed(
    kept_engine, prompts, reference, monkeypatch
):
    """It ends and another one is found while a pass saves: there the slots are someone else's."""
    from kvstrata.runtime.session import Session

    session = kept_engine.connector._scheduler.session
    epoch, names, sealed = session.epoch, list(kept_engine.worker._copies._layers), []
    real_wait, real_tell = type(kept_engine.worker).wait_for, Session.tell_all

    def wait_for(self, layer):
        real_wait(self, layer)
        if layer == names[-1] and session.epoch == epoch:
            os.kill(kept_engine.connector.daemon_pid, signal.SIGKILL)
            deadline = time.monotonic() + 30
            while not session.usable() or session.epoch == epoch:
                assert time.monotonic() < deadline
                time.sleep(0.01)

    def tell_all(self, calls):
        sealed.extend(call for call in calls if isinstance(call, wire.Seal))
        real_tell(self, calls)

    with monkeypatch.context() as patch:
        patch.setattr(type(kept_engine.worker), "wait_for", wait_for)
        patch.setattr(Session, "tell_all", tell_all)
        kept_engine.ask([[9] * 100], max_tokens=1)
    assert session.epoch > epoch
    assert sealed == []
    assert [each.tokens for each in kept_engine.ask(prompts)] == reference
    kept_engine.forget()
    again = kept_engine.ask(prompts)
    assert [each.tokens for each in again] == reference
    assert again[2].tokens_from["host"] == 256
