"""The directive ``c-header``: a page of the sections, comments and declarations of a C header.

It knows the form that include/pyda8w4/pyda8w4.h has: sections begin with a comment ``/* ---- title ---- */``, and
between blank lines there is a comment and the declarations that it is about. Functions become those of Sphinx's C
domain, which links and finds them; types become such with their source, as comments of members stand in it.
"""

from __future__ import annotations

import re
import textwrap
from itertools import groupby

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

SECTION = re.compile(r"^/\* ---- (.*?) -+ \*/$", re.MULTILINE)
ITEM = re.compile(
    r"(?:/\*(?P<comment>(?:(?!\*/).)*)\*/\n)?^(?P<source>(?:typedef|DA8W4_API)\b.*)", re.DOTALL | re.MULTILINE
)
TYPE = re.compile(r"typedef (?P<kind>enum|struct) (?P<name>\w+)")


class CHeader(SphinxDirective):
    """``.. c-header:: FILE``"""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Make the nodes of the page."""
        relative, path = self.env.relfn2path(self.arguments[0])
        self.env.note_dependency(relative)
        with open(path, encoding="utf-8") as file:
            text = file.read()
        return self.parse_text_to_nodes(page_of(text), allow_section_headings=True)


def page_of(header: str) -> str:
    """-> reStructuredText."""
    first, *others = SECTION.split(header)
    page = ""
    for title, section in zip(["version and status", *others[::2]], [first, *others[1::2]]):
        page += f"{title[0].upper()}{title[1:]}\n{'-' * len(title)}\n\n"
        for part in section.split("\n\n"):
            if item := ITEM.search(part):
                page += item_of(item["comment"] or "", item["source"])
    return page


def item_of(comment: str, source: str) -> str:
    """A type, or the functions that share a comment."""
    source = source.replace("DA8W4_API ", "").replace(" DA8W4_INT ", " ").strip()
    if found := TYPE.match(source):
        head = f".. c:{found['kind']}:: {found['name']}"
        body = f".. code-block:: c\n\n{textwrap.indent(source, '   ')}"
    else:
        one, *others = (" ".join(function.split()) for function in source.split(";") if function.strip())
        head = "\n".join([f".. c:function:: {one}", *(f"                {other}" for other in others)])
        body = ""
    return f"{head}\n\n{textwrap.indent(prose_of(comment) + body, '   ')}\n\n"


def prose_of(comment: str) -> str:
    """Paragraphs; what is indented in the comment is a formula."""
    lines = re.sub(r"^ \* ?", "", comment.strip(), flags=re.MULTILINE).splitlines()
    text = ""
    for indented, paragraph in groupby(lines, lambda line: line.startswith("    ")):
        part = "\n".join(paragraph)
        if indented:
            text += f"\n.. code-block:: none\n\n{part}\n\n"
        else:
            part = re.sub(r"[*|]", r"\\\g<0>", part).replace("`", "``")
            text += re.sub(r"\b(da8w4_\w+)(\(\))?", r":c:type:`\1`", part) + "\n"
    return f"{text}\n"


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("c-header", CHeader)
    return {"parallel_read_safe": True}
