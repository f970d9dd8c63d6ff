"""`isogrid recover`."""

from pathlib import Path
from typing import Annotated

import typer


def recover(
    checkpoint: Annotated[
        Path, typer.Argument(help="A safetensors file, or the folder of a model, sharded or not.", show_default=False)
    ],
    format: Annotated[
        str, typer.Option(help="The lattice to look for: q4_0, q4_1, q8_0 or q4_k.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option(help="GGUF file to write with the codes that were found.", show_default=False)
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            help="GGUF file of the same checkpoint in F32, F16 or BF16, from llama.cpp's converter.", show_default=False
        ),
    ] = None,
) -> None:
    """Find the grid that a checkpoint was trained on, and carry its codes over unchanged.

    Converters derive scales anew, and change codes; here scales are found that reproduce every value. What lies on no
    lattice is counted and stays float. The model's config.json has to lie beside the weights where a file is written.

    [bold]Example:[/bold] isogrid recover gemma-qat --format q4_0 --base gemma-bf16.gguf --out gemma-q4_0.gguf
    """
    from rich.table import Table

    from isogrid.cli.console import output
    from isogrid.errors import TargetError
    from isogrid.formats import named_format
    from isogrid.report import words
    from isogrid.targets.recovery import checkpoint_tensors
    from isogrid.targets.recovery import recover as recovered_of

    if (out is None) != (base is None):
        raise TargetError("--out and --base go together: the base has the model's metadata and tokenizer.")
    table = Table(title=f"Lattices of {format} in {checkpoint}", title_justify="left")
    table.add_column("tensor", overflow="fold")
    for column in ("blocks", "exact", "near", "residual", "usual route alters"):
        table.add_column(column, justify="right")
    found = list(recovered_of(checkpoint_tensors(checkpoint), named_format(format)))
    for part in found:
        counts = (part.exact, part.near, part.requantised)
        exact, near, other = (f"{words.percent(count / max(1, part.blocks))} %" for count in counts)
        cells = (str(part.blocks), exact, near, f"{part.residual:.2g}", other) if part.blocks else ("does not fit",)
        table.add_row(part.name, *cells)
    output.print(table)
    blocks, exact_blocks = (sum(getattr(part, name) for part in found) for name in ("blocks", "exact"))
    off = [part.name for part in found if part.weight is None]
    output.print(
        f"{exact_blocks:,} of {blocks:,} blocks lie on a lattice to the last bit"
        + (f"; on none, and left float: {', '.join(off)}" if off else "."),
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    if out is not None and base is not None:
        from isogrid.targets.gguf_recovery import write_recovered

        write_recovered(checkpoint, {part.name: part.weight for part in found if part.weight is not None}, base, out)
        output.print(f"{out}: written, every other tensor as in {base}.", markup=False, highlight=False)
