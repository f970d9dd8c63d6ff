"""`isogrid search`."""

from typing import Annotated

import typer

from isogrid.cli.options import Recipe, Settings


def search(
    recipe: Recipe,
    budget: Annotated[float, typer.Option(help="Mean bits a weight, scales included.", show_default=False)],
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="A format that may be chosen; repeatable. Not needed for llama.cpp."),
    ] = None,
    settings: Settings = None,
) -> None:
    """Print rules that store each weight of a recipe's model where all lose least, within a budget of bits.

    They are YAML, for the recipe. Weights are those of the recipe's checkpoint, or that its model is made with.

    [bold]Example:[/bold] isogrid search digits-w4a8 --budget 5 --format int2/channel --format int8/channel
    """
    from pathlib import Path

    import yaml

    from isogrid.cli.console import output
    from isogrid.recipes.loading import load_recipe
    from isogrid.recipes.sources import make_data
    from isogrid.recipes.stages import load_float_weights, new_model, plan_of
    from isogrid.search import fit_types

    loaded = load_recipe(recipe, settings or ())
    model = new_model(loaded)
    if loaded.checkpoint is not None:
        load_float_weights(model, Path(loaded.checkpoint))
    plan = plan_of(loaded, model, make_data(loaded.data))
    rules = [{"match": rule.match, "weight": rule.weight} for rule in fit_types(model, plan, budget, formats)]
    text = yaml.safe_dump({"rules": rules}, sort_keys=False)
    output.print(text, markup=False, highlight=False, soft_wrap=True, end="")
