"""What a training step on quantised grids costs over the same step in float, beside torchao.

The model is a stack of Llama-shaped blocks in plain PyTorch: RMSNorm, causal attention, SwiGLU. All variants take one
step after the other in every round, so that whatever else the machine does falls on all of them; a ratio is a
variant's step over the float step of its round. Peak memory is what tensors occupy at the worst moment of a step,
parameters and optimizer state included, as the allocator reports it.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --rounds 9 --tokens 2048 --json overhead.json
    python benchmarks/overhead.py --clock processor      # on a machine that is busy with other things
"""

import argparse
import copy
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import isogrid as ig
from isogrid.quantizers import compiled
from isogrid.training.memory import peak_bytes, resting_bytes


class Attention(nn.Module):
    """Causal self-attention without biases."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        split = (x.shape[0], x.shape[1], self.heads, -1)
        query, key, value = (layer(x).view(split).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(x.shape))


class SwiGLU(nn.Module):
    """The gated feed-forward layer of Llama."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One decoder block."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention, self.mlp = Attention(width, heads), SwiGLU(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


@dataclass
class Variant:
    """A prepared model with its optimizer, and what was measured of it."""

    name: str
    model: nn.Module
    plain: bool = False
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)

    def step(self, x: Tensor, target: Tensor, clock: Callable[[], float] = time.perf_counter) -> float:
        """One optimizer step; how long it took by a clock."""
        with without_compiler() if self.plain else with_compiler():
            self.optimizer.zero_grad(set_to_none=True)
            start = clock()
            F.mse_loss(self.model(x), target).backward()
            self.optimizer.step()
            return clock() - start

    def measure_memory(self, x: Tensor, target: Tensor) -> None:
        """Peak of one step, from the allocator's own record."""
        self.optimizer.zero_grad(set_to_none=True)
        peak = peak_bytes(partial(self.step, x, target))
        self.peak_bytes = peak + resting_bytes(self.model, self.optimizer)


@contextmanager
def without_compiler() -> Iterator[None]:
    """As on a machine that has none."""
    before = compiled.SMALLEST_COMPILED
    compiled.SMALLEST_COMPILED = sys.maxsize
    try:
        yield
    finally:
        compiled.SMALLEST_COMPILED = before


@contextmanager
def with_compiler() -> Iterator[None]:
    """As it is."""
    yield


def isogrid_model(model: nn.Module, x: Tensor, scheme: str, rules: tuple[ig.Rule, ...] = ()) -> nn.Module:
    """A copy on the grids of a scheme, calibrated."""
    model = copy.deepcopy(model)
    ig.prepare(model, ig.plan(model, scheme=scheme, rules=rules, example_inputs=(x,)))
    return ig.calibrate(model, [x])


