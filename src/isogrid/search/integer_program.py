"""The choice of one option for each of many things as an integer program, solved to the optimum."""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from isogrid.errors import PlanError
from isogrid.search.allocation import Option, too_small


def optimum(options: Sequence[Sequence[Option]], budget: float) -> list[Option]:
    """One option for each thing, with the least total error that a budget of bits allows.

    Minimises the sum of `error · x` over one binary x for each option, where those of a thing add up to 1 and the sum
    of `bits · x` stays within the budget: the program of LQ-LoRA (Guo et al., arXiv 2311.12023), by HiGHS.
    `isogrid.search.allocate` is faster and misses the optimum by less than one step's error.

    Args:
        options: for each thing, at least one.
        budget: in bits.

    Raises:
        PlanError: even the smallest options take more.

    >>> few, many = Option("int2", 20, 9.0), Option("int8", 80, 1.0)
    >>> [option.name for option in optimum([[few, many], [Option("int2", 20, 2.0), many]], budget=100)]
    ['int8', 'int2']
    """
    smallest = sum(min(option.bits for option in each) for each in options)
    if smallest > budget:
        raise too_small(budget, smallest)
    flat = [(thing, option) for thing, each in enumerate(options) for option in each]
    things = np.array([thing for thing, _ in flat])
    bits, errors = (np.array([getattr(option, name) for _, option in flat]) for name in ("bits", "error"))
    one_each = csr_array((np.ones(len(flat)), (things, np.arange(len(flat)))))
    # Of the order of 1, for the solver's tolerances are absolute.
    largest = max(float(errors.max()), np.finfo(float).tiny)
    result = milp(
        errors / largest,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(bits[None] / budget, -np.inf, 1)],
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise PlanError(f"No choice of formats within {budget:,.0f} bits was found: {result.message}")
    chosen = [option for (_, option), share in zip(flat, result.x, strict=True) if share > 0.5]
    return chosen
