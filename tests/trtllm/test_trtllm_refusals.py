"""What is not known to be right is refused at start, in words that say what to do."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from kvstrata.core.errors import ConfigError, LayoutError

pytestmark = pytest.mark.transformers


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ADRESS": "x"}, "TLLM_KVSTRATA_ADRESS: there is no such setting .*known keys"),
        ({"BLOCK_TOKENS": "0"}, "TLLM_KVSTRATA_.*block_tokens"),
        ({"BACKGROUND": "perhaps"}, "TLLM_KVSTRATA_.*background"),
        ({"STAGING_WAIT_S": "61"}, "TLLM_KVSTRATA_.*staging_wait_s"),
        ({"ADAPTERS": "1=a"}, "TLLM_KVSTRATA_ADAPTERS: .*write it as JSON"),
        ({"ADAPTERS": '{"x": "a"}'}, "TLLM_KVSTRATA_.*adapters"),
        ({"CONFIG": "/nowhere/kv.yaml"}, "TLLM_KVSTRATA_CONFIG: cannot read '/nowhere/kv.yaml'"),
        ({"CONFIG": "/nowhere/kv.ini"}, r"TLLM_KVSTRATA_CONFIG: 'kv\.ini' has no suffix"),
    ],
)
def test_settings_that_are_wrong(variables, message):
    from kvstrata.connectors.trtllm.settings import read_settings

    with pytest.raises(ConfigError, match=message):
        read_settings({f"TLLM_KVSTRATA_{name}": value for name, value in variables.items()})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("kv.yaml", "tiers: host:2GiB\nadapters: {1: commit}\n"),
        ("kv.toml", 'tiers = "host:2GiB"\n[adapters]\n1 = "commit"\n'),
        ("kv.json", '{"tiers": "host:2GiB", "adapters": {"1": "commit"}}'),
    ],
)
def test_a_file_and_variables_that_have_the_last_word(tmp_path, name, text):
    from kvstrata.connectors.trtllm.settings import read_settings

    path = tmp_path / name
    path.write_text(text)
    variables = {"TLLM_KVSTRATA_CONFIG": str(path), "TLLM_KVSTRATA_POLICY": "arc"}
    settings = read_settings(variables | {"TLLM_KVSTRATA_BLOCK_TOKENS": "32", "OTHER": "x"})
    assert settings.tiers == "host:2GiB"
    assert settings.adapters == {1: "commit"}
    assert settings.policy == "arc"
    assert settings.block_tokens == 32
    path.write_text(text.replace("tiers", "tears"))
    with pytest.raises(ConfigError, match=r"TLLM_KVSTRATA_CONFIG: .*unknown field `tears`"):
        read_settings(variables)
    path.write_text("{[")
    with pytest.raises(ConfigError, match=r"TLLM_KVSTRATA_CONFIG: .*cannot be read"):
        read_settings(variables)


def test_an_empty_file_means_the_defaults(tmp_path):
    from kvstrata.connectors.trtllm.settings import ConnectorSettings, read_settings

    (tmp_path / "kv.yaml").write_text("# nothing\n")
    found = read_settings({"TLLM_KVSTRATA_CONFIG": str(tmp_path / "kv.yaml")})
    assert found == ConnectorSettings() == read_settings({})


def test_block_tokens_that_are_no_multiple_of_a_page():
    from kvstrata.connectors.trtllm.settings import ConnectorSettings

    assert ConnectorSettings().block_tokens_for(32) == 64
    assert ConnectorSettings().block_tokens_for(48) == 96
    with pytest.raises(ConfigError, match="no multiple of the engine's tokens_per_block of 32"):
        ConnectorSettings(block_tokens=80).block_tokens_for(32)


# -- arguments and models --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "cache", "message"),
    [
        ({"tensor_parallel_size": 2}, {}, "tensor_parallel_size is 2"),
        ({"pipeline_parallel_size": 2}, {}, "pipeline_parallel_size is 2"),
        ({"max_beam_width": 4}, {}, "max_beam_width is 4"),
        ({"enable_attention_dp": True}, {}, "enable_attention_dp"),
        ({"speculative_config": object()}, {}, "speculative_config"),
        ({"sparse_attention_config": object()}, {}, "sparse_attention_config"),
        ({"cache_transceiver_config": object()}, {}, "cache_transceiver_config"),
        ({}, {"host_cache_size": 1 << 30}, "kv_cache_config.host_cache_size"),
        ({}, {"max_attention_window": [4096]}, "kv_cache_config.max_attention_window"),
        ({}, {"enable_block_reuse": False}, "enable_block_reuse"),
        ({}, {"dtype": "nvfp4"}, "its scales lie in a pool of their own"),
        ({}, {"tokens_per_block": None}, "tokens_per_block is None"),
        ({"model": "nobody/nothing"}, {}, "no config.json of 'nobody/nothing'"),
    ],
)
def test_engines_that_are_not_served(arguments, settle, changes, cache, message):
    from kvstrata.connectors.trtllm import KvstrataScheduler, KvstrataWorker

    settle()
    for half in (KvstrataScheduler, KvstrataWorker):
        with pytest.raises(ConfigError, match=message):
            half(arguments(cache, **changes))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["DeepseekV3ForCausalLM"]}, "DeepseekV3ForCausalLM, which kvstrata"),
        ({}, "the model is none"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}, "sliding window"),
    ],
)
def test_models_that_are_not_served(arguments, settle, tmp_path, config, message):
    from kvstrata.connectors.trtllm import KvstrataWorker

    settle()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LayoutError, match=message):
        KvstrataWorker(arguments(model=str(tmp_path)))


def test_a_window_that_the_model_does_not_use_is_no_window(arguments, settle, tmp_path):
    from kvstrata.connectors.trtllm import KvstrataWorker

    settle()
    config = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 9, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config | {"use_sliding_window": False}))
    assert KvstrataWorker(arguments(model=str(tmp_path)))._model.heads == 4


def test_weights_without_a_revision(tmp_path, arguments, settle):
    import torch

    from kvstrata.connectors.trtllm import KvstrataScheduler, KvstrataWorker

    settle()
    config = {"architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = arguments(model=str(tmp_path))
    scheduler, worker = KvstrataScheduler(given), KvstrataWorker(given)
    worker.register_kv_caches(torch.zeros(20, 2, 2, 32, dtype=torch.float64))
    with pytest.raises(ConfigError, match="TLLM_KVSTRATA_WEIGHTS_REVISION"):
        scheduler.wait_for_initialization()
    worker.close()


def test_a_scheduler_half_without_a_worker_half(arguments, settle):
    from kvstrata.connectors.trtllm import KvstrataScheduler

    settle()
    scheduler = KvstrataScheduler(arguments())
    with pytest.raises(ConfigError, match="halves share a process"):
        scheduler.wait_for_initialization()
    assert scheduler.get_num_new_matched_tokens(None, 0) == (0, False)
    assert scheduler.build_connector_meta(None) is None


def test_halves_that_were_given_copies_of_the_arguments_find_each_other():
    from kvstrata.connectors.trtllm import desk

    made = desk.Desk(object())
    made.pages = "the worker half's"
    other = desk.Desk(object())
    desk._desks.add(made)
    try:
        assert desk.partner_of(other) is made
        made.served = True
        assert desk.partner_of(other) is None
    finally:
        desk._desks.discard(made)


# -- pages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["shape", "kv", "heads", "strides", "dtype"])
def test_pools_of_another_shape(change):
    import torch

    from kvstrata.connectors.trtllm.pages import pages_of_tensor

    pool = torch.zeros(6, 3, 2, 2 * 4 * 5, dtype=torch.float16)
    assert pages_of_tensor(pool, 4, 2).block_layout(8).describe() == (
        "trtllm-pool [page=2 layer=3 kv=2 head=2 token=4 channel=5] float16 8 tokens "
        "tp=0/1 pp=0/1 group=0"
    )
    odd = {
        "shape": pool.view(6, 6, 40),
        "kv": pool[:, :, :1],
        "heads": pool[..., :39],
        "strides": pool[::2],
        "dtype": pool.to(torch.complex64),
    }[change]
    with pytest.raises(LayoutError, match="the KV pool is"):
        pages_of_tensor(odd, 4, 2)


def layout(**changes):
    import torch

    rows = torch.zeros(6, 16, dtype=torch.uint8)
    buffers = (SimpleNamespace(layer_id=0, role="key", expansion=changes.get("expansion", 1)),)
    region = SimpleNamespace(
        num_slots=6, size=changes.get("size", 16), stride=changes.get("stride", 16),
        buffers=buffers, as_tensor=lambda: rows,
    )  # fmt: skip
    group = SimpleNamespace(
        layer_group_id=changes.get("group", 0), layer_ids=changes.get("layers", (0,)),
        window_size=changes.get("window"), regions=changes.get("regions", (region,)),
    )  # fmt: skip
    return SimpleNamespace(tokens_per_block=changes.get("tokens", 4), groups=(group,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 8}, "8 tokens in a page, the engine's arguments 4"),
        ({"group": 1}, "layer group 1 stands at position 0"),
        ({"window": 512}, "window of 512 tokens"),
        ({"expansion": 2}, "expanded pages"),
        ({"size": 12}, "not bytes"),
        ({"stride": 8}, "8 apart"),
        ({"layers": (0, 0)}, "a layer twice"),
        ({"regions": ()}, "no regions"),
    ],
)
def test_layouts_that_are_not_known(changes, message):
    from kvstrata.connectors.trtllm.pages import pages_of_layout

    assert pages_of_layout(layout(), 4).page_bytes == 16
    with pytest.raises(LayoutError, match=message):
        pages_of_layout(layout(**changes), 4)


def test_regions_in_another_order_are_another_layout(sim):
    from kvstrata.connectors.trtllm.pages import pages_of_layout

    whole = sim.Pool(6, 4, [[0], [1]]).layout()
    names = {pages_of_layout(whole, 4).writer}
    for group in whole.groups:
        group.regions = group.regions[::-1]
    names.add(pages_of_layout(whole, 4).writer)
    assert len(names) == 2


def test_pages_are_registered_once(arguments, settle):
    import torch

    from kvstrata.connectors.trtllm import KvstrataWorker

    settle()
    worker = KvstrataWorker(arguments())
    worker.register_kv_caches(torch.zeros(20, 2, 2, 32, dtype=torch.float64))
    with pytest.raises(ConfigError, match="twice"):
        worker.register_kv_caches(torch.zeros(20, 2, 2, 32, dtype=torch.float64))
    worker.close()


# -- the interface ---------------------------------------------------------------------------------

METHODS = {
    "KvstrataScheduler": {
        "__init__": ["self", "llm_args"],
        "build_connector_meta": ["self", "scheduler_output"],
        "get_num_new_matched_tokens": ["self", "request", "num_computed_tokens"],
        "request_finished": ["self", "request", "cache_block_ids"],
        "request_finished_by_layer_group": ["self", "request", "cache_block_ids_by_layer_group"],
        "update_state_after_alloc": ["self", "request", "block_ids"],
        "update_state_after_alloc_by_layer_group": ["self", "request", "block_ids_by_layer_group"],
        "wait_for_initialization": ["self"],
        "cancel_load": ["self", "request", "start", "end"],
        "request_reset": ["self", "request"],
    },
    "KvstrataWorker": {
        "__init__": ["self", "llm_args"],
        "bind_connector_meta": ["self", "metadata"],
        "get_connector_meta": ["self"],
        "register_forward_pass_callable": ["self"],
        "register_kv_caches": ["self", "kv_cache_tensor"],
        "register_kv_cache_layout": ["self", "layout"],
        "start_load_kv": ["self", "stream"],
        "wait_for_layer_load": ["self", "layer_idx", "stream"],
        "save_kv_layer": ["self", "layer_idx", "stream"],
        "wait_for_save": ["self", "stream"],
        "get_finished": ["self", "finished_gen_req_ids", "started_loading_req_ids"],
    },
}


@pytest.mark.parametrize("half", sorted(METHODS))
def test_every_method_has_the_parameters_of_the_interface(half):
    from kvstrata.connectors import trtllm

    for name, parameters in METHODS[half].items():
        method = getattr(getattr(trtllm, half), name)
        assert list(inspect.signature(method).parameters) == parameters, name


@pytest.mark.parametrize("version", ["1.1.0", "1.5.0rc2", "0.21"])
def test_an_unknown_release_is_refused_with_the_matrix(version):
    from kvstrata.connectors.trtllm.interface import INTERFACES, Interface, check_interface

    for known in INTERFACES:
        check_interface(object, Interface(object, object, f"{known}.1rc0"))
    with pytest.raises(LayoutError, match=f"TensorRT-LLM {version} is not a version") as refused:
        check_interface(object, Interface(object, object, version))
    for known in INTERFACES:
        assert f"{known}: " in str(refused.value)
    assert "none of them run yet" in str(refused.value)


STUB = {
    "__init__.py": "__version__ = {version!r}\n",
    "_torch/__init__.py": "",
    "_torch/pyexecutor/__init__.py": "",
}
INTERFACE = """
from abc import ABC, abstractmethod
from dataclasses import dataclass
@dataclass
class RequestData:
    request_id: int
    new_tokens: list
    {blocks}: list
    computed_position: int
    num_scheduled_tokens: int
