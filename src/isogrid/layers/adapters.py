"""Adapters inside layers: low-rank updates, in three places.

`l4q` adds them to the weight before it is quantised, `Q(W + BA)`; `qa-lora` adds them to the zero points or offsets of
its groups, over codes that are frozen; `qlora` adds them to the layer's output, `Q(W) + BA`, which no grid holds.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isogrid.quantizers.sources import LowRank, Made, Magnitudes

ATTRIBUTE = "adapters"
"""Of a layer: its `Adapters`."""


Method = Literal["l4q", "qlora", "qa-lora"]
"""Where updates are added: to the weight that is quantised, to the output, or to the zero points of groups."""

METHODS: tuple[str, ...] = get_args(Method)


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter of a model, as checkpoints keep it.

    Attributes:
        name: of the adapter.
        rank: of the update of each layer.
        alpha: the update is multiplied by `alpha / rank`, or by `alpha / √rank` where it is stabilised.
        layers: paths of the layers that own it.
        method: where it is added.
        dora: the norm of each row of the weight trains too.
        rank_stabilized: rsLoRA (arXiv 2312.03732).
        active: it is added to the weights.
    """

    name: str
    rank: int
    alpha: float
    layers: tuple[str, ...]
    method: Method = "l4q"
    dora: bool = False
    rank_stabilized: bool = False
    active: bool = True

    @property
    def scaling(self) -> float:
        """What BA is multiplied by.

        >>> AdapterSpec("default", rank=16, alpha=32, layers=()).scaling
        2.0
        """
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def to_json(self) -> dict[str, Any]:
        """As `from_json` reads it."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "AdapterSpec":
        """The adapter of a checkpoint."""
        return cls(**{**data, "layers": tuple(data["layers"])})


class Adapter(nn.Module):
    """One low-rank update of a matrix: `scaling · B A`.

    A starts uniform and B at zero, as in LoRA (Hu et al., arXiv 2106.09685), so that nothing changes at first.

    Args:
        weight: what is updated, [out, ...]; its shape, device and dtype are taken.
        rank: of the update.
        scaling: s.
        method: where it is added.
        dora: learn the norm of each row too, from that of the weight: DoRA (arXiv 2402.09353).

    Attributes:
        A, B: parameters [rank, all dimensions of the weight but the first] and [out, rank]; float32 at least.
        magnitude: parameter [out], or None.

    >>> adapter = Adapter(torch.ones(6, 4), rank=2, scaling=0.5)
    >>> adapter.A.shape, adapter.B.shape
    (torch.Size([2, 4]), torch.Size([6, 2]))
    """

    magnitude: nn.Parameter | None

    def __init__(self, weight: Tensor, rank: int, scaling: float, method: Method = "l4q", dora: bool = False):
        super().__init__()
        rows = weight.detach().flatten(1)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.rank, self.scaling, self.method = rank, scaling, method
        self.A = nn.Parameter(torch.empty(rank, rows.shape[1], dtype=dtype, device=weight.device))
        self.B = nn.Parameter(torch.zeros(len(rows), rank, dtype=dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        norms = torch.linalg.vector_norm(rows.to(dtype), dim=1) if dora else None
        self.register_parameter("magnitude", None if norms is None else nn.Parameter(norms))

    def extra_repr(self) -> str:
        more = "" if self.magnitude is None else ", dora"
        return f"{self.method}, rank={self.rank}, scaling={self.scaling:g}{more}"


class Adapters(nn.ModuleDict):
    """The adapters of one layer by name.

    Attributes:
        active: names of those that are added to the weight.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active: tuple[str, ...] = ()

    def made(self) -> Made | None:
        """How the weight is made with the active adapters that change it; None without any.

        That of a layer with adapters beside it is what its merged weight would be in float.
        """
        chosen = self._chosen("l4q", "qlora")
        if not chosen:
            return None
        update = LowRank(tuple(adapter.scaling for adapter in chosen))
        pairs = tuple(tensor for adapter in chosen for tensor in (adapter.A, adapter.B))
        magnitudes = tuple(adapter.magnitude for adapter in chosen if adapter.magnitude is not None)
        return Made(Magnitudes(update), (*magnitudes, *pairs)) if magnitudes else Made(update, pairs)

    @property
    def stands_beside(self) -> bool:
        """Whether an active adapter is added to the layer's output."""
        return bool(self._chosen("qlora"))

    def beside(self, x: Tensor, y: Tensor) -> Tensor:
        """The output y [..., out] of a layer, with what adapters beside it make of its input x [..., in]."""
        for adapter in self._chosen("qlora"):
            update = F.linear(F.linear(x.to(adapter.A.dtype), adapter.A), adapter.B)
            y = y + (update * adapter.scaling).to(y.dtype)
        return y

    def shift(self) -> Tensor | None:
        """What adapters add to the values of each group, [out, groups]; None without any."""
        total: Tensor | None = None
        for adapter in self._chosen("qa-lora"):
            with torch.autocast(adapter.A.device.type, enabled=False):
                update = (adapter.B @ adapter.A) * adapter.scaling
            total = update if total is None else total + update
        return total

    def _chosen(self, *methods: str) -> list[Any]:
        chosen: list[Any] = [self[name] for name in self.active]
        return [adapter for adapter in chosen if adapter.method in methods]

    def extra_repr(self) -> str:
        return f"active={', '.join(self.active) or 'none'}"


def adapters_of(module: nn.Module) -> Adapters | None:
    """The adapters of a layer, which may be those of another layer with the same weight."""
    found = getattr(module, ATTRIBUTE, None)
    return found if isinstance(found, Adapters) else None


def adapter_of(module: nn.Module, name: str) -> Adapter:
    """The adapter of a layer by its name."""
    found: Any = getattr(module, ATTRIBUTE)[name]
    return found  # type: ignore[no-any-return]


def made_of(module: nn.Module) -> Made | None:
    """How a layer's weight is made with its active adapters; None where it has none."""
    adapters = adapters_of(module)
    return None if adapters is None else adapters.made()
