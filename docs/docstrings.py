"""Docstrings as these pages show them: written for `help()` and doctest, rendered as Markdown."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object
from latex2mathml.converter import convert


class DocstringsAsMarkdown(Extension):
    """Turns doctests into code blocks, ``:math:`` into MathML, which browsers show by themselves, and links."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    text = re.sub(r"(?<!<)(https?://[^\s,;)]*[^\s,;).])", r"<\1>", text)
    text = re.sub(r"`([^`<]+?)\s+<(https?://[^>]+)>`_", r"[\1](\2)", text)
    # Outside of code, <g_i, g_j> would be taken for a tag.
    text = re.sub(
        r"(``.+?``|`[^`]+`|^ *(?:>>>|\.\.\.) .*$)|<(?!http)", lambda match: match[1] or "&lt;", text, flags=re.MULTILINE
    )
    # In a span, as Markdown takes a line that begins with <math> for a paragraph.
    text = re.sub(r":math:`([^`]+)`", lambda match: f"<span>{convert(match[1])}</span>", text)
    text = re.sub(r"^Example::\n", "Example:\n", text, flags=re.MULTILINE)
    # A doctest reaches to the next blank line. In a section of its own it is indented, and code already.
    return re.sub(r"(?m)^(>>> (?:.+\n?)+)", lambda match: f"```pycon\n{match[1].rstrip()}\n```\n", text)