class KvCacheConnectorWorker(ABC):
    def __init__(self, llm_args):
        self._llm_args, self._metadata = llm_args, None
    def bind_connector_meta(self, metadata):
        self._metadata = metadata
    @abstractmethod
    def start_load_kv(self, stream): ...
class KvCacheConnectorScheduler(ABC):
    def __init__(self, llm_args):
        self._llm_args = llm_args
    @abstractmethod
    def build_connector_meta(self, scheduler_output): ...
{more}
"""
TRY = """
from types import SimpleNamespace
from kvstrata.connectors.trtllm import KvstrataScheduler, KvstrataWorker
print(KvstrataWorker.__mro__[1].__module__, KvstrataScheduler.__mro__[1].__module__)
KvstrataWorker(SimpleNamespace(model="m"))
"""


def install(folder, version, path, *, blocks="new_block_ids", more=""):
    """Make a TensorRT-LLM that is only its interface."""
    package = folder / "tensorrt_llm"
    for name, text in STUB.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text.format(version=version))
    module = package / "_torch" / "pyexecutor" / path
    module.parent.mkdir(exist_ok=True)
    (module.parent / "__init__.py").touch()
    module.write_text(INTERFACE.format(blocks=blocks, more=more))


@pytest.fixture
def find(tmp_path, monkeypatch):
    """Look for a TensorRT-LLM that was installed in `tmp_path`."""
    from kvstrata.connectors.trtllm import interface

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt_llm"]:
            del sys.modules[name]

    monkeypatch.syspath_prepend(tmp_path)
    forget()
    yield interface._find
    forget()


@pytest.mark.parametrize(
    ("version", "path"),
    [("1.2.1", "kv_cache_connector.py"), ("1.3.0rc1", "connectors/kv_cache_connector.py")],
)
def test_the_installed_base_classes_are_found_wherever_they_are(tmp_path, find, version, path):
    from kvstrata.connectors.trtllm.interface import check_interface

    install(tmp_path, version, path)
    found = find()
    module = f"tensorrt_llm._torch.pyexecutor.{path.removesuffix('.py').replace('/', '.')}"
    assert (found.version, found.problem) == (version, "")
    assert found.scheduler.__module__ == found.worker.__module__ == module
    check_interface(object, found)


@pytest.mark.parametrize(
    ("path", "more", "message"),
    [
        ("elsewhere.py", {}, "its connector interface was not found"),
        ("kv_cache_connector.py", {"blocks": "pages"}, "its RequestData has no new_block_ids"),
        (
            "kv_cache_connector.py",
            {"more": "    @abstractmethod\n    def migrate(self): ..."},
            "asks its connectors for migrate",
        ),
        (
            "connectors/kv_cache_connector.py",
            {"more": "import nothing_of_this_name"},
            "it cannot be imported: No module named 'nothing_of_this_name'",
        ),
    ],
)
def test_an_installed_interface_that_is_not_known(tmp_path, find, path, more, message):
    from kvstrata.connectors.trtllm.interface import check_interface

    install(tmp_path, "1.2.1", path, **more)
    found = find()

    class Half(found.scheduler):
        def build_connector_meta(self, scheduler_output): ...

    with pytest.raises(LayoutError, match=message):
        check_interface(Half, found)


def test_our_halves_are_subclasses_of_the_installed_base_classes(tmp_path):
    path = "connectors/kv_cache_connector.py"
    install(tmp_path, "1.3.0", path)
    done = subprocess.run(
        [sys.executable, "-c", TRY], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": ":".join([str(tmp_path), *sys.path[1:]]), "PATH": ""},
    )  # fmt: skip
    module = "tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector"
    assert done.stdout.strip() == f"{module} {module}"
    assert "LayoutError: kv_cache_config.tokens_per_block" in done.stderr, "let in, and goes on"


def test_importable_without_tensorrt_llm():
    from kvstrata.connectors.trtllm import KvstrataScheduler, KvstrataWorker, interface

    assert "tensorrt_llm" not in sys.modules
    assert interface.engine_version() == ""
    for half in (KvstrataScheduler, KvstrataWorker):
        assert half.__mro__[1].__module__ == interface.__name__, "the shape of the base class"
