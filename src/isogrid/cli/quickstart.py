"""`isogrid quickstart`."""

from pathlib import Path
from typing import Annotated

import typer


def quickstart(
    output: Annotated[Path, typer.Option(help="Folder for models, result.json and report.html.")] = Path(
        "runs/quickstart"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
) -> None:
    """Train, quantise, export and verify a small network on handwritten digits, in about a minute.

    [bold]Example:[/bold] isogrid quickstart --seed 1 --output runs/second
    """
    from isogrid.cli.console import Bars
    from isogrid.cli.console import output as console
    from isogrid.recipes.quickstart import quickstart as work
    from isogrid.report import results_table

    with Bars() as bars:
        result = work(output, seed, bars)
    console.print(results_table(result.rows))
    console.print(f"[bold]{output}/report.html[/bold] has the details.", soft_wrap=True)
    for line in result.failures:
        console.print(f"fails: {line}", style="red", markup=False, highlight=False)
    if result.failures:
        raise typer.Exit(1)
