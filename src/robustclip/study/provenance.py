"""Which code a number depends on: one digest per component that took part.

The digest of a class covers the syntax tree of its definition and of everything of this package that it refers to,
symbol by symbol, so that editing Square touches what uses Square. Docstrings, comments, annotations of arguments and
the texts of errors do not count, nor does the place of a definition. Classes of a notebook or a script count by their
source and by what that refers to. Files below `assets` count where a definition names them.

    digests(PGD(eps=4/255))      # {"robustclip.attacks.gradient:PGD": "3f0c..."}

A definition that was edited counts as what it was where `assets/edits.json` says that the edit changed no answer; see
`study.edits`, which writes that file.
"""

import ast
import hashlib
import inspect
import json
import linecache
import platform
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from robustclip.files import file_digest

PACKAGE = "robustclip"
ROOT = Path(str(files(PACKAGE)))
# They check, show and keep, or say what is to be measured, all of which is in the key; no number depends on how.
SILENT = {"checks", "component", "files", "hub", "progress", "_torchvision"}
SILENT |= {f"study.{name}" for name in ("cells", "named", "provenance", "scales", "shipped", "store")}
EDITS = ROOT / "assets" / "edits.json"
OWN = "own"  # in the place of the module for what is not part of the package
LIBRARIES = ("robustclip", "torch", "torchvision", "open_clip_torch", "transformers", "numpy", "pandas")
Symbol = tuple[str, str]  # module, name


def digests(*objects: Any) -> dict[str, str]:
    """Name -> digest for classes, functions and components, those inside of components included."""
    kinds = dict.fromkeys(kind for value in objects for kind in _kinds(value))
    ours = {kind: _is_ours(kind.__module__) for kind in kinds}
    return {
        f"{kind.__module__ if ours[kind] else OWN}:{kind.__qualname__}":
        digest(kind.__module__, kind.__qualname__) if ours[kind] else _own_digest(kind)
        for kind in kinds
    }  # fmt: skip


def digest(module: str, name: str) -> str:
    """Digest of one definition of the package and of all that it refers to; "gone" if there is no such definition."""
    return _digest(module, name.partition(".")[0])


def current(component: str) -> str | None:
    """The digest that a component recorded by `digests` has now; None for those that are not of the package."""
    module, _, name = component.partition(":")
    return None if module == OWN else digest(module, name)


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that matter, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def commit() -> str:
    """The last git commit that changed the package, or "" outside a checkout."""
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%H", "--", "."]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _is_ours(module: str) -> bool:
    return module == PACKAGE or module.startswith(PACKAGE + ".")


def _kinds(value: Any) -> Iterator[Any]:
    """The class of a component and of every component inside it; classes and functions as they are."""
    if isinstance(value, type) or inspect.isfunction(value):
        yield value
    elif value is not None:
        yield type(value)
        for part in [getattr(value, entry.name) for entry in fields(value)] if is_dataclass(value) else []:
            for one in part if isinstance(part, tuple | list) else [part]:
                if is_dataclass(one) or inspect.isfunction(one):
                    yield from _kinds(one)


# --- one module -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """What a module of the package defines and imports, by name."""

    defined: dict[str, list[ast.stmt]]
    imported: dict[str, Symbol]  # a whole module goes by the name ""


@cache
def _source(module: str) -> Source:
    """The parsed module; an empty one if it does not exist."""
    spec = find_spec(module)
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return Source({}, {})
    return parsed(Path(spec.origin).read_text(encoding="utf-8"))


def parsed(text: str) -> Source:
    """What the text of a module defines and imports."""
    tree, defined = ast.parse(text), {}
    for node in _statements(tree):
        for name in _bound(node):
            defined.setdefault(name, []).append(node)
    return Source(defined, dict(_imports(tree)))


def _statements(tree: ast.AST) -> Iterator[ast.stmt]:
    """Statements of a module, also those under an `if` or `try`."""
    for node in [*getattr(tree, "body", []), *getattr(tree, "orelse", [])]:
        yield from _statements(node) if isinstance(node, ast.If | ast.Try | ast.With) else [node]


