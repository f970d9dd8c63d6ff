"""Arguments that several commands share."""

from typing import Annotated

import typer

Recipe = Annotated[
    str, typer.Argument(help="Path of a YAML file, or a recipe that comes with Isogrid.", show_default=False)
]

Demo = Annotated[bool, typer.Option("--demo", help="With the recipe's built-in model and data.")]

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe, such as training.seed=1. Repeatable."),
]
