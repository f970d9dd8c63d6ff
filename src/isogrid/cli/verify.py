"""`isogrid verify`."""

from pathlib import Path
from typing import Annotated

import typer


def verify(
    artifact: Annotated[
        Path, typer.Argument(help="The exported file; its sidecar lies beside it.", show_default=False)
    ],
    run: Annotated[
        Path | None, typer.Option(help="Folder of the run that it was exported from; the artefact's folder by default.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the report as JSON to this file.")] = None,
) -> None:
    """Run an artefact on its runtime and hold every code against the trained model. Fails where a bound does not hold.

    [bold]Example:[/bold] isogrid verify runs/digits-w4a8/model.onnx
    """
    from isogrid.api import verify as verify_artifact
    from isogrid.cli.console import output
    from isogrid.files import write_whole
    from isogrid.recipes.folders import find_run
    from isogrid.recipes.sources import make_data
    from isogrid.targets import read_artifact

    read = read_artifact(artifact)
    found = find_run(str(run or artifact.parent))
    data = make_data(found.saved_recipe().data)
    report = verify_artifact(
        found.trained_model(), read, data.test_batches(), lambda outputs, batch: data.metric(outputs, batch[-1])
    )
    output.print(report.table())
    if json is not None:
        write_whole(json, lambda path: path.write_text(report.to_json(), encoding="utf-8"))
    for line in report.failures:
        output.print(f"fails: {line}", style="red", markup=False, highlight=False)
    if not report:
        raise typer.Exit(1)
    output.print("Everything holds.", style="green")
