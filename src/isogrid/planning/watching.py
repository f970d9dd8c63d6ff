"""Which forwards of a model are watched for the operations of a plan."""

from collections.abc import Iterable, Mapping, Sequence

from isogrid.planning.chains import Chain
from isogrid.planning.graph import Graph
from isogrid.planning.plan import OperationPlan


def watched_scopes(
    graph: Graph,
    operations: Sequence[OperationPlan],
    chains: Mapping[str, Chain],
    lenders: Iterable[str],
    is_static: bool,
) -> dict[str, tuple[str, ...]]:
    """The forwards to watch, with the calls that other layers do for them.

    Where there are integers to compute, every forward is watched, so that calls are counted for the module that makes
    them, also in modules that the example inputs did not reach.

    Args:
        graph: of the model.
        operations: of the plan.
        chains: of layers with what they absorb.
        lenders: paths of modules whose parameters other layers multiply by.
        is_static: whether the plan has grids of activations.
    """
    skipped: dict[str, dict[str, None]] = {}
    for chain in chains.values():
        for clamp in chain.clamps:
            skipped.setdefault(clamp.scope, {})[clamp.name.rpartition(".")[2]] = None
    watched = (*graph.fast_paths, *sorted(lenders))
    if not is_static:
        watched += scopes_around(operations, graph.scopes)
    elif operations or skipped:
        watched = graph.scopes
    return {path: tuple(skipped.get(path, ())) for path in watched}


def scopes_around(operations: Iterable[OperationPlan], scopes: Iterable[str]) -> tuple[str, ...]:
    """The forwards of operations, and all further in, which count their own calls.

    >>> scopes_around([OperationPlan("act", "gelu", "function", (None,), None)], ["", "act", "act.deep", "fc"])
    ('act', 'act.deep')
    """
    busy = {f"{operation.scope}.".lstrip(".") for operation in operations}
    return tuple(path for path in scopes if any(f"{path}.".startswith(scope) for scope in busy))
