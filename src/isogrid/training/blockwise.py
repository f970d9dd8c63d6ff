"""Block-wise training: one block at a time is held against its float self, and nothing else has gradients."""

import gc
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isogrid.errors import CheckpointError, NonFiniteError, NotCalibratedError, PlanError
from isogrid.planning.batches import filled_batches, run_batch
from isogrid.planning.plan import Plan
from isogrid.planning.state import prepared_state, quantizers
from isogrid.training.block_files import BlockFiles
from isogrid.training.block_sources import BlockSource, InMemory, OnDisk
from isogrid.training.blocks import Call, Caller, find_blocks
from isogrid.training.memory import explained_memory
from isogrid.training.optimizers import make_optimizer, set_rate, stepping_in_backward
from isogrid.training.parameters import groups_of
from isogrid.training.shards import Shards


@dataclass(frozen=True)
class Blockwise:
    """How blocks are trained; the defaults are EfficientQAT's for 2 bits but for the scales, which move by shares.

    Args:
        epochs: passes of each block over the batches.
        lr: of weights.
        scale_lr: by what share of itself a scale may move a step, and by how much of a code a zero point.
        final: share of the rates that the cosine ends at.
        weight_decay: of weights.
        optimizer: a name of `isogrid.training.optimizers.OPTIMIZERS`.
        checkpoint_every: steps after which the block in training is written down; after each block it is in any case.
        seed: of the order of the batches.
    """

    epochs: int = 2
    lr: float = 2e-5
    scale_lr: float = 1e-3
    final: float = 0.05
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    checkpoint_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.epochs, self.checkpoint_every) < 1 or min(self.lr, self.scale_lr) <= 0 or not 0 <= self.final <= 1:
            raise PlanError("epochs and checkpoint_every are at least 1, rates above 0, and final a share from 0 to 1.")


@dataclass(frozen=True)
class BlockResult:
    """What came of one block.

    Attributes:
        path: of the block.
        losses: mean squared error of its output in each step.
        steps_per_epoch: of which the first and the last make `before` and `after`.
    """

    path: str
    losses: tuple[float, ...]
    steps_per_epoch: int

    @property
    def before(self) -> float:
        """Mean loss of the first epoch."""
        return sum(self.losses[: self.steps_per_epoch]) / self.steps_per_epoch

    @property
    def after(self) -> float:
        """Mean loss of the last epoch."""
        return sum(self.losses[-self.steps_per_epoch :]) / self.steps_per_epoch


AfterStep = Callable[[str, int, float], None]
"""Called with a block's path, the number of its steps done, and the loss of the last one."""


def train_blockwise(
    model: nn.Module,
    batches: Sequence[Any],
    settings: Blockwise | None = None,
    *,
    blocks: str | None = None,
    folder: str | Path | None = None,
    device: torch.device | str | None = None,
    after_step: AfterStep = lambda path, step, loss: None,
) -> tuple[BlockResult, ...]:
    """Train a prepared model block by block, in place: EfficientQAT's Block-AP (Chen et al., arXiv 2407.11062).

    Each block learns to return what it returns in float: the float block is given float inputs, the quantised one the
    outputs of the quantised blocks before it, and the mean squared error trains its weights, scales and, with the
    estimator `efficientqat`, zero points. Optimizer state is there for one block at a time, a gradient for one layer.
    Dropout is off. What lies around the blocks is not trained.

    Args:
        model: prepared and calibrated.
        batches: as for `calibrate`; each is one step. They are passed over for every block.
        settings: rates and lengths.
        blocks: pattern of their paths, such as `model.layers.*`; found by itself if not given.
        folder: keeps hidden states, trained blocks and the position. A run of the same model, batches and settings
            that was killed goes on from there, with the same losses bit for bit. Without one, a folder that is gone
            afterwards.
        device: where a block is while it trains; it goes back to where it was. None leaves all in their places.
        after_step: told about progress.

    Returns:
        Path and losses of each block.

    Raises:
        PlanError: the model is not prepared, its blocks do not follow each other, or one has nothing to train.
        NotCalibratedError: there are no batches, or a quantizer has no range.
        CheckpointError: the folder holds another run, or cannot be read or written.
        NonFiniteError: a loss is NaN or infinite.
        MemoryExhaustedError: a step does not fit into memory; the folder holds what was trained before.

    >>> import isogrid as ig
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    >>> x = torch.randn(8, 64)
    >>> model = ig.prepare(model, ig.plan(model, scheme="w2a16-asym", example_inputs=(x,)))
    >>> [result.path for result in train_blockwise(model, [x], blocks="[01]")]
    ['0', '1']
    """
    arguments = prepared_state(model).plan.arguments
    for name, quantizer in quantizers(model).items():
        if not quantizer.is_calibrated:
            raise NotCalibratedError(f"{name} has no range. Run isogrid.calibrate(model, batches) first.")
    source = InMemory(model, find_blocks(model, blocks), device)
    return run_blockwise(
        source, batches, settings or Blockwise(), folder, after_step, lambda m, batch: run_batch(m, batch, arguments)
    )


