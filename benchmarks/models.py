"""Two architectures that everybody knows, in plain torch, with random weights: what counts here is their shape."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a residual (He et al., arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet18(nn.Module):
    """1.8 GMACs and 11.7 million parameters at 224x224."""

    def __init__(self, classes: int = 1000):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.pool = nn.MaxPool2d(3, 2, 1)
        widths = (64, 64, 128, 256, 512)
        blocks: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            stride = 1 if inputs == outputs else 2
            blocks += [BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.pool(self.stem(x)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class InvertedResidual(nn.Module):
    """Expand, convolve each channel alone, project; a residual where the shape stays (arXiv 1801.04381)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        hidden = inputs * expansion
        widen = (nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()) if expansion > 1 else ()
        self.layers = nn.Sequential(
            *widen,
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.has_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.has_residual else self.layers(x)


class MobileNetV2(nn.Module):
    """0.3 GMACs and 3.5 million parameters at 224x224.

    Args:
        classes: of the head.
        width: multiplies the channels.
        strides: of the stem and of the second to fourth and sixth group of blocks; small images want fewer.
    """

    def __init__(self, classes: int = 1000, width: float = 1.0, strides: tuple[int, ...] = (2, 2, 2, 2, 2)):
        super().__init__()
        stem, second, third, fourth, sixth = strides
        groups = (
            (1, 16, 1, 1),
            (6, 24, 2, second),
            (6, 32, 3, third),
            (6, 64, 4, fourth),
            (6, 96, 3, 1),
            (6, 160, 3, sixth),
            (6, 320, 1, 1),
        )
        channels = _rounded(32 * width)
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, stem, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU6()]
        for expansion, outputs, count, stride in groups:
            for number in range(count):
                step = stride if number == 0 else 1
                layers.append(InvertedResidual(channels, _rounded(outputs * width), step, expansion))
                channels = _rounded(outputs * width)
        last = _rounded(1280 * max(1.0, width))
        layers += [nn.Conv2d(channels, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU6()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def _rounded(channels: float) -> int:
    """To a multiple of eight, not below nine tenths."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