def _bound(node: ast.stmt) -> Iterator[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    for target in getattr(node, "targets", [getattr(node, "target", None)]):
        yield from (part.id for part in ast.walk(target or ast.Pass()) if isinstance(part, ast.Name))


def _imports(tree: ast.AST) -> Iterator[tuple[str, Symbol]]:
    """Local name -> what it stands for, of all absolute imports of this package anywhere in a syntax tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.asname or PACKAGE, (alias.name if alias.asname else PACKAGE, ""))
                        for alias in node.names if _is_ours(alias.name))  # fmt: skip
        elif isinstance(node, ast.ImportFrom) and _is_ours(node.module or ""):
            yield from ((alias.asname or alias.name, (node.module, alias.name)) for alias in node.names)


def _settled(module: str, name: str) -> Symbol | None:
    """Where a name of a module is defined, followed through imports; None if that is not in the package."""
    source = _source(module)
    if not name or name in source.defined:
        return module, name
    if name in source.imported:
        return _settled(*source.imported[name])
    submodule = f"{module}.{name}"
    return (submodule, "") if find_spec(module).submodule_search_locations and find_spec(submodule) else None


# --- closures ---------------------------------------------------------------------------------------------------------


def _mentions(node: ast.AST, bound: dict[str, Symbol]) -> Iterator[Symbol]:
    """The definitions of the package that a syntax tree refers to; `bound` says what its names stand for."""
    for part in ast.walk(node):
        found = _named(part, bound)
        if found and found[1]:
            yield found


def _named(node: ast.AST, bound: dict[str, Symbol]) -> Symbol | None:
    """What `name`, `module.name` or `package.module.name` stands for."""
    if isinstance(node, ast.Name) and node.id in bound:
        return _settled(*bound[node.id])
    if isinstance(node, ast.Attribute) and (outer := _named(node.value, bound)) and not outer[1]:
        return _settled(outer[0], node.attr)
    return None


@cache
def _neighbours(module: str, name: str) -> tuple[Symbol, ...]:
    """What the definition of a symbol refers to."""
    return tuple(neighbours(_source(module), module, name))


def neighbours(source: Source, module: str, name: str) -> set[Symbol]:
    """What a definition in the source of a module refers to, as far as that counts."""
    bound = {other: (module, other) for other in source.defined} | source.imported
    found = {symbol for node in source.defined.get(name, []) for symbol in _mentions(node, bound)}
    return {symbol for symbol in found if not is_silent(symbol[0])}


def is_silent(module: str) -> bool:
    """Whether no number depends on how a module of the package does its work."""
    return module.removeprefix(f"{PACKAGE}.") in SILENT


def closure(*roots: Symbol) -> set[Symbol]:
    """The symbols and all that they refer to, directly or not."""
    found, waiting = set(), [*roots]
    while waiting:
        symbol = waiting.pop()
        if symbol not in found:
            found.add(symbol)
            waiting += _neighbours(*symbol)
    return found


@cache
def _digest(module: str, name: str) -> str:
    settled = _settled(module, name) if find_spec(module) else None
    return digest_of_parts(part for symbol in closure(settled) for part in _dumps(*symbol)) if settled else "gone"


@cache
def _dumps(module: str, name: str) -> tuple[str, ...]:
    """What counts of a definition, as text: what it was, if it was edited and no answer changed."""
    parts = counted(_source(module), name)
    told = edits().get(f"{module}:{name}", {}).get(digest_of_parts(parts))
    return tuple(told["was"]) if told else parts


def counted(source: Source, name: str) -> tuple[str, ...]:
    """What counts of a definition, as it is written."""
    return tuple(part for node in source.defined.get(name, []) for part in _counted(node))


@cache
def edits() -> dict[str, dict[str, dict]]:
    """Definition -> digest of how it is written -> what it was, and on what evidence that answers the same."""
    return json.loads(EDITS.read_text(encoding="utf-8")) if EDITS.is_file() else {}


def _counted(node: ast.AST) -> list[str]:
    """A syntax tree without what does not count, and the digests of the assets it names."""
    named = (part.value for part in ast.walk(node) if isinstance(part, ast.Constant))
    assets = [ROOT / text for text in named if isinstance(text, str) and text.startswith("assets/")]
    plain = _dumped(_Plain().visit(ast.parse(ast.unparse(node)).body[0]))
    return [plain, *(file_digest(path) for path in assets if path.is_file())]


def _dumped(part: Any) -> str:
    """A syntax tree as `ast.dump` of Python 3.11 writes it; later versions write other fields."""
    if isinstance(part, list):
        return f"[{', '.join(map(_dumped, part))}]"
    if not isinstance(part, ast.AST):
        return repr(part)
    own = {name: getattr(part, name, None) for name in part._fields}
    kept = {name: value for name, value in own.items() if value is not None and (value or name != "type_params")}
    kept |= {"value": own["value"]} if isinstance(part, ast.Constant) else {}  # which may be None
    return f"{type(part).__name__}({', '.join(f'{name}={_dumped(value)}' for name, value in kept.items())})"


class _Plain(ast.NodeTransformer):
    """Takes out docstrings, annotations of functions, and what errors say."""

    def _without_docstring(self, node: Any) -> Any:
        self.generic_visit(node)
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            node.body = node.body[1:] or [ast.Pass()]
        return node

    visit_ClassDef = _without_docstring

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        return self._without_docstring(node)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_Raise(self, node: ast.Raise) -> ast.Raise:
        called = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return ast.Raise(called, None)


def digest_of_parts(parts: Iterable[str]) -> str:
    """A digest of texts, whatever their order."""
    return hashlib.sha256("\0".join(sorted(parts)).encode()).hexdigest()[:16]


# --- classes of notebooks and scripts ---------------------------------------------------------------------------------


def _own_digest(kind: Any) -> str:
    """Digest of a class or function that is not of the package: its source, and what that refers to."""
    own, symbols, waiting = {}, [], [kind]
    while waiting:
        part = waiting.pop()
        if part not in own:
            own[part], mentioned, more = _own_source(part)
            symbols, waiting = symbols + mentioned, waiting + more
    counted = [text for node in own.values() for text in _counted(node)]
    return digest_of_parts([*counted, *(text for symbol in closure(*symbols) for text in _dumps(*symbol))])


def _tree_of(kind: Any) -> ast.stmt:
    """The syntax tree of a function or class; of a class in a notebook, from the cell where its methods are."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    except (OSError, TypeError):
        cells = {part.__code__.co_filename for part in vars(kind).values() if inspect.isfunction(part)}
        trees = (node for cell in cells for node in ast.walk(ast.parse("".join(linecache.getlines(cell)))))
        for node in trees:
            if isinstance(node, ast.ClassDef) and node.name == kind.__name__:
                return node
    raise ValueError(f"the source of {kind.__qualname__} is not to be had; define it in a file or a cell")


def _own_source(kind: Any) -> tuple[ast.AST, list[Symbol], list[Any]]:
    """The syntax tree of a definition with the constants it uses; the symbols and the own definitions it refers to."""
    node = _tree_of(kind)
    around, bound, more = vars(sys.modules[kind.__module__]), {}, []
    for name in sorted({part.id for part in ast.walk(node) if isinstance(part, ast.Name)}):
        value = around.get(name)
        whole, defined = isinstance(value, ModuleType), isinstance(value, type) or inspect.isfunction(value)
        module = value.__name__ if whole else value.__module__ if defined else ""
        if _is_ours(module):
            bound[name] = (module, "" if whole else value.__qualname__.partition(".")[0])
        elif defined and module == kind.__module__ and value is not kind:
            more.append(value)
        elif isinstance(value, bool | int | float | str | tuple):
            node.body.append(ast.Expr(ast.Constant(repr((name, value)))))
    return node, list(_mentions(node, bound)), more