def train_blockwise_on_disk(
    model: nn.Module,
    plan: Plan,
    weights: str | Path,
    batches: Sequence[Any],
    settings: Blockwise | None = None,
    *,
    blocks: str | None = None,
    folder: str | Path,
    device: torch.device | str = "cpu",
    after_step: AfterStep = lambda path, step, loss: None,
) -> tuple[BlockResult, ...]:
    """`train_blockwise` for a model that is larger than memory: blocks are read from shards, trained, kept as codes.

    The float weights of one block are there at a time. Afterwards the model is prepared and whole, with its linear
    layers as `isogrid.freeze_codes` leaves them: it can train its scales, be converted and exported.

    Args:
        model: float, on the meta device but for its buffers: made under `accelerate.init_empty_weights()`.
        plan: of it; its activations stay float, or are quantised as they come.
        weights: folder of safetensors shards, as `save_pretrained` writes it.
        batches, settings, blocks, after_step: as for `train_blockwise`.
        folder: as there, and where the codes of the blocks are.
        device: where blocks train.

    Raises:
        CheckpointError: a shard or a tensor is missing, truncated or of another model.
        PlanError: a block shares grids with others.

    See `train_blockwise` for the rest.
    """
    source = OnDisk(model, plan, find_blocks(model, blocks), Shards(weights), torch.device(device))
    arguments = plan.arguments
    return run_blockwise(
        source, batches, settings or Blockwise(), folder, after_step, lambda m, batch: run_batch(m, batch, arguments)
    )


def run_blockwise(
    source: BlockSource,
    batches: Sequence[Any],
    settings: Blockwise,
    folder: str | Path | None,
    after_step: AfterStep,
    run: Callable[[nn.Module, Any], Any],
) -> tuple[BlockResult, ...]:
    """`train_blockwise` for blocks from wherever they come."""
    for _ in filled_batches(batches, "to train blocks with"):
        pass  # all of them, before the first block trains
    if folder is None:
        with TemporaryDirectory() as temporary:
            return _Run(source, batches, settings, BlockFiles(Path(temporary)), after_step, run).all()
    return _Run(source, batches, settings, BlockFiles(Path(folder)), after_step, run).all()


