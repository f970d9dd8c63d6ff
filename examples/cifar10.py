"""A MobileNetV2 on CIFAR-10, quantised for every runtime that is installed: the same predictions, to the last image.

    python examples/cifar10.py --data PATH
    python examples/cifar10.py --data PATH --quick

PATH holds cifar10_train.npz and cifar10_test.npz: JPEG files of 32x32 pixels one after another (`jpeg`, where each
begins in `offsets`) and `labels`. A float network is trained for a few minutes. For each scheme and each runtime it is
then planned, trained on that runtime's grid, exported and run in the runtime on the test images, next to
`convert(model)` in PyTorch. Exit code 1 if a single prediction differs. --quick shows that, but no accuracy.
"""

import argparse
import copy
import io
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import isogrid as ig
from isogrid.errors import MissingExtraError
from isogrid.targets import TARGETS, target_from_name
from isogrid.targets.subprocesses import WORKERS, Worker

RUNTIMES = [name for name in ("onnxruntime", "openvino", "executorch", "litert") if name in TARGETS]
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
BATCH = 50

# MobileNetV2's groups of blocks: expansion, channels, how many, stride. Small images are not made smaller at once.
GROUPS = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class Block(nn.Module):
    """An inverted residual."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        hidden = inputs * expansion
        self.layers = nn.Sequential(
            *(convolution(inputs, hidden, 1) if expansion > 1 else ()),
            *convolution(hidden, hidden, 3, stride, groups=hidden),
            *convolution(hidden, outputs, 1)[:2],
        )
        self.has_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.has_residual else self.layers(x)


class MobileNetV2(nn.Module):
    """For images of 32x32."""

    def __init__(self, width: float, classes: int = 10):
        super().__init__()
        channels = int(32 * width)
        layers = [*convolution(3, channels, 3)]
        for expansion, outputs, count, stride in GROUPS:
            for number in range(count):
                layers.append(Block(channels, int(outputs * width), stride if number == 0 else 1, expansion))
                channels = int(outputs * width)
        last = int(1280 * width)
        self.features = nn.Sequential(*layers, *convolution(channels, last, 1))
        self.head = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def convolution(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> tuple[nn.Module, ...]:
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return layer, nn.BatchNorm2d(outputs), nn.ReLU6()


def read(folder: Path, split: str, count: int) -> tuple[Tensor, Tensor]:
    """Normalised images float32 [count, 3, 32, 32], and labels int64."""
    from PIL import Image

    with np.load(folder / f"cifar10_{split}.npz") as archive:
        jpeg, offsets, labels = archive["jpeg"], archive["offsets"], archive["labels"]
    count = min(count, len(labels))
    parts = pairwise(offsets[: count + 1])
    images = np.stack([np.asarray(Image.open(io.BytesIO(jpeg[a:b].tobytes())).convert("RGB")) for a, b in parts])
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    normalised = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]
    return normalised.contiguous(), torch.from_numpy(labels[:count].astype(np.int64))


def batches(images: Tensor, labels: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled, each image mirrored or not, a batch moved by up to four pixels."""
    generator = torch.Generator().manual_seed(0)
    padded = F.pad(images, (4, 4, 4, 4))
    epochs = 1 + steps * BATCH // len(images)
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(epochs)])
    for index in order.split(BATCH)[:steps]:
        top, left = torch.randint(9, (2,), generator=generator).tolist()
        x = padded[index, :, top : top + 32, left : left + 32]
        mirrored = torch.rand(len(index), generator=generator) < 0.5
        yield torch.where(mirrored[:, None, None, None], x.flip(3), x), labels[index]


def train(
    model: nn.Module, images: Tensor, labels: Tensor, steps: int, rate: float, schedule: ig.Schedule | None = None
) -> nn.Module:
    """Adam, the rate falling to zero along a cosine."""
    groups = model.parameters() if schedule is None else ig.parameter_groups(model, lr=rate, weight_decay=1e-4)
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=1e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for x, y in batches(images, labels, steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        cosine.step()
        if schedule is not None:
            schedule.step()
    return model.eval()


def predictions(model: object, images: Tensor) -> Tensor:
    """The class of each image; a loaded artefact returns its outputs in a list."""
    found = []
    with torch.no_grad():
        for x in images.split(BATCH):
            outputs = model(x)  # type: ignore[operator]
            found.append((outputs[0] if isinstance(outputs, list) else outputs).argmax(1))
    return torch.cat(found)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of cifar10_train.npz and cifar10_test.npz")
    parser.add_argument("--quick", action="store_true", help="a narrow network, few steps, 500 test images")
    parser.add_argument("--images", type=int, default=20_000, help="how many to train on")
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=2_000, help="of float training; quantised training has a quarter")
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--schemes", nargs="+", default=["w8a8", "w4a8"])
    parser.add_argument("--targets", nargs="+", choices=RUNTIMES, default=RUNTIMES)
    parser.add_argument("--output", type=Path, default=Path("runs/cifar10"))
    options = parser.parse_args(arguments)
    if options.quick:
        options.images, options.test_images, options.steps, options.width = 2_000, 500, 80, 0.25
    if options.test_images % BATCH:
        parser.error(f"--test-images: runtimes of a fixed batch size take whole batches, multiples of {BATCH}")
    torch.manual_seed(0)
    console = Console(width=110)
    images, labels = read(options.data, "train", options.images)
    test_images, test_labels = read(options.data, "test", options.test_images)
    options.output.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    network = train(MobileNetV2(options.width), images, labels, options.steps, rate=4e-3)
    float_predictions = predictions(network, test_images)
    accuracy = (float_predictions == test_labels).float().mean()
    console.print(f"float32: {accuracy:.2%} of {len(test_labels)} images, {time.perf_counter() - start:.0f} s")

    table = Table(title="The same predictions in PyTorch and in each runtime")
    for column in ("scheme", "runtime"):
        table.add_column(column)
    for column in ("accuracy of convert(model)", "accuracy in the runtime", "differing", "seconds"):
        table.add_column(column, justify="right")
    total = 0
    for target in installed(options.targets, console):
        for scheme in options.schemes:
            start = time.perf_counter()
            model = copy.deepcopy(network)
            ig.prepare(model, ig.plan(model, target, scheme, example_inputs=(images[:BATCH],)))
            ig.calibrate(model, images[: 5 * BATCH].split(BATCH))
            steps = options.steps // 4
            train(model, images, labels, steps, rate=1e-3, schedule=ig.Schedule(model, total_steps=steps))
            artifact = ig.export(model, options.output / f"{target}-{scheme}.model")
            expected = predictions(ig.convert(model), test_images)
            found = predictions(ig.load(artifact.path), test_images)
            differing = int((expected != found).sum())
            total += differing
            rates = (f"{(p == test_labels).float().mean():.2%}" for p in (expected, found))
            table.add_row(scheme, target, *rates, str(differing), f"{time.perf_counter() - start:.0f}")
    console.print(table)
    return int(total > 0)


def installed(targets: list[str], console: Console) -> list[str]:
    """Those of the runtimes that can be used here; what the others lack is said."""
    found = []
    for target in targets:
        try:
            target_from_name(target)
            if (WORKERS / f"{target}.py").exists():
                Worker(target).close()
            found.append(target)
        except MissingExtraError as error:
            console.print(f"{target} is left out. {error}")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
