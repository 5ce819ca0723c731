"""The English prose that models are measured on: the first sections of The Debian Administrator's Handbook.

It is by Raphaël Hertzog and Roland Mas (GPL 2 or later, or CC BY-SA 3.0), in the package debian-handbook:

    apt-get download debian-handbook=11.20220922
"""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import sys
import tarfile
from html.parser import HTMLParser
from pathlib import Path

SHA256 = "6f5dd71d54feed099928dd2c1f635c56ba0e66628f62af9fbfff73e211cb6546"  # of the paragraphs
FOLDER = "./usr/share/doc/debian-handbook/html/en-US/"


def split_sentences(text: str, count: int) -> list[str]:
    """The first `count` different sentences of 40 to 200 characters.

    One ends before a space and a capital. Equal ones would be each other's neighbours, whatever a model makes of them.
    """
    parts = (part for paragraph in text.split("\n\n") for part in re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph))
    return list(dict.fromkeys(part for part in parts if 40 <= len(part) <= 200))[:count]


class Paragraphs(HTMLParser):
    """Collects what stands in ``<div class="para">``, without the elements nested in it that are not prose."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[bool] = []  # of each div and pre around here: whether it is a paragraph
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        if tag in ("div", "pre"):
            self.open.append(dict(attributes).get("class") == "para")
            self.found.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("div", "pre"):
            self.open.pop()
            self.found.append("")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1]:
            self.found[-1] += data


def read_text(deb: Path) -> str:
    unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", deb], check=True, capture_output=True).stdout
    paragraphs = []
    with tarfile.open(fileobj=io.BytesIO(unpacked)) as archive:
        names = [name for name in archive.getnames() if re.fullmatch(re.escape(FOLDER) + r"[\w.-]+\.html", name)]
        for name in sorted(names):
            parser = Paragraphs()
            parser.feed(archive.extractfile(name).read().decode())
            paragraphs += [" ".join(text.split()) for text in parser.found]
    text = "\n\n".join(each for each in paragraphs if len(each) >= 200)
    if (digest := hashlib.sha256(text.encode()).hexdigest()) != SHA256:
        sys.exit(f"error: the corpus has the SHA-256 {digest}, not {SHA256}")
    return text
