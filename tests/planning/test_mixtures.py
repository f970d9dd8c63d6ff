"""Which types llama.cpp gives to which layers, against counts that its own tool writes and its rules written out."""

import pytest
import torch
from torch import nn

import isogrid as ig
from isogrid.errors import FormatError, PlanError
from isogrid.planning.mixtures import MIXTURES, assign
from isogrid.planning.roles import Weight, role_of
from isogrid.planning.rules import SCHEMES


def llama(blocks: int, hidden: int = 256, sharing: int = 1, tied: bool = False, experts: int = 1) -> list[Weight]:
    """The weights of a Llama, or of a Mixtral, by the names of transformers."""
    rows = {"self_attn.q_proj": hidden, "self_attn.k_proj": hidden // sharing, "self_attn.v_proj": hidden // sharing}
    rows |= {"self_attn.o_proj": hidden, "mlp.gate_proj": 512, "mlp.up_proj": 512, "mlp.down_proj": hidden}
    embedding = "model.embed_tokens"
    found = [Weight(embedding, "embedding", (1000, hidden), embedding)]
    for block in range(blocks):
        for name, out in rows.items():
            path = f"model.layers.{block}.{name}"
            columns = 512 if "down" in name else hidden
            if experts > 1 and "mlp" in name:
                path = path.replace("mlp.", "mlp.experts.").replace("_proj", "_projection")
                found.append(Weight(path, "experts", (experts * out, columns), path, experts))
            else:
                found.append(Weight(path, "linear", (out, columns), path))
    return [*found, Weight("lm_head", "linear", (1000, hidden), embedding if tied else "lm_head")]


def types(mixture: str, weights: list[Weight], ending: str) -> list[str]:
    found = assign(mixture, MIXTURES[mixture].base, weights)
    return [assigned.weight for path, assigned in found.items() if path.endswith(ending)]


def test_half_of_the_values_and_of_the_feed_forward_outputs_get_six_bits() -> None:
    weights = llama(32)
    # llama-quantize prints for a Llama of 32 blocks: 193 tensors q4_K, 33 q6_K.
    found = [assigned.weight for assigned in assign("q4_k_m", "q4_k", weights).values()]
    assert (found.count("q4_k"), found.count("q6_k")) == (193, 33)
    expected = [i < 4 or i >= 28 or (i - 4) % 3 == 2 for i in range(32)]
    for ending in ("v_proj", "down_proj"):
        assert [weight == "q6_k" for weight in types("q4_k_m", weights, ending)] == expected
    assert types("q4_k_m", weights, "lm_head") == ["q6_k"]
    assert types("q4_k_m", weights, "embed_tokens") == ["q4_k"]
    assert set(types("q5_k_m", weights, "v_proj")) == {"q5_k", "q6_k"}


@pytest.mark.parametrize(
    ("mixture", "ending", "expected"),
    [
        ("q4_k_s", "v_proj", ["q5_k"] * 4 + ["q4_k"] * 12),
        ("q4_k_s", "down_proj", ["q5_k"] * 2 + ["q4_k"] * 14),
        ("q3_k_m", "v_proj", ["q5_k"] * 2 + ["q4_k"] * 14),
        ("q3_k_m", "down_proj", ["q5_k"] + ["q4_k"] * 15),
        ("q3_k_m", "o_proj", ["q4_k"] * 16),
        ("q3_k_l", "o_proj", ["q5_k"] * 16),
        ("q3_k_s", "v_proj", ["q3_k"] * 16),
        ("q2_k", "v_proj", ["q3_k"] * 16),
        ("q2_k", "down_proj", ["q3_k"] * 16),
        ("q2_k", "o_proj", ["q3_k"] * 16),
        ("q2_k", "k_proj", ["q2_k"] * 16),
        ("q2_k_s", "down_proj", ["q4_k"] * 2 + ["q2_k"] * 14),
        ("iq4_nl", "down_proj", ["q5_k"] * 2 + ["iq4_nl"] * 14),
        ("tq2_0", "embed_tokens", ["q4_k"]),
        ("q8_0", "lm_head", ["q8_0"]),
        ("q4_0", "lm_head", ["q6_k"]),
        ("q4_0", "embed_tokens", ["q4_0"]),
    ],
)
def test_types_by_role(mixture: str, ending: str, expected: list[str]) -> None:
    assert types(mixture, llama(16), ending) == expected


def test_eight_experts_and_eighty_blocks() -> None:
    eight = llama(16, sharing=4, experts=8)
    assert set(types("q4_k_m", eight, "v_proj")) == set(types("q4_0", eight, "k_proj")) == {"q8_0"}
    assert set(types("q4_k_m", eight, "o_proj")) == {"q5_k"} and set(types("q3_k_l", eight, "o_proj")) == {"q3_k"}
    assert types("q4_k_m", eight, "down_projection")[:4] == ["q6_k", "q6_k", "q4_k", "q4_k"]
    assert set(types("q4_k_m", llama(16, experts=4), "k_proj")) == {"q4_k"}
    assert set(types("q3_k_s", llama(80, sharing=8), "v_proj")) == {"q5_k"}
    assert set(types("q3_k_s", llama(80), "v_proj")) == {"q3_k"}


def test_a_table_that_is_also_the_output_is_stored_as_the_output() -> None:
    weights = llama(4, tied=True)
    assert types("q4_0", weights, "embed_tokens") == types("q4_0", weights, "lm_head") == ["q6_k"]


def test_values_that_many_queries_share_get_more_bits() -> None:
    assert types("q2_k", llama(4, sharing=4), "v_proj") == ["q4_k"] * 4
    assert types("iq4_nl", llama(4, sharing=4), "v_proj") == ["q5_k"] * 4
    assert types("iq4_nl", llama(4, sharing=2), "v_proj") == ["iq4_nl"] * 4


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("transformer.h.0.attn.c_attn.linear", "attention_qkv"),
        ("transformer.h.0.attn.c_proj.linear", "attention_output"),
        ("transformer.h.0.mlp.c_proj.linear", "ffn_down"),
        ("transformer.h.0.mlp.c_fc.linear", "ffn_up"),
        ("gpt_neox.layers.1.attention.query_key_value", "attention_qkv"),
        ("gpt_neox.layers.1.attention.dense", "attention_output"),
        ("gpt_neox.layers.1.mlp.dense_4h_to_h", "ffn_down"),
        ("embed_out", "output"),
        ("model.layers.0.mlp.experts.down_proj", "ffn_down"),
        ("model.decoder.layers.0.self_attn.out_proj", "attention_output"),
        ("model.layers.1.mlp.gate_up_proj", "ffn_up"),
        ("0.0", "other"),
    ],
)
def test_roles_are_told_by_the_paths_of_many_families(path: str, role: str) -> None:
    assert role_of(Weight(path, "linear", (8, 8), path)) == role


