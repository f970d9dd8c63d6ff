"""QuantStub and DeQuantStub of torch.ao: where the author of a model has integers begin and end.

Both are identities. A model that has one is quantised between them and nowhere else.
"""

from typing import Literal

from torch import nn

from isogrid.planning.graph import Graph

_MODULE = "torch.ao.quantization.stubs"


def stub_of(module: nn.Module) -> Literal["QuantStub", "DeQuantStub"] | None:
    """Which stub a module is, or None; found by name, so that torch.ao need not be imported.

    >>> from torch.ao.quantization import DeQuantStub
    >>> stub_of(DeQuantStub()), stub_of(nn.Identity())
    ('DeQuantStub', None)
    """
    for kind in type(module).__mro__:
        if kind.__module__ == _MODULE and kind.__name__ == "QuantStub":
            return "QuantStub"
        if kind.__module__ == _MODULE and kind.__name__ == "DeQuantStub":
            return "DeQuantStub"
    return None


def outside_stubs(graph: Graph) -> dict[str, str]:
    """The calls that a model's stubs leave in float, by name, with the reason; none where it has no stubs.

    A call is inside if all of the model's values that it reads have passed a QuantStub and no DeQuantStub since.
    Embeddings read indices, which no stub concerns.
    """
    if not any(call.kind == "pass" and call.type in ("QuantStub", "DeQuantStub") for call in graph.calls):
        return {}
    inside: dict[int, bool] = dict.fromkeys(graph.model_inputs, False)
    found: dict[str, str] = {}
    for call in graph.calls:
        # Parameters and constants belong to either side.
        known = [inside[value] for value in call.inputs if value in inside]
        if call.type in ("QuantStub", "DeQuantStub"):
            is_inside = call.type == "QuantStub"
        elif not known:
            continue
        else:
            is_inside = all(known)
            if not is_inside and call.kind != "embedding":
                found[call.name] = _reason(any(known))
        inside.update(dict.fromkeys(call.outputs, is_inside))
    return found


def _reason(partly: bool) -> str:
    if partly:
        return "the model's QuantStubs and DeQuantStubs let one of its inputs be quantised and leave another float"
    return "outside of the model's QuantStub and DeQuantStub"
