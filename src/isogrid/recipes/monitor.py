"""Figures of a run for TensorBoard and other trackers."""

import time
from collections.abc import Callable
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
        log: called with the same values and their step: other trackers.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        start: int = 0,
        log: Callable[[dict[str, float], int], None] = lambda values, step: None,
    ):
        _wait_for_a_later_name(folder)
        # The first step that this run writes is start + 1; anything there and later is of a run that was killed.
        self._writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)
        self._model, self._log = model, log
        self._seen_at = start
        self._codes = {weight.layer: weight.quantized.codes for weight in stored_weights(model)}

    def loss(self, step: int, loss: Tensor, learning_rate: float) -> None:
        """The loss of a step."""
        self._write({"loss": float(loss), "learning_rate": learning_rate}, step)

    def weights(self, step: int) -> None:
        """SQNR and saturation of every weight, and what share of its codes changed a step since the last entry."""
        values: dict[str, float] = {}
        for weight in stored_weights(self._model):
            codes = weight.quantized.codes
            changed = torch.ne(codes, self._codes[weight.layer]).float().mean()
            values[f"sqnr_db/{weight.layer}"] = float(weight.sqnr_db())
            values[f"saturation/{weight.layer}"] = float(weight.saturation())
            values[f"flips_per_step/{weight.layer}"] = float(changed / (step - self._seen_at))
            self._codes[weight.layer] = codes
        self._write(values, step)
        self._seen_at = step

    def _write(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._log(values, step)

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
