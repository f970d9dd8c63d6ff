"""From a converted model to a `torch.export` program of `quantized_decomposed` operators.

Each operator of Isogrid becomes the float operator of torch between `dequantize_per_tensor` and `quantize_per_tensor`,
with the numbers of its grids written into the graph: the form that PyTorch's own quantisation produces, and that
ExecuTorch, LiteRT's converter and Inductor look for. Their kernels compute it in integers. Read as it stands, by torch
itself, it is float arithmetic, which now and then rounds a value near a tie the other way.
"""

from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from isogrid.errors import TargetError
from isogrid.targets.decomposed_operators import WRITERS
from isogrid.targets.decomposed_writer import QUANTIZE, DecomposedWriter, Grid
from isogrid.targets.dynamic_decomposed import dynamic_form
from isogrid.targets.standing_in import standing_in


class Decomposed(NamedTuple):
    """A decomposed model.

    Attributes:
        program: takes and returns what the model does.
        observing: the same with every quantised tensor as a further output, all outputs in one flat tuple.
        codes: for each quantised tensor by its name, which of the further outputs it is.
        layers: names of the linear layers and convolutions, in order.
        grids: of each of the further outputs.
        quantizations: for each quantised tensor by its name, which of the program's quantisations makes it, in order.
        packed: for each linear layer with float input and output, which of the further outputs these two are.
    """

    program: torch.export.ExportedProgram
    observing: torch.export.ExportedProgram
    codes: dict[str, int]
    layers: list[str]
    grids: list[Grid]
    quantizations: dict[str, int]
    packed: dict[str, tuple[int, int]]


def decompose(
    integer_model: nn.Module, example_inputs: tuple[Any, ...], dynamic_shapes: Any = None, stored_as: str = "codes"
) -> Decomposed:
    """Export a converted model and replace Isogrid's operators by those of torch.

    Args:
        integer_model: of `isogrid.convert`.
        example_inputs: positional arguments of its forward.
        dynamic_shapes: as for torch.export.export.
        stored_as: "codes" has int8 weights, and codes as the further outputs; "values" has float weights that the graph
            quantises, and dequantised codes, for readers that make the codes themselves.

    Raises:
        TargetError: torch.export cannot trace the model, or one of its operators has no such form.
    """
    # In the functional form there is no writing in place and no dropout.
    with standing_in(integer_model, dynamic_form):
        functional = _exported(integer_model, example_inputs, dynamic_shapes).run_decompositions({})
    module = functional.module(check_guards=False)
    writer = DecomposedWriter(module, stored_as)
    writer.run(WRITERS)
    program = _exported(module, example_inputs, dynamic_shapes)
    outputs = next(node for node in module.graph.nodes if node.op == "output")
    flat = [node for node in pytree.tree_leaves(outputs.args[0]) if isinstance(node, fx.Node)]
    made = list(dict.fromkeys(writer.codes.values()))
    with module.graph.inserting_before(outputs):
        seen = [writer.values(node, writer.grid_of(node)) for node in made] if stored_as == "values" else made
    ends = list(dict.fromkeys(node for pair in writer.packed.values() for node in pair))
    outputs.args = ((*flat, *seen, *ends),)
    module.graph.set_codegen(fx.graph.CodeGen())
    module.recompile()
    leaves = tuple(pytree.tree_leaves(example_inputs))
    shapes = None if dynamic_shapes is None else tuple(pytree.tree_leaves(dynamic_shapes))
    observing = _exported(module, leaves, shapes)
    position = {node: number for number, node in enumerate(made)}
    codes = {name: position[node] for name, node in writer.codes.items()}
    order = {node: number for number, node in enumerate(n for n in module.graph.nodes if n.target is QUANTIZE)}
    return Decomposed(
        program,
        observing,
        codes,
        writer.layers,
        [writer.grid_of(node) for node in made],
        {name: order[node] for name, node in writer.codes.items()},
        {name: (len(seen) + ends.index(x), len(seen) + ends.index(y)) for name, (x, y) in writer.packed.items()},
    )


def _exported(module: nn.Module, inputs: tuple[Any, ...], dynamic_shapes: Any) -> torch.export.ExportedProgram:
    try:
        with torch.no_grad():
            return torch.export.export(module, inputs, dynamic_shapes=dynamic_shapes)
    except Exception as error:  # what torch.export raises shares no base class
        raise TargetError(
            f"torch.export cannot trace the model: {type(error).__name__}: {error}. It needs a forward whose Python "
            "does not depend on the data."
        ) from error
