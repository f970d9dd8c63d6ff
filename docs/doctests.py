"""Lets docstrings be read as Markdown.

They hold their examples bare, for doctest, and write powers as Python does. Markdown would take `>>>` for a quotation
in a quotation, and what stands between two powers for bold.
"""

import re
from typing import Any

from griffe import Extension, Object

CODE = re.compile(r"(?P<example>^>>> .*(?:\n.+)*)|(?P<span>`[^`]+`)|(?P<power>(?<=[\w)])\*\*)", re.MULTILINE)
"""An example, from a prompt at the margin to the next empty line; a code span, which is left alone; a power."""


class Doctests(Extension):
    """Fences examples, escapes powers."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = CODE.sub(_markdown, obj.docstring.value)


def _markdown(match: re.Match[str]) -> str:
    if match["example"]:
        return f"```pycon\n{match[0]}\n```"
    return r"\*\*" if match["power"] else match[0]
