"""`isogrid export`."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    source: Annotated[
        str,
        typer.Argument(help="Folder of a run, its checkpoint, or the recipe it was trained by.", show_default=False),
    ],
    output: Annotated[
        Path | None, typer.Option(help="File to write; by default model with the target's suffix, in the run's folder.")
    ] = None,
) -> None:
    """Write the artefact of a trained checkpoint for its target.

    [bold]Example:[/bold] isogrid export runs/digits-w4a8 --output digits.onnx
    """
    from isogrid.api import export as export_model
    from isogrid.cli.console import output as console
    from isogrid.recipes.folders import find_run
    from isogrid.report import words

    found = find_run(source)
    artifact = export_model(found.trained_model(), output or found.artifact(found.saved_recipe().runtime))
    console.print(
        f"{artifact.path}: {words.size(artifact.size_bytes)}, {artifact.plan.scheme} for {artifact.target}; "
        f"{artifact.path.name}.json beside it says how to run it.",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
