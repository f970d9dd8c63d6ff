"""A network with what targets fuse: batch norm, clamps, additions of two layers and of a layer and its input."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isogrid as ig


class Residuals(nn.Module):
    """3 x 12 x 12 images to ten scores."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU6())
        self.pointwise = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16))
        self.down, self.left = nn.Conv2d(16, 32, 1, stride=2), nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.joined = nn.Conv2d(64, 32, 3)
        self.hidden, self.head = nn.Linear(32, 64), nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.max_pool2d(F.relu(x + self.pointwise(self.depthwise(x))), 2)
        a, b = self.down(x), self.left(x)
        x = self.joined(torch.cat([F.relu(a + b), b], dim=1))
        return self.head(F.relu(self.hidden(x.mean((2, 3)))))


class Portable(nn.Module):
    """Two convolutions with strides are added, one of them pointwise by default; the mean is what comes out.

    Both branches end in a ReLU, a third one in no more than its convolution.
    """

    def __init__(self, channels: int, kernel: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.ReLU())
        self.picked = nn.Sequential(nn.Conv2d(channels, 16, kernel, stride=2, padding=kernel // 2), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(channels, 16, 3, stride=2, padding=1), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.bottleneck = nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU6(), nn.Conv2d(32, 16, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.last(self.picked(x) + self.branch(x))
        return (x + self.bottleneck(x)).mean((2, 3))


INPUTS = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def residuals(seed: int = 0) -> Residuals:
    """The network with batch norms that have seen something, some factors of which are negative."""
    torch.manual_seed(seed)
    model = Residuals().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, -2, 2)
            nn.init.normal_(module.bias)
    return model


def trained(target: str, scheme: str = "w8a8", rules: list[ig.Rule] | None = None) -> nn.Module:
    """The network prepared for a target, calibrated, and after two steps of training."""
    model = residuals()
    ig.prepare(model, ig.plan(model, target=target, scheme=scheme, rules=rules or [], example_inputs=(INPUTS[:1],)))
    ig.calibrate(model, [INPUTS])
    optimizer = torch.optim.SGD(ig.parameter_groups(model, lr=1e-3))
    for _ in range(2):
        optimizer.zero_grad()
        model(INPUTS).square().mean().backward()
        optimizer.step()
    return model.eval()