class _Run:
    """One run, at some position."""

    def __init__(
        self,
        source: BlockSource,
        batches: Sequence[Any],
        settings: Blockwise,
        files: BlockFiles,
        after_step: AfterStep,
        run: Callable[[nn.Module, Any], Any],
    ):
        self.source, self.batches, self.settings, self.files = source, batches, settings, files
        self.after_step = after_step
        self.caller = Caller(source.model, source.paths, run)
        self.results: list[BlockResult] = []

    def all(self) -> tuple[BlockResult, ...]:
        """Train what is not trained yet."""
        # By path, for a layer that is replaced would otherwise keep its weight.
        flags = {path: module.training for path, module in self.source.model.named_modules()}
        try:
            self.source.model.eval()
            self.caller.check(self.batches[0])
            for index in range(self._resume(), len(self.source.paths)):
                self._block(index)
            self.source.finish(self.files)
        finally:
            for path, module in self.source.model.named_modules():
                module.training = flags.get(path, flags[""])
        return tuple(self.results)

    def _resume(self) -> int:
        """How many blocks are done; these are loaded."""
        identity = self._identity()
        manifest = self.files.read()
        if manifest is None:
            self.files.forget()
            for kind in ("float", "quantized"):
                for number, batch in enumerate(self.batches):
                    with _quantized(self.source.model, kind == "quantized"):
                        self.files.write_hidden(0, kind, number, self.caller.call(batch, 0).hidden)
            self.files.write({"identity": identity, "done": 0, "losses": []})
            return 0
        for key, value in identity.items():
            if manifest["identity"].get(key) != value:
                raise CheckpointError(
                    f"{self.files.folder} holds a block-wise run with other {key}: "
                    f"{manifest['identity'].get(key)}, not {value}. Put them back, or use another folder."
                )
        for index, losses in enumerate(manifest["losses"]):
            self.source.restore(index, self.files)
            self._add_result(index, losses)
        return int(manifest["done"])

    def _identity(self) -> dict[str, Any]:
        """What has to be the same for a run to go on."""
        kept = {key: value for key, value in asdict(self.settings).items() if key != "checkpoint_every"}
        with _quantized(self.source.model, True):
            hidden = [self.caller.call(batch, 0).hidden for batch in (self.batches[0], self.batches[-1])]
        data = sha256(b"".join(h.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for h in hidden))
        return {
            "settings": kept,
            "blocks": list(self.source.paths),
            "batches": len(self.batches),
            "embedded data": data.hexdigest()[:16],
        }

    def _add_result(self, index: int, losses: Sequence[float]) -> None:
        self.results.append(BlockResult(self.source.paths[index], tuple(losses), len(self.batches)))

    def _block(self, index: int) -> None:
        """Train a block, and find what it hands on to the next."""
        files, path = self.files, self.source.paths[index]
        advice = "Use smaller or shorter batches, the optimizer 'adamw8bit', or a device with more memory for a block."
        advice = f"{advice} What was trained before is kept."
        with explained_memory(f"Block {path!r}", advice, self.source.model.parameters()):
            try:
                losses = self._trained(index)
            finally:
                # Optimizers and modules refer to themselves in circles, and would keep their tensors for a while.
                gc.collect()
                self.source.put_back()
        manifest = files.read() or {}
        done = {"identity": manifest["identity"], "done": index + 1, "losses": [*manifest["losses"], losses]}
        files.write(done)
        files.forget_hidden(index)
        self._add_result(index, losses)

    def _trained(self, index: int) -> list[float]:
        """The losses of a block, from the first step to the last, after which it is written down and let go."""
        files, path = self.files, self.source.paths[index]
        block = self.source.open(index)
        if not any(parameter.requires_grad for parameter in block.parameters()):
            raise PlanError(
                f"Block {path!r} has nothing to train: all of its parameters are frozen. Call requires_grad_(True) "
                "on them, or leave the block out by a pattern."
            )
        parameters = groups_of(block, self.settings.lr, self.settings.weight_decay, self.settings.scale_lr)
        optimizer = make_optimizer(self.settings.optimizer, parameters)
        started = files.read_step(index, block, optimizer)
        if started is None:
            with _quantized(block, False):
                self._pass(index, block, "float")
            # Where a run fails later on, this process may go on from here too, whose block has moved by then.
            files.write_step(index, 0, block, optimizer, [])
        start, losses = started or (0, [])
        with stepping_in_backward(optimizer):
            losses += self._train(index, block, optimizer, start, losses)
        if index + 1 < len(self.source.paths):
            self._pass(index, block, "quantized")
        self.source.close(index, block, files)
        return losses

    @torch.no_grad()
    def _pass(self, index: int, block: nn.Module, kind: str) -> None:
        """Hand what a block gets through it, for the next block."""
        for number, batch in enumerate(self.batches):
            call = self._call(batch, index)
            hidden = self._hidden(index, kind, number)
            self.files.write_hidden(index + 1, kind, number, call.run(block, hidden))

    def _train(
        self, index: int, block: nn.Module, optimizer: torch.optim.Optimizer, start: int, before: list[float]
    ) -> list[float]:
        """The losses of the steps from `start` on."""
        settings, path = self.settings, self.source.paths[index]
        rates = [float(group["initial_lr"]) for group in optimizer.param_groups]
        steps = settings.epochs * len(self.batches)
        losses: list[float] = []
        for step in range(start, steps):
            factor = settings.final + (1 - settings.final) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                set_rate(group, rate * factor)
            number = self._order(index, step // len(self.batches))[step % len(self.batches)]
            call = self._call(self.batches[number], index)
            output = call.run(block, self._hidden(index, "quantized", number))
            target = self._hidden(index + 1, "float", number)
            loss = F.mse_loss(output.float(), target.float())
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise NonFiniteError(f"The loss of block {path!r} is {losses[-1]} at step {step + 1}. Lower its rates.")
            if (step + 1) % settings.checkpoint_every == 0 or step + 1 == steps:
                self.files.write_step(index, step + 1, block, optimizer, [*before, *losses])
            self.after_step(path, step + 1, losses[-1])
        return losses

    def _order(self, index: int, epoch: int) -> list[int]:
        order = list(range(len(self.batches)))
        random.Random(f"{self.settings.seed}/{index}/{epoch}").shuffle(order)
        return order

    def _call(self, batch: Any, index: int) -> Call:
        return self.source.on_device(self.caller.call(batch, index))

    def _hidden(self, index: int, kind: str, number: int) -> Tensor:
        return self.files.read_hidden(index, kind, number).to(self.source.device)


@contextmanager
def _quantized(module: nn.Module, on: bool) -> Iterator[None]:
    """While open, the quantizers of a module quantise, or none of them does."""
    before = {quantizer: quantizer.enabled for quantizer in quantizers(module).values()}
    for quantizer in before:
        quantizer.enabled = on and quantizer.enabled
    try:
        yield
    finally:
        for quantizer, enabled in before.items():
            quantizer.enabled = enabled
