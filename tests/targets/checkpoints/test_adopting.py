"""Quantised checkpoints as a start: their codes, scales and zero points, and what is computed with them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import isogrid as ig
from isogrid.errors import CheckpointError, PlanError
from isogrid.targets.checkpoints.integers import Integers, integers_in

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GROUP = 32
IDS = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(3))
BATCH = {"input_ids": IDS}


def model_of(kind: str = "Llama", dtype: torch.dtype = torch.float16, **more: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **more})
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def prepared(model: Any, weight: str, *rules: ig.Rule) -> Any:
    rules = (*rules, ig.Rule(match="*", weight=weight))
    return ig.prepare(model, ig.plan(model, "vllm", "w4a16", rules, example_inputs=BATCH)).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def integers(rows: int, columns: int, bits: int = 4, symmetric: bool = False, seed: int = 0) -> Integers:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=draw, dtype=torch.uint8)
    scale = (torch.rand(rows, columns // GROUP, generator=draw) * 0.02 + 0.001).half()
    zero = torch.randint(1, 1 << bits, scale.shape, generator=draw, dtype=torch.uint8)
    return Integers(codes, scale, torch.full_like(zero, 1 << bits - 1) if symmetric else zero, bits)


def words(codes: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """int32 [rows, columns * bits / 32] as the loops of AutoAWQ and GPTQModel pack them, bit by bit."""
    order = order or tuple(range(32 // bits))
    packed = torch.zeros(len(codes), codes.shape[1] * bits // 32, dtype=torch.int64)
    if 32 % bits:  # 3 bits: a stream that crosses the borders of words
        for column in range(codes.shape[1]):
            for bit in range(bits):
                word, place = divmod(column * bits + bit, 32)
                packed[:, word] |= (codes[:, column].long() >> bit & 1) << place
    else:
        for word in range(packed.shape[1]):
            for place, column in enumerate(order):
                packed[:, word] |= codes[:, word * len(order) + column].long() << place * bits
    return packed.to(torch.int32)


def awq_tensors(x: Integers) -> dict[str, Tensor]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": words(x.codes.T, 4, order),
        "qzeros": words(x.zero.T, 4, order),
        "scales": x.scale.T.contiguous(),
    }


def gptq_tensors(x: Integers, less: int = 1) -> dict[str, Tensor]:
    columns = x.codes.shape[1]
    return {
        "qweight": words(x.codes, x.bits).T.contiguous(),
        "qzeros": words(x.zero.T.int() - less, x.bits),
        "scales": x.scale.T.contiguous(),
        "g_idx": (torch.arange(columns) // (columns // x.scale.shape[1])).int(),
    }


AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}


def gptq(bits: int = 4, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": False, **more}


def write(folder: Path, model: Any, config: dict[str, Any], pack: Any, **more: Any) -> dict[str, Integers]:
    """A checkpoint of a float model's tensors, whose linear layers are of random integers; these by layer."""
    from transformers.core_model_loading import revert_weight_conversion

    torch.manual_seed(1)
    state = {name: x.clone() for name, x in revert_weight_conversion(model, model.state_dict()).items()}
    found = {}
    for number, name in enumerate(list(state)):
        if name.endswith(("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")):
            layer = name.removesuffix(".weight")
            found[layer] = integers(*state.pop(name).shape, seed=number, **more)
            state |= {f"{layer}.{leaf}": tensor for leaf, tensor in pack(found[layer]).items()}
    folder.mkdir(exist_ok=True)
    save_file({name: x.contiguous() for name, x in state.items()}, folder / "model.safetensors")
    data = {**model.config.to_dict(), "architectures": [type(model).__name__], "quantization_config": config}
    (folder / "config.json").write_text(json.dumps(data, default=str))
    return found


def same_codes(model: Any, found: dict[str, Integers]) -> None:
    for path, expected in found.items():
        layer = model.get_submodule(path)
        quantized = layer.quantized_weight()
        assert torch.equal(quantized.dequantize(), expected.values())
        low = quantized.format.grid.low
        assert torch.equal(quantized.codes.int() - low, expected.codes.int())


