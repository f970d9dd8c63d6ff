"""Words for errors."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The most similar known word as a question with a space before it, or nothing.

    >>> did_you_mean("epocs", ["epochs", "steps"])
    " Did you mean 'epochs'?"
    """
    similar = get_close_matches(word.lower(), list(known), n=1)
    return f" Did you mean {similar[0]!r}?" if similar else ""
