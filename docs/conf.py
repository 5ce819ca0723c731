"""How Sphinx builds the site: pip install --group docs, and sphinx-build docs FOLDER."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.autodoc.mock import mock
from sphinx.util import logging
from sphinx.util.inspect import signature, stringify_signature

import pyda8w4

DOCS = Path(__file__).parent
ROOT = DOCS.parent
LOGGER = logging.getLogger(__name__)
sys.path.append(str(DOCS))

project = "pyda8w4"
copyright = "the authors of pyda8w4, BSD-3-Clause"
version = release = importlib.metadata.version("pyda8w4")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
    "sphinx_gallery.gen_gallery",
    "c_header",
]
templates_path = ["_templates"]
exclude_patterns = ["_templates"]
highlight_language = "none"  # of indented blocks, which are commands, formulas and pictures
myst_heading_anchors = 3  # page.md#heading, as code-hosting sites have it

default_role = "py:obj"  # of names in docstrings
nitpicky = True
nitpick_ignore = [("c:identifier", name) for name in ("size_t", "uint8_t", "int8_t", "int32_t", "uint64_t")]
# Some names in docstrings are parameters, or of other packages. Those that begin with this package's must be found.
nitpick_ignore_regex = [("py:obj", r"(?!pyda8w4\.).*")]

html_theme = "furo"
html_title = f"pyda8w4 {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]

autodoc_mock_imports = ["torch", "transformers", "safetensors", "vllm"]  # adapters need them, their docstrings do not
autodoc_typehints = "none"  # docstrings say the types
autodoc_member_order = "bysource"
autosummary_ignore_module_all = False
toc_object_entries_show_parents = "hide"
numpydoc_show_class_members = False  # autodoc shows them

sphinx_gallery_conf = {
    "examples_dirs": "../examples/gallery",
    "gallery_dirs": "gallery",
    "filename_pattern": "",  # each is run
    "within_subsection_order": "FileNameSortKey",
    "image_scrapers": (),  # they print, and draw nothing
    "reset_modules": (),
    "show_signature": False,
    "download_all_examples": False,
    "write_computation_times": False,
}

# Files elsewhere that are pages of the site. Markdown is included by pages in docs/, of the same name in lower case.
PAGES = {path: DOCS / path.name.lower() for path in ROOT.glob("*.md")}
PAGES |= {path: DOCS / "gallery" / f"{path.stem}.rst" for path in ROOT.glob("examples/gallery/*.py")}


def links_of(text: str, folder: Path) -> str:
    """Markdown of a file in this folder, whose links are right there, with links that are right in docs/."""

    def link(match: re.Match[str]) -> str:
        path = (folder / match[1]).resolve()
        return f"]({os.path.relpath(PAGES.get(path, path), DOCS)}" if path.exists() else match[0]

    return re.sub(r"\]\(([^():#\s]+)", link, text)


def change_page(app: Sphinx, page: str, source: list[str]) -> None:
    """Change the links of a page."""
    if (DOCS / f"{page}.md").exists():
        source[0] = links_of(source[0], DOCS)


def change_included(app: Sphinx, path: Path, page: str, source: list[str]) -> None:
    """Change those of a file that a page includes."""
    source[0] = links_of(source[0], (DOCS / path).resolve().parent)


def public_names() -> list[str]:
    """What each public module has in ``__all__``."""
    with mock(autodoc_mock_imports):
        modules = ["pyda8w4", *(module.name for module in pkgutil.walk_packages(pyda8w4.__path__, "pyda8w4."))]
        public = [name for name in modules if "._" not in name and name != "pyda8w4.libpyda8w4"]  # the C library
        return [f"{module}.{name}" for module in public for name in importlib.import_module(module).__all__]


def sign_class(app: Sphinx, what: str, name: str, thing: Any, options: Any, given: str | None, returns: Any) -> Any:
    """Give a class the signature of its constructor, which `__new__` of a mocked base hides."""
    if what == "class" and given == "(*args, **kwargs)":
        return stringify_signature(signature(thing.__init__, bound_method=True), show_annotation=False), returns
    return None


def check_reference(app: Sphinx, env: BuildEnvironment) -> None:
    """Each public name is in the reference, and so is each function and type of the C interface."""
    header = (ROOT / "include" / "pyda8w4" / "pyda8w4.h").read_text("utf-8")
    in_c = re.findall(r"(?m)^DA8W4_API .*?(\w+)\(", header) + re.findall(r"(?m)^typedef \w+ (\w+)", header)
    found = {name for domain in ("py", "c") for name, *_ in env.domains[domain].get_objects()}
    for name in [*public_names(), *in_c]:
        if name not in found:
            LOGGER.warning("%s is in no page of the reference", name)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", change_page)
    app.connect("include-read", change_included)
    app.connect("autodoc-process-signature", sign_class)
    app.connect("env-check-consistency", check_reference)
