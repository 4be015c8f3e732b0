"""LSTM, GRU and plain recurrent layers as cuDNN runs them, all time steps in one call.

Which tensors PyTorch makes is read from aten/src/ATen/native/cudnn/RNN.cpp. How much cuDNN works
with and keeps for the backward pass is not published; the sums below meet traces of an H100 (torch
2.11, cuDNN 9.19, 2026-11-27) to the byte for an LSTM of widths from 256 to 1024.
Narrower ones, GRU and plain layers take up to half as much again, and count as unmodelled.
"""

from dataclasses import dataclass

import torch

from simgpu.device import on_card
from simgpu.units import MIB

KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
# Of a kind: gates; numbers kept per time step, of the first layer and of each further one; of the
# workspace, in states of all layers: per time step, per layer, and once.
_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_KEPT = {"lstm": (5, 6), "gru": (6, 7), "rnn_tanh": (1, 2), "rnn_relu": (1, 2)}
_WORK = {"lstm": (5, 10, 0), "gru": (4.5, 12, 0), "rnn_tanh": (5, 17, 9), "rnn_relu": (5, 17, 9)}
_GATE_BYTES, _LEAST_HIDDEN = 2 * MIB, 256
_KEPT_BYTES = _COUNTERS = 256


@dataclass(frozen=True)
class _Call:
    """One call: sizes, and what follows from them."""

    kind: str
    steps: int
    batch: int
    inputs: int
    hidden: int
    layers: int
    directions: int
    dropout: float
    itemsize: int
    weight_bytes: int  # without biases

    @property
    def reserve_bytes(self) -> int:
        """What forward keeps for backward."""
        first, further = _KEPT[self.kind]
        step = self.steps * self.batch * self.hidden
        states = self.directions * (first + (self.layers - 1) * further)
        masks = (self.layers - 1) * self.directions * step // 8 if self.dropout else 0
        return states * step * self.itemsize + masks + _KEPT_BYTES

    @property
    def workspace_bytes(self) -> int:
        per_step, per_layer, once = _WORK[self.kind]
        state = self.batch * self.hidden * self.itemsize
        layers = self.layers * self.directions
        steps = self.steps * state * per_step * self.directions
        if self.directions == 2:
            steps += self.steps * state * _GATES[self.kind] + 4 * self.layers * state
        if self.dropout and self.layers > 1:
            steps += self.directions * self.steps * state
        steps += self.steps * self.batch * self.inputs * self.itemsize
        work = layers * (per_layer * state + _GATES[self.kind] * _GATE_BYTES) + once * state
        return int(steps) + work + self.weight_bytes + 8 * self.batch + _COUNTERS


def recurrent(rig, kind: str, original, input, *arguments):
    """``torch.lstm``, ``gru``, ``rnn_tanh`` or ``rnn_relu`` of padded sequences."""
    if not on_card(input) or isinstance(arguments[3], bool):  # packed sequences have one more
        return original(input, *arguments)
    state, weights, has_biases, layers, dropout, train, bidirectional, batch_first = arguments
    states = state if isinstance(state, tuple | list) else (state,)
    directions, biases = 1 + bidirectional, 2 if has_biases else 0
    recurrent_weight = weights[1]
    step = input.transpose(0, 1) if batch_first else input
    projected = weights[2 + biases] if recurrent_weight.shape[1] != states[-1].shape[2] else None
    hidden = recurrent_weight.shape[0] // _GATES[kind]
    if kind != "lstm" or projected is not None or hidden < _LEAST_HIDDEN:
        rig.note_unmodelled(kind, 3 * input.nbytes + 2**23)
    call = _Call(
        kind,
        *step.shape,
        hidden,
        layers,
        directions,
        dropout if train else 0.0,
        input.itemsize,
        sum(weight.nbytes for weight in weights if weight.ndim == 2),
    )
    given = (input, len(states), *states, *weights)
    return _Recurrence.apply(call, train, batch_first, *given)


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, train, batch_first, input, count, *tensors):
        states, weights = tensors[:count], tensors[count:]
        step = _by_step(input, batch_first)
        width = states[0].shape[2] * call.directions
        output = input.new_empty(call.steps, call.batch, width)
        results = [torch.empty_like(state) for state in states]
        # PyTorch keeps the weights in one piece, but for those of bfloat16, which it copies.
        flat = None
        if input.dtype is torch.bfloat16:
            flat = input.new_empty(sum(weight.numel() for weight in weights))
        workspace = _bytes(call.workspace_bytes, input)
        ctx.reserve = _bytes(call.reserve_bytes, input) if train else None
        del workspace, step
        ctx.call, ctx.batch_first, ctx.flat, ctx.count = call, batch_first, flat, count
        ctx.save_for_backward(input, *states, output, *weights)
        return output.transpose(0, 1) if batch_first else output, *results

    @staticmethod
    def backward(ctx, *gradients):
        input, *tensors = ctx.saved_tensors
        states, weights = tensors[: ctx.count], tensors[ctx.count + 1 :]
        step = _by_step(input, ctx.batch_first)
        of_output = gradients[0].transpose(0, 1) if ctx.batch_first else gradients[0]
        of_output = of_output.contiguous()
        of_input = torch.empty_like(step)
        of_states = [torch.empty_like(state) for state in states]
        workspace = _bytes(ctx.call.workspace_bytes, input)
        del workspace, of_output, step
        step = _by_step(input, ctx.batch_first)
        flat = input.new_empty(sum(weight.numel() for weight in weights))
        workspace = _bytes(ctx.call.workspace_bytes, input)
        del workspace, step
        parts = flat.split([weight.numel() for weight in weights])
        of_weights = [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]
        ctx.reserve = ctx.flat = None
        of_input = of_input.transpose(0, 1) if ctx.batch_first else of_input
        return None, None, None, of_input, None, *of_states, *of_weights


def _by_step(input: torch.Tensor, batch_first: bool) -> torch.Tensor:
    return input.transpose(0, 1).contiguous() if batch_first else input


def _bytes(count: int, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8, device=like.device)


def flatten_parameters(self):
    """Of ``torch.nn.RNNBase``: the weights move into one piece, as cuDNN wants them, but for those
    of bfloat16."""
    weights = [weight for weight in self._flat_weights if isinstance(weight, torch.Tensor)]
    if not all(on_card(each) and each.dtype is not torch.bfloat16 for each in weights):
        return
    flat = weights[0].new_empty(sum(weight.numel() for weight in weights))
    parts = flat.split([weight.numel() for weight in weights])
    for weight, part in zip(weights, parts, strict=True):
        weight.data = part.view_as(weight)
