"""Which code a number depends on: one digest per component that took part.

The digest of a class covers the syntax tree of its definition and of everything of this package that it refers to,
symbol by symbol, so that editing Square touches what uses Square. Docstrings, comments, annotations of arguments and
the texts of errors do not count, nor does the place of a definition. Classes of a notebook or a script count by their
source and by what that refers to. Files below `assets` count where a definition names them.

    digests(PGD(eps=4/255))      # {"robustclip.attacks.gradient:PGD": "3f0c..."}
"""

import ast
import hashlib
import inspect
import platform
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = "robustclip"
ROOT = Path(str(files(PACKAGE)))
# They check, show and prepare; no measured number depends on how.
SILENT = ("robustclip.checks", "robustclip.component", "robustclip.progress", "robustclip._torchvision")
OWN = "own"  # in the place of the module for what is not part of the package
LIBRARIES = ("robustclip", "torch", "torchvision", "open_clip_torch", "transformers", "numpy", "pandas")
Symbol = tuple[str, str]  # module, name


def digests(*objects: Any) -> dict[str, str]:
    """Name -> digest for classes, functions and components, those inside of components included."""
    found = {}
    for kind in dict.fromkeys(kind for value in objects for kind in _kinds(value)):
        module, name = kind.__module__, kind.__qualname__
        if _is_ours(module):
            found[f"{module}:{name}"] = digest(module, name)
        else:
            found[f"{OWN}:{name}"] = _own_digest(kind)
    return found


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
        parts = [getattr(value, entry.name) for entry in fields(value)] if is_dataclass(value) else []
        for part in parts:
            several = part if isinstance(part, tuple | list) else [part]
            for one in several:
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
    package = module if spec.submodule_search_locations else module.rpartition(".")[0]
    return _parsed(Path(spec.origin).read_text(encoding="utf-8"), package)


def _parsed(text: str, package: str) -> Source:
    tree, defined = ast.parse(text), {}
    for node in _statements(tree):
        for name in _bound(node):
            defined.setdefault(name, []).append(node)
    return Source(defined, dict(_imports(tree, package)))


def _statements(tree: ast.AST) -> Iterator[ast.stmt]:
    """Statements of a module, also those under an `if` or `try`."""
    for node in getattr(tree, "body", []) + getattr(tree, "orelse", []) + getattr(tree, "finalbody", []):
        if isinstance(node, ast.If | ast.Try | ast.With):
            yield from _statements(node)
        else:
            yield node


def _bound(node: ast.stmt) -> Iterator[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
        yield node.name
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    for target in targets:
        if target is not None and not isinstance(node, ast.For):
            yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name))


def _imports(tree: ast.AST, package: str) -> Iterator[tuple[str, Symbol]]:
    """Local name -> what it stands for, of all imports of this package anywhere in a syntax tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if _is_ours(alias.name):
                    yield alias.asname or PACKAGE, (alias.name if alias.asname else PACKAGE, "")
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            module = f"{above}.{node.module or ''}".rstrip(".") if node.level else node.module
            if _is_ours(module):
                yield from ((alias.asname or alias.name, (module, alias.name)) for alias in node.names)


def _settled(module: str, name: str) -> Symbol | None:
    """Where a name of a module is defined, followed through imports; None if that is not in the package."""
    if not name:
        return module, ""
    source = _source(module)
    if name in source.defined:
        return module, name
    if name in source.imported:
        return _settled(*source.imported[name])
    submodule = f"{module}.{name}"
    return (submodule, "") if find_spec(module).submodule_search_locations and find_spec(submodule) else None


# --- closures ---------------------------------------------------------------------------------------------------------


def _mentions(node: ast.AST, bound: dict[str, Symbol]) -> Iterator[Symbol]:
    """The symbols of the package that a syntax tree refers to; `bound` says what its names stand for."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and part.id in bound and (found := _settled(*bound[part.id])) and found[1]:
            yield found
        elif isinstance(part, ast.Attribute):
            module = _module_of(part.value, bound)
            if module and (found := _settled(module, part.attr)) and found[1]:
                yield found


def _module_of(node: ast.expr, bound: dict[str, Symbol]) -> str | None:
    """The module of the package that an expression names, like `models` or `robustclip.attacks`."""
    if isinstance(node, ast.Name) and node.id in bound:
        found = _settled(*bound[node.id])
    elif isinstance(node, ast.Attribute) and (outer := _module_of(node.value, bound)):
        found = _settled(outer, node.attr)
    else:
        return None
    return found[0] if found and not found[1] else None


@cache
def _neighbours(module: str, name: str) -> tuple[Symbol, ...]:
    """What the definition of a symbol refers to."""
    source = _source(module)
    bound = {other: (module, other) for other in source.defined} | source.imported
    found = (symbol for node in source.defined.get(name, []) for symbol in _mentions(node, bound))
    return tuple(dict.fromkeys(symbol for symbol in found if symbol[0] not in SILENT))


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
    if settled is None:
        return "gone"
    return _hash(part for symbol in closure(settled) for part in _dumps(*symbol))


@cache
def _dumps(module: str, name: str) -> tuple[str, ...]:
    """What counts of a definition, as text."""
    return tuple(part for node in _source(module).defined.get(name, []) for part in _counted(node))


def _counted(node: ast.AST) -> list[str]:
    """A syntax tree without what does not count, and the digests of the assets it names."""
    named = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    assets = [ROOT / text for text in named if text.startswith("assets/") and (ROOT / text).is_file()]
    return [ast.dump(_Plain().visit(_copy(node))), *(hashlib.sha256(path.read_bytes()).hexdigest() for path in assets)]


def _copy(node: ast.AST) -> ast.AST:
    return ast.parse(ast.unparse(node)).body[0]


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


def _hash(parts: Iterator[str]) -> str:
    return hashlib.sha256("\0".join(sorted(parts)).encode()).hexdigest()[:16]


# --- classes of notebooks and scripts ---------------------------------------------------------------------------------


def _own_digest(kind: Any) -> str:
    """Digest of a class or function that is not of the package: its source, and what that refers to."""
    own, symbols, waiting = {}, set(), [kind]
    while waiting:
        part = waiting.pop()
        if part not in own:
            node, names = _own_source(part)
            own[part] = node
            for value in names:
                if isinstance(value, tuple):
                    symbols.add(value)
                else:
                    waiting.append(value)
    counted = [text for node in own.values() for text in _counted(node)]
    return _hash([*counted, *(text for symbol in closure(*symbols) for text in _dumps(*symbol))])


def _own_source(kind: Any) -> tuple[ast.AST, list[Any]]:
    """The syntax tree of a definition, and what its names stand for: symbols of the package, or more own ones."""
    try:
        node = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    except (OSError, TypeError) as error:
        raise ValueError(
            f"the source of {kind.__qualname__} is not to be had; define it in a file or a cell"
        ) from error
    around, found = vars(sys.modules[kind.__module__]), []
    for name in {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}:
        value = around.get(name)
        module = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None) or ""
        if isinstance(value, ModuleType) and _is_ours(module):
            found += _mentions(node, {name: (module, "")})
        elif isinstance(value, type) or inspect.isfunction(value):
            if _is_ours(module):
                found += [symbol for symbol in [_settled(module, value.__qualname__.partition(".")[0])] if symbol]
            elif module == kind.__module__ and value is not kind:
                found.append(value)
        elif isinstance(value, bool | int | float | str | tuple):
            node.body.append(ast.Expr(ast.Constant(repr((name, value)))))
    return node, found
