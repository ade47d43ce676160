"""Checks the shapes of tensors at every call of the package while tests run.

``check_package`` is called by ``tests/conftest.py`` before the package is imported. It decorates
each function and method whose annotations name a shape, ``Float[Tensor, "head target source"]``,
and each dataclass with such a field that does not validate itself. A call then raises if a tensor
has another number of axes or another type, or if one axis name stands for two lengths.

jaxtyping's own import hook also decorates functions inside functions, again each time the outer
function runs, which makes a call of this package several times slower. This one leaves them out,
together with every annotation that names no shape.
"""

from __future__ import annotations

import ast
import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Sequence
from types import CodeType, FunctionType, ModuleType
from typing import Any, TypeVar

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeCallHintParamViolation
from jaxtyping import jaxtyped

Checked = TypeVar("Checked", bound=Callable[..., Any])

# An int is a float, as type checkers have it.
_CHECK = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function_or_class: Checked) -> Checked:
    """Returns a function whose shapes are checked at each call, or a dataclass checked when made.

    A function that refuses a shape with an error of its own still raises that error.
    """
    if isinstance(function_or_class, type):
        return jaxtyped(function_or_class, typechecker=_CHECK)
    function: Any = function_or_class
    # Cheaper than jaxtyped(typechecker=beartype), which checks the arguments twice.
    inside = jaxtyped(_CHECK(function), typechecker=None)

    def outside(*args: Any, **kwargs: Any) -> Any:
        try:
            return inside(*args, **kwargs)
        except BeartypeCallHintParamViolation as violation:
            if not getattr(violation, "is_final", False):
                violation.is_final = True  # for the functions that called this one
                function(*args, **kwargs)
            raise

    # Its frames count as a checker's, so that warnings name the line of the package's caller.
    like_beartype = {**globals(), "__name__": "beartype.shapes"}
    wrapper = FunctionType(outside.__code__, like_beartype, closure=outside.__closure__)
    return functools.wraps(function)(wrapper)  # type: ignore[return-value]


def check_package(package: str) -> None:
    """Checks the shapes of ``package``, which must not have been imported yet."""
    assert package not in sys.modules, f"{package} is imported already, and stays unchecked"
    sys.meta_path.insert(0, _Finder(package))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of one package, and loads them with ``_Loader``."""

    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != self._package:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a module from its source, decorated; neither reads nor writes cached bytecode."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        tree = ast.parse(self.get_data(path), path)
        if shapes := _names_of_shapes(tree):
            _decorate(tree, shapes)
        return compile(tree, path, "exec", dont_inherit=True)


def _names_of_shapes(tree: ast.Module) -> frozenset[str]:
    """What the module imports from jaxtyping, and its own names for types made of those."""
    names = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "jaxtyping"
        for alias in node.names
    }
    for node in tree.body:
        if isinstance(node, ast.Assign) and _mentions(node.value, names):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return frozenset(names)


def _decorate(tree: ast.Module, shapes: frozenset[str]) -> None:
    for definition in _definitions(tree):
        if isinstance(definition, ast.ClassDef):
            annotated = [node for node in definition.body if isinstance(node, ast.AnnAssign)]
            if _is_dataclass(definition) and any(
                _mentions(n.annotation, shapes) for n in annotated
            ):
                definition.decorator_list.insert(0, _decorator(definition))  # the outermost one
        elif _keeps_shapes_alone(definition, shapes):
            definition.decorator_list.append(_decorator(definition))  # the innermost one


def _keeps_shapes_alone(function: ast.FunctionDef, shapes: frozenset[str]) -> bool:
    """Removes every annotation that names no shape; false if none is left.

    Type checkers hold those, and names that are imported for them alone do not exist here.
    """
    arguments = [node for node in ast.walk(function.args) if isinstance(node, ast.arg)]
    for argument in arguments:
        if argument.annotation and not _mentions(argument.annotation, shapes):
            argument.annotation = None
    if function.returns and not _mentions(function.returns, shapes):
        function.returns = None
    return any(argument.annotation for argument in arguments) or function.returns is not None


def _definitions(
    parent: ast.Module | ast.ClassDef | ast.If,
) -> Iterator[ast.ClassDef | ast.FunctionDef]:
    """Functions and classes, and those inside classes; not those inside functions."""
    for node in parent.body:
        if isinstance(node, ast.ClassDef | ast.If):
            yield from _definitions(node)
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node


def _is_dataclass(definition: ast.ClassDef) -> bool:
    """Whether it is one whose fields nothing checks yet: ``__post_init__`` has its own errors."""
    methods = {node.name for node in definition.body if isinstance(node, ast.FunctionDef)}
    return "__post_init__" not in methods and any(
        "dataclass" in ast.unparse(decorator) for decorator in definition.decorator_list
    )


def _mentions(node: ast.AST, names: frozenset[str] | set[str]) -> bool:
    return any(isinstance(part, ast.Name) and part.id in names for part in ast.walk(node))


def _decorator(definition: ast.stmt) -> ast.expr:
    call = ast.parse(f"__import__({__name__!r}, fromlist=['checked']).checked", mode="eval").body
    for part in ast.walk(call):
        ast.copy_location(part, definition)
    return call
