"""Data from the model itself, where there are none: what a language model writes is what it knows."""

import torch
from torch import Tensor, nn

from isogrid.errors import DistillationError
from isogrid.planning.evaluating import evaluating
from isogrid.training.outputs import logits_of

GREEDY = (3, 4, 5)
"""How many tokens after the first are the most probable ones; sequences take turns."""


@torch.no_grad()
def generate_text(
    model: nn.Module,
    sequences: int,
    length: int,
    *,
    vocabulary: int,
    batch_size: int = 16,
    seed: int = 0,
) -> Tensor:
    """Sequences that a causal language model writes, to distil it without data, as LLM-QAT does (arXiv 2305.17888).

    Every sequence begins with another token of the vocabulary. The next 3 to 5 tokens are the most probable ones, so
    that it gets under way sensibly; the rest are drawn from the model's distribution, so that no two are alike. The
    end of a text is a token like any other.

    Args:
        model: float; input_ids int64 [sequences, length] to logits [sequences, length, vocabulary], alone or in an
            object that also has `past_key_values`, which are then used.
        sequences: how many.
        length: tokens of each, the first included.
        vocabulary: tokens that may come first, from 0 on; there may be padding behind them.
        batch_size: sequences at a time.
        seed: of the draws; a batch's sequences depend on it and on the batch's number alone.

    Returns:
        int64 [sequences, length], on the model's device.

    Raises:
        DistillationError: the model's logits are no distribution, or there is nothing to generate.

    >>> successor = nn.Embedding.from_pretrained(99.0 * torch.eye(8).roll(1, 1))
    >>> generate_text(successor, 2, 6, vocabulary=8)
    tensor([[0, 1, 2, 3, 4, 5],
            [1, 2, 3, 4, 5, 6]])
    """
    if min(sequences, length, vocabulary, batch_size) < 1:
        raise DistillationError("Nothing to generate: sequences, length, vocabulary and batch_size are at least 1.")
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    batches = []
    with evaluating(model):
        for start in range(0, sequences, batch_size):
            numbers = torch.arange(start, min(start + batch_size, sequences), device=device)
            generator = torch.Generator(device).manual_seed(seed * (1 << 20) + start // batch_size)
            batches.append(_written(model, numbers, length, vocabulary, generator))
    return torch.cat(batches)


def _written(model: nn.Module, numbers: Tensor, length: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    """int64 [batch, length]: the sequences of these numbers."""
    greedy = torch.tensor(GREEDY, device=numbers.device)[numbers % len(GREEDY)]
    written = (numbers % vocabulary).unsqueeze(-1)
    memory = None
    keeps = "use_cache" in getattr(getattr(model, "config", None), "to_dict", dict)()
    for position in range(1, length):
        if keeps:
            outputs = model(written if memory is None else written[:, -1:], past_key_values=memory, use_cache=True)
            memory = outputs.past_key_values
        else:
            outputs = model(written)
        logits = logits_of(outputs)[:, -1].float()
        probabilities = torch.softmax(logits, -1)
        if not bool(probabilities.isfinite().all()):
            raise DistillationError("The model's logits hold NaN or infinity, so it can write nothing.")
        drawn = torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
        chosen = torch.where(position <= greedy, logits.argmax(-1), drawn)
        written = torch.cat([written, chosen.unsqueeze(-1)], 1)
    return written
