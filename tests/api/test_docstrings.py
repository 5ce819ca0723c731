"""Public names are documented in numpydoc's form, and what the examples show is true."""

from __future__ import annotations

import builtins
import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest
from numpydoc.docscrape import get_doc_object
from numpydoc.validate import ERROR_MSGS, validate

import pyda8w4

# What numpydoc.validate can check and is not asked to.
NOT_CHECKED = {
    "ES01": "a summary can be enough",
    "EX01": "test_examples says where examples must be",
    "PR07": "a name and a type can say all",
    "RT03": "a summary and a type can say all",
    "SA01": "names in a docstring are links",
    "SS05": "it takes plurals for verbs: 'Names of the kernels'",
}


def import_or_skip(name: str) -> ModuleType:
    try:
        with warnings.catch_warnings():  # by libraries that transformers imports where they are installed
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "pyda8w4":
            raise
        pytest.skip(f"{error.name} is not installed")


def modules() -> Iterator[str]:
    """Every module of the package, but for __main__, whose import runs it."""
    yield "pyda8w4"
    for folder in ("", "/checkpoints", "/formats", "/torch"):
        package = f"pyda8w4{folder.replace('/', '.')}"
        paths = [f"{path}{folder}" for path in pyda8w4.__path__]
        for module in pkgutil.iter_modules(paths):
            if module.name not in ("__main__", "libpyda8w4"):  # the C library lies there, too
                yield f"{package}.{module.name}"


def is_private(module: str) -> bool:
    return module.rpartition(".")[2].startswith("_")


MODULES = list(modules())
PUBLIC_MODULES = [name for name in MODULES if not is_private(name)]
FUNCTIONS = [name for name in pyda8w4.__all__ if inspect.isfunction(getattr(pyda8w4, name))]
CLASSES = [name for name in pyda8w4.__all__ if inspect.isclass(getattr(pyda8w4, name))]


def public_names(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Functions, classes and what the classes have, with their names behind that of the module.

    A method that overrides one may leave its docstring to that.
    """
    for name in module.__all__:
        thing = getattr(module, name)
        if callable(thing):
            yield name, thing
        if inspect.isclass(thing):
            for key, value in vars(thing).items():
                public = not key.startswith("_") or key == "__getitem__"
                inherits = value.__doc__ is None and inspect.getdoc(value)
                if public and not inherits and isinstance(value, (property, classmethod, staticmethod, FunctionType)):
                    yield f"{name}.{key}", value


def problems(name: str, thing: Any) -> list[str]:
    skipped = set(NOT_CHECKED)
    if dataclasses.is_dataclass(thing):
        skipped.add("PR01")  # its fields are its attributes
    return [f"{name}: {code} {text}" for code, text in validate(name)["errors"] if code not in skipped]


def test_everything_public_is_a_function_or_class():
    assert sorted(pyda8w4.__all__) == pyda8w4.__all__
    assert sorted(FUNCTIONS + CLASSES) == sorted(pyda8w4.__all__)


def test_checks_that_are_left_out_exist():
    assert NOT_CHECKED.keys() < ERROR_MSGS.keys()


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_numpydoc(name):
    module = import_or_skip(name)
    assert module.__doc__
    named = list(public_names(module))
    assert named
    found = [problem for key, thing in named for problem in problems(f"{name}.{key}", thing)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_raises(name):
    # Whoever needs an argument can be given a wrong one.
    thing = getattr(pyda8w4, name)
    required = [p for p in inspect.signature(thing).parameters.values() if p.default is p.empty]
    raises = get_doc_object(thing)["Raises"]
    assert raises or not required
    for kind in ", ".join(error.type for error in raises).split(", ") if raises else []:
        assert issubclass(getattr(builtins, kind), Exception)


@pytest.mark.parametrize("name", FUNCTIONS + CLASSES)
def test_examples(name):
    assert ">>> " in "\n".join(get_doc_object(getattr(pyda8w4, name))["Examples"])


@pytest.mark.parametrize("name", CLASSES)
def test_attributes(name):
    kind = getattr(pyda8w4, name)
    public = {key for base in kind.__mro__[:-1] for key in (*base.__annotations__, *vars(base)) if key[0] != "_"}
    attributes = {key for key in public if not inspect.isfunction(getattr(kind, key, None))}
    documented = ", ".join(attribute.name for attribute in get_doc_object(kind)["Attributes"])
    assert set(documented.split(", ")) == attributes


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    module = import_or_skip(name)
    np.set_printoptions()  # the defaults
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted or ">>> " not in (module.__doc__ or "")
