"""`isogrid inspect`."""

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    file: Annotated[
        Path,
        typer.Argument(
            help="An artefact, any ONNX file, the folder of a checkpoint or run, or a plan as JSON.",
            show_default=False,
        ),
    ],
    lint: Annotated[
        str | None,
        typer.Option(help="Hold an ONNX file against the rules of a runtime: tensorrt.", show_default=False),
    ] = None,
) -> None:
    """Say what a file holds: its layers and their formats, how their codes are used, what runs in float and why.

    With --lint, say instead what a runtime would refuse, ignore or be slow with; an error among it is exit code 1.

    [bold]Example:[/bold] isogrid inspect runs/digits-w4a8/model.onnx
    """
    from isogrid.cli.console import output

    if lint is not None:
        from isogrid.cli.lint import findings_of, findings_table, summary

        findings = findings_of(file, lint)
        if findings:
            output.print(findings_table(findings))
        output.print(summary(file, lint, findings), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(int(any(finding.severity == "error" for finding in findings)))

    from isogrid.cli.contents import contents_of

    found = contents_of(file)
    output.print(*found.facts, sep="\n", markup=False, highlight=False, soft_wrap=True)
    output.print()
    output.print(*found.tables)
