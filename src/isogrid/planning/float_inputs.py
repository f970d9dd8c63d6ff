"""Inputs that are quantised on a grid of their own, for layers that compute in float on what they read."""

from collections.abc import Hashable, Mapping

from isogrid.formats import named_format
from isogrid.planning.choice import Choice
from isogrid.planning.graph import Graph
from isogrid.planning.plan import Site
from isogrid.planning.rules import Scheme
from isogrid.planning.target import Target


def input_owners(graph: Graph, choices: Mapping[str, Choice], scheme: Scheme) -> dict[str, str]:
    """For each such layer the first one that reads the same value, which owns the grid."""
    first: dict[Hashable, str] = {}
    found = {}
    for name, choice in choices.items():
        call = graph.calls_of(name)[0]
        if scheme.arithmetic == "float" and choice.activation and call.kind in ("linear", "experts"):
            key = graph.origin(call.inputs[0])[0], choice.activation, choice.scale, choice.range
            found[name] = first.setdefault(key, name)
    return found


def input_sites(
    graph: Graph, choices: Mapping[str, Choice], scheme: Scheme, target: Target, owners: Mapping[str, str]
) -> list[Site]:
    """The sites of these grids; raises TargetError where the target has no such inputs."""
    sites = []
    for name in dict.fromkeys(owners.values()):
        choice, call = choices[name], graph.calls_of(name)[0]
        assert choice.activation is not None
        target.check_format("activation", named_format(choice.activation), call, scheme)
        others = [other for other, owner in owners.items() if owner == name != other]
        reason = choice.reason + (f", shared with {', '.join(others)}" if others else "")
        how = (choice.activation, choice.scale, choice.estimator, choice.range)
        if named_format(choice.activation).grid.dimension > 1:  # scales that values choose leave extremes to be known
            how = (choice.activation, "frozen", "identity", "absmax")
        sites.append(Site(f"{name}.input", "input", *how, call.shape, reason))
    return sites
