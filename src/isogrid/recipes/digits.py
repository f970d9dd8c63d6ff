"""The built-in example: scikit-learn's handwritten digits, and a small residual network that reads them."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from isogrid.recipes.data import Data

TEST_SHARE = 1 / 3


@lru_cache(maxsize=1)
def digits() -> Data:
    """1198 digits to train on and 599 to test on, split once and for all, each class in the same share.

    Images are float32 [1, 8, 8] in [0, 1], labels int64. The source is the test set of E. Alpaydin and C. Kaynak,
    "Optical Recognition of Handwritten Digits" (1998), UCI Machine Learning Repository, which scikit-learn ships.

    >>> image, label = digits().test[0]
    >>> tuple(image.shape), len(digits().test)
    ((1, 8, 8), 599)
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    train, test = train_test_split(
        range(len(source.target)), test_size=TEST_SHARE, stratify=source.target, random_state=0
    )
    images = torch.tensor(source.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(source.target, dtype=torch.int64)
    return Data(TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test]))


class ResidualBlock(nn.Module):
    """Two convolutions around which the input is added: x [batch, channels, height, width] → the same shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(x + y)


class DigitsNet(nn.Module):
    """A small residual network: images float32 [batch, 1, 8, 8] → logits float32 [batch, 10].

    It has what quantisation has to get right in larger ones: batch norm after every convolution, a residual addition,
    maximum and average pooling, and a final linear layer.

    Args:
        channels: of the first convolution and the block; the last convolution has twice as many.

    >>> DigitsNet()(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self, channels: int = 16):
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(channels)
        self.block = ResidualBlock(channels)
        self.conv = nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(2 * channels)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(2 * channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        x = F.max_pool2d(self.block(x), 2)
        x = F.relu(self.norm(self.conv(x)))
        logits: Tensor = self.classifier(self.pool(x).flatten(1))
        return logits