@pytest.mark.parametrize(
    ("columns", "mixture", "expected"),
    [
        (288, "q4_k_s", "q5_0"),
        (288, "q5_k_s", "q5_1"),
        (288, "q6_k", "q8_0"),
        (288, "q3_k_s", "q4_0"),
        (288, "q2_k_s", "q4_0"),
        (288, "tq2_0", "q4_0"),
        (96, "q2_0", "q4_0"),
        (100, "q4_k_s", "float16"),
        (100, "q4_0", "float16"),
        (288, "q4_0", "q4_0"),
    ],
)
def test_rows_that_do_not_fit_fall_back_as_in_llama_cpp(columns: int, mixture: str, expected: str) -> None:
    [found] = assign(mixture, MIXTURES[mixture].base, [Weight("a", "linear", (8, columns), "a")]).values()
    assert found.weight == expected
    assert (found.instead_of == "") == (expected == MIXTURES[mixture].base)
    if found.instead_of:
        assert str(columns) in found.reason and expected in found.reason


def test_an_output_layer_that_does_not_fit_the_mixtures_first_type_gets_eight_bits() -> None:
    assert types("q4_k_m", llama(4, hidden=288), "lm_head") == ["q8_0"]
    assert types("q4_k_m", llama(4, hidden=288), "embed_tokens") == ["q5_0"]


def test_every_mixture_is_a_scheme_and_unknown_ones_are_refused() -> None:
    named = {scheme.mixture for scheme in SCHEMES.values() if scheme.mixture}
    assert named == set(MIXTURES)
    for scheme in SCHEMES.values():
        if scheme.mixture:
            assert MIXTURES[scheme.mixture].base == scheme.weight
    with pytest.raises(PlanError, match="Unknown mixture 'q4_k_x'"):
        assign("q4_k_x", "q4_k", [])


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.v_proj, self.down_proj = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.v_proj(x))


class Tiny(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(16, hidden), nn.Embedding(8, hidden)
        self.layers = nn.ModuleList(Block(hidden) for _ in range(2))
        self.lm_head = nn.Linear(hidden, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


IDS = torch.zeros(1, 4, dtype=torch.long)


def test_the_plan_has_a_reason_for_every_other_type() -> None:
    plan = ig.plan(Tiny(288), scheme="q4_k_m", example_inputs=(IDS,))
    sites = {site.name: site for site in plan.sites}
    assert sites["layers.1.v_proj.weight"].format == "q8_0"
    assert sites["layers.1.v_proj.weight"].reason == (
        "scheme q4_k_m: attention v, block 1; q6_k holds 256 values of a row and 288 are no multiple, so q8_0"
    )
    assert {layer.path: layer.activation_rule for layer in plan.layers} == {
        "wte": None,
        "layers.0.v_proj": "q8_0",
        "layers.0.down_proj": "q8_0",
        "layers.1.v_proj": "q8_0",
        "layers.1.down_proj": "q8_0",
        "lm_head": "q8_0",
    }
    assert dict(plan.floats)["wpe"] == "llama.cpp keeps embeddings of positions and of token types in float"


def test_strict_plans_take_no_stand_ins() -> None:
    ig.plan(Tiny(256), scheme="q4_k_m", example_inputs=(IDS,), strict=True)
    with pytest.raises(FormatError, match=r"288 are no multiple, so q5_0\. Plan without strict=True"):
        ig.plan(Tiny(288), scheme="q4_k_m", example_inputs=(IDS,), strict=True)


def test_rules_come_before_the_mixture_and_are_taken_at_their_word() -> None:
    rules = [ig.Rule(match="lm_head", weight="q8_0"), ig.Rule(match="*.v_proj", scale="frozen")]
    plan = ig.plan(Tiny(256), scheme="q4_k_m", rules=rules, example_inputs=(IDS,))
    sites = {site.name: site for site in plan.sites}
    assert (sites["lm_head.weight"].format, sites["lm_head.weight"].reason) == ("q8_0", "rule 'lm_head'")
    assert (sites["layers.1.v_proj.weight"].format, sites["layers.1.v_proj.weight"].scale) == ("q6_k", "frozen")
    with pytest.raises(FormatError, match="does not fit layer 'lm_head'"):
        ig.plan(Tiny(288), scheme="q4_0", rules=[ig.Rule(match="lm_head", weight="q6_k")], example_inputs=(IDS,))
