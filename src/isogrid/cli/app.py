"""The commands, and what happens to their errors."""

import logging
import sys
from importlib import metadata
from typing import Annotated

import typer

from isogrid.cli.console import errors
from isogrid.cli.export import export
from isogrid.cli.inspect import inspect
from isogrid.cli.plan import plan
from isogrid.cli.quickstart import quickstart
from isogrid.cli.recover import recover
from isogrid.cli.run import run
from isogrid.cli.search import search
from isogrid.cli.verify import verify
from isogrid.errors import IsogridError

app = typer.Typer(
    name="isogrid",
    help="Quantization-aware training where what you train is, bit for bit, what you deploy.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (quickstart, run, plan, search, export, verify, inspect, recover):
    app.command()(command)


def _print_version(asked: bool) -> None:
    if asked:
        try:
            print(f"isogrid {metadata.version('isogrid')}")
        except metadata.PackageNotFoundError:
            print("isogrid, from a source tree")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None: ...


TALKATIVE = ("torchao", "torch.utils._pytree")
"""Loggers that warn whenever transformers imports torchao, about GPUs that are not there and about themselves."""


def main() -> None:
    """Run the command line; an error is one clear message on stderr and exit code 1, wrong usage exit code 2."""
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app()
    except IsogridError as error:
        _fail(str(error))
    except OSError as error:
        # Of all that Python raises, these are the user's to mend: a full disk, a folder that cannot be written.
        name = f"{error.filename}: " if error.filename else ""
        _fail(f"{name}{error.strerror or error}")


def _fail(message: str) -> None:
    errors.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(1)
