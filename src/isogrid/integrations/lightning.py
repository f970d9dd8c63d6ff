"""Lightning: a callback that drives the schedule and evaluates what will be deployed."""

import json
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from isogrid.api import Schedule
from isogrid.integrations.deployed import evaluate_deployed
from isogrid.planning.state import steps_done
from isogrid.training.checkpoint import random_state, set_random_state


class QATCallback(Callback):  # type: ignore[misc]  # Lightning is no dependency, so its types are not known
    """Drives a prepared model's schedule by optimizer steps, and lets validation and tests run `convert(model)`.

    Prepare and calibrate the model in the LightningModule's `__init__`, so that checkpoints load into it, and return an
    optimizer of `isogrid.parameter_groups` from `configure_optimizers`. `EarlyStopping` and `ModelCheckpoint` then
    decide by the deployed figures. The position of the schedule is in the checkpoint, with the model, and so is the
    state of the global random generators, which Lightning does not save: a run that goes on from the end of an epoch
    shuffles and drops out as it would have.

    Args:
        model: the prepared model inside the LightningModule, or the name of its attribute.
        schedule: keyword arguments of `isogrid.Schedule`.
        evaluates_deployed: whether validation runs `convert(model)`.
    """

    def __init__(self, model: nn.Module | str, evaluates_deployed: bool = True, **schedule: Any):
        self._model, self._schedule, self._evaluates_deployed = model, schedule, evaluates_deployed
        self.schedule: Schedule | None = None
        self._deployed: Any = None
        self._random: dict[str, Any] | None = None

    def model(self, pl_module: LightningModule) -> nn.Module:
        """The prepared model."""
        return pl_module.get_submodule(self._model) if isinstance(self._model, str) else self._model

    def state_dict(self) -> dict[str, Any]:
        tensors, plain = random_state()
        return {"random": tensors, "generators": json.dumps(plain)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._random = state_dict

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Between here and the first batch a loop draws what it draws between two epochs: the order of the next one.
        if self._random is not None:
            set_random_state(self._random["random"], json.loads(self._random["generators"]))
            self._random = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._evaluates_deployed:
            self._deployed = evaluate_deployed(self.model(pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = self.model(pl_module)
        steps_done(model).fill_(trainer.global_step)
        self.schedule = Schedule(model, int(trainer.estimated_stepping_batches), **self._schedule)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.schedule is not None and self.schedule.position < trainer.global_step:
            self.schedule.step()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._deployed is not None:
            self._deployed.forget()
