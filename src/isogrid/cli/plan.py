"""`isogrid plan`."""

from pathlib import Path
from typing import Annotated

import typer

from isogrid.cli.options import Demo, Recipe, Settings


def plan(
    recipe: Recipe,
    demo: Demo = False,
    settings: Settings = None,
    json: Annotated[Path | None, typer.Option(help="Also write the plan as JSON to this file.")] = None,
) -> None:
    """Print what a recipe makes of every weight and activation, and what stays float and why. Nothing is trained.

    [bold]Example:[/bold] isogrid plan digits-w4a8 --set scheme=w8a8
    """
    from isogrid.cli.console import output
    from isogrid.files import write_whole
    from isogrid.recipes.loading import load_recipe
    from isogrid.recipes.sources import make_data
    from isogrid.recipes.stages import new_model, plan_of

    loaded = load_recipe(recipe, settings or (), demo=demo)
    made = plan_of(loaded, new_model(loaded), make_data(loaded.data))
    output.print(*made.tables())
    if json is not None:
        write_whole(json, lambda path: path.write_text(made.to_json(), encoding="utf-8"))
