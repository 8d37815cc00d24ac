"""Which laws of the engine connector are asked of whom: no connector lacks more in silence.

The suites run in lanes of their own, each with its engine, so they are read here and not imported.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from kvstrata.testing.contracts.engine_connector import CAPABILITIES, EngineConnectorContract

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "contracts" / "engine-connector.md"
LACKS = {
    "TestVllm": set(),
    "TestShards": set(),
    "TestVllmStates": {"lives", "preempts", "resets"},
    "TestStorage": {"carried_reports", "ends", "planned_saves", "reported_loads"},
    "TestLinker": {"carried_reports", "ends", "planned_saves", "reported_loads", "resets"},
    "TestLinkerRanks": {"carried_reports", "ends", "planned_saves", "reported_loads", "resets"},
    "TestV1": {"carried_reports", "declines", "preempts", "resets"},
    "TestV2": {"carried_reports", "resets", "separate_loads"},
    "TestTransformers": {
        "carried_reports", "declines", "planned_loads", "planned_saves", "preempts",
        "reported_loads", "resets",
    },
}  # fmt: skip
"""Suite -> capabilities that its connector's engine has no word for."""


def suites():
    """Return every class that is given the contract, by name."""
    found = {}
    for path in sorted(ROOT.glob("tests/**/test_*.py")):
        if "EngineConnectorContract" not in (text := path.read_text(encoding="utf-8")):
            continue
        for node in ast.walk(ast.parse(text)):
            bases = [ast.unparse(base) for base in getattr(node, "bases", ())]
            if "EngineConnectorContract" in bases:
                assert node.name not in found, "two suites of one name"
                found[node.name] = node
    return found


def lacking(suite):
    """Return what a suite takes from CAPABILITIES, as it is written there."""
    for node in suite.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "capabilities":
            assert isinstance(node.value, ast.BinOp), "write CAPABILITIES - {...}"
            assert isinstance(node.value.op, ast.Sub)
            assert ast.unparse(node.value.left) == "CAPABILITIES"
            return set(ast.literal_eval(node.value.right))
    return set()


def test_every_connector_is_asked_for_all_that_its_engine_has_words_for():
    assert {name: lacking(suite) for name, suite in suites().items()} == LACKS
    assert set().union(*LACKS.values()) <= CAPABILITIES


def test_no_suite_replaces_or_skips_a_law():
    laws = {name for name in vars(EngineConnectorContract) if name.startswith("test_")}
    assert len(laws) == 10
    for name, suite in suites().items():
        own = {node.name for node in suite.body if isinstance(node, ast.FunctionDef)}
        assert own == {"engine"}, name
        decorators = [ast.unparse(each) for each in suite.decorator_list]
        assert not any("skip" in each or "xfail" in each for each in decorators), name


def test_the_page_says_so():
    rows = re.findall(
        r"^\| `(Test\w+)` \| (.*?)\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert {name: set(re.findall(r"`(\w+)`", lacks)) for name, lacks in rows} == LACKS
