"""The runtime's own graph: which arithmetic it chose for every multiplication, against what was planned."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

from isogrid.planning.plan import OperationPlan, Plan
from isogrid.targets import RuntimeOperator
from isogrid.verification.names import site_of
from isogrid.verification.report import GraphCheck
from isogrid.verification.survey import Work

PLANNED = {"static": "integer", "dynamic": "integer", "weight_only": "float", "float": "float", "half": "float"}
"""In which arithmetic a layer multiplies, by what its plan says."""

UNREAD = "nothing: no output depends on it"


def check_graph(
    work: Sequence[Work],
    examples: int,
    operators: Sequence[RuntimeOperator],
    producers: Mapping[str, RuntimeOperator],
    plan: Plan,
) -> tuple[GraphCheck, ...]:
    """Hold the graph that a runtime really runs against the plan.

    A planned layer or matrix product must run under its own name in the arithmetic that was planned, and so must
    planned operations such as additions. Whatever else multiplies was left in float, and must still be: a runtime that
    turns a float product into an integer one computes what nobody trained for. What no output depends on, and what is
    computed again, may be missing.

    Args:
        work: the calls that multiply in the reference.
        examples: that this work was for.
        operators: those that multiply in the runtime's graph.
        producers: which operator makes the codes of each quantised tensor.
        plan: of the model.
    """
    planned = {layer.path: PLANNED[layer.arithmetic] for layer in plan.layers}
    planned |= {_path(operation): "integer" for operation in plan.operations if operation.kind == "matmul"}
    by_name = {operator.name: operator for operator in operators if operator.name}
    checks, unmatched = [], []
    for layer, path, total, read, repeated in work:
        macs = total // max(1, examples)
        found = by_name.pop(layer or "", None)
        if found is None and not (read and not repeated):
            operator = "the same as before, once" if read else UNREAD
            checks.append(GraphCheck(site_of(layer or path), operator, "no", "no", macs))
        elif found is not None or site_of(path) in planned:
            checks.append(_check(site_of(layer or path), found, planned.get(site_of(path), "float"), macs))
        else:
            unmatched.append((layer or path, macs))
    matched = {id(operator) for operator in by_name.values()}
    left = [operator for operator in operators if not operator.name or id(operator) in matched]
    checks += list(_rest(unmatched, left))
    return (*checks, *_operations(producers, plan))


def _rest(work: Sequence[tuple[str, int]], operators: Sequence[RuntimeOperator]) -> Iterator[GraphCheck]:
    """Multiplications that the runtime has renamed or merged, in order; all were left in float."""
    for call, operator in zip_longest(work, operators):
        name, macs = call or (operator.name or "(unnamed)", 0)
        yield _check(name, operator, "float", macs) if operator else GraphCheck(name, "merged", "float", "float", macs)


def _operations(producers: Mapping[str, RuntimeOperator], plan: Plan) -> Iterator[GraphCheck]:
    # An addition inside a layer adds floats, as that layer's kernel or as an operation of its own.
    operations = (operation for operation in plan.operations if operation.kind not in ("fused_add", "matmul"))
    planned = {_path(operation): operation.kind for operation in operations}
    for name, operator in producers.items():
        path, _, kind = site_of(name).rpartition(".")
        if path in planned and kind.startswith("output"):
            # An artefact may have a float operator for a function whose codes it cannot change.
            yield _check(path, operator, operator.arithmetic if planned[path] == "activation" else "integer", 0)


def _path(operation: OperationPlan) -> str:
    return f"{operation.scope}.{operation.site}".lstrip(".")


def _check(name: str, operator: RuntimeOperator | None, planned: str, macs: int) -> GraphCheck:
    if operator is None:
        return GraphCheck(name, "nothing of its name", "no", planned, macs)
    return GraphCheck(name, operator.operator, operator.arithmetic, planned, macs)
