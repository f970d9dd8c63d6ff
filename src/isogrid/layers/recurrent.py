"""LSTM, GRU and RNN as two matrix products: of the input, for all steps at once, and of the hidden state in each step.

The gates between them compute in float; they are elementwise. The loop over time is Python's: training goes through it,
and an exported graph holds as many steps as the example had.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from isogrid.errors import PlanError
from isogrid.layers.borrowed import TakenApart

State = tuple[Tensor, ...]
"""Hidden state, and for an LSTM the cell state: [batch, features] each."""


class Gates(nn.Module):
    """What happens to the products of a step; subclasses say it for each kind of layer.

    Args:
        activation: of a plain RNN.
    """

    def __init__(self, activation: str = "tanh"):
        super().__init__()
        self.activation = activation

    def forward(self, from_input: Tensor, from_hidden: Tensor, state: State) -> State:
        """The next state, from the products [batch, gates * features] and the last."""
        with torch._C.DisableTorchFunction():
            return self.step(from_input, from_hidden, state)

    def step(self, from_input: Tensor, from_hidden: Tensor, state: State) -> State:
        """`forward`, out of sight of whoever counts functions."""
        raise NotImplementedError


class LSTMGates(Gates):
    """`c' = sigmoid(f) * c + sigmoid(i) * tanh(g)`, `h' = sigmoid(o) * tanh(c')`."""

    def step(self, from_input: Tensor, from_hidden: Tensor, state: State) -> State:
        i, f, g, o = (from_input + from_hidden).chunk(4, -1)
        cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(cell), cell


class GRUGates(Gates):
    """`n = tanh(n_x + sigmoid(r) * n_h)`, `h' = (1 - sigmoid(z)) * n + sigmoid(z) * h`."""

    def step(self, from_input: Tensor, from_hidden: Tensor, state: State) -> State:
        (r_x, z_x, n_x), (r_h, z_h, n_h) = from_input.chunk(3, -1), from_hidden.chunk(3, -1)
        update = torch.sigmoid(z_x + z_h)
        new = torch.tanh(n_x + torch.sigmoid(r_x + r_h) * n_h)
        return ((1 - update) * new + update * state[0],)


class RNNGates(Gates):
    """`h' = tanh(x + h)`, or ReLU."""

    def step(self, from_input: Tensor, from_hidden: Tensor, state: State) -> State:
        total = from_input + from_hidden
        return (torch.tanh(total) if self.activation == "tanh" else F.relu(total),)


class Unrolled(TakenApart):
    """Mixin of UnrolledLSTM, UnrolledGRU and UnrolledRNN: any layers, directions, batch order and projection."""

    gates: ClassVar[type[Gates]]
    states: ClassVar[int] = 1

    def add_products(self) -> None:
        layer: Any = self
        for suffix in self._suffixes():
            bias = ("bias_ih_", "bias_hh_") if layer.bias else (None, None)
            for name, weight, shift in zip(("input_", "hidden_"), ("weight_ih_", "weight_hh_"), bias, strict=True):
                self.borrow(name + suffix, weight + suffix, None if shift is None else shift + suffix)
            if layer.proj_size:
                self.borrow(f"projection_{suffix}", f"weight_hr_{suffix}")
            self.add_module(f"gates_{suffix}", self.gates(getattr(self, "nonlinearity", "tanh")).train(self.training))

    def _suffixes(self) -> list[str]:
        layer: Any = self
        directions = ("", "_reverse") if layer.bidirectional else ("",)
        return [f"l{number}{direction}" for number in range(layer.num_layers) for direction in directions]

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """As the float module; sequences that are packed are refused."""
        if isinstance(input, PackedSequence):
            raise PlanError(
                "A quantised recurrent layer takes padded tensors, not packed sequences. Pass the padded batch, and "
                "leave padding out of the loss."
            )
        layer: Any = self
        is_batched = input.dim() == 3
        x = input if is_batched else input.unsqueeze(1)
        x = x.transpose(0, 1) if layer.batch_first and is_batched else x
        given = (hx,) if isinstance(hx, Tensor) else hx
        with torch._C.DisableTorchFunction():
            initial = [state if is_batched else state.unsqueeze(1) for state in given] if given else self._zeros(x)
            output, finals = self._layers(x, initial)
            if not is_batched:
                output, finals = output.squeeze(1), [final.squeeze(1) for final in finals]
            elif layer.batch_first:
                output = output.transpose(0, 1)
        return output, finals[0] if self.states == 1 else tuple(finals)

    def _zeros(self, x: Tensor) -> list[Tensor]:
        layer: Any = self
        sizes = (layer.proj_size or layer.hidden_size, layer.hidden_size)[: self.states]
        return [x.new_zeros(len(self._suffixes()), x.shape[1], size) for size in sizes]

    def _layers(self, x: Tensor, initial: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        layer: Any = self
        directions = 2 if layer.bidirectional else 1
        finals: list[State] = []
        for number, suffix in enumerate(self._suffixes()):
            if number % directions == 0:
                outputs: list[Tensor] = []
            output, final = self._direction(suffix, x, tuple(state[number] for state in initial))
            outputs.append(output)
            finals.append(final)
            if len(outputs) == directions:
                x = torch.cat(outputs, -1) if directions == 2 else output
                if layer.dropout and number < len(self._suffixes()) - 1:
                    x = F.dropout(x, layer.dropout, self.training)
        return x, [torch.stack(parts) for parts in zip(*finals, strict=True)]

    def _direction(self, suffix: str, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Outputs [time, batch, features] and last state of one layer in one direction."""
        children: Any = self._modules
        from_input = children[f"input_{suffix}"](x)
        steps = range(x.shape[0])
        outputs = []
        for step in reversed(steps) if suffix.endswith("_reverse") else steps:
            state = children[f"gates_{suffix}"](from_input[step], children[f"hidden_{suffix}"](state[0]), state)
            if f"projection_{suffix}" in children:
                state = (children[f"projection_{suffix}"](state[0]), *state[1:])
            outputs.append(state[0])
        return torch.stack(outputs[::-1] if suffix.endswith("_reverse") else outputs), state


