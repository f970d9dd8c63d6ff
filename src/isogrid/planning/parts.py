"""Parts of a plan, for the parts of a model that are prepared one at a time."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from isogrid.errors import PlanError
from isogrid.planning.plan import Feed, LayerPlan, OperationPlan, Plan


def plan_of_part(plan: Plan, path: str) -> Plan:
    """The plan of one module of the model, with the names that it has inside the module.

    Raises:
        PlanError: the module shares a grid or a weight with others, so that it cannot be prepared alone.
    """
    inside = _inside([path])

    def name(value: str) -> str:
        if not inside(value):
            raise PlanError(
                f"{path!r} shares the grid {value!r} with what is around it, so that it cannot be prepared alone. "
                "Blocks that are loaded one at a time need a scheme whose activations stay float, such as w4a16, "
                "w2a16-asym or q2_k."
            )
        return value[len(path) + 1 :]

    def feed(value: Feed | None) -> Feed | None:
        return None if value is None else Feed(name(value.grid), value.on_grid)

    def optional(value: str | None) -> str | None:
        return None if value is None else name(value)

    def layer(each: LayerPlan) -> LayerPlan:
        return replace(
            each, path=name(each.path), weight=name(each.weight), input=feed(each.input), output=optional(each.output),
            batch_norm=optional(each.batch_norm),
        )  # fmt: skip

    def operation(each: OperationPlan) -> OperationPlan:
        return replace(
            each, scope=_relative(each.scope, path), inputs=tuple(feed(value) for value in each.inputs),
            output=optional(each.output),
        )  # fmt: skip

    part = _kept(plan, lambda value: inside(value) or value == path)
    return replace(
        part,
        sites=tuple(replace(site, name=name(site.name)) for site in part.sites),
        layers=tuple(layer(each) for each in part.layers),
        operations=tuple(operation(each) for each in part.operations),
        scopes={_relative(scope, path): skipped for scope, skipped in part.scopes.items()},
        floats=tuple((_relative(value, path), reason) for value, reason in part.floats),
        apart=tuple(name(value) for value in part.apart),
        lent=tuple(replace(each, scope=_relative(each.scope, path)) for each in part.lent),
        states=tuple(replace(each, path=_relative(each.path, path)) for each in part.states),
    )


def plan_around(plan: Plan, paths: Sequence[str]) -> Plan:
    """The plan without some modules and all that is in them."""
    inside = _inside(paths)
    return _kept(plan, lambda value: not inside(value) and value not in paths)


def _kept(plan: Plan, keeps: Callable[[str], bool]) -> Plan:
    return replace(
        plan,
        sites=tuple(site for site in plan.sites if keeps(site.name)),
        layers=tuple(layer for layer in plan.layers if keeps(layer.path)),
        operations=tuple(each for each in plan.operations if keeps(each.scope)),
        scopes={path: skipped for path, skipped in plan.scopes.items() if keeps(path)},
        floats=tuple((name, reason) for name, reason in plan.floats if keeps(name)),
        apart=tuple(path for path in plan.apart if keeps(path)),
        lent=tuple(each for each in plan.lent if keeps(each.scope)),
        states=tuple(each for each in plan.states if keeps(each.path)),
    )


def _inside(paths: Sequence[str]) -> Callable[[str], bool]:
    prefixes = tuple(f"{path}." for path in paths)
    return lambda value: value.startswith(prefixes)


def _relative(value: str, path: str) -> str:
    return "" if value == path else value[len(path) + 1 :]
