"""Integer modules as they leave conversion: codes inside, float values on their grids between them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

OPERATORS = torch.ops.isogrid
Grid = tuple[float, int]


class Integer(nn.Module):
    """Grids are buffers: `input_scale` and `input_zero_point` of `input`, and so on."""

    def grid(self, site: str, grid: Grid) -> None:
        self.register_buffer(f"{site}_scale", torch.tensor([grid[0]]))
        self.register_buffer(f"{site}_zero_point", torch.tensor([grid[1]], dtype=torch.uint8))

    def of(self, site: str) -> tuple[Tensor, Tensor]:
        return getattr(self, f"{site}_scale"), getattr(self, f"{site}_zero_point")

    def codes(self, site: str, x: Tensor) -> Tensor:
        return OPERATORS.quantize(x, *self.of(site), 0, 255)

    def values(self, codes: Tensor, site: str = "output") -> Tensor:
        return OPERATORS.dequantize(codes, *self.of(site))

    def weights(self, shape: Sequence[int], low: int, high: int) -> None:
        self.register_buffer("weight", torch.randint(low, high + 1, shape, dtype=torch.int8))
        fan_in = self.weight[0].numel()
        self.register_buffer("weight_scale", (torch.rand(shape[0]) + 0.5) * 2 / (high + 1) / fan_in**0.5)
        self.register_buffer("bias", torch.randint(-500, 500, shape[:1], dtype=torch.int32))


class Convolution(Integer):
    def __init__(
        self,
        shape: Sequence[int],
        x: Grid,
        y: Grid,
        codes: tuple[int, int],
        relu: bool = False,
        groups: int = 1,
        high: int = 255,
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.weights(shape, *codes)
        self.grid("input", x)
        self.grid("output", y)
        rank = len(shape) - 2
        self.window = ([stride] * rank, [k // 2 for k in shape[2:]], [1] * rank, groups)
        self.bounds = (y[1] if relu else 0, high)

    def forward(self, x: Tensor) -> Tensor:
        operands = (*self.of("input"), self.weight, self.weight_scale, self.bias, *self.of("output"))
        codes = OPERATORS.static_convolution(self.codes("input", x), *operands, *self.window, *self.bounds)
        return self.values(codes)


class Linear(Integer):
    def __init__(self, shape: Sequence[int], x: Grid, y: Grid | None, codes: tuple[int, int]) -> None:
        super().__init__()
        self.weights(shape, *codes)
        self.grid("input", x)
        self.quantized = y is not None
        if y is not None:
            self.grid("output", y)

    def forward(self, x: Tensor) -> Tensor:
        operands = (*self.of("input"), self.weight, self.weight_scale, self.bias)
        if not self.quantized:
            return OPERATORS.static_linear_float(self.codes("input", x), *operands)
        return self.values(OPERATORS.static_linear(self.codes("input", x), *operands, *self.of("output"), 0, 255))


class Binary(Integer):
    """Add or multiply."""

    def __init__(self, operator: str, a: Grid, b: Grid, y: Grid, relu: bool = False) -> None:
        super().__init__()
        self.operator = operator
        self.grid("a", a)
        self.grid("b", b)
        self.grid("output", y)
        self.low = y[1] if relu else 0

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        operands = (self.codes("a", a), *self.of("a"), self.codes("b", b), *self.of("b"), *self.of("output"))
        return self.values(getattr(OPERATORS, self.operator)(*operands, self.low, 255, "onnxruntime"))


class Pool(Integer):
    """Average over windows, or over all of space."""

    def __init__(self, x: Grid, y: Grid, window: tuple[list[int], list[int], list[int], bool, bool] | None) -> None:
        super().__init__()
        self.grid("input", x)
        self.grid("output", y)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        operands = (self.codes("input", x), *self.of("input"), *self.of("output"))
        if self.window is None:
            return self.values(OPERATORS.static_global_average_pool(*operands, 0, 255, "onnxruntime"))
        return self.values(OPERATORS.static_average_pool(*operands, *self.window, 0, 255, "onnxruntime"))


class Concatenate(Integer):
    def __init__(self, a: Grid, b: Grid, y: Grid) -> None:
        super().__init__()
        self.grid("a", a)
        self.grid("b", b)
        self.grid("output", y)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        scales, zero_points = zip(self.of("a"), self.of("b"), strict=True)
        parts = [self.codes("a", a), self.codes("b", b)]
        return self.values(OPERATORS.static_concatenate(parts, scales, zero_points, *self.of("output"), 1, 0, 255))


class Residual(nn.Module):
    """conv, relu, max pool, conv, add, relu, global average pool, flatten, linear."""

    def __init__(self, codes: tuple[int, int], zero_point: int = 0) -> None:
        super().__init__()
        image, wide, signed, narrow = (0.02, 128), (0.03, zero_point), (0.04, 117), (0.035, 0)
        self.conv1 = Convolution((16, 3, 3, 3), image, wide, codes, relu=True)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = Convolution((16, 16, 3, 3), wide, signed, codes)
        self.add = Binary("static_add", signed, wide, narrow, relu=True)
        self.mean = Pool(narrow, (0.02, 0), None)
        self.fc = Linear((10, 16), (0.02, 0), None, codes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv1(x))
        return self.fc(self.mean(self.add(self.conv2(x), x)).flatten(1))


class Various(nn.Module):
    """What the residual network has not: branches, modules called again, three-dimensional Linear, narrow grids."""

    def __init__(self) -> None:
        super().__init__()
        image, middle, small = (0.02, 128), (0.03, 100), (0.25, 3)
        self.narrow = Convolution((8, 2, 3), image, small, (-8, 7), relu=True, high=15, groups=2)
        self.wide = Convolution((8, 4, 5), image, middle, (-128, 127), stride=1)
        self.join = Concatenate(small, middle, (0.05, 60))
        self.average = Pool((0.05, 60), (0.04, 90), ([3], [2], [1], True, False))
        self.shared = Linear((16, 16), (0.04, 90), (0.04, 90), (-128, 127))
        self.small = Linear((16, 16), (0.04, 90), (0.04, 90), (-8, 7))
        self.gate = Binary("static_multiply", (0.04, 90), (0.04, 90), (0.06, 128))
        self.head = Linear((5, 16), (0.06, 128), None, (-2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.average(self.join(self.narrow(x), self.wide(x)))
        tokens = x.transpose(1, 2)
        mixed = self.shared(self.small(self.shared(self.small(self.shared(tokens)))))
        return self.head(self.gate(mixed, tokens))


class FloatBetween(nn.Module):
    """Float operations between quantised layers, each of a kind that ONNX Runtime has an integer kernel for."""

    def __init__(self) -> None:
        super().__init__()
        self.a = Linear((16, 16), (0.02, 128), (0.03, 117), (-128, 127))
        self.b = Linear((16, 16), (0.02, 128), (0.06, 90), (-128, 127))
        self.c = Linear((16, 16), (0.02, 128), None, (-128, 127))
        self.heads = nn.ModuleList(Linear((4, 16), (0.015, 100), None, (-128, 127)) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        operations = [
            a + b,
            (a * b).relu(),
            a.sigmoid().T.contiguous().T,
            functional.leaky_relu(b),
            a.softmax(-1),
            functional.avg_pool1d(a.unsqueeze(1), 3, 1, 1).flatten(1),
            self.c(x),
            self.c(x).relu(),
        ]
        return torch.cat([head(y) for head, y in zip(self.heads, operations, strict=True)], 1)


class ReturnedAndRead(nn.Module):
    """A float value that leaves the model and that a quantised layer reads, in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.a = Linear((16, 16), (0.02, 128), None, (-128, 127))
        self.b = Linear((16, 16), (0.015, 100), None, (-128, 127))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x).abs()
        return y, self.b(y.transpose(1, 2))


def recorded_codes(module: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The module's output, and the codes that each of its operators gives, in order."""
    seen: list[Tensor] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
            result = function(*arguments, **(options or {}))
            if function.namespace == "isogrid" and result.dtype == torch.uint8:
                seen.append(result)
            return result

    with torch.no_grad(), Record():
        return module(x), seen
