"""Layers whose weight the code of a model reads: found in its source.

``F.linear(x, self.proj.weight)`` needs the numbers, and a replaced layer has none to give. Reading the type or the
device is no obstacle. What this does not find (code without source, a layer handed to a function) raises when it runs.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache

from torch import nn

# What a layer without float weights can answer.
_ANSWERED = {
    "device", "dim", "dtype", "element_size", "is_cpu", "is_cuda", "is_floating_point", "is_meta", "layout", "ndim",
    "numel", "requires_grad", "shape", "size",
}  # fmt: skip
_HINT = re.compile(r"\.weight\b|\.parameters\(")
_ABOUT = {"getattr", "hasattr", "id", "isinstance", "is_tensor", "type"}
# Methods that no forward pass calls, and those for another device.
_NOT_FORWARD = re.compile(
    r"_*(init|reset|resize|tie|load|set|cuda|fuse|prune|merge|copy|convert|extra_repr|get_resized)"
)

_Path = tuple[str, ...]  # attributes from the module, or from a parameter, to the layer; "*" for all of a list


def weight_readers(model: nn.Module) -> dict[int, str]:
    """By the identity of a layer: who reads its weight."""
    found: dict[int, str] = {}
    for module in model.modules():
        for cls in type(module).__mro__:
            if cls.__module__.partition(".")[0] in ("torch", "builtins", "pyda8w4"):
                continue  # torch's own modules ask for the numbers only of plain tensors
            for path, method in _reads(cls):
                for layer in _at(module, path):
                    found.setdefault(id(layer), f"{cls.__name__}.{method} reads its weight")
    return found


def _at(module: nn.Module, path: _Path) -> Iterator[nn.Module]:
    if not path:
        yield module
        return
    if path[0] == "parameters":  # at least one must be left: that of the first layer, if nothing else has any
        layers = [one for one in module.modules() if one._parameters]
        yield from layers[:1] if all(isinstance(one, nn.Linear) for one in layers) else ()
        return
    if path[0] == "*":
        children: Iterable[object] = module.children() if isinstance(module, nn.Module) else ()
    else:
        children = [getattr(module, path[0], None)]
    for child in children:
        if isinstance(child, nn.Module):
            yield from _at(child, path[1:])


@cache
def _reads(cls: type) -> tuple[tuple[_Path, str], ...]:
    """Paths to the layers whose weight the methods of a class read, and the methods."""
    methods = {
        method.name: _Method(method)
        for node in _definitions(cls)
        for method in node.body
        if isinstance(method, (ast.FunctionDef, ast.AsyncFunctionDef)) and not _NOT_FORWARD.match(method.name)
    }
    own: list[tuple[_Path, str]] = []
    given: list[tuple[_Path, str]] = []
    for name, method in methods.items():
        for path in method.reads():
            (given if path[0] in method.parameters else own).append((path, name))
    for path, name in given:  # of a layer that other methods give it
        for method in methods.values():
            own += [(one + path[1:], name) for one in method.arguments(name, methods[name].parameters.index(path[0]))]
    return tuple(dict.fromkeys(own))


def _definitions(cls: type) -> list[ast.ClassDef]:
    try:
        found = _classes(cls.__module__).get(cls.__qualname__, [])
        if found or not _HINT.search(source := textwrap.dedent(inspect.getsource(cls))):
            return found
        return [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    except (OSError, TypeError, SyntaxError):
        return []


@lru_cache(maxsize=64)
def _classes(module: str) -> dict[str, list[ast.ClassDef]]:
    """The class definitions of a file, by qualified name."""
    found: dict[str, list[ast.ClassDef]] = {}

    def enter(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                found.setdefault(prefix + child.name, []).append(child)
                enter(child, f"{prefix}{child.name}.")
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                enter(child, f"{prefix}{child.name}.<locals>.")
            else:
                enter(child, prefix)

    try:
        source = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return found
    if _HINT.search(source):
        enter(ast.parse(source), "")
    return found


class _Method:
    """One method: follows names that stand for layers, and finds weights that are read."""

    def __init__(self, method: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._nodes = list(ast.walk(method))
        self._parents = {child: node for node in self._nodes for child in ast.iter_child_nodes(node)}
        self.parameters = [argument.arg for argument in method.args.posonlyargs + method.args.args]
        self._names: dict[str, _Path] = {name: (name,) for name in self.parameters[1:]}
        self._names.update(dict.fromkeys(self.parameters[:1], ()))
        for node in self._nodes:
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                self._name(node.targets[0], node.value, ())
            elif isinstance(node, (ast.For, ast.comprehension)):
                self._name(node.target, node.iter, ("*",))

    def _name(self, target: ast.expr, value: ast.expr, more: _Path) -> None:
        if isinstance(value, ast.Call) and getattr(value.func, "id", None) in ("enumerate", "zip"):
            skip = value.func.id == "enumerate"  # type: ignore[attr-defined]
            if isinstance(target, ast.Tuple):
                for one, each in zip(target.elts[skip:], value.args):
                    self._name(one, each, more)
            return
        path = self._path(value)
        if isinstance(target, ast.Name) and path:
            self._names.setdefault(target.id, path + more)

    def _path(self, node: ast.AST) -> _Path | None:
        if isinstance(node, ast.Name):
            return self._names.get(node.id)
        if isinstance(node, ast.Attribute):
            path = self._path(node.value)
            return None if path is None else (*path, node.attr)
        if isinstance(node, ast.Subscript):
            path = self._path(node.value)
            return None if path is None else (*path, "*")
        return None

    def arguments(self, method: str, index: int) -> Iterator[_Path]:
        """What this one gives another as its argument `index`: layers of the module."""
        for node in self._nodes:
            if isinstance(node, ast.Call) and self._path(node.func) == (method,):
                parts = [*node.args[index - 1 : index], *(one.value for one in node.keywords)]
                for path in map(self._path, parts):
                    if path and path[0] not in self.parameters:
                        yield path

    def reads(self) -> Iterator[_Path]:
        for node in self._nodes:
            if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
                path = self._path(node.value)
                if path and not self._is_answered(node) and not self._is_training(node):
                    yield path
            elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "next" and node.args:
                value = node.args[0]  # next(self.mlp.parameters()).dtype
                if isinstance(value, ast.Call):
                    path = self._path(value.func)
                    if path and path[-1] == "parameters" and len(path) > 1:
                        yield path

    def _is_answered(self, node: ast.Attribute) -> bool:
        parent = self._parents[node]
        if isinstance(parent, ast.Attribute):
            return parent.attr in _ANSWERED
        if isinstance(parent, ast.Call):
            name = getattr(parent.func, "id", getattr(parent.func, "attr", None))
            return parent.func is not node and name in _ABOUT
        return isinstance(parent, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in parent.ops)

    def _is_training(self, node: ast.AST) -> bool:
        """Whether it is under ``if self.training``."""
        while (parent := self._parents.get(node)) is not None:
            if isinstance(parent, ast.If) and node in parent.body:
                conditions = parent.test.values if isinstance(parent.test, ast.BoolOp) else [parent.test]
                if not isinstance(getattr(parent.test, "op", None), ast.Or) and any(
                    isinstance(one, ast.Attribute) and one.attr == "training" for one in conditions
                ):
                    return True
            node = parent
        return False
