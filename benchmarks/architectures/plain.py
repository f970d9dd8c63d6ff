"""Kinds that transformers lacks, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.building import Architecture, plain_image


class UNet(nn.Module):
    """Down, across and up again, the skips joined by concatenation."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.first, self.second, self.bottom = (
            self._block(a, b) for a, b in ((3, width), (width, 2 * width), (2 * width, 4 * width))
        )
        self.up_second = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.up_first = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.join_second, self.join_first = self._block(4 * width, 2 * width), self._block(2 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Module:
        layers = []
        for channels in (inputs, outputs):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        second = self.second(F.max_pool2d(first, 2))
        bottom = self.bottom(F.max_pool2d(second, 2))
        x = self.join_second(torch.cat([second, self.up_second(bottom)], 1))
        return self.head(self.join_first(torch.cat([first, self.up_first(x)], 1)))


def gan_generator(noise: int = 16, width: int = 8) -> nn.Module:
    """DCGAN's generator."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride, padding in (
        (noise, 4 * width, 1, 0),
        (4 * width, 2 * width, 2, 1),
        (2 * width, width, 2, 1),
    ):
        layers += [
            nn.ConvTranspose2d(inputs, outputs, 4, stride, padding, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
        ]  # fmt: skip
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False), nn.Tanh())


class LstmTagger(nn.Module):
    """A tag for every word."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(99, 16)
        self.lstm = nn.LSTM(16, 24, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(48, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0])


class DetectionHead(nn.Module):
    """Classes and boxes from two scales, written with functional calls on parameters of its own."""

    def __init__(self, width: int = 16, classes: int = 5):
        super().__init__()
        self.backbone = nn.Conv2d(3, width, 3, stride=4, padding=1)
        self.tower = nn.Parameter(torch.randn(width, width, 3, 3) / (3 * width**0.5))
        self.tower_bias = nn.Parameter(torch.zeros(width))
        self.classes = nn.Parameter(torch.randn(classes, width, 1, 1) / width**0.5)
        self.boxes = nn.Parameter(torch.randn(4, width, 3, 3) / (3 * width**0.5))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {"classes": [], "boxes": []}
        fine = F.relu(self.backbone(x))
        coarse = F.avg_pool2d(fine, 2)
        for level in (fine + F.interpolate(coarse, scale_factor=2.0, mode="nearest"), coarse):
            features = F.relu(F.conv2d(level, self.tower, self.tower_bias, padding=1))
            found["classes"].append(F.conv2d(features, self.classes).flatten(2).transpose(1, 2).sigmoid())
            boxes = F.conv2d(features, self.boxes, padding=1) * self.scale
            found["boxes"].append(F.relu(boxes).flatten(2).transpose(1, 2))
        return found


PLAIN: dict[str, Architecture] = {
    "U-Net": Architecture(UNet, plain_image),
    "GAN generator": Architecture(gan_generator, lambda: (torch.randn(2, 16, 1, 1),)),
    "LSTM tagger": Architecture(LstmTagger, lambda: (torch.randint(0, 99, (2, 12)),)),
    "Detection head": Architecture(DetectionHead, plain_image),
}
