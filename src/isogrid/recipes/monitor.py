"""TensorBoard scalars of a run."""

import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from isogrid.recipes.weights import stored_weights


class Monitor:
    """Writes down the loss, and for each weight how well its codes hold it and how many of them still change.

    Args:
        folder: of the event files.
        model: prepared.
        start: steps done already; what an earlier run wrote beyond them is hidden.
    """

    def __init__(self, folder: Path, model: nn.Module, start: int = 0):
        _wait_for_a_later_name(folder)
        # The first step that this run writes is start + 1; anything there and later is of a run that was killed.
        self._writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)
        self._model = model
        self._seen_at = start
        self._codes = {weight.layer: weight.quantized.codes for weight in stored_weights(model)}

    def loss(self, step: int, loss: Tensor, learning_rate: float) -> None:
        """The loss of a step."""
        self._writer.add_scalar("loss", loss, step)
        self._writer.add_scalar("learning_rate", learning_rate, step)

    def weights(self, step: int) -> None:
        """SQNR and saturation of every weight, and what share of its codes changed a step since the last entry."""
        for weight in stored_weights(self._model):
            codes = weight.quantized.codes
            changed = torch.ne(codes, self._codes[weight.layer]).float().mean()
            self._writer.add_scalar(f"sqnr_db/{weight.layer}", weight.sqnr_db(), step)
            self._writer.add_scalar(f"saturation/{weight.layer}", weight.saturation(), step)
            self._writer.add_scalar(f"flips_per_step/{weight.layer}", changed / (step - self._seen_at), step)
            self._codes[weight.layer] = codes
        self._seen_at = step

    def flush(self) -> None:
        """Write what is still in memory: before a checkpoint, or a killed run would go on beyond a gap."""
        self._writer.flush()

    def close(self) -> None:
        """Write the rest."""
        self._writer.close()


def _wait_for_a_later_name(folder: Path) -> None:
    """TensorBoard reads event files in the order of their names, and these tell the time in whole seconds."""
    newest = max((file.stat().st_mtime for file in folder.glob("events.*")), default=0.0)
    time.sleep(max(0.0, min(1.0, int(newest) + 1 - time.time())))
