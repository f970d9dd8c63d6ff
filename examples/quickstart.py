"""Ten lines of Isogrid around your own training loop.

    python examples/quickstart.py

A float model is trained as always, then planned, prepared, calibrated, trained on its grid, exported and verified.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import isogrid as ig

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
loader = DataLoader(TensorDataset(images[:1200], labels[:1200]), batch_size=60, shuffle=True)
test_images, test_labels = images[1200:], labels[1200:]

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
    nn.Flatten(), nn.Linear(128, 10),
)  # fmt: skip

optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
for _ in range(5):
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

# From here on, Isogrid.
plan = ig.plan(model, target="onnxruntime", scheme="w4a8", example_inputs=(images[:2],))
print(plan)  # site → format → reason, and all that stays float
ig.prepare(model, plan)  # in place
ig.calibrate(model, [x for x, _ in loader])  # a good start from data
optimizer = torch.optim.AdamW(ig.parameter_groups(model, lr=2e-3))  # after prepare: scales are parameters, too
schedule = ig.Schedule(model, total_steps=3 * len(loader))
for _ in range(3):
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
integer = ig.convert(model)  # computes what the runtime computes
artifact = ig.export(model, "model.onnx")
report = ig.verify(model, artifact, [test_images])  # runs the real runtime and compares
print(report)

(logits,) = ig.load(artifact.path)(test_images)
print(f"accuracy in ONNX Runtime: {(logits.argmax(1) == test_labels).float().mean():.2%}")
print(f"accuracy of convert(model): {(integer(test_images).argmax(1) == test_labels).float().mean():.2%}")
if not report:
    raise SystemExit(1)
