"""`isogrid run`."""

from typing import Annotated

import typer

from isogrid.cli.options import Demo, Recipe, Settings


def run(
    recipe: Recipe,
    demo: Demo = False,
    model: Annotated[str | None, typer.Option(help="A language model of Hugging Face: its name or folder.")] = None,
    text: Annotated[str | None, typer.Option(help="Text files to train it on, such as 'texts/*.txt'.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Throw an earlier run in the folder away.")] = False,
    settings: Settings = None,
) -> None:
    """Train as a recipe says, then export, verify and report.

    A run that was stopped goes on with --resume and has the losses it would have had. TensorBoard shows the training.
    Several processes: torchrun --nproc-per-node 2 -m isogrid run RECIPE.

    [bold]Example:[/bold] isogrid run digits-w4a8 --set training.epochs=5 --set output=runs/short
    [bold]Example:[/bold] isogrid run llama-q4_0 --demo
    """
    import os

    from isogrid.cli.console import Bars, errors, output
    from isogrid.recipes.loading import language_settings, load_recipe
    from isogrid.recipes.progress import Silent
    from isogrid.recipes.runner import run as run_recipe
    from isogrid.report import results_table

    loaded = load_recipe(recipe, [*language_settings(model, text), *(settings or ())], demo=demo)
    if int(os.environ.get("RANK", "0")):  # torchrun numbers its processes; the first one speaks for all
        run_recipe(loaded, resume=resume, restart=restart, progress=Silent())
        return
    try:
        with Bars() as bars:
            result = run_recipe(loaded, resume=resume, restart=restart, progress=bars)
    except KeyboardInterrupt:
        errors.print("Stopped. --resume goes on from the last checkpoint.")
        raise
    output.print(results_table(result.rows))
    output.print(
        f"[bold]{result.folder}/report.html[/bold] has the details; "
        f"tensorboard --logdir {result.folder}/tensorboard shows the training.",
        soft_wrap=True,
    )
    if not result.verification:
        output.print(result.verification)
        raise typer.Exit(1)
