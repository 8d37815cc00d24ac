"""Rules of tidy that look at one Python file."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

FILE_LINES_AIM = 300
FILE_LINES_MAX = 600
FUNCTION_LINES_MAX = 60

MODULE_NAMES_BANNED = frozenset({"utils", "helpers", "common", "misc"})

WORDS = {
    r"chunk(?:s|ed|ing)?": "block",
    r"promot(?:e|es|ed|er|ing|ion|ions)": "onboard",
    r"cascad(?:e|es|ed|ing)": "offload",
    r"G[1-4]": "the tier's name",
}
"""Banned in names and comments: word -> our term (docs/glossary.md)."""
WORDS_OF_NAMES = {r"src": "source", r"dst": "target"}
"""Banned in names only; a comment may speak of the folder `src`."""

HOT_FOLDERS = tuple(f"src/kvstrata/{room}/" for room in ("pool", "policy", "tokens"))
LOGGER_NAMES = frozenset({"logging", "logger", "log", "_logger", "_log"})

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Finding(NamedTuple):
    """One broken rule at one line."""

    path: str
    """File, from the root of the repository."""
    line: int
    """Line, from 1."""
    rule: str
    """Short name; `note` does not fail."""
    sentence: str
    """What is wrong, or what to do."""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}: {self.sentence}"


@dataclass(frozen=True, slots=True)
class Source:
    """One parsed Python file."""

    path: str
    """From the root of the repository."""
    text: str
    """As it is on disk."""
    tree: ast.Module
    """Its syntax tree."""

    @classmethod
    def parse(cls, root: Path, path: str) -> Source:
        """Read and parse one file; raises SyntaxError."""
        text = (root / path).read_text(encoding="utf-8")
        return cls(path, text, ast.parse(text, filename=path))


def module_name(source: Source) -> Iterator[Finding]:
    """No module or package is named after nothing in particular."""
    for name in Path(source.path).with_suffix("").parts:
        if name in MODULE_NAMES_BANNED:
            yield Finding(source.path, 1, "module-name", f"{name!r} says nothing; name the idea")


def size(source: Source) -> Iterator[Finding]:
    """Files and functions stay readable in one go."""
    lines = source.text.count("\n")
    if lines > FILE_LINES_MAX:
        yield Finding(source.path, 1, "size", f"{lines} lines, above {FILE_LINES_MAX}; split it")
    elif lines > FILE_LINES_AIM:
        yield Finding(source.path, 1, "note", f"{lines} lines, above the aim of {FILE_LINES_AIM}")
    for node in ast.walk(source.tree):
        if isinstance(node, Function):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES_MAX:
                sentence = f"{node.name}() has {length} lines, above {FUNCTION_LINES_MAX}"
                yield Finding(source.path, node.lineno, "size", sentence)


def todo(source: Source) -> Iterator[Finding]:
    """Postponed work has an issue, so that it is not forgotten."""
    for line, comment in _comments(source):
        if re.search(r"\b(TODO|FIXME)\b", comment) and not re.search(r"#\d+", comment[1:]):
            yield Finding(source.path, line, "todo", "name the issue that will do it, as #123")


def words(source: Source, allowed: frozenset[str]) -> Iterator[Finding]:
    """One term per idea; an engine's own word lives only inside its connector."""
    if source.path.startswith("src/kvstrata/connectors/"):
        return
    for line, name in _names(source.tree):
        parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).split("_")
        for word, ours in {**WORDS, **WORDS_OF_NAMES}.items():
            for part in parts:
                if re.fullmatch(word, part, re.IGNORECASE) and part.lower() not in allowed:
                    sentence = f"{part!r} in the name {name!r}: our word is {ours}"
                    yield Finding(source.path, line, "word", sentence)
    prose = [*_comments(source), *_docstrings(source.tree)]
    for line, text in prose:
        for word, ours in WORDS.items():
            flags = re.NOFLAG if word.startswith("G") else re.IGNORECASE
            for match in re.finditer(rf"\b{word}\b", text, flags):
                if match[0].lower() not in allowed:
                    at = line + text.count("\n", 0, match.start())
                    yield Finding(source.path, at, "word", f"{match[0]!r}: our word is {ours}")


def fields(source: Source, records: frozenset[str]) -> Iterator[Finding]:
    """Each public field of a record has a docstring: the literal on the line after it."""
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
            continue
        if node.name not in records:
            continue
        for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(statement, ast.AnnAssign):
                continue
            if not isinstance(statement.target, ast.Name) or statement.target.id.startswith("_"):
                continue
            if "ClassVar" in ast.unparse(statement.annotation) or is_text(after):
                continue
            sentence = f"{node.name}.{statement.target.id} needs a docstring on the next line"
            yield Finding(source.path, statement.lineno, "field-docstring", sentence)


def hot_path(source: Source) -> Iterator[Finding]:
    """Functions of hot rooms format and log nothing, except on their way to fail."""
    if not source.path.startswith(HOT_FOLDERS):
        return
    for node in ast.walk(source.tree):
        if isinstance(node, Function) and node.name not in {"__repr__", "__str__"}:
            yield from _hot_function(source.path, node)


def _hot_function(path: str, function: Function) -> Iterator[Finding]:
    todo_nodes: list[ast.AST] = list(function.body)
    while todo_nodes:
        node = todo_nodes.pop()
        if isinstance(node, ast.Raise | ast.Assert | Function):
            continue  # failing may take its time; a nested function is looked at on its own
        if isinstance(node, ast.JoinedStr):
            yield Finding(path, node.lineno, "hot-path", "no f-string here; it runs for each block")
            continue
        if isinstance(node, ast.Call) and _root_name(node.func) in LOGGER_NAMES:
            yield Finding(
                path, node.lineno, "hot-path", "no logging here; count it in statistics()"
            )
        todo_nodes += ast.iter_child_nodes(node)


def is_text(node: ast.stmt | None) -> bool:
    """Whether a statement is a lone string literal, which is how a field is documented."""
    match node:
        case ast.Expr(value=ast.Constant(value=str())):
            return True
        case _:
            return False


def _root_name(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _comments(source: Source) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield every lone string literal: docstrings of modules, classes, functions and fields."""
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield node.lineno, text
            case _:
                pass


def _names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield every identifier with its line."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield node.lineno, name
            case ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.keyword(arg=str(name)):
                yield node.value.lineno, name
            case ast.alias(name=name, asname=other):
                yield node.lineno, other or name.rpartition(".")[2]
            case _:
                pass
