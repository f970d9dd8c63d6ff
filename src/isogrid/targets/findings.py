"""What a linter says about a file."""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """Something in a file that a runtime refuses, ignores or is slow with.

    Attributes:
        rule: its name.
        severity: `error` where the runtime refuses the file or a layer does not run quantised as the file says,
            `warning` where it runs slower than it could, `note` for what whoever runs the file must know.
        node: which node, or which input.
        problem: what is wrong.
        remedy: what to do.
    """

    rule: str
    severity: Severity
    node: str
    problem: str
    remedy: str
