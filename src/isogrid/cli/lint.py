"""Files held against a runtime's rules, for `isogrid inspect --lint`."""

from collections import Counter
from pathlib import Path

import onnx
from rich.table import Table
from rich.text import Text

from isogrid.errors import ArtifactError, TargetError
from isogrid.planning.rules import nearest
from isogrid.report import words
from isogrid.targets import tensorrt_rules
from isogrid.targets.findings import Finding

LINTERS = {"tensorrt": tensorrt_rules.lint}
"""The runtimes whose rules are known, by name."""

COLORS = {"error": "red", "warning": "yellow", "note": "dim"}


def findings_of(path: Path, runtime: str) -> list[Finding]:
    """What a runtime would refuse, ignore or be slow with in an ONNX file.

    Raises:
        TargetError: the runtime has no rules here.
        ArtifactError: the file is missing, or is no ONNX model.
    """
    if runtime not in LINTERS:
        raise TargetError(
            f"There are no rules for {runtime!r}.{nearest(runtime, LINTERS)} Known: {', '.join(LINTERS)}."
        )
    if not path.is_file():
        raise ArtifactError(f"There is no file {path}.")
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's and the file system's share no base class
        raise ArtifactError(f"{path} is no ONNX model: {type(error).__name__}: {error}.") from error
    if not model.graph.node:
        raise ArtifactError(f"{path} is no ONNX model: there is no operator in it.")
    return LINTERS[runtime](model)


def findings_table(findings: list[Finding]) -> Table:
    """Findings as a Rich table, errors first."""
    table = Table(title_justify="left")
    table.add_column("severity")
    for column in ("rule", "where", "what is wrong", "what to do"):
        table.add_column(column, overflow="fold")
    for severity, color in COLORS.items():
        for finding in findings:
            if finding.severity == severity:
                cells = (finding.rule, finding.node, finding.problem, finding.remedy)
                table.add_row(Text(severity, color), *map(Text, cells))
    return table


def summary(path: Path, runtime: str, findings: list[Finding]) -> str:
    """One line on what was found."""
    counts = Counter[str](finding.severity for finding in findings)
    found = ", ".join(words.plural(counts[severity], severity) for severity in COLORS if counts[severity])
    return f"{path}: {found or 'nothing'} by the rules of {runtime}"
