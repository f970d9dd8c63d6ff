"""Mixtures of experts whose weights are stacked in parameters of three dimensions, as transformers has them.

The two products of all experts become layers. Each reads the stack as one matrix, [experts * out, in], so that formats,
ranges and estimators see the weight of a wide Linear: a scale per channel is one for each row of each expert.
"""

from collections.abc import Hashable
from functools import cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from isogrid.layers.borrowed import TakenApart
from isogrid.layers.integer import uncounted
from isogrid.layers.layer import QuantizedLayer, link, replacement
from isogrid.layers.made_classes import reduced
from isogrid.layers.operations import BilinearOperation, GroupedOperation
from isogrid.layers.stored import StoredLinear
from isogrid.layers.weights import parameter_of


class BorrowedExperts(nn.Module):
    """One product of all experts, by stacked parameters of the module around.

    Args:
        owner: that module; it is referred to, not registered.
        weight, bias: names of its parameters, [experts, out, in] and [experts, out].
        turned: the weight is stored [experts, in, out].
    """

    owner: Any

    def __init__(self, owner: nn.Module, weight: str, bias: str | None = None, turned: bool = False):
        super().__init__()
        link(self, "owner", owner)
        self.source, self.bias_source, self.turned = weight, bias, turned
        self.experts = len(parameter_of(owner, weight))
        self.out_features, self.in_features = len(self.weight) // self.experts, self.weight.shape[1]

    @property
    def weight(self) -> Tensor:
        """[experts * out, in]."""
        stack = parameter_of(self.owner, self.source)
        return (stack.transpose(1, 2) if self.turned else stack).flatten(0, 1)

    @property
    def bias(self) -> Tensor | None:
        """[experts * out] or None."""
        return None if self.bias_source is None else parameter_of(self.owner, self.bias_source).flatten()

    @property
    def borrowed_key(self) -> Hashable:
        """Equal for layers that borrow the same stack; see `isogrid.layers.weights.weight_key`."""
        return id(getattr(self.owner, self.source, self.owner)), self.source, None

    def forward(self, input: Tensor, ends: tuple[int, ...]) -> Tensor:
        """input [rows, in] sorted by expert, and where each expert's rows end, to [rows, out]."""
        return GroupedOperation(ends).forward(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}"


class QuantizedExperts(QuantizedLayer, BorrowedExperts):
    """One product of all experts, quantised; made by `isogrid.prepare`."""

    @property
    def operation(self) -> BilinearOperation:
        raise NotImplementedError("The operation of experts depends on the rows of each call.")

    def forward(self, input: Tensor, ends: tuple[int, ...]) -> Tensor:  # type: ignore[override]
        with torch._C.DisableTorchFunction():
            return self.compute(input, GroupedOperation(ends))

    def to_integer(self) -> nn.Module:
        """The layer that stores codes."""
        return self.to_stored(StoredExperts)


class StoredExperts(StoredLinear):
    """One product of all experts, with a stored weight [experts * out, in]."""

    def forward(self, input: Tensor, ends: tuple[int, ...]) -> Tensor:  # type: ignore[override]
        with uncounted():
            return self.compute(input, GroupedOperation(ends))


class SeparateExperts(TakenApart):
    """Mixin of the experts of transformers (`use_experts_implementation`), with their products as children.

    Computes as transformers' `grouped_mm` does, which is its default: rows sorted by expert, outputs weighted and added
    up over the experts of a token.
    """

    extending: ClassVar[type[nn.Module]]
    has_gate: bool
    has_bias: bool
    is_transposed: bool

    @classmethod
    def of(cls, module: nn.Module) -> Self:
        kind: Any = type(module)
        new: Any = replacement(module, _separate(kind))
        new._modules = dict(module._modules)
        new.add_products()
        return new  # type: ignore[no-any-return]

    def add_products(self) -> None:
        for name in ("gate_up_proj" if self.has_gate else "up_proj", "down_proj"):
            bias = f"{name}_bias" if self.has_bias else None
            child = BorrowedExperts(self, name, bias, self.is_transposed)
            self.add_module(f"{name}ection", child.train(self.training))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden], experts and their weights [tokens, chosen] to [tokens, hidden]."""
        module: Any = self
        chosen = top_k_index.shape[-1]
        expert, order = top_k_index.reshape(-1).sort(stable=True)
        experts = torch.arange(module.num_experts, device=expert.device)
        ends = tuple(torch.searchsorted(expert, experts, right=True).tolist())
        inner = (module.gate_up_projection if self.has_gate else module.up_projection)(
            hidden_states[order // chosen], ends
        )
        inner = module._apply_gate(inner) if self.has_gate else module.act_fn(inner)
        outer = module.down_projection(inner, ends)
        outer = module.post_expert_norm(outer) if module.has_post_expert_norm else outer
        weighted = outer * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        back = weighted[order.argsort()].reshape(-1, chosen, weighted.shape[-1])
        total: Tensor = back.sum(1).to(hidden_states.dtype)
        return total

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self, _separate, self.extending)


@cache
def _separate(kind: Any) -> type[nn.Module]:
    return type(f"Separate{kind.__name__}", (SeparateExperts, kind), {"extending": kind, "__module__": __name__})


def are_stacked_experts(module: nn.Module) -> bool:
    """Whether a module keeps its experts as transformers does: stacks of three dimensions, and flags that say how.

    So it is not where experts are spread over devices: their products are then not all here.
    """
    experts: Any = module
    flags = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "num_experts")
    if isinstance(module, SeparateExperts) or any(not hasattr(module, flag) for flag in flags):
        return False
    if getattr(module, "_is_expert_parallel", False):
        return False
    names = ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")
    stacks = [getattr(module, name, None) for name in names]
    return all(isinstance(stack, Tensor) and stack.dim() == 3 for stack in stacks)
