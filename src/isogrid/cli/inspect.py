"""`isogrid inspect`."""

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    file: Annotated[
        Path,
        typer.Argument(help="An artefact, the folder of a checkpoint or run, or a plan as JSON.", show_default=False),
    ],
) -> None:
    """Say what a file holds: its layers and their formats, how their codes are used, and what stays float and why.

    [bold]Example:[/bold] isogrid inspect runs/digits-w4a8/model.onnx
    """
    from isogrid.cli.console import output
    from isogrid.cli.contents import contents_of

    found = contents_of(file)
    output.print(*found.facts, sep="\n", markup=False, highlight=False, soft_wrap=True)
    output.print()
    output.print(*found.plan.tables())
    if found.weights:
        output.print(found.weights_table())
