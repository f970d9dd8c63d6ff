"""Replay: each operation on the inputs that the runtime had for it."""

from pathlib import Path

import torch
from torch import Tensor, nn

import isogrid as ig
from isogrid.planning.convert import watched
from isogrid.targets import Observed
from isogrid.verification.replay import Replays
from isogrid.verification.survey import survey


class Shared(nn.Module):
    """A float normalisation whose result several layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.query, self.key = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return torch.cat([self.query(y), self.key(y.contiguous())], -1)


def test_layers_that_share_an_input_are_replayed_on_the_one_that_the_runtime_had(tmp_path: Path) -> None:
    """A file quantises it once, under one name; the runtime's float arithmetic before it may round otherwise."""
    torch.manual_seed(0)
    x = torch.randn(16, 8)
    model = Shared()
    ig.prepare(model, ig.plan(model, scheme="w8a8", example_inputs=(x,)))
    ig.calibrate(model, [(x,)])
    artifact = ig.export(model, tmp_path / "model.onnx")
    assert {"query.input", "key.input"} & ig.load(artifact).observe(x).codes.keys() == {"query.input"}

    reference = ig.convert(model)
    seen: dict[str, Tensor] = {}

    def runtime(name: str, codes: Tensor) -> Tensor:
        """One that rounds the normalised values half a step higher."""
        if name in ("query.input", "key.input"):
            codes = codes.clamp(max=254) + 1
        seen[name] = codes
        return codes

    with watched(reference, runtime):
        output = reference(x)
    del seen["key.input"]

    def run(inputs: tuple[Tensor, ...]) -> Tensor:
        return reference(*inputs)  # type: ignore[no-any-return]

    replays = Replays(reference, run, survey(reference, run, (x,)))
    replays.add((x,), Observed([output], seen, {}), {}, [output])
    differing = {check.name: check.differing for check in replays.checks({})}
    assert differing.pop("query.input") > 0
    assert set(differing.values()) == {0}, differing