def test_awq_is_what_compressed_tensors_makes_of_it(tmp_path: Path) -> None:
    """Their converter, transformers' loading and ours: one model."""
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

    found = write(tmp_path / "awq", model_of(), AWQ, awq_tensors)
    model = ig.adopt_checkpoint(prepared(model_of(), f"uint4/group{GROUP}:scale=float16"), tmp_path / "awq")
    same_codes(model, found)

    folder = ig.export(model, tmp_path / "ours").path
    theirs = AutoAWQConverter(group_size=GROUP).process(load_file(tmp_path / "awq" / "model.safetensors"))
    ours = load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert torch.equal(ig.load(folder)(IDS)[0], logits(model))


@pytest.mark.parametrize(("bits", "version"), [(2, "gptq_v2"), (3, "gptq"), (4, "gptq"), (8, "gptq_v2")])
def test_gptq(bits: int, version: str, tmp_path: Path) -> None:
    config = gptq(bits, checkpoint_format=version)
    found = write(tmp_path, model_of(), config, lambda x: gptq_tensors(x, int(version == "gptq")), bits=bits)
    model = prepared(model_of(dtype=torch.float32), f"uint{bits}/group{GROUP}:scale=float16")
    same_codes(ig.adopt_checkpoint(model, tmp_path), found)


def test_symmetric_gptq_needs_no_zero_points(tmp_path: Path) -> None:
    found = write(tmp_path, model_of(), gptq(), gptq_tensors, symmetric=True)
    for fmt in ("int4", "uint4"):
        model = prepared(model_of(), f"{fmt}/group{GROUP}:scale=float16")
        same_codes(ig.adopt_checkpoint(model, tmp_path), found)


def test_experts(tmp_path: Path) -> None:
    """Mixtral's experts, which lie one by one on disk and in stacks in the model."""
    found = write(tmp_path / "awq", model_of("Mixtral", num_local_experts=2), AWQ, awq_tensors)
    model = prepared(model_of("Mixtral", num_local_experts=2), f"uint4/group{GROUP}:scale=float16")
    ig.adopt_checkpoint(model, tmp_path / "awq")
    expert = model.model.layers[0].mlp.experts.down_projection.quantized_weight().dequantize()
    whole = torch.cat([found[f"model.layers.0.block_sparse_moe.experts.{n}.w2"].values() for n in range(2)])
    assert torch.equal(expert, whole)
    ours = load_file(ig.export(model, tmp_path / "ours").path / "model.safetensors")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    written = dict(integers_in(ours, config))
    assert written.keys() == found.keys()
    for name, x in found.items():
        assert torch.equal(written[name].codes, x.codes) and torch.equal(written[name].zero, x.zero)


