"""Language models in recipes: the text, its tokens, perplexity, and a run from one end to the other."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from isogrid.errors import MissingExtraError, NonFiniteError, RecipeError
from isogrid.recipes.document import parse
from isogrid.recipes.english import english, split
from isogrid.recipes.folders import RunFolder
from isogrid.recipes.language import built_in_model, causal_model, text
from isogrid.recipes.loading import load_recipe, validated
from isogrid.recipes.perplexity import Perplexity, predictions, token_loss
from isogrid.recipes.runner import run
from isogrid.recipes.sources import make_model
from isogrid.recipes.stages import begins_untrained
from isogrid.recipes.tokens import END, Packed, byte_level_tokenizer, documents_of, token_file
from tests.recipes.tiny import prose


def test_every_python_carries_english_enough():
    found = english()
    assert sum(map(len, found.test)) > 60_000  # at three characters a token, 20,000 tokens
    held_out = {" ".join(p.split()) for document in found.test for p in document.split("\n\n")}
    learned = {" ".join(p.split()) for document in found.train for p in document.split("\n\n")}
    assert not held_out & learned


def test_the_same_documents_are_held_out_whatever_else_there_is():
    documents = {f"document {n}": f"Paragraph {n}." for n in range(100)}
    found = split(documents)
    fewer = split({name: text for name, text in documents.items() if not name.endswith("7")})
    assert found.train and found.test
    assert set(fewer.test) <= set(found.test) and set(fewer.train) <= set(found.train)


def test_tokens_come_back_as_the_text_they_were(tmp_path):
    documents = ("Zwölf Boxkämpfer\n\n  jagen\t«Viktor» 🥊", "x" * 50)
    tokenizer = byte_level_tokenizer((prose(1, 2000),), 300)
    tokens = token_file(([document] for document in documents), tokenizer, tmp_path / "tokens")
    assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint32
    assert tokenizer.decode(tokens.tolist()) == END.join([*documents, ""])
    assert tokenizer.get_vocab() == byte_level_tokenizer.__wrapped__((prose(1, 2000),), 300).get_vocab()


def test_packing_loses_nothing_but_the_end():
    packed = Packed(np.arange(3 * 7 + 3, dtype=np.uint32), 7)
    assert len(packed) == 3
    assert torch.cat([packed[i][0] for i in range(3)]).tolist() == list(range(21))
    assert all(torch.equal(ids[1:], targets[:-1]) and targets[-1] == ids[-1] + 1 for ids, targets in packed)
    with pytest.raises(IndexError):
        packed[3]


def test_a_file_is_read_in_pieces_of_whole_lines(tmp_path, monkeypatch):
    monkeypatch.setattr("isogrid.recipes.tokens.CHUNK", 10)
    (tmp_path / "a.txt").write_text("one line\nanother line\n\nlast", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "first"}\n{"text": "second\\nline"}\n', encoding="utf-8")
    documents = [list(document) for document in documents_of([tmp_path / "a.txt", tmp_path / "b.jsonl"])]
    assert "".join(documents[0]) == "one line\nanother line\n\nlast" and len(documents[0]) > 1
    assert documents[1:] == [["first"], ["second\nline"]]


def test_perplexity_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, 11, generator=generator)
    targets = torch.randint(11, (5, 7), generator=generator)
    found = predictions(lambda ids: logits[ids[:, 0]], [(torch.tensor([[0], [1]]), targets[:2]),
                                                         (torch.tensor([[2], [3], [4]]), targets[2:])])  # fmt: skip
    each = -(logits.double().exp() / logits.double().exp().sum(-1, keepdim=True)).log()
    losses = each.gather(-1, targets[..., None])[..., 0]
    # Float32 log-softmax of logits of size 1 against float64.
    torch.testing.assert_close(found.losses.double(), losses, rtol=1e-6, atol=1e-6)
    mean, error = float(losses.mean()), float(losses.mean(1).std()) / math.sqrt(5)
    perplexity = found.perplexity
    assert math.isclose(perplexity.value, math.exp(mean), rel_tol=1e-6)
    assert math.isclose(perplexity.low, math.exp(mean - 1.959964 * error), rel_tol=1e-6)
    assert math.isclose(perplexity.high, math.exp(mean + 1.959964 * error), rel_tol=1e-6)
    assert perplexity.tokens == 35
    assert found.agreement(found) == 1.0
    assert math.isclose(float(token_loss(logits, targets)), mean, rel_tol=1e-6)


def test_an_infinite_loss_is_no_perplexity():
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        Perplexity.of(torch.tensor([[1.0, math.inf]]))
    assert Perplexity.of(torch.ones(1, 4)).high == math.inf  # one sequence says nothing about the spread


def test_a_language_model_runs_from_float_to_the_runtime(folder, tmp_path):
    recipe = validated(parse(json.dumps(recipe_of(folder, tmp_path / "run")), "recipe.yaml"))
    rows = run(recipe).rows
    assert [row.method for row in rows] == ["float", "float-extra", "ptq", "qat"]
    figures = [row.language for row in rows]
    assert all(found.low < found.perplexity < found.high < 60 for found in figures)  # 320 would be a guess
    for found in figures[2:]:
        assert found.agreement > 0.999
        assert math.isclose(found.perplexity, found.trained_perplexity, rel_tol=1e-4)
        assert found.tokens == figures[0].tokens and found.prompt_speed > 0
    assert rows[3].size_bytes < rows[0].size_bytes
    saved = RunFolder(tmp_path / "run").trained_model()
    assert saved.tokenizer.decode(saved.tokenizer("the cat")["input_ids"]) == "the cat"


def recipe_of(folder: Path, output: Path) -> dict:
    return {
        "model": {"name": "tests.recipes.test_language:tiny_model"},
        "data": {
            "name": "text",
            "arguments": {"train": f"{folder}/*.txt", "tokenizer": f"{folder}/tokenizer", "length": 32},
        },
        "scheme": "w4a16",
        "controls": True,
        "float_training": {"steps": 40, "batch_size": 8, "lr": 3e-3},
        "calibration": {"batches": 1, "batch_size": 2},
        "training": {"steps": 4, "batch_size": 8, "lr": 1e-4},
        "output": str(output),
    }


def tiny_model() -> torch.nn.Module:
    return built_in_model(layers=1, hidden=64, feed_forward=64, context=32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 33}, "33 tokens do not fit into the model's context of 32"),
        ({"length": 100_000}, "less than one sequence of 100000"),
        ({"train": "nowhere/*.txt"}, "there is no file nowhere"),
        ({"tokenizer": "/nowhere/at/all"}, "no tokenizer can be loaded from '/nowhere/at/all'"),
    ],
)
def test_bad_data_say_what_to_do(folder, tmp_path, change, message):
    settings = recipe_of(folder, tmp_path / "run")
    settings["data"]["arguments"] |= change
    with pytest.raises(RecipeError, match=message):
        run(validated(parse(json.dumps(settings), "recipe.yaml")))


def test_a_tokenizer_of_another_model_is_refused(folder):
    data = text(str(folder / "text.txt"), str(folder / "tokenizer"), length=16)
    model = tiny_model()
    model.config.vocab_size = 100
    with pytest.raises(RecipeError, match=r"tokens and the model knows 100"):
        data.check(model)


def test_json_lines_without_text_say_where(folder, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n{"words": "second"}\n', encoding="utf-8")
    with pytest.raises(RecipeError, match=r"a\.jsonl:2 is no JSON object with a key 'text'"):
        text(str(tmp_path / "a.jsonl"), str(folder / "tokenizer"))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not a readable text file in UTF-8"):
        text(str(tmp_path / "b.txt"), str(folder / "tokenizer"))


def test_a_saved_model_is_a_model_of_a_recipe(tmp_path):
    tiny_model().save_pretrained(tmp_path / "saved")
    found = causal_model(str(tmp_path / "saved"))
    assert found.config.use_cache is False and next(found.parameters()).dtype == torch.float32
    with pytest.raises(RecipeError, match="no causal language model can be loaded from '/nowhere'"):
        causal_model("/nowhere")
    with pytest.raises(RecipeError, match="unknown dtype 'int8'"):
        causal_model("/nowhere", dtype="int8")


def test_without_transformers_a_recipe_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'isogrid\[transformers\]'"):
        make_model(load_recipe("llama-q4_0", demo=True).model)


def test_a_demo_takes_the_place_of_model_and_data():
    own, demo = load_recipe("llama-q4_0"), load_recipe("llama-q4_0", demo=True)
    assert (own.model.name, own.data.name, own.float_training) == ("huggingface", "text", None)
    assert (demo.model.name, demo.data.name, demo.output) == ("language-model", "english", "runs/llama-q4_0-demo")
    assert demo.scheme == own.scheme and demo.float_training is not None
    assert load_recipe("llama-q4_0", ["training.steps=7"], demo=True).training.steps == 7
    with pytest.raises(RecipeError, match=r"digits-w4a8\.yaml has no demo\. These have one: .*llama-q4_0"):
        load_recipe("digits-w4a8", demo=True)


@pytest.mark.parametrize(("name", "untrained"), [("bitnet", True), ("llama-q4_0", False)])
def test_what_nobody_has_trained_is_not_called_the_float_model(name: str, untrained: bool) -> None:
    assert begins_untrained(load_recipe(name, demo=True)) == untrained
    assert not begins_untrained(load_recipe(name, ["model.arguments.path=gpt2"]))
