"""One network on CIFAR-10, trained once and exported to every runtime that is installed: the same predictions.

    python examples/cifar10.py --data PATH
    python examples/cifar10.py --data PATH --network mobilenetv2
    python examples/cifar10.py --data PATH --quick

PATH holds cifar10_train.npz and cifar10_test.npz: JPEG files of 32x32 pixels one after another (`jpeg`, where each
begins in `offsets`) and `labels`. A float network is trained for a few minutes, and then once more on the grids of the
scheme `portable`, whose values all runtimes compute alike: power-of-two scales, sums on one grid. Every runtime's plan
adopts that one model, and the file that it exports classifies the test images in the runtime itself. Exit code 1 if a
single prediction differs from the trained model's. --quick shows that, but no accuracy.

The network is a ResNet of 20 layers, or has the inverted bottlenecks of MobileNetV2 (Sandler et al., 2018): depthwise
convolutions, ReLU6, and additions right behind a linear convolution.
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

BLOCKS = 3
"""In each of three stages."""

SCHEMES: dict[str, list[ig.Rule]] = {
    "W8A8": [],
    "W4A8": [ig.Rule(match="Conv2d", weight="int4/channel:scale=e8m0")],
}
"""Rules on top of the scheme `portable`, which has weights of 7 of the 8 bits."""


class Block(nn.Module):
    """Two convolutions beside the identity, or beside a convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.branch = nn.Sequential(convolution(inputs, outputs, 3, stride), convolution(outputs, outputs, 3))
        self.beside = nn.Identity() if stride == 1 else convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.beside(x) + self.branch(x)


class ResNet(nn.Module):
    """For images of 32x32: a stem, three stages, a linear head on the mean over space."""

    def __init__(self, width: int, classes: int = 10):
        super().__init__()
        layers: list[nn.Module] = [convolution(3, width, 3)]
        for inputs, outputs in ((width, width), (width, 2 * width), (2 * width, 4 * width)):
            layers.append(Block(inputs, outputs, 1 if inputs == outputs else 2))
            layers.extend(Block(outputs, outputs, 1) for _ in range(BLOCKS - 1))
        self.features, self.head = nn.Sequential(*layers), nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class Bottleneck(nn.Module):
    """MobileNetV2's: more channels, a depthwise convolution, fewer channels; beside the identity where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int = 4):
        super().__init__()
        inside = expansion * inputs
        self.branch = nn.Sequential(
            convolution(inputs, inside, 1, activation=nn.ReLU6()),
            convolution(inside, inside, 3, stride, groups=inside, activation=nn.ReLU6()),
            convolution(inside, outputs, 1)[:2],
        )
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x) if self.is_residual else self.branch(x)


class MobileNetV2(nn.Module):
    """A stem of stride 2, three stages of bottlenecks, a pointwise convolution, a linear head on the mean."""

    def __init__(self, width: int, classes: int = 10):
        super().__init__()
        layers: list[nn.Module] = [convolution(3, width, 3, 2, activation=nn.ReLU6())]
        for inputs, outputs in ((width, width), (width, 2 * width), (2 * width, 4 * width)):
            layers.append(Bottleneck(inputs, outputs, 1 if inputs == outputs else 2))
            layers.extend(Bottleneck(outputs, outputs, 1) for _ in range(BLOCKS - 1))
        layers.append(convolution(4 * width, 16 * width, 1, activation=nn.ReLU6()))
        self.features, self.head = nn.Sequential(*layers), nn.Linear(16 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


NETWORKS = {"resnet": ResNet, "mobilenetv2": MobileNetV2}


def convolution(
    inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1, activation: nn.Module | None = None
) -> nn.Sequential:
    """With batch norm, and ReLU unless it is another activation."""
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), activation or nn.ReLU())


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
    parser.add_argument("--network", choices=NETWORKS, default="resnet")
    parser.add_argument("--quick", action="store_true", help="a narrow network, few steps, 500 test images")
    parser.add_argument("--images", type=int, default=50_000, help="how many to train on")
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=4_000, help="of float training; quantised training has a quarter")
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--targets", nargs="+", choices=RUNTIMES, default=RUNTIMES)
    parser.add_argument("--output", type=Path, default=Path("runs/cifar10"))
    options = parser.parse_args(arguments)
    if options.quick:
        options.images, options.test_images, options.steps, options.width = 2_000, 500, 80, 8
    if options.test_images % BATCH:
        parser.error(f"--test-images: runtimes of a fixed batch size take whole batches, multiples of {BATCH}")
    torch.manual_seed(0)
    console = Console(width=110)
    images, labels = read(options.data, "train", options.images)
    test_images, test_labels = read(options.data, "test", options.test_images)
    options.output.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    network = train(NETWORKS[options.network](options.width), images, labels, options.steps, rate=4e-3)
    accuracy = (predictions(network, test_images) == test_labels).float().mean()
    console.print(f"float32: {accuracy:.2%} of {len(test_labels)} images, {time.perf_counter() - start:.0f} s")

    table = Table(title=f"One trained model a row's scheme, {len(test_labels)} test images, in each runtime")
    for column in ("scheme", "runtime"):
        table.add_column(column)
    for column in ("accuracy", "predictions unlike the trained model's", "seconds"):
        table.add_column(column, justify="right")
    total = 0
    targets = installed(options.targets, console)
    for scheme in options.schemes:
        start = time.perf_counter()
        trained = planned(network, "onnxruntime", scheme, images[:BATCH])
        ig.calibrate(trained, images[: 5 * BATCH].split(BATCH))
        steps = options.steps // 4
        train(trained, images, labels, steps, rate=1e-3, schedule=ig.Schedule(trained, total_steps=steps))
        expected = predictions(trained, test_images)
        rows = [("PyTorch, as trained", expected, time.perf_counter() - start)]
        for target in targets:
            start = time.perf_counter()
            model = ig.adopt(planned(network, target, scheme, images[:BATCH]).eval(), trained)
            artifact = ig.export(model, options.output / f"{options.network}-{target}-{scheme}.model")
            rows.append((target, predictions(ig.load(artifact.path), test_images), time.perf_counter() - start))
        for name, found, seconds in rows:
            differing = int((expected != found).sum())
            total += differing
            accuracy = (found == test_labels).float().mean()
            table.add_row(scheme, name, f"{accuracy:.2%}", str(differing), f"{seconds:.0f}")
    console.print(table)
    return int(total > 0)


def planned(network: nn.Module, target: str, scheme: str, example: Tensor) -> nn.Module:
    """A copy of the network, prepared for a runtime."""
    model = copy.deepcopy(network)
    return ig.prepare(model, ig.plan(model, target, "portable", SCHEMES[scheme], example_inputs=(example,)))


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
