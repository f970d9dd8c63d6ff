"""LQ-LoRA: a format for each weight under a budget, given that an update makes up for part of what it takes away."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from isogrid.errors import FormatError, PlanError
from isogrid.formats import Format, named_format
from isogrid.layers.weights import weight_of
from isogrid.planning.plan import Plan, Site
from isogrid.planning.rules import Rule
from isogrid.planning.state import is_prepared
from isogrid.quantizers import LSQ, MSE, Quantizer
from isogrid.search.allocation import Option
from isogrid.search.integer_program import optimum
from isogrid.search.types import only
from isogrid.training.loftq import alternate


def fit_lq_lora(
    model: nn.Module,
    plan: Plan,
    budget: float,
    formats: Sequence[str],
    rank: int = 16,
    fisher: Mapping[str, Tensor] | None = None,
) -> list[Rule]:
    """Rules that store each weight so that codes and updates together come nearest to all weights, within a budget.

    Each weight is shared out between each format and an update of this rank, in turns; which format it gets is an
    integer program over errors and bits (Guo et al., arXiv 2311.12023). Train with
    `isogrid.add_adapters(model, rank, method="qlora", start="loftq")`.

    Args:
        model: float; the one that was planned.
        plan: which weights there are; those that are no matrices keep their format.
        budget: mean bits a weight, scales included, updates not.
        formats: to choose from, by name; those that do not fit a weight are left out for it.
        rank: of the updates.
        fisher: by site, how much the error of each element counts, such as the mean of its squared gradients.

    Returns:
        A rule for each layer.

    Raises:
        PlanError: the model is prepared already, the budget is too small, or no format fits a weight.

    >>> import isogrid as ig, torch
    >>> model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.mul_(8)
    >>> plan = ig.plan(model, scheme="q8_0", example_inputs=(torch.zeros(1, 256),))
    >>> [rule.weight for rule in fit_lq_lora(model, plan, budget=5.6, formats=["q2_k", "q8_0"], rank=4)]
    ['q8_0', 'q2_k']
    """
    if is_prepared(model):
        raise PlanError("The model is prepared already; fit formats to the float model, then plan it with the rules.")
    known = {name: named_format(name) for name in formats}
    sites = [site for site in plan.sites if site.kind == "weight" and len(site.shape) == 2]
    weights = [weight_of(model.get_submodule(site.name.removesuffix(".weight"))).detach() for site in sites]
    options = [
        _options(site, weight, known, rank, (fisher or {}).get(site.name))
        for site, weight in zip(sites, weights, strict=True)
    ]
    chosen = optimum(options, budget * sum(weight.numel() for weight in weights))
    by_site = {site.name: option.name for site, option in zip(sites, chosen, strict=True)}
    return [Rule(match=only(each.path), weight=by_site[each.weight]) for each in plan.layers if each.weight in by_site]


def _options(
    site: Site, weight: Tensor, known: Mapping[str, Format], rank: int, importance: Tensor | None
) -> list[Option]:
    found = []
    for name, fmt in known.items():
        try:
            bits = fmt.storage_bits(tuple(weight.shape))
        except FormatError:
            continue
        quantizer = Quantizer(fmt, tuple(weight.shape), MSE(), LSQ(), "frozen")
        *_, errors = alternate(weight, quantizer, rank, importance=importance)
        found.append(Option(name, bits, errors[-1] ** 2))
    if not found:
        names = ", ".join(known)
        raise PlanError(f"None of {names} fits {site.name!r} of shape {list(weight.shape)}. Add one that does.")
    return found
