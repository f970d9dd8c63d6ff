"""Language models in recipes: the built-in one, any of Hugging Face, and the text that they learn from."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from isogrid.api import to_bitnet
from isogrid.errors import RecipeError
from isogrid.recipes.data import Data, collate, size
from isogrid.recipes.english import english
from isogrid.recipes.perplexity import token_accuracy, token_loss
from isogrid.recipes.tokens import (
    Packed,
    byte_level_tokenizer,
    cached,
    documents_of,
    file_digest,
    needs_transformers,
    pretrained_tokenizer,
    text_files,
    token_file,
    tokenizer_digest,
)

VOCABULARY = 1024
"""Tokens of the built-in tokenizer."""

TEST_SHARE = 0.05
"""Of a text without test files of its own."""


@dataclass(frozen=True)
class LanguageData(Data):
    """Text in sequences of tokens.

    Attributes:
        tokenizer: of transformers, which made the tokens; the artefact gets it where its format holds one.
        length: tokens of a sequence.
        description: of the text, for people.
    """

    tokenizer: Any = None
    length: int = 0
    description: str = ""

    @property
    def example_inputs(self) -> dict[str, Any]:
        """The first sequences, by the name that every causal model of transformers has for them."""
        ids, _ = collate(self.train, range(min(2, size(self.train))))
        return {"input_ids": ids}

    def test_batches(self, batch_size: int = 8) -> Iterator[tuple[Any, ...]]:
        """The test sequences in order; few at a time, for logits are many."""
        return super().test_batches(batch_size)

    @property
    def pace(self) -> tuple[int, str]:
        return self.length, "tokens"

    def check(self, model: nn.Module) -> None:
        """Raise RecipeError where sequences are longer than the model's context, or have tokens that it lacks."""
        config = getattr(model, "config", None)
        context = getattr(config, "max_position_embeddings", None)
        if context is not None and self.length > context:
            raise RecipeError(
                f"data: sequences of {self.length} tokens do not fit into the model's context of {context}. "
                f"Set data.arguments.length to at most {context}."
            )
        known = getattr(config, "vocab_size", None)
        if known is not None and len(self.tokenizer) > known:
            raise RecipeError(
                f"data: the tokenizer has {len(self.tokenizer)} tokens and the model knows {known}. "
                "Set data.arguments.tokenizer to the model's own."
            )


def built_in_text(length: int = 256) -> LanguageData:
    """The English that every Python installation carries, in tokens of the built-in tokenizer.

    Args:
        length: tokens of a sequence.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    text = english()
    tokenizer = byte_level_tokenizer(text.train, VOCABULARY)
    parts: list[Packed] = []
    for documents in (text.train, text.test):
        path = cached("english", text.digest, str(len(documents)), tokenizer_digest(tokenizer))
        parts.append(Packed(token_file(([document] for document in documents), tokenizer, path), length))
    train, test = parts
    return _language_data(train, test, tokenizer, str(text))


def text(train: str, tokenizer: str, test: str | None = None, length: int = 1024, column: str = "text") -> LanguageData:
    """Text files as a language model's data, tokenised once and kept in the user's cache.

    Args:
        train: path of a text file or a .jsonl file, or a pattern of paths such as `books/*.txt`.
        tokenizer: of Hugging Face, by name or folder.
        test: the same, never trained on; without it the last twentieth of the tokens is held out.
        length: tokens of a sequence.
        column: key of the text in the objects of .jsonl files.

    Raises:
        RecipeError: there is no such file, tokenizer, or less text than two sequences.
        MissingExtraError: transformers is not installed.
    """
    chosen = pretrained_tokenizer(tokenizer)
    training = _tokens_of(train, chosen, column)
    if test is not None:
        held_out = _tokens_of(test, chosen, column)
    else:
        cut = len(training) - max(length + 1, round(TEST_SHARE * len(training)))
        training, held_out = training[: max(cut, 0)], training[max(cut, 0) :]
    return _language_data(Packed(training, length), Packed(held_out, length), chosen, f"Text of {train}")


def _tokens_of(pattern: str, tokenizer: Any, column: str) -> np.ndarray[Any, Any]:
    paths = text_files(pattern)
    path = cached("text", file_digest(paths), column, tokenizer_digest(tokenizer))
    return token_file(documents_of(paths, column), tokenizer, path)


def _language_data(train: Packed, test: Packed, tokenizer: Any, description: str) -> LanguageData:
    for name, part in (("train", train), ("test", test)):
        if not len(part):
            raise RecipeError(
                f"The {name} text has {len(part.tokens)} tokens, less than one sequence of {part.length} and its "
                "targets. Give more text, or a smaller data.arguments.length."
            )
    return LanguageData(
        train, test, loss=token_loss, metric=token_accuracy,
        tokenizer=tokenizer, length=train.length, description=description,
    )  # fmt: skip


def built_in_model(
    layers: int = 3, hidden: int = 256, feed_forward: int = 768, context: int = 256, bitnet: bool = False
) -> nn.Module:
    """A small language model of the Llama architecture, for the built-in text.

    All sizes are multiples of 256, so that every format of llama.cpp fits. input_ids int64 [sequences, length] to
    logits float32 [sequences, length, 1024].

    Args:
        layers: decoder blocks.
        hidden: size of an embedding; heads have 64 features, and two of them share keys and values.
        feed_forward: size in between.
        context: tokens at most.
        bitnet: the structure of BitNet, see `isogrid.to_bitnet`; embedding and head are then one, as llama.cpp has it.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    needs_transformers("The built-in language model")
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, hidden // 64)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=context,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=bitnet,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return to_bitnet(model) if bitnet else model


def causal_model(path: str, dtype: str = "float32", bitnet: bool = False) -> nn.Module:
    """A causal language model of Hugging Face, with its weights.

    Args:
        path: its name or folder.
        dtype: that the weights are trained in.
        bitnet: give it the structure of BitNet, see `isogrid.to_bitnet`; it then has to be trained.

    Raises:
        RecipeError: there is none.
        MissingExtraError: transformers is not installed.
    """
    needs_transformers("A language model of Hugging Face")
    from transformers import AutoModelForCausalLM

    kind = getattr(torch, dtype, None)
    if kind not in (torch.float32, torch.bfloat16, torch.float16):
        raise RecipeError(f"model: unknown dtype {dtype!r}. Known: float32, bfloat16, float16.")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=kind)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).partition("\n")[0]
        raise RecipeError(f"model: no causal language model can be loaded from {path!r}: {first}") from error
    model.config.use_cache = False  # training sees whole sequences
    return to_bitnet(model) if bitnet else model