class UnrolledLSTM(Unrolled, nn.LSTM):  # type: ignore[misc]
    """torch.nn.LSTM, unrolled; made by `isogrid.prepare`."""

    gates, states = LSTMGates, 2


class UnrolledGRU(Unrolled, nn.GRU):  # type: ignore[misc]
    """torch.nn.GRU, unrolled; made by `isogrid.prepare`."""

    gates = GRUGates


class UnrolledRNN(Unrolled, nn.RNN):  # type: ignore[misc]
    """torch.nn.RNN, unrolled; made by `isogrid.prepare`."""

    gates = RNNGates


class Cell(TakenApart):
    """Mixin of the cells: one step."""

    gates: ClassVar[type[Gates]]
    states: ClassVar[int] = 1

    def add_products(self) -> None:
        layer: Any = self
        for name, part in (("input", "ih"), ("hidden", "hh")):
            self.borrow(name, f"weight_{part}", f"bias_{part}" if layer.bias else None)
        self.add_module("step", self.gates(getattr(self, "nonlinearity", "tanh")).train(self.training))

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """As the float module."""
        layer: Any = self
        with torch._C.DisableTorchFunction():
            given = (hx,) if isinstance(hx, Tensor) else hx
            state = given or (input.new_zeros(*input.shape[:-1], layer.hidden_size),) * self.states
            state = layer.step(layer.input(input), layer.hidden(state[0]), state)
        return state[0] if self.states == 1 else state


class LSTMCell(Cell, nn.LSTMCell):
    """torch.nn.LSTMCell as two products; made by `isogrid.prepare`."""

    gates, states = LSTMGates, 2


class GRUCell(Cell, nn.GRUCell):
    """torch.nn.GRUCell as two products; made by `isogrid.prepare`."""

    gates = GRUGates


class RNNCell(Cell, nn.RNNCell):
    """torch.nn.RNNCell as two products; made by `isogrid.prepare`."""

    gates = RNNGates
