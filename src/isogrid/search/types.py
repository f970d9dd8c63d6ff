"""A format for each weight of a model under a budget of bits, by the error that each would make."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from isogrid.errors import FormatError, PlanError
from isogrid.formats import Format, named_format
from isogrid.layers.weights import weight_of
from isogrid.planning.plan import Plan, Site
from isogrid.planning.rules import Rule
from isogrid.planning.state import is_prepared
from isogrid.quantizers import LSQ, MSE, Quantizer
from isogrid.search.allocation import Option, allocate

CANDIDATES: dict[str, tuple[str, ...]] = {
    "llamacpp": ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_0", "q5_0", "q5_1", "q8_0"),
}
"""What is tried for a target where nobody says; formats that do not fit a weight are left out for it."""

SAMPLE = 2**18
"""Values of a weight that are looked at."""


def fit_types(
    model: nn.Module,
    plan: Plan,
    budget: float,
    formats: Sequence[str] | None = None,
    importance: Mapping[str, float] | None = None,
) -> list[Rule]:
    """Rules that store each weight in the format with which all weights together lose least, within a budget.

    What a weight loses is its mean squared error over its mean square, times the number of its values and its
    importance. It is measured on the weights alone, from the start that training would have; what an error does to the
    model's outputs is for `importance` to say.

    Args:
        model: float; the one that was planned.
        plan: which weights there are, and for which target.
        budget: mean bits a weight, scales included.
        formats: to choose from, by name; for llama.cpp not needed.
        importance: by site, how much its error counts; 1 where it is not given.

    Returns:
        A rule for each layer: `isogrid.plan(model, scheme=..., rules=fit_types(...), ...)`.

    Raises:
        PlanError: the budget is too small, no format fits a weight, or there is nothing to choose from.

    >>> import isogrid as ig
    >>> model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    >>> with torch.no_grad():
    ...     _ = model[1].weight.copy_(torch.randint(0, 4, (256, 256)) - 1.5)  # exact in few bits
    >>> plan = ig.plan(model, scheme="q4_k", example_inputs=(torch.zeros(1, 256),))
    >>> [rule.weight for rule in fit_types(model, plan, budget=4.6, formats=["q2_k", "q4_k", "q6_k"])]
    ['q6_k', 'q2_k']
    """
    names = formats if formats is not None else CANDIDATES.get(plan.target, ())
    if not names:
        raise PlanError(f"Say which formats may be chosen for {plan.target}: formats=['int4/group32', 'int8/group32'].")
    if is_prepared(model):
        raise PlanError("The model is prepared already; fit types to the float model, then plan it with the rules.")
    known = {name: named_format(name) for name in names}
    layers = [layer for layer in plan.layers if layer.arithmetic != "half"]  # what stays float, as the plan has it
    owners = {layer.weight for layer in layers}
    sites = [site for site in plan.sites if site.name in owners]
    weights = [weight_of(model.get_submodule(site.name.removesuffix(".weight"))).detach() for site in sites]
    options = [
        _options(site, weight, known, (importance or {}).get(site.name, 1.0))
        for site, weight in zip(sites, weights, strict=True)
    ]
    chosen = allocate(options, budget * sum(weight.numel() for weight in weights))
    by_site = {site.name: option.name for site, option in zip(sites, chosen, strict=True)}
    return [Rule(match=only(layer.path), weight=by_site[layer.weight]) for layer in layers]


def _options(site: Site, weight: Tensor, known: Mapping[str, Format], importance: float) -> list[Option]:
    found = []
    sample = _sampled(weight)
    for name, fmt in known.items():
        try:
            bits = fmt.storage_bits(tuple(weight.shape))
        except FormatError:
            continue
        found.append(Option(name, bits, importance * weight.numel() * noise_to_signal(sample, fmt)))
    if not found:
        raise PlanError(
            f"None of {', '.join(known)} fits {site.name!r} of shape {list(weight.shape)}. Add one that does, such as "
            "float16, or keep the layer in float by a rule."
        )
    return found


@torch.no_grad()
def noise_to_signal(x: Tensor, fmt: Format) -> float:
    """Squared error over squares of a tensor that is stored in a format, with the parameters of least error.

    >>> noise_to_signal(torch.tensor([[1.0, 2.0, 3.0, 7.0]]), named_format("int4/tensor"))
    0.0
    """
    quantizer = Quantizer(fmt, tuple(x.shape), MSE(), LSQ(), "frozen")
    quantizer.fit(x)
    power = float(x.to(torch.float64).square().sum())
    return float((quantizer(x).to(torch.float64) - x).square().sum()) / power if power else 0.0


def _sampled(weight: Tensor) -> Tensor:
    """Whole rows, evenly spread."""
    rows = weight.reshape(len(weight), -1)
    return rows[:: -(-rows.numel() // SAMPLE)].reshape(-1, *weight.shape[1:]).to(torch.float32)


def only(path: str) -> str:
    """A pattern that this path alone matches; a path without a dot could be the name of a kind or class too."""
    return path if re.fullmatch(r"[\w.]*\.[\w.]*", path) else f"re:{re.escape(path)}"
