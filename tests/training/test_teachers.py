"""A teacher is the float model as it was, bit for bit, and costs what differs from the student."""

import copy

import pytest
import torch
from torch import nn

import isogrid as ig
from isogrid.errors import DistillationError, PlanError
from isogrid.planning.state import quantizers
from isogrid.training import LayerLosses, generate_text
from tests.recipes.tiny import model as tiny_model


def prepared(model: nn.Module, x: object, scheme: str = "w4a8") -> nn.Module:
    inputs = x if isinstance(x, dict) else (x,)
    return ig.calibrate(ig.prepare(model, ig.plan(model, scheme=scheme, example_inputs=inputs)), [x])


def trained(model: nn.Module, guide: object, x: torch.Tensor, steps: int = 3) -> None:
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        targets = guide(x)
        ig.Distillation()(model(x), targets).backward()
        optimizer.step()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


def test_the_teacher_stays_the_float_model_while_the_student_trains(x: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = tiny_model()
    expected = copy.deepcopy(model).eval()(x)
    prepared(model, x)
    guide = ig.teacher(model)
    before = model.eval()(x)
    trained(model, guide, x)
    assert torch.equal(guide(x), expected)
    assert model.training and not torch.equal(model.eval()(x), before)
    assert all(quantizer.enabled for quantizer in quantizers(model).values())


def test_a_frozen_tensor_is_shared_and_scales_alone_cost_nothing(x: torch.Tensor) -> None:
    x = x.repeat(1, 8)
    model = prepared(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)), x, "w4a16")
    whole = ig.teacher(model)
    assert whole.kept_bytes == sum(4 * p.numel() for name, p in model.named_parameters() if "quantizer" not in name)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("quantizer" in name)
    scales = ig.teacher(model)
    assert scales.kept_bytes == 0
    assert torch.equal(scales(x), whole(x))


def test_a_teacher_may_rest_elsewhere_in_eight_bits_and_come_from_weights(x: torch.Tensor) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    rounded = copy.deepcopy(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(x).detach()
    prepared(model, x)
    small = ig.teacher(model, format="int8/channel", device="cpu")
    trained(model, small, x)
    assert torch.equal(ig.teacher(model, weights=weights)(x), expected)
    with torch.no_grad():
        for layer in (rounded[0], rounded[2]):
            layer.weight.copy_(ig.format("int8/channel").fake_quantize(layer.weight))
    assert torch.equal(small(x), rounded(x))
    assert small.kept_bytes == sum(layer.weight.numel() + 8 * len(layer.bias) for layer in (rounded[0], rounded[2]))
    with pytest.raises(DistillationError, match=r"0\.weight, \[8, 4\], and .* is not among the weights"):
        ig.teacher(model, weights={})
    with pytest.raises(DistillationError, match="has shape \\[2\\]"):
        ig.teacher(model, weights={**weights, "0.bias": torch.zeros(2)})


def test_with_adapters_the_teacher_keeps_the_adapters() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 32)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    expected = model(x).detach()
    prepared(model, x, "w4a16")
    ig.add_adapters(model, 4)
    guide = ig.teacher(model)
    trained(model, guide, x)
    assert torch.equal(guide(x), expected)
    assert guide.kept_bytes == sum(4 * p.numel() for name, p in model.named_parameters() if ".adapters." in name)


def test_another_model_teaches_in_evaluation_mode_without_gradients(x: torch.Tensor) -> None:
    other = tiny_model().train()
    guide = ig.teacher(other)
    assert torch.equal(guide(x), guide(x)) and not guide(x).requires_grad and other.training
    model = prepared(nn.Sequential(nn.Linear(32, 4)), torch.ones(1, 32), "w4a16")
    guide = ig.teacher(model)
    ig.freeze_codes(model)
    with pytest.raises(DistillationError, match="0 is kept as codes"):
        guide(torch.ones(1, 32))
    with pytest.raises(DistillationError, match="brings its own weights"):
        ig.teacher(other, device="cpu")


def test_a_language_model_s_teacher_gives_the_float_model_s_logits() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=ids).logits
    prepared(model, {"input_ids": ids}, "nvfp4")
    guide = ig.teacher(model)
    assert torch.equal(guide(input_ids=ids).logits, expected)
    assert guide.kept_bytes < 4 * sum(p.numel() for p in model.parameters()) + 4096  # tied weights once, and RoPE's


def test_layers_are_compared_where_teacher_and_student_are_one_model_and_where_not(x: torch.Tensor) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    other = copy.deepcopy(model)
    prepared(model, x).train()
    found = []
    for guide in (ig.teacher(model), ig.teacher(other)):
        inside = LayerLosses(model, guide, features={"0": 1.0, "2": 0.5}, relations={"0": 2.0}, heads=2)
        for runs in ((guide, model), (model, guide)):
            for run in runs:
                run(x)
            found.append(inside.loss())
        with pytest.raises(DistillationError, match="0 has not run in both models"):
            inside.loss()
        inside.remove()
    assert found[0] > 0 and found[0].requires_grad and all(torch.equal(found[0], loss) for loss in found)
    with pytest.raises(DistillationError, match="no module 'nowhere'"):
        LayerLosses(model, ig.teacher(model), features={"nowhere": 1.0})


def test_the_student_that_has_not_been_prepared_is_its_own_mistake() -> None:
    with pytest.raises(PlanError, match="not prepared"):
        ig.parameter_groups(tiny_model(), lr=1.0)


class Scripted(nn.Module):
    """Knows two next tokens of every token: one more and two more, with odds of e to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.odds = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = torch.full((*ids.shape, 8), -torch.inf)
        for more in (1, 2):
            logits.scatter_(-1, (ids + more).unsqueeze(-1) % 8, float(self.odds[more - 1]))
        return logits


def test_a_model_writes_from_every_first_token_greedily_and_then_by_chance() -> None:
    found = generate_text(Scripted(), 24, 64, vocabulary=8, batch_size=10)
    assert found.shape == (24, 64)
    assert found[:, 0].tolist() == [number % 8 for number in range(24)]
    steps = found.diff(dim=1) % 8
    for number, row in enumerate(steps):
        greedy = 3 + number % 3
        assert (row[:greedy] == 1).all()
    # 59 or more draws of each of 24 sequences, of which 1 / (1 + e) take two steps; three standard deviations.
    share = float((steps[:, 5:] == 2).double().mean())
    assert share == pytest.approx(0.2689, abs=3 * (0.2689 * 0.7311 / (24 * 58)) ** 0.5)
    assert torch.equal(found, generate_text(Scripted(), 24, 64, vocabulary=8, batch_size=10))
    assert not torch.equal(found, generate_text(Scripted(), 24, 64, vocabulary=8, batch_size=10, seed=1))


def test_a_model_with_a_memory_writes_what_it_writes_without() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2)).eval()
    found = generate_text(model, 4, 12, vocabulary=32)

    class Forgetful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.inner(ids, use_cache=False).logits

    assert torch.equal(found, generate_text(Forgetful(), 4, 12, vocabulary=32))
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(DistillationError, match="it can write nothing"):
        generate_text(model, 1, 3, vocabulary=32)
    with pytest.raises(DistillationError, match="at least 1"):
        generate_text(model, 0, 3, vocabulary=32)
