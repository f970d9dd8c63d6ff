"""`isogrid recover`."""

from pathlib import Path
from typing import Annotated

import typer


def recover(
    checkpoint: Annotated[
        Path, typer.Argument(help="A safetensors file, or the folder of a model, sharded or not.", show_default=False)
    ],
    format: Annotated[
        str,
        typer.Option(
            help="The lattice to look for: q4_0, q4_1, q8_0 or q4_k for llama.cpp; integers by group or by channel, "
            "such as int4/group128:scale=bfloat16, for vLLM.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="What to write with the codes that were found: a GGUF file, or the folder of a compressed-tensors "
            "checkpoint.",
            show_default=False,
        ),
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
    lattice is counted and stays float. What is written needs the model's config.json beside the weights.
    llama.cpp's formats go into a GGUF file, and need one of the model as a base; integers into a checkpoint for vLLM.

    [bold]Example:[/bold] isogrid recover gemma-qat --format q4_0 --base gemma-bf16.gguf --out gemma-q4_0.gguf
    """
    from rich.table import Table

    from isogrid.cli.console import output
    from isogrid.errors import TargetError
    from isogrid.formats import named_format
    from isogrid.report import words
    from isogrid.targets.recovery import checkpoint_tensors
    from isogrid.targets.recovery import recover as recovered_of

    fmt = named_format(format)
    is_ggml = "/" not in format
    if base is not None and (out is None or not is_ggml):
        raise TargetError("--base is for a GGUF file: give --out too, and one of llama.cpp's formats, such as q4_0.")
    if is_ggml and out is not None and base is None:
        raise TargetError("--out with one of llama.cpp's formats needs --base, which has its metadata and tokenizer.")
    table = Table(title=f"Lattices of {format} in {checkpoint}", title_justify="left")
    table.add_column("tensor", overflow="fold")
    for column in ("blocks", "exact", "near", "residual", "usual route alters"):
        table.add_column(column, justify="right")
    found = list(recovered_of(checkpoint_tensors(checkpoint), fmt))
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
    weights = {part.name: part.weight for part in found if part.weight is not None}
    if out is not None and base is not None:
        from isogrid.targets.gguf_recovery import write_recovered as write_gguf

        write_gguf(checkpoint, weights, base, out)
        output.print(f"{out}: written, every other tensor as in {base}.", markup=False, highlight=False)
    elif out is not None:
        from isogrid.targets.compressed_tensors.recovery import write_recovered as write_folder

        float_still = write_folder(checkpoint, weights, out)
        rest = f" On a lattice, but of no linear layer and left float: {', '.join(float_still)}." if float_still else ""
        output.print(f"{out}: written, every other tensor as in {checkpoint}.{rest}", markup=False, highlight=False)
