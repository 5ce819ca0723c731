"""Public names are documented in numpydoc's form, and what the examples show is true."""

import builtins
import doctest
import importlib
import inspect
import pkgutil
import re

import numpy as np
import pytest

import pyda8w4

# Importing __main__ runs it, and the C library lies beside the modules without being one.
NO_MODULES = ("__main__", "libpyda8w4")
NAMES = [module.name for module in pkgutil.iter_modules(pyda8w4.__path__)]
NAMES += [f"torch.{module.name}" for module in pkgutil.iter_modules([f"{path}/torch" for path in pyda8w4.__path__])]
MODULES = ["pyda8w4", *[f"pyda8w4.{name}" for name in NAMES if name not in NO_MODULES]]
FUNCTIONS = [name for name in pyda8w4.__all__ if inspect.isfunction(getattr(pyda8w4, name))]
CLASSES = [name for name in pyda8w4.__all__ if inspect.isclass(getattr(pyda8w4, name))]


def methods():
    for name in CLASSES:
        for key, value in vars(getattr(pyda8w4, name)).items():
            public = not key.startswith("_") or key == "__getitem__"
            if public and inspect.isfunction(value):
                yield f"{name}.{key}", value


DOCUMENTED = [(name, getattr(pyda8w4, name)) for name in FUNCTIONS + CLASSES] + list(methods())
documented = pytest.mark.parametrize("name, thing", DOCUMENTED, ids=[name for name, _ in DOCUMENTED])
functions = pytest.mark.parametrize("name", FUNCTIONS)


def sections(thing):
    """-> {title: text}, the beginning under ""."""
    doc = inspect.getdoc(thing)
    assert doc, "there is no docstring"
    parts = re.split(r"^(\w[\w ]*)\n-{3,}$", doc, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def described(text):
    """Names at the start of a line of a section, several with commas between."""
    heads = re.findall(r"^(\w[\w, ]*?)(?: :.*)?$", text, flags=re.MULTILINE)
    return [name for head in heads for name in head.split(", ")]


def test_everything_public_is_a_function_or_class():
    assert sorted(pyda8w4.__all__) == pyda8w4.__all__
    assert sorted(FUNCTIONS + CLASSES) == sorted(pyda8w4.__all__)


@documented
def test_summary_is_one_line(name, thing):
    first, *rest = sections(thing)[""].rstrip("\n").split("\n")
    assert first.endswith((".", "``.")) or ":" in first, first
    assert len(first) <= 120
    assert not rest or rest[0] == "", "the summary goes on in a second line"


@documented
def test_section_titles(name, thing):
    titles = ["", "Parameters", "Attributes", "Returns", "Yields", "Raises", "Notes", "References", "Examples"]
    found = list(sections(thing))
    assert found == [title for title in titles if title in found], "unknown sections, or another order"


@functions
def test_parameters(name):
    thing = getattr(pyda8w4, name)
    names = list(inspect.signature(thing).parameters)
    text = sections(thing).get("Parameters", "")
    assert described(text) == names
    for parameter in names:
        assert re.search(rf"^{parameter} : \S", text, flags=re.MULTILINE), f"{parameter} has no type"


@functions
def test_returns(name):
    thing = getattr(pyda8w4, name)
    returns = inspect.signature(thing).return_annotation
    assert ("Returns" in sections(thing)) == (returns not in ("None", "Iterator[None]"))


@functions
def test_raises(name):
    # Whoever needs an argument can be given a wrong one.
    thing = getattr(pyda8w4, name)
    required = [p for p in inspect.signature(thing).parameters.values() if p.default is p.empty]
    text = sections(thing).get("Raises", "")
    assert text or not required
    for error in described(text):
        assert issubclass(getattr(builtins, error), Exception)


@pytest.mark.parametrize("name", FUNCTIONS + CLASSES)
def test_examples(name):
    assert ">>> " in sections(getattr(pyda8w4, name)).get("Examples", "")


@pytest.mark.parametrize("name", CLASSES)
def test_attributes(name):
    kind = getattr(pyda8w4, name)
    public = {key for key in (*kind.__annotations__, *vars(kind)) if not key.startswith("_")}
    attributes = {key for key in public if not inspect.isfunction(getattr(kind, key, None))}
    assert set(described(sections(kind)["Attributes"])) == attributes


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name, monkeypatch):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "pyda8w4":
            raise
        pytest.skip(f"{name} needs {error.name}")
    np.set_printoptions()  # the defaults
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted or not hasattr(module, "__all__")
