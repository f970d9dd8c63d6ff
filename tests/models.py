"""Small models with what real ones do, and the flow they all go through."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isogrid as ig
from isogrid.planning.state import absorbed_batch_norms, quantizers

Inputs = tuple[Any, ...]


class Residual(nn.Module):
    """The same ReLU object twice, an addition in place, a concatenation, pooling, dropout, flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4, eps=0.01, momentum=0.3), nn.ReLU())
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4, momentum=None)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4, affine=False)
        self.relu = nn.ReLU(inplace=True)
        self.pool, self.mean = nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)
        self.dropout, self.fc = nn.Dropout(0.2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x
        joined = torch.cat([x, self.relu(y)], dim=1)
        return self.fc(self.dropout(torch.flatten(self.mean(joined), 1)))


class Small(nn.Module):
    """Convolution with batch norm and ReLU, an addition in place, pooling, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        y += x
        return self.fc(F.relu(y).mean((2, 3)))


class Spellings(nn.Module):
    """Functions and methods by all their names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(input=self.a(input=x))
        y = torch.add(input=y, other=self.b(x))
        y = y.add(self.c(x)).relu()
        y = torch.cat(tensors=[y, x], dim=1)
        y = F.avg_pool2d(input=y, kernel_size=2)
        return torch.mean(y, dim=(2, 3)) + y.mean((-1, -2), keepdim=False)


class Geometries(nn.Module):
    """Padding modes, same padding on unequal sides, groups, dilation, stride."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(2, 4, 3, padding="same", dilation=2),
                nn.Conv2d(4, 4, (2, 4), padding="same"),
                nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
                nn.Conv2d(4, 4, 3, padding=(1, 2), padding_mode="circular", groups=2),
                nn.Conv2d(4, 8, 3, padding=2, padding_mode="replicate", groups=4, stride=2),
                nn.Conv2d(8, 4, 1, stride=2, bias=False),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Shared(nn.Module):
    """A block used twice, with an addition inside."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Addition()
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.block(x)))


class Addition(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.linear(x))


class Tied(nn.Module):
    """Embedding and output layer share one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 32, padding_idx=0)
        self.norm, self.hidden = nn.LayerNorm(32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(F.gelu(self.hidden(self.embedding(tokens)))))


class Inputs2(nn.Module):
    """Two inputs and a keyword with a default."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor, z: Tensor, scale: float = 1.0, flip: bool = False) -> Tensor:
        y = self.a(x) + self.b(z)
        return self.a(y.flip(-1) if flip else y) * scale


class Dense(nn.ModuleDict):
    """A container with a forward of its own, as in DenseNet."""

    def __init__(self) -> None:
        super().__init__({f"layer{i}": nn.Sequential(nn.Conv2d(2 + 2 * i, 2, 1), nn.ReLU()) for i in range(2)})

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for _, layer in self.items():
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class Dynamic(nn.Module):
    """Python that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + x
        if float(x.sum()) > 0:
            y = self.b(y)
        return self.c(y)


class Gated(nn.Module):
    """A difference, and a product with a gate over space."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.gate = nn.Conv2d(4, 4, 1)
        for layer in self.children():
            nn.init.normal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        y = F.relu(self.b(x)) - self.c(x)
        return self.d(y * self.gate(x.mean((2, 3), keepdim=True)))


class Curved(nn.Module):
    """Averages over windows, both kinds of GELU and leaky ReLU between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(F.gelu(self.a(x)), 2)
        x = F.avg_pool2d(F.gelu(self.b(x), approximate="tanh"), 3, 1)
        return F.leaky_relu(self.c(x), 0.1)


class Forked(nn.Module):
    """An input that is convolved, concatenated and convolved once more."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.cat([self.a(x), x], 1)) + self.c(x)


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(8, 2))


def sequential() -> nn.Module:
    relu = nn.ReLU()
    return nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), relu, nn.Conv1d(4, 4, 3), relu, nn.AvgPool1d(2), nn.Flatten(),
        nn.Linear(8, 6), nn.BatchNorm1d(6), relu, nn.Linear(6, 2),
    )  # fmt: skip


def volume() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2), nn.ReLU(), nn.MaxPool3d(2), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
        nn.Linear(2, 2),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "residual": (Residual, lambda: (torch.randn(5, 1, 8, 8),)),
    "small": (Small, lambda: (torch.randn(3, 2, 4, 4),)),
    "spellings": (Spellings, lambda: (torch.randn(3, 2, 6, 6),)),
    "geometries": (Geometries, lambda: (torch.randn(2, 2, 9, 9),)),
    "shared": (Shared, lambda: (torch.randn(7, 6),)),
    "tied": (Tied, lambda: (torch.randint(0, 12, (2, 5)),)),
    "two inputs": (Inputs2, lambda: (torch.randn(5, 4), torch.randn(5, 3))),
    "dense": (lambda: nn.Sequential(Dense(), nn.Conv2d(6, 2, 1)), lambda: (torch.randn(3, 2, 4, 4),)),
    "gated": (Gated, lambda: (torch.randn(3, 4, 8, 8),)),
    "curved": (Curved, lambda: (torch.randn(3, 4, 8, 8),)),
    "forked": (Forked, lambda: (torch.randn(3, 2, 6, 6),)),
    "dynamic": (Dynamic, lambda: (torch.randn(6, 4).abs(),)),
    "transformer": (transformer, lambda: (torch.randn(2, 5, 8),)),
    "sequential": (sequential, lambda: (torch.randn(6, 2, 8),)),
    "volume": (volume, lambda: (torch.randn(3, 1, 6, 6, 6),)),
}


def make(name: str, seed: int = 0) -> tuple[nn.Module, Inputs]:
    """A model with batch norms as training leaves them, gains of both signs included, and inputs for it."""
    torch.manual_seed(seed)
    model, inputs = MODELS[name][0](), MODELS[name][1]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            randomize(module)
    return model, inputs


def randomize(norm: Any) -> None:
    """Statistics and gains that are not those of a new batch norm."""
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    if norm.affine:
        nn.init.uniform_(norm.weight, -1.5, 1.5)
        nn.init.normal_(norm.bias)


def prepared(
    model: nn.Module, inputs: Inputs, scheme: Any = "w8a8", rules: Any = (), calibrate: bool = True
) -> nn.Module:
    """The model planned for these inputs, prepared and calibrated."""
    ig.prepare(model, ig.plan(model, scheme=scheme, rules=rules, example_inputs=inputs))
    return ig.calibrate(model, [inputs]) if calibrate else model


def switch_off(model: nn.Module) -> nn.Module:
    """Quantisation off everywhere."""
    for quantizer in quantizers(model).values():
        quantizer.enabled = False
    return model


def freeze_batch_norm(model: nn.Module) -> nn.Module:
    """Batch norm by its running statistics in training too."""
    for norm in absorbed_batch_norms(model):
        norm.statistics_are_frozen = True
    return model


def no_dropout(model: nn.Module) -> nn.Module:
    """Dropout off in training too."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def train(model: nn.Module, inputs: Inputs, steps: int, lr: float = 0.01) -> None:
    """Some steps of training towards zero."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(*inputs).square().mean().backward()
        optimizer.step()


def assert_equal(a: Any, b: Any) -> None:
    """Every bit."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
