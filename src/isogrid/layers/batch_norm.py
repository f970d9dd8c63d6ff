"""Batch norm that the preceding layer applies itself."""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn


class AbsorbedBatchNorm(nn.Module):
    """Mixin: keeps batch norm's name, parameters and statistics, while the preceding layer does its work.

    Attributes:
        statistics_are_frozen: normalise by the running statistics in training too; the schedule sets it.
    """

    statistics_are_frozen: bool = False
    place: ClassVar[str] = "absorbed by the layer before"

    def forward(self, x: Tensor) -> Tensor:
        """x itself: the layer before has normalised it."""
        return x

    @property
    def is_live(self) -> bool:
        """Whether the statistics of the batch are used, as in ordinary training."""
        return self.training and not self.statistics_are_frozen

    def normalize(self, x: Tensor) -> Tensor:
        """What the float model's batch norm computes from x [batch, channels, ...]."""
        module: Any = self
        if not self.is_live:
            statistics = (module.running_mean, module.running_var)
            return F.batch_norm(x, *statistics, module.weight, module.bias, False, 0.0, module.eps)
        return self._float_forward(x)

    def _float_forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.place}"


class AbsorbedBatchNorm1d(AbsorbedBatchNorm, nn.BatchNorm1d):
    """BatchNorm1d that the Linear or Conv1d before it applies."""

    def _float_forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm1d.forward(self, x)


class AbsorbedBatchNorm2d(AbsorbedBatchNorm, nn.BatchNorm2d):
    """BatchNorm2d that the Conv2d before it applies."""

    def _float_forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self, x)


class AbsorbedBatchNorm3d(AbsorbedBatchNorm, nn.BatchNorm3d):
    """BatchNorm3d that the Conv3d before it applies."""

    def _float_forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm3d.forward(self, x)
