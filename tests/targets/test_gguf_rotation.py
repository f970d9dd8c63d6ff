"""Stretched rotary embeddings in GGUF files, against what transformers makes of the same configuration."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from isogrid.errors import TargetError
from isogrid.targets.gguf_base import open_gguf
from isogrid.targets.gguf_export import write_float_gguf
from isogrid.targets.gguf_rotation import rotation, rotation_factors
from tests.models import assert_equal
from tests.targets.language_models import stretched_model


def config_of(name: str, **rope: Any) -> Any:
    return stretched_model(name, **rope).config


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_factors_of_llama_3_are_those_of_transformers(share: float) -> None:
    config = config_of("llama3", partial_rotary_factor=share)
    found = rotation_factors(config)["rope_freqs.weight"]
    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / config.rope_parameters["rope_theta"] ** (torch.arange(0, 2 * len(slowed), 2) / (2 * len(slowed)))
    assert len(found) == config.head_dim * share / 2
    torch.testing.assert_close(plain / found, slowed)  # float32, in another order


@pytest.mark.parametrize(
    "more", [{}, {"attention_factor": 1.5}, {"mscale": 0.7, "mscale_all_dim": 1.3}, {"factor": 0.5}]
)
def test_what_yarn_multiplies_by(more: dict[str, float]) -> None:
    config = config_of("yarn", **more)
    found = rotation(config, 64)
    _, expected = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    recommended = ROPE_INIT_FUNCTIONS["yarn"](config_of("yarn", factor=config.rope_parameters["factor"]), None)[1]
    # llama.cpp multiplies by the recommended factor itself.
    assert found.get("rope.scaling.attn_factor", 1.0) * recommended == pytest.approx(expected)
    assert found["rope.scaling.original_context_length"] == 16 and found["rope.scaling.type"] == "yarn"


@pytest.mark.parametrize("more", [{}, {"attention_factor": 1.3}, {"factor": 8.0}])
def test_what_longrope_multiplies_by(more: dict[str, float], tmp_path: Path) -> None:
    config = config_of("longrope", **more)
    _, expected = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
    assert rotation(config, 64)["rope.scaling.attn_factor"] == pytest.approx(expected)
    reader = open_gguf(write_float_gguf(stretched_model("longrope", **more), tmp_path / "model.gguf"))
    stored = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors if "rope" in tensor.name}
    for kind in ("long", "short"):
        assert_equal(stored[f"rope_factors_{kind}.weight"], torch.tensor(config.rope_parameters[f"{kind}_factor"]))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"truncate": False}, "ends of YaRN's ramp"),
        ({"beta_fast": 16.0}, "beta_fast = 32 alone"),
        ({"rope_type": "dynamic"}, "'dynamic' is not written"),
    ],
)
def test_other_angles_are_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        rotation(config_of("yarn", **more), 64)
