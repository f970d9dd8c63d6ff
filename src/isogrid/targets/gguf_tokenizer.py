"""A transformers tokenizer as the metadata of a GGUF file, after llama.cpp's own converter."""

import json
from typing import Any

from isogrid.errors import TargetError
from isogrid.targets.gguf_architectures import Metadata

_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_ENGLISH = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = "[^\\r\\n\\p{L}\\p{N}]?\\p{L}+"
_REST = " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

PRE_TOKENIZERS = {
    f"{start}|{_WORDS}|{digits}|{_REST}": name
    for start in (_CONTRACTIONS, _ENGLISH)
    for digits, name in (("\\p{N}{1,3}", "llama-bpe"), ("\\p{N}", "qwen2"))
}
"""llama.cpp's names of the patterns that split text before byte pairs are merged; see llama-vocab.cpp."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens, as llama.h numbers them."""


def tokenizer_metadata(tokenizer: Any, size: int) -> Metadata:
    """The vocabulary, merges and special tokens of a tokenizer.

    Args:
        tokenizer: of transformers, with a `backend_tokenizer`; None writes a file without a vocabulary, which takes
            and gives numbers of tokens only.
        size: rows of the embedding; numbers without a token are filled up.

    Raises:
        TargetError: llama.cpp has no tokenizer like it, or it has more tokens than the model.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    data: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    if data.get("model", {}).get("type") != "BPE":
        kind = data.get("model", {}).get("type", "no fast tokenizer")
        raise _unknown(f"{type(tokenizer).__name__} ({kind})")
    bytewise = _is_bytewise(data)
    tokens, types = _tokens(data, size, bytewise)
    found: Metadata = {
        "tokenizer.ggml.model": "gpt2" if bytewise else "llama",
        "tokenizer.ggml.pre": _pre_tokenizer(data) if bytewise else "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
    }
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in data["model"]["merges"]]
    if bytewise:
        found["tokenizer.ggml.merges"] = [" ".join(_escaped(part) for part in merge) for merge in merges]
    else:
        found["tokenizer.ggml.scores"] = _scores(tokens, types, merges)
        found["tokenizer.ggml.add_space_prefix"] = _prepends_space(data)
    return found | _special(tokenizer)


def _is_bytewise(data: dict[str, Any]) -> bool:
    """Whether tokens are bytes written as letters, as GPT-2 has them, rather than text with bytes as a last resort."""
    if any(step["type"] == "ByteLevel" for step in _steps(data.get("pre_tokenizer"))):
        return True
    if data["model"].get("byte_fallback"):
        return False
    raise _unknown("byte pairs that fall back on no bytes")


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    if part is None:
        return []
    return part.get("pretokenizers") or part.get("normalizers") or [part]


def _pre_tokenizer(data: dict[str, Any]) -> str:
    """What llama.cpp calls the way in which text is split; raises TargetError where it has none like it."""
    steps = _steps(data["pre_tokenizer"])
    last = steps[-1]
    if last["type"] == "ByteLevel" and last.get("use_regex", True):
        before = [(step["type"], step.get("individual_digits")) for step in steps[:-1]]
        if before in ([], [("Digits", True)]):
            return "smollm" if before else "gpt-2"
    elif len(steps) == 2 and steps[0]["type"] == "Split":
        pattern = steps[0]["pattern"].get("Regex")
        if pattern in PRE_TOKENIZERS:
            return PRE_TOKENIZERS[pattern]
    raise _unknown(f"text split by {[step['type'] for step in steps]}, in none of the ways known here")


def _tokens(data: dict[str, Any], size: int, bytewise: bool) -> tuple[list[str], list[int]]:
    vocabulary: dict[str, int] = data["model"]["vocab"]
    added = {token["id"]: token for token in data.get("added_tokens", ())}
    last = max((*vocabulary.values(), *added), default=0)
    if last >= size:
        raise TargetError(
            f"The tokenizer has token {last}, and the model's embedding {size} rows. Give the model's own tokenizer, "
            "or resize the embedding before planning: model.resize_token_embeddings(len(tokenizer))."
        )
    tokens, types = [f"[PAD{number}]" for number in range(size)], [UNUSED] * size
    for token, number in vocabulary.items():
        is_byte = not bytewise and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        tokens[number], types[number] = token, BYTE if is_byte else NORMAL
        if not bytewise and token == data["model"].get("unk_token"):
            types[number] = UNKNOWN
    for number, token in added.items():
        text = token["content"]
        control = token["special"] or _looks_special(text)
        tokens[number] = text if control or bytewise else text.replace("▁", " ")
        if types[number] != UNKNOWN:
            types[number] = CONTROL if control else USER_DEFINED
    return tokens, types


def _looks_special(text: str) -> bool:
    """Tokens that some models forget to mark as special."""
    framed = any(text.startswith(a) and text.endswith(b) for a, b in (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">")))
    return framed or text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")


def _scores(tokens: list[str], types: list[int], merges: list[tuple[str, ...]]) -> list[float]:
    """llama.cpp merges the pair with the highest score first: that of the earliest merge that makes a token."""
    made: dict[str, float] = {}
    for number, (left, right) in enumerate(merges):
        made.setdefault(left + right, -float(number))
    fallback = -float(len(merges))
    return [made.get(t, fallback) if kind == NORMAL else 0.0 for t, kind in zip(tokens, types, strict=True)]


def _prepends_space(data: dict[str, Any]) -> bool:
    for step in (*_steps(data.get("normalizer")), *_steps(data.get("pre_tokenizer"))):
        if step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never"):
            return True
    return False


def _escaped(part: str) -> str:
    """A part of a merge, in which a space would end it."""
    return part.replace(" ", chr(ord(" ") + 256))


def _special(tokenizer: Any) -> Metadata:
    found: Metadata = {}
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}
    for name, key in names.items():
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None:
            found[f"tokenizer.ggml.{key}_token_id"] = int(number)
    framed = tokenizer("")["input_ids"]
    found["tokenizer.ggml.add_bos_token"] = bool(framed) and framed[0] == tokenizer.bos_token_id
    found["tokenizer.ggml.add_eos_token"] = len(framed) > 1 and framed[-1] == tokenizer.eos_token_id
    if getattr(tokenizer, "chat_template", None):
        found["tokenizer.chat_template"] = tokenizer.chat_template
    return found


def _unknown(what: str) -> TargetError:
    return TargetError(
        f"The writer of GGUF files does not know this tokenizer: {what}. Export with base=<a GGUF file of the float "
        "model that llama.cpp's converter made>, whose tokenizer is kept, or without one: tokenizer=None."
    )
