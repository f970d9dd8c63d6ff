"""What a model computes from positions and constants alone, such as the angles of rotary embeddings."""

from isogrid.planning.graph import Graph

REASON = "computed from positions or constants, not from data: an angle needs more digits than a code has"


def from_positions(graph: Graph) -> dict[str, str]:
    """The calls that make nothing out of data or parameters, with the reason why they stay float."""
    made = {name: {value for call in calls for value in call.outputs} for name, calls in graph.by_name.items()}
    return {name: REASON for name, values in made.items() if values.isdisjoint(graph.from_data)}
