"""What llama.cpp's BitNet cannot hold is refused, and what it can has its norms."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import isogrid as ig
from isogrid.errors import TargetError
from isogrid.recipes.language import built_in_model
from isogrid.targets.gguf_export import write_float_gguf


def small(**changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return built_in_model(layers=1, hidden=64, feed_forward=128, context=32, **changes)


def test_the_file_has_four_norms_of_ones_in_each_block(tmp_path: Path) -> None:
    path = write_float_gguf(small(bitnet=True), tmp_path / "model.gguf", type="F32")
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    sizes = {"attn_norm": 64, "attn_sub_norm": 64, "ffn_norm": 64, "ffn_sub_norm": 128}
    for name, size in sizes.items():
        assert np.array_equal(tensors[f"blk.0.{name}.weight"], np.ones(size, np.float32))
    assert "output.weight" not in tensors
    assert reader.get_field("general.architecture").contents() == "bitnet"


def test_a_head_of_its_own_has_no_place() -> None:
    with pytest.raises(TargetError, match="tie_word_embeddings=True"):
        write_float_gguf(ig.to_bitnet(small()), Path("model.gguf"))


def test_norms_with_different_eps_have_no_place() -> None:
    model = small(bitnet=True)
    model.model.layers[0].mlp.up_proj.eps = 1e-3
    with pytest.raises(TargetError, match="one eps for all norms"):
        write_float_gguf(model, Path("model.gguf"))