@pytest.mark.parametrize("scheme", ["int4/channel", f"uint3/group{GROUP}"])
def test_our_own_checkpoints(scheme: str, tmp_path: Path) -> None:
    weight = f"{scheme}:scale=float16"
    first = prepared(model_of(), weight)
    one = ig.export(first, tmp_path / "one").path
    model = ig.adopt_checkpoint(prepared(model_of(), weight), one)
    assert torch.equal(logits(model), logits(first))
    two = ig.export(model, tmp_path / "two").path
    a, b = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def test_training_goes_on(tmp_path: Path) -> None:
    write(tmp_path, model_of(), AWQ, awq_tensors)
    model = prepared(model_of(dtype=torch.float32), f"uint4/group{GROUP}:scale=float16")
    ig.adopt_checkpoint(model, tmp_path).train()
    before = logits(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert not torch.equal(logits(model), before)


def test_layers_that_are_no_model_of_transformers(tmp_path: Path) -> None:
    x = integers(16, 64)
    state = {"0.bias": torch.ones(16, dtype=torch.float16)}
    save_file(state | {f"0.{leaf}": tensor for leaf, tensor in gptq_tensors(x).items()}, tmp_path / "model.safetensors")
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": GROUP}))
    model = nn.Sequential(nn.Linear(64, 16))
    rules = [ig.Rule(match="0", weight=f"uint4/group{GROUP}:scale=float16")]
    ig.prepare(model, ig.plan(model, "pytorch", "w4a16", rules, example_inputs=(torch.zeros(1, 64),)))
    ig.adopt_checkpoint(model, tmp_path)
    assert torch.equal(model(torch.eye(64)), x.values().T + 1)


def test_another_format_is_refused_with_the_rule(tmp_path: Path) -> None:
    write(tmp_path, model_of(), AWQ, awq_tensors)
    for wrong in ("int4/group32:scale=float16", "uint4/group16:scale=float16", "uint4/group32:scale=bfloat16"):
        with pytest.raises(PlanError, match=r"weight='uint4/group32:scale=float16'"):
            ig.adopt_checkpoint(prepared(model_of(dtype=torch.float32), wrong), tmp_path)


def test_groups_of_columns_that_lie_apart(tmp_path: Path) -> None:
    def shuffled(x: Integers) -> dict[str, Tensor]:
        tensors = gptq_tensors(x)
        return tensors | {"g_idx": tensors["g_idx"].flip(0)}

    write(tmp_path, model_of(), gptq(desc_act=True), shuffled)
    with pytest.raises(CheckpointError, match=r"desc_act.*static_groups=True"):
        ig.adopt_checkpoint(prepared(model_of(), "uint4/group32:scale=float16"), tmp_path)


def test_zero_points_that_runtimes_read_differently() -> None:
    x = integers(8, 64)
    tensors = gptq_tensors(Integers(x.codes, x.scale, torch.zeros_like(x.zero), 4), less=-15)
    with pytest.raises(CheckpointError, match="Save it as gptq_v2"):
        dict(integers_in({f"a.{leaf}": tensor for leaf, tensor in tensors.items()}, gptq()))


def test_a_layer_that_one_of_them_keeps_in_float(tmp_path: Path) -> None:
    write(tmp_path, model_of(), AWQ, awq_tensors)
    tensors = load_file(tmp_path / "model.safetensors")
    path = "model.layers.0.self_attn.o_proj"
    for leaf in ("qweight", "qzeros", "scales"):
        del tensors[f"{path}.{leaf}"]
    save_file(tensors | {f"{path}.weight": torch.ones(64, 64).half()}, tmp_path / "model.safetensors")
    with pytest.raises(PlanError, match=rf"Rule\(match='{path}', keep='float'\)"):
        ig.adopt_checkpoint(prepared(model_of(), "uint4/group32:scale=float16"), tmp_path)
    rule = ig.Rule(match="*.o_proj", keep="float")
    model = ig.adopt_checkpoint(prepared(model_of(), "uint4/group32:scale=float16", rule), tmp_path)
    assert (model.get_submodule(path).weight == 1).all()


def test_files_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    write(tmp_path, model_of(), AWQ, awq_tensors)
    model = prepared(model_of(), "uint4/group32:scale=float16")
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.scales"
    for change, message in (
        ({name: tensors[name][:, :5].contiguous()}, "is corrupt"),
        ({name: tensors[name] * torch.nan}, "not finite"),
        ({"model.extra": torch.ones(1)}, "not have the same tensors: model.extra"),
    ):
        save_file(tensors | change, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            ig.adopt_checkpoint(model, tmp_path)
    save_file({key: x for key, x in tensors.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="lacks"):
        ig.adopt_checkpoint(model, tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**data, "quantization_config": {"quant_method": "aqlm"}}))
    with pytest.raises(CheckpointError, match="quantised by 'aqlm'"):
        ig.adopt_checkpoint(model, tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is corrupt"):
        ig.adopt_checkpoint(model, tmp_path)
