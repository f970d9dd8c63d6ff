"""The blocks of a model: where they are, and what its forward calls each of them with."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from isogrid.errors import PlanError


def find_blocks(model: nn.Module, pattern: str | None = None) -> tuple[str, ...]:
    """The paths of a model's blocks, in the order in which it holds them.

    Args:
        model: any.
        pattern: that paths of blocks match, with wildcards: `encoder.layers.*`; without one, the children of the
            ModuleList or Sequential with most parameters, of those whose children are all of one class.

    Raises:
        PlanError: the pattern matches nothing, or there is no such list.

    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]))
    >>> find_blocks(model)
    ('1.0', '1.1')
    """
    if pattern is not None:
        depth = pattern.count(".")
        found = [path for path, _ in model.named_modules() if path.count(".") == depth and fnmatchcase(path, pattern)]
        if not found:
            raise PlanError(
                f"blocks: {pattern!r} matches no module. Lists of modules: {', '.join(_lists(model)) or 'none'}."
            )
        return tuple(found)
    lists = _lists(model)
    if not lists:
        raise PlanError(
            "No list of blocks of one class was found in this model. Name its blocks by a pattern, such as "
            "blocks='encoder.layers.*'."
        )
    path = max(lists, key=lambda path: sum(p.numel() for p in model.get_submodule(path).parameters()))
    return tuple(f"{path}.{name}".lstrip(".") for name, _ in model.get_submodule(path).named_children())


def _lists(model: nn.Module) -> list[str]:
    """Paths of lists of modules of one class."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and len(module) > 1
        and len({type(child) for child in module}) == 1
        and next(module.parameters(), None) is not None
    ]


@dataclass(frozen=True)
class Call:
    """What a block is called with, whose hidden state is given anew each time.

    Attributes:
        args, kwargs: of the call.
        hidden: the tensor among them that the block before has made, or what comes before the first.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden: Tensor

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Call":
        """The call whose first tensor is the hidden state."""
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not tensors:
            raise PlanError("A block is called without a tensor, so that there is nothing it could be trained on.")
        return Call(args, kwargs, tensors[0])

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output for another hidden state."""
        args = tuple(hidden if value is self.hidden else value for value in self.args)
        kwargs = {name: hidden if value is self.hidden else value for name, value in self.kwargs.items()}
        return first_tensor(block(*args, **kwargs))


def first_tensor(output: Any) -> Tensor:
    """The hidden state in what a block returns."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            return leaf
    raise PlanError("A block returns no tensor, so that there is nothing it could be held against.")


FAILED = "The model does not run with its blocks left out"


class _Reached(Exception):
    """The forward of a model has come to the block that was asked for."""


class Caller:
    """Finds out what a model calls its blocks with, without running them.

    In their places stand functions that hand on the hidden state. What lies around the blocks is computed, so that
    embeddings have to be there, but blocks need not.

    Args:
        model: whose forward calls the blocks one after the other.
        blocks: their paths.
        run: runs the model on a batch.

    Raises:
        PlanError: the model does more between two blocks than hand on what the first returned.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], run: Callable[[nn.Module, Any], Any]):
        self.model, self.blocks, self.run = model, tuple(blocks), run
        self._modules = [model.get_submodule(path) for path in blocks]
        self._wraps = False

    def check(self, batch: Any) -> None:
        """Find out whether blocks return a tensor or a tuple, and whether one follows the other."""
        problems = []
        for self._wraps in (False, True):
            problem = self._problem(batch)
            if problem is None:
                return
            problems.append(problem)
        telling = min(problems, key=lambda problem: problem.startswith(FAILED))
        raise PlanError(
            f"{telling} Block-wise training needs blocks that follow each other; name other ones by a pattern, such as "
            "blocks='model.layers.*'."
        )

    def _problem(self, batch: Any) -> str | None:
        seen: list[tuple[str, Any, Any]] = []
        try:
            self._until(batch, len(self.blocks) - 1, seen)
        except PlanError as error:
            return str(error)
        except Exception as error:  # a model that takes the wrong kind of output fails in any way
            return f"{FAILED}: {type(error).__name__}: {error}"
        for (before, _, returned), (path, received, _) in pairwise(seen):
            if received is not returned:
                return f"What {path!r} gets is not what {before!r} returned."
        return None

    def call(self, batch: Any, index: int) -> Call:
        """What a block is called with for a batch; its hidden state is right for the first block alone."""
        return self._until(batch, index, [])

    @torch.no_grad()
    def _until(self, batch: Any, index: int, seen: list[tuple[str, Any, Any]]) -> Call:
        found: list[Call] = []

        def stand_in(number: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if number != len(seen):
                    raise PlanError(f"The model calls {self.blocks[number]!r} out of order or twice.")
                call = Call.of(args, kwargs)
                output = call.hidden.detach().clone()
                seen.append((self.blocks[number], call.hidden, output))
                if number == index:
                    found.append(call)
                    raise _Reached
                return (output,) if self._wraps else output

            return forward

        with _without_cache(self.model), _forwards(self._modules, [stand_in(n) for n in range(len(self._modules))]):
            try:
                self.run(self.model, batch)
            except _Reached:
                return found[0]
        raise PlanError(f"The model's forward does not reach the block {self.blocks[index]!r}.")


@contextmanager
def _forwards(modules: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """While open, modules have other forwards."""
    before = [vars(module).get("forward") for module in modules]
    for module, forward in zip(modules, forwards, strict=True):
        module.forward = forward
    try:
        yield
    finally:
        for module, old in zip(modules, before, strict=True):
            del vars(module)["forward"]
            if old is not None:
                module.forward = old


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """While open, a model of transformers keeps no keys and values, for no block runs that would add any."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before is not None:
        config.use_cache = False
    try:
        yield
    finally:
        if before is not None:
            config.use_cache = before
