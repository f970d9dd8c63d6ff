"""BitNet b1.58: against closed forms, the published formulas, and transformers' own reading of them."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import isogrid as ig
from isogrid.errors import PlanError, TargetError
from isogrid.layers.bitnet import BitLinear, TernaryLinear, ternary_sums
from isogrid.layers.bitnet_activations import BitNetActivations, token_codes


def prepared(model: nn.Module, x: torch.Tensor, **options: object) -> nn.Module:
    return ig.calibrate(ig.prepare(model, ig.plan(model, scheme="bitnet", example_inputs=(x,), **options)), [x])


def published(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """The formulas of the FAQ, in float64, with straight-through gradients."""
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    sigma = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    gamma = weight.abs().mean().clamp(min=1e-5)
    x_q = (x * sigma).round().clamp(-128, 127) / sigma
    w_q = (weight / gamma).round().clamp(-1, 1) * gamma
    return F.linear(x + (x_q - x).detach(), weight + (w_q - weight).detach())


@pytest.fixture
def data() -> tuple[BitLinear, torch.Tensor]:
    torch.manual_seed(0)
    return BitLinear(96, 40), 3.0 * torch.randn(7, 5, 96)


def test_forward_and_gradients_are_the_published_formulas(data):
    layer, x = data
    weight = layer.weight.detach().double().requires_grad_()
    x64 = x.double().requires_grad_()
    expected = published(x64, weight)
    trained = prepared(nn.Sequential(copy.deepcopy(layer)), x)
    x32 = x.clone().requires_grad_()
    y = trained(x32)
    # float32 products and sums of 96 terms against float64; a code that sat on a tie would show as a hundredth.
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    expected.backward(gradient.double())
    torch.testing.assert_close(trained[0].weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x32.grad.double(), x64.grad, rtol=1e-5, atol=1e-5)


def test_tokens_and_weights_are_those_of_transformers(data):
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    layer, x = data
    # What torch.compile wraps: no compiler is asked for here.
    assert torch.equal(BitNetActivations()(x), bitnet.ActQuant.forward.__wrapped__(None, x))
    theirs = bitnet.WeightQuant.forward.__wrapped__(None, layer.weight.detach())
    ours = prepared(nn.Sequential(copy.deepcopy(layer)), x)[0].weight_quantizer.quantize(layer.weight)
    assert torch.equal(theirs.sign(), ours.codes.float())
    # They divide by 1 / mean, which is the mean to an ulp.
    torch.testing.assert_close(theirs, ours.dequantize(), rtol=2e-7, atol=0)


def test_a_gaussian_weight_has_31_percent_zeros():
    torch.manual_seed(0)
    layer = BitLinear(512, 512)
    nn.init.normal_(layer.weight, std=0.02)
    model = prepared(nn.Sequential(layer), torch.randn(2, 512))
    codes = model[0].weight_quantizer.quantize(model[0].weight).codes
    # P(|w| < mean|w| / 2) of a Gaussian, whose mean magnitude is sqrt(2 / pi); four standard errors of 2^18 draws.
    zeros = math.erf(math.sqrt(2 / math.pi) / 2 / math.sqrt(2))
    assert abs(float((codes == 0).double().mean()) - zeros) < 4 * math.sqrt(zeros * (1 - zeros) / codes.numel())
    assert round(zeros, 3) == 0.31


def test_the_scale_is_the_mean_magnitude_and_follows_the_weight(data):
    layer, x = data
    model = prepared(nn.Sequential(layer), x)
    with torch.no_grad():
        layer_weight = model[0].weight
        layer_weight.mul_(3.0)
        scale = model[0].weight_quantizer.quantize(layer_weight).affine.scale
    torch.testing.assert_close(scale.reshape(()), layer_weight.detach().abs().mean(), rtol=1e-6, atol=0)


def test_no_token_and_no_weight_is_divided_by_zero():
    codes, factor = token_codes(torch.zeros(2, 8))
    assert not codes.any() and torch.equal(factor, 127.0 / torch.full((2, 1), 1e-5))
    layer = BitLinear(8, 4)
    nn.init.zeros_(layer.weight)
    x = torch.randn(3, 8)
    assert not prepared(nn.Sequential(layer), x)(x).any()


def test_additions_are_the_product():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (3, 5, 300), generator=generator, dtype=torch.int32)
    weight = torch.randint(-1, 2, (70, 300), generator=generator, dtype=torch.int8)
    sums = ternary_sums(codes, weight)
    assert torch.equal(sums.long(), codes.long() @ weight.long().T)
    assert sums.dtype == torch.int32 and sums.shape == (3, 5, 70)


def test_the_converted_layer_multiplies_by_no_weight(data, monkeypatch):
    layer, x = data
    model = prepared(nn.Sequential(layer), x).eval()
    expected = model(x).detach()
    converted = ig.convert(model)
    assert isinstance(converted[0], TernaryLinear)
    codes, factor = token_codes(F.rms_norm(x, (96,), eps=layer.eps))
    gamma = converted[0].quantized.affine.scale.reshape(())
    whole = codes.double() @ converted[0].quantized.codes.double().T
    monkeypatch.setattr(F, "linear", lambda x, weight, bias=None: pytest.fail("a matrix product"))
    with torch.no_grad():
        found = TernaryLinear.forward(converted[0], F.rms_norm(x, (96,), eps=layer.eps))
    assert torch.equal(found, whole.float() * (gamma / factor))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # a float32 matrix product of 96 terms


def test_the_ramp_blends_weights_and_activations_in(data):
    layer, x = data
    model = prepared(nn.Sequential(copy.deepcopy(layer)), x)
    schedule = ig.Schedule(model, total_steps=2000, ramp_steps=999)
    normal = F.rms_norm(x, (96,), eps=layer.eps)
    quantized = model[0].weight_quantizer.quantize(layer.weight).dequantize()
    for step in (0, 1, 499, 998, 999):  # λ = min(t / 1000, 1) in the t-th step
        while schedule.position < step:
            schedule.step()
        strength = min((step + 1) / 1000, 1.0)
        x_mixed = normal + strength * (BitNetActivations()(normal) - normal)
        w_mixed = layer.weight + strength * (quantized - layer.weight)
        torch.testing.assert_close(model(x), F.linear(x_mixed, w_mixed), rtol=1e-5, atol=1e-5)


def llama(**changes: object) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, use_cache=False, **changes,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def test_a_model_of_bitnets_structure_reads_the_same_in_the_layers_behind_its_norms():
    model, ids = llama(), torch.arange(12).reshape(2, 6)
    seen = {}
    watched = [f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj")]
    bit = ig.to_bitnet(copy.deepcopy(model))
    for kind, each in (("float", model), ("bit", bit)):
        for name in watched:
            each.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, key=(kind, name): seen.__setitem__(key, output)
            )
        each(ids)
    for name in watched:
        # The gain multiplies weights instead of inputs: float32 products of 32 terms.
        torch.testing.assert_close(seen["bit", name], seen["float", name], rtol=1e-5, atol=1e-6)
    assert isinstance(bit.model.layers[1].input_layernorm, nn.Identity)
    kinds = {name: type(module).__name__ for name, module in bit.named_modules() if isinstance(module, nn.Linear)}
    assert kinds.pop("lm_head") == "Linear" and set(kinds.values()) == {"BitLinear"} and len(kinds) == 14
    assert bit.state_dict().keys() == {name for name in model.state_dict() if not name.endswith("layernorm.weight")}


def test_embedding_and_head_stay_float_and_say_so(tmp_path):
    model, ids = ig.to_bitnet(llama()), torch.arange(12).reshape(2, 6)
    plan = ig.plan(model, scheme="bitnet", example_inputs={"input_ids": ids})
    floats = dict(plan.floats)
    assert floats["lm_head"] == floats["model.embed_tokens"] == "scheme bitnet is for BitLinear layers"
    assert {site.format for site in plan.sites} == {"bitnet"} and len(plan.sites) == 14
    assert {layer.activation_rule for layer in plan.layers} == {"bitnet"}
    ig.calibrate(ig.prepare(model, plan), [{"input_ids": ids}])
    ig.save(model, tmp_path / "saved")
    again = ig.restore(ig.to_bitnet(llama()), tmp_path / "saved").eval()
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    with pytest.raises(TargetError, match=r"isogrid\.save"):
        ig.export(model, tmp_path / "model")


def test_llama_cpp_gets_blocks_that_share_one_half_precision_scale():
    layer = BitLinear(256, 8)
    plan = ig.plan(nn.Sequential(layer), "llamacpp", "bitnet", example_inputs=(torch.randn(2, 256),))
    assert [(site.format, site.range, site.estimator, site.scale) for site in plan.sites] == [
        ("ternary/tensor:scale=float16", "absmean", "identity", "dynamic")
    ]
    assert plan.layers[0].activation_rule == "q8_k"  # what llama.cpp does, which is what is trained then


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4, bias=False)), "no blocks with input_layernorm"),
        (lambda: llama(attention_bias=True), "has a bias, and BitNet has none"),
        (lambda: llama(mlp_bias=True), "has a bias, and BitNet has none"),
    ],
)
def test_what_is_built_otherwise_is_refused(model, message):
    with pytest.raises(PlanError, match=message):
        ig.to_bitnet(model())


def test_a_norm_whose_readers_are_skipped_is_not_lost():
    with pytest.raises(PlanError, match="its norm would be lost"):
        ig.to_bitnet(llama(), skip=("lm_head", "*.q_proj"))


def test_two_stages_drop_the_rate_and_the_decay():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([{"params": [parameter], "lr": 1.5e-3, "weight_decay": 0.1}])
    stages, seen = ig.TwoStages(), []
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 1.5e-3  # a constant schedule
        stages.apply(optimizer, step, 4)
        seen.append((round(optimizer.param_groups[0]["lr"], 9), optimizer.param_groups[0]["weight_decay"]))
    assert seen == [(1.5e-3, 0.1), (1.5e-3, 0.1), (1e-3, 0.0), (1e-3, 0.0)]
    with pytest.raises(PlanError, match="a share of the steps"):
        ig.TwoStages(at=2.0)
