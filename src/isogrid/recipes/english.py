"""The built-in text: the English that every Python installation carries."""

import ast
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

HELD_OUT = 15
"""One document in so many is held out."""

LEFT_OUT = {
    "__phello__", "distutils", "dist-packages", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data",
    "site-packages", "test", "tests", "tkinter", "turtle.py", "turtledemo", "venv",
}  # fmt: skip
"""Folders and files of the standard library that not every installation has, or that are no English."""


@dataclass(frozen=True)
class English:
    """Real English, split by topic.

    Attributes:
        train, test: documents, none of whose paragraphs is in the other part, or twice in the same.
    """

    train: tuple[str, ...]
    test: tuple[str, ...]

    @property
    def characters(self) -> int:
        """Of both parts."""
        return sum(map(len, (*self.train, *self.test)))

    @property
    def digest(self) -> str:
        """SHA-256 of both parts: the same for the same version of Python, where nobody has patched its library."""
        parts = ("\0".join(self.train), "\0".join(self.test))
        return hashlib.sha256("\0\0".join(parts).encode()).hexdigest()

    def __str__(self) -> str:
        return (
            f"{self.characters:,} characters of English from the documentation of this Python: "
            f"{len(self.train)} documents to train on, {len(self.test)} held out, digest {self.digest[:12]}"
        )


@lru_cache(maxsize=1)
def english() -> English:
    """Python's language reference, from `pydoc_data.topics`, and the docstrings of its standard library.

    A topic of the reference is a document, and so is a module with its docstrings. Which ones are held out depends on
    their names alone. Where the library comes without its sources, there are the topics only.

    >>> text = english()
    >>> text.characters > 300_000, any("statement" in document for document in text.train)
    (True, True)
    """
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    return split({**{f"topic {name}": text for name, text in topics.items()}, **_docstrings_below(library)})


def split(documents: Mapping[str, str]) -> English:
    r"""Documents by name, parted into those to train on and those held out.

    Paragraphs that stand in several documents, as the reference has them, are kept where they come first; the held
    out documents come before all others, so that nothing of them can be learned by heart.

    >>> found = split({"a": "One paragraph.\n\nAnother.", "b": "Another."})
    >>> sorted(found.train + found.test)
    ['One paragraph.\n\nAnother.']
    """
    held_out = {name for name in documents if int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT == 0}
    seen: set[str] = set()
    test = tuple(_new_paragraphs((documents[name] for name in sorted(held_out)), seen))
    train = tuple(_new_paragraphs((documents[name] for name in sorted(documents.keys() - held_out)), seen))
    return English(train, test)


def _new_paragraphs(documents: Iterable[str], seen: set[str]) -> Iterator[str]:
    """Each document without the paragraphs seen before; none that is empty then."""
    for document in documents:
        kept = []
        for paragraph in document.split("\n\n"):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                kept.append(paragraph.rstrip())
        if kept:
            yield "\n\n".join(kept).strip("\n")


def _docstrings_below(library: Path) -> dict[str, str]:
    """The docstrings of each module below a folder, by the module's path."""
    documents = {}
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if LEFT_OUT.intersection(parts) or parts[0].startswith(("_sysconfigdata", "lib-dynload")):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):  # a file that is meant to be broken, or cannot be read
            continue
        documents["/".join(parts)] = "\n\n".join(_docstrings(tree))
    return documents


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """The docstrings of a module, its classes and functions, in order."""
    text = ast.get_docstring(node)
    if text:
        yield text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child)
