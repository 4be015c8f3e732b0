"""Keys and values of all requests that run, one row each, and a step of all rows at a time.

A row is filled from its begin, so rows of unequal length need no padding: a mask hides what is
behind a row's last position. Nothing moves when a request joins or leaves.
"""

import torch
from torch import nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from glm4v_nb.inference.fast import MOST_ROWS
from glm4v_nb.inference.supported import why_not
from glm4v_nb.placement import input_device


class RowCache:
    """Keys and values of every layer, each (sequences, groups, capacity, head_dim), on its card.

    Args:
        model: whose decoder layers it is for.
        sequences: how many requests run at a time.
        capacity: positions of the longest one, prompt and answer.

    Raises:
        ValueError: a layer is offloaded.
        torch.OutOfMemoryError: no room.
    """

    def __init__(self, model: nn.Module, sequences: int, capacity: int):
        config = model.config.text_config
        shape = (sequences, config.num_key_value_heads, capacity, config.head_dim)
        self.sequences, self.capacity = sequences, capacity
        # Norms are in the type that is computed with, whatever quantisation does to the rest.
        norms = [layer.input_layernorm.weight for layer in model.language_model.layers]
        if any(one.is_meta for one in norms):
            raise ValueError(
                "Layers of the model are offloaded, as the cards have no room for all weights."
                " A service wants them on cards: add a card, or load fewer bytes of weights."
            )
        self.layers = [
            tuple(torch.zeros(shape, dtype=one.dtype, device=one.device) for _ in range(2))
            for one in norms
        ]

    @property
    def bytes(self) -> int:
        """Of all layers, rows and positions, on all cards."""
        return sum(one.nbytes for pair in self.layers for one in pair)

    def filling(self, row: int) -> Cache:
        """For the prefill of one prompt into a row."""
        return Cache(layers=[_Filling(keys[row], values[row]) for keys, values in self.layers])

    def stepping(self, slots: list[int]) -> Cache:
        """For one token of each of the first ``len(slots)`` rows, each at its slot."""
        where = {}  # one copy a card
        for keys, _ in self.layers:
            if keys.device not in where:
                where[keys.device] = torch.tensor(slots, device=keys.device)
        longest = max(slots) + 1
        return Cache(layers=[_Stepping(*pair, where[pair[0].device], longest)
                             for pair in self.layers])  # fmt: skip


class _Filling(DynamicLayer):
    """Writes the positions of one prompt, which attention then takes as they came."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.row = keys, values

    def update(self, key_states, value_states, *args, **kwargs):
        length = key_states.shape[-2]
        for whole, new in zip(self.row, (key_states, value_states), strict=True):
            whole[:, :length] = new[0]
        # Before the first update a layer has no length; after it the model asks for it.
        self.keys, self.values = (whole[None, :, :length] for whole in self.row)
        self.is_initialized = True
        return key_states.contiguous(), value_states.contiguous()


class _Stepping(DynamicLayer):
    """Writes one position of each row, at its slot, and shows all rows up to the longest."""

    def __init__(self, keys, values, slots: torch.Tensor, longest: int):
        super().__init__()
        self.whole, self.slots, self.longest = (keys, values), slots, longest

    def update(self, key_states, value_states, *args, **kwargs):
        rows = torch.arange(len(self.slots), device=self.slots.device)
        for whole, new in zip(self.whole, (key_states, value_states), strict=True):
            whole[rows, :, self.slots] = new[:, :, 0]
        return tuple(whole[: len(rows), :, : self.longest] for whole in self.whole)


@torch.no_grad()
def prefill(model, inputs: dict, cache: RowCache, row: int) -> torch.Tensor:
    """Run a prompt, as the processor makes it, into a row; logits (vocabulary,) of its last
    position."""
    inputs = {name: tensor.to(input_device(model)) for name, tensor in inputs.items()}
    filled = cache.filling(row)
    return model(**inputs, past_key_values=filled, use_cache=True, logits_to_keep=1).logits[0, -1]


class Steps:
    """One token of every request that runs, by the model's own forward pass."""

    def __init__(self, model, cache: RowCache):
        self.model, self.cache = model, cache

    @torch.no_grad()
    def __call__(self, rows, tokens, positions, slots) -> torch.Tensor:
        """Logits (len(rows), vocabulary); each argument a list, one number a request.

        Args:
            rows: of the cache.
            tokens: that were chosen last.
            positions: of these tokens, an image counted as its three ids.
            slots: where their keys and values go, an image counted as all its positions.
        """
        count = max(rows) + 1
        state = torch.zeros(3, count, dtype=torch.long)  # a row that is free writes into its begin
        state[:, rows] = torch.tensor([tokens, positions, slots])
        seen = torch.arange(int(state[2].max()) + 1) <= state[2][:, None]
        device = input_device(self.model)
        logits = self.model(
            input_ids=state[0][:, None].to(device),
            position_ids=state[1][:, None].to(device),
            attention_mask=seen[:, None, None].to(device),
            past_key_values=self.cache.stepping(state[2].tolist()),
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return logits[rows]


class FastSteps:
    """The same from fused kernels: one CUDA graph a card for 1, 2, 4 and 8 requests.

    Raises:
        ValueError: more rows than the kernels take, or they cannot run here.
    """

    def __init__(self, model, cache: RowCache):
        if reason := why_not(model):
            raise ValueError(f"No fast decoding: {reason}. Serve with --decoding eager.")
        if cache.sequences > MOST_ROWS:
            raise ValueError(
                f"There are {cache.sequences} rows; fast decoding takes 1 to {MOST_ROWS}. Serve"
                " with fewer --rows, or with --decoding eager."
            )
        from glm4v_nb.inference.step import LayerWeights, Step

        weights = [LayerWeights.of(layer) for layer in model.language_model.layers]
        counts = {min(1 << power, cache.sequences) for power in range(MOST_ROWS.bit_length())}
        self.steps = {count: Step(model, weights, cache, count) for count in sorted(counts)}
        self.sequences = cache.sequences

    def __call__(self, rows, tokens, positions, slots) -> torch.Tensor:
        """As ``Steps``."""
        count = next(count for count in self.steps if count >= len(rows))
        step = self.steps[count]
        # What is left of the step writes into the begin of rows that are free.
        spare = [row for row in range(self.sequences) if row not in rows][: count - len(rows)]
        none = [0] * len(spare)
        step.tokens.copy_(torch.tensor([*tokens, *none]), non_blocking=True)
        step.place([*positions, *none], [*slots, *none], [0] * count, [*rows, *spare])
        step()
        return step.logits[: len(rows)]


STEPS = {"eager": Steps, "fast": FastSteps}


def best_steps(model, cache: RowCache) -> str:
    """The name of the faster ones that this model can have where it is, with so many rows."""
    few, on_card = cache.sequences <= MOST_ROWS, model.lm_head.weight.is_cuda
    return "fast" if few and on_card and why_not(model) is None else "eager"