def torchao_model(model: nn.Module, weight: Any, activation: Any, compiles: bool = False) -> nn.Module:
    """A copy prepared for torchao's quantization-aware training."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    model = copy.deepcopy(model)
    quantize_(model, QATConfig(weight_config=weight, activation_config=activation, step="prepare"))
    if compiles:
        model.compile()
    return model


def variants(model: nn.Module, x: Tensor, peers: bool) -> Iterator[tuple[str, Callable[[], nn.Module], bool]]:
    """Name, how to make it, and whether it runs without a compiler."""
    yield "float", lambda: copy.deepcopy(model), False
    yield "Isogrid int4/group32", lambda: isogrid_model(model, x, "w4a16"), False
    yield "Isogrid int4/group32, no compiler", lambda: isogrid_model(model, x, "w4a16"), True
    yield "Isogrid int8 dynamic, int4/group32", lambda: isogrid_model(model, x, "w4a8-dynamic"), False
    rules = (ig.Rule(match="add", keep="float"),)
    yield "Isogrid static W8A8, linear layers", lambda: isogrid_model(model, x, "w8a8", rules), False
    yield "Isogrid static W8A8", lambda: isogrid_model(model, x, "w8a8"), False
    yield "Isogrid static W8A8, no compiler", lambda: isogrid_model(model, x, "w8a8"), True
    if peers:
        from torchao.quantization.qat import IntxFakeQuantizeConfig

        int4 = IntxFakeQuantizeConfig(torch.int4, group_size=32)
        int8 = IntxFakeQuantizeConfig(torch.int8, "per_channel")
        tokens = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
        yield "torchao int4/group32", lambda: torchao_model(model, int4, None), False
        yield "torchao int4/group32, torch.compile", lambda: torchao_model(model, int4, None, compiles=True), False
        yield "torchao dynamic W8A8", lambda: torchao_model(model, int8, tokens), False


def torchao_is_there(console: Console) -> bool:
    """Whether the peer can be measured; said where it cannot."""
    try:
        import torchao
    except ImportError:
        console.print("torchao is not installed, so it is left out. To measure it too: pip install 'isogrid[torchao]'")
        return False
    console.print(f"torch {torch.__version__}, torchao {torchao.__version__}, {torch.get_num_threads()} threads")
    return True


def measure(arguments: argparse.Namespace, console: Console) -> list[Variant]:
    """All variants, measured in turn."""
    torch.manual_seed(0)
    blocks = [Block(arguments.width, arguments.heads, arguments.hidden) for _ in range(arguments.blocks)]
    model = nn.Sequential(*blocks)
    x = torch.randn(arguments.tokens // arguments.length, arguments.length, arguments.width)
    target = torch.randn_like(x)
    chosen = variants(model, x, torchao_is_there(console))
    made = []
    for name, make, plain in chosen:
        if name == "float" or arguments.only in name:
            made.append(Variant(name, make(), plain))
            # The first step compiles kernels, the second shows them the shapes again.
            made[-1].step(x, target)
            made[-1].step(x, target)
    for _ in track(range(arguments.rounds), "Rounds", console=console, disable=not console.is_terminal):
        for variant in made:
            variant.seconds.append(variant.step(x, target, CLOCKS[arguments.clock]))
    for variant in made:
        variant.measure_memory(x, target)
    return made


def summary(made: list[Variant]) -> list[dict[str, Any]]:
    """One row a variant."""
    base = made[0]
    rows = []
    for variant in made:
        ratios = [a / b for a, b in zip(variant.seconds, base.seconds, strict=True)]
        low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else (ratios * 3)
        rows.append(
            {
                "name": variant.name,
                "seconds": median(variant.seconds),
                "time_ratio": median(ratios),
                "time_ratio_quartiles": [low, high],
                "peak_bytes": variant.peak_bytes,
                "memory_ratio": variant.peak_bytes / base.peak_bytes,
            }
        )
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table()
    table.add_column("variant", no_wrap=True)
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for row in rows:
        low, high = row["time_ratio_quartiles"]
        table.add_row(
            row["name"],
            f"{row['seconds']:.3f}",
            f"{row['time_ratio']:.2f}",
            f"{low:.2f}–{high:.2f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
            f"{row['memory_ratio']:.2f}",
        )
    console.print(table)


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}

HEADINGS = ("step [s]", "ratio", "quartiles", "peak [MiB]", "ratio")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512, help="features of a token")
    parser.add_argument("--hidden", type=int, default=1408, help="features inside the feed-forward layer")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens a step, a multiple of --length")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--rounds", type=int, default=7, help="steps measured of each variant")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="what seconds are measured by")
    parser.add_argument("--only", default="", help="measure float and the variants whose name contains this")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    rows = summary(measure(arguments, console))
    show(rows, console)
    if arguments.json is not None:
        settings = {key: value for key, value in vars(arguments).items() if key != "json"}
        machine = {"processor": platform.processor(), "torch": torch.__version__}
        arguments.json.write_text(json.dumps({"settings": settings, **machine, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
