"""One decode step over all cards: buffers, cache, kernels in their order, a graph for each card.

A step has rows, one token each: one for every prompt of a batch, or several of one prompt to
verify. Everything it reads and writes stays at its place, so that a graph can be launched again.
"""

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from glm4v_nb.inference import kernels
from glm4v_nb.inference.graphs import captured
from glm4v_nb.inference.tiles import FIRST_TILE, Tile, best_tile
from glm4v_nb.inference.weights import LayerWeights, Weight
from glm4v_nb.parallel.exchange import Exchange

# Keys are read in blocks of so many, and a context is split into at most so many parts.
BLOCK, MOST_SPLITS = 64, 64
# Which product comes behind which; behind that of the heads comes attention.
_FOLLOWS = {"out": "gate_up", "gate_up": "down", "down": "heads"}


class _Layer(DynamicLayer):
    """A layer of a cache that fills tensors which are there, and shows what is filled."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.all_keys, self.all_values = keys, values
        self.length = 0

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, self.length = self.length, self.length + key_states.shape[-2]
        self.all_keys[:, :, begin : self.length] = key_states
        self.all_values[:, :, begin : self.length] = value_states
        self.keys, self.values = (
            whole[:, :, : self.length] for whole in (self.all_keys, self.all_values)
        )
        # What filled it from its begin, laid out as a growing cache has it: attention may choose
        # another kernel, and plan it anew for every length, where positions lie apart.
        if begin:
            return self.keys, self.values
        return key_states.contiguous(), value_states.contiguous()


class FixedCache:
    """Keys and values of every layer, each (sequences, groups, capacity, head_dim), on its card."""

    def __init__(self, config, weights: list[LayerWeights], sequences: int, capacity: int):
        shape = (sequences, config.num_key_value_heads, capacity, config.head_dim)
        self.sequences, self.capacity = sequences, capacity
        self.layers = [
            tuple(torch.zeros(shape, dtype=one.dtype, device=one.device) for _ in range(2))
            for one in weights
        ]

    def empty(self) -> Cache:
        """For a prefill by the model itself, which fills it from its begin."""
        return Cache(layers=[_Layer(keys, values) for keys, values in self.layers])


class _Part:
    """The consecutive layers that one card has, with their buffers for a step of so many rows.

    Where ``ranks`` share the layers, products by columns are added up: by the kernels themselves
    where there is an ``exchange``; else after them, and one of the ranks adds what is added once.
    """

    def __init__(self, config, layers, caches, rows: int, capacity: int, ranks, exchange):
        self.config, self.layers, self.caches, self.capacity = config, layers, caches, capacity
        self.ranks, self.is_first = ranks, ranks is None or ranks.rank == 0
        self.exchange = exchange
        self.device, self.dtype = layers[0].device, layers[0].dtype
        self.rows = rows
        self.splits = min(MOST_SPLITS, 1 << (-(-capacity // BLOCK) - 1).bit_length())
        # Dependent launch came with Hopper.
        self.early = {"PDL": 0}
        if self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (9, 0):
            self.early = {"PDL": 2, "launch_pdl": True}
        self.are_alone = caches[0][0].shape[0] == rows  # each row in a sequence
        heads, depth = config.num_attention_heads, config.head_dim
        self.x, self.middle = self._room(config.hidden_size), self._room(config.hidden_size)
        self.queries, self.attended = self._room(heads * depth), self._room(heads * depth)
        self.hidden = self._room(config.intermediate_size)
        self.parts = self._room(heads, self.splits, depth, dtype=torch.float32)
        self.maxima = self._room(heads, self.splits, dtype=torch.float32)
        self.totals = self._room(heads, self.splits, dtype=torch.float32)
        # Of each row: position, slot of the cache, first slot that it sees, sequence.
        self.state = torch.zeros(4, rows, dtype=torch.int32, device=self.device)
        self.tiles: dict[str, Tile] = {}

    def _room(self, *shape: int, dtype=None) -> torch.Tensor:
        return torch.empty(self.rows, *shape, dtype=dtype or self.dtype, device=self.device)

    def set_rotation(self, inverse_frequencies: torch.Tensor):
        """Cosines and sines of every position, (capacity, rotary / 2), in float32."""
        positions = torch.arange(self.capacity, device=self.device, dtype=torch.float32)
        angles = positions[:, None] * inverse_frequencies.to(self.device).float()[None, :]
        self.cosines, self.sines = angles.cos(), angles.sin()

    def choose_tiles(self):
        """The best tile of each product, tried on this card or known from before.

        It is tried alone; a sum over the ranks within all of their layers, since there it shares
        the card with the kernels beside it. No rank waits for another meanwhile.
        """
        least = {"heads": 2, "out": 1, "gate_up": 2, "down": 1}
        self.tiles = dict.fromkeys(least, FIRST_TILE[self.rows == 1])
        for name in least:
            weight = self._weight(name)

            def run(tile, name=name):
                if self.exchange is not None:
                    self.tiles[name] = tile
                    return self.run()
                for layer, cache in zip(self.layers, self.caches, strict=True):
                    self._product(name, layer, cache, tile)

            self.tiles[name] = self.best_tile(name, weight, least[name], run)

    def best_tile(self, name: str, weight: Weight, least: int, run) -> Tile:
        """As ``tiles.best_tile``, for a product with this weight."""
        shape = "x".join(map(str, weight.shape))
        # Kernels have room for 1, 2, 4 or 8 rows; the more they are, the more rows a tile pays for.
        rows = f"{1 << (self.rows - 1).bit_length()} rows"
        shared = "" if self.exchange is None else f", {self.exchange.count} ranks"
        key = f"{name} {shape}, {weight.kind}, {rows}{shared}"
        return best_tile(key, self.rows == 1, least, self.device, run, weight.bits)

    def _early(self, name: str, tile: Tile | None = None) -> dict:
        """When the kernel behind a product, or behind attention, may begin, by dependent launch:
        with the one in front (2), or as that has read what it needs (1).

        A kernel that asks for its weights at once had better begin at once: on one H100 a step took
        6.00 instead of 6.16 ms. Of one that waits first, or of few large programs, those that begin
        early crowd on the parts of the card that are free early, which then have all the work: with
        int8 and tiles for tensor cores 5.08 instead of 3.98 ms.
        """
        if not self.early["PDL"] or self.exchange is not None:
            return self.early
        if name == "attention":
            return self.early | {"PDL": 2 if self.tiles["out"].lanes == 1 else 1}
        follows = _FOLLOWS.get(name, name)
        waits = (tile or self.tiles[follows]).lanes > 1 and self._weight(follows).bits == 8
        return self.early | {"PDL": 1 if waits else 2}

    def _weight(self, name: str) -> Weight:
        return getattr(self.layers[0], name)

    def run(self):
        """Launch the layers' kernels: from x to x; then every row is a position further."""
        config = self.config
        groups, heads, depth = (
            config.num_key_value_heads,
            config.num_attention_heads,
            config.head_dim,
        )
        positions, slots, starts, sequences = self.state
        split = (self.parts, self.maxima, self.totals)
        early = self._early("attention")
        if self.exchange is not None:
            self.exchange.begin()
        for layer, cache in zip(self.layers, self.caches, strict=True):
            self._product("heads", layer, cache)
            kernels.attend[(self.rows, groups, self.splits)](
                self.queries, *cache, starts, slots, sequences, *split, self.capacity,
                SCALE=depth**-0.5, HEADS=heads, GROUPS=groups, H=max(16, heads // groups), D=depth,
                SPLITS=self.splits, BT=BLOCK, ALONE=self.are_alone, num_warps=4, **early,
            )  # fmt: skip
            kernels.combine[(self.rows * heads,)](
                *split, self.attended, D=depth, SPLITS=self.splits, num_warps=4, **early
            )
            for name, sums in (("out", self.middle), ("gate_up", None), ("down", self.x)):
                self._product(name, layer, cache)
                if sums is not None and self.ranks is not None and self.exchange is None:
                    self.ranks.add_up(sums)
        if self.exchange is None:
            self.state[:2] += 1

    def _product(self, name: str, layer: LayerWeights, cache, tile: Tile | None = None):
        early = self._early(name, tile)
        config, tile = self.config, tile or self.tiles[name]
        if name == "heads":
            positions, slots, _, sequences = self.state
            operands = (layer.heads_bias, self.cosines, self.sines, positions, slots, sequences,
                        self.queries, *cache, self.capacity)  # fmt: skip
            self._launch(
                kernels.project_heads, layer.heads, tile, self.x, layer.input_gain, *operands,
                HEADS=config.num_attention_heads, GROUPS=config.num_key_value_heads,
                D=config.head_dim, ROTARY=2 * self.cosines.shape[1], K=config.hidden_size, **early,
            )  # fmt: skip
        elif name == "gate_up":
            operands = (self.middle, layer.gain, self.hidden)
            sizes = {"OUTPUTS": config.intermediate_size, "K": config.hidden_size}
            self._launch(kernels.project_gated, layer.gate_up, tile, *operands, **sizes, **early)
        elif self.exchange is not None:
            ahead = layer.gate_up if self.early["PDL"] else None
            sum_of = {
                "out": (self.attended, layer.out, self.x, self.middle, tile, ahead),
                "down": (self.hidden, layer.down, self.middle, self.x, tile),
            }
            self.exchange.add_up(self._launch, *sum_of[name])
        elif name == "out":
            residual = self.x if self.is_first else None
            self.project(self.attended, None, layer.out, residual, self.middle, tile, early)
        else:
            residual = self.middle if self.is_first else None
            self.project(self.hidden, None, layer.down, residual, self.x, tile, early)

    def project(self, x, gain, weight: Weight, residual, y, tile: Tile, early: dict):
        """y = weight x, of the normalised x if there is a gain, plus a residual if there is one."""
        outputs, columns = weight.shape
        operands = (x, x if gain is None else gain, y if residual is None else residual, y)
        flags = {"NORM": gain is not None, "RESIDUAL": residual is not None}
        sizes = {"OUTPUTS": outputs, "K": columns}
        self._launch(kernels.project, weight, tile, *operands, **sizes, **flags, **early)

    def _launch(self, kernel, weight: Weight, tile: Tile, x, gain, *operands, **constants):
        kernel[(-(-weight.shape[0] // tile.rows),)](
            x, gain, weight.numbers, weight.scales, *operands, ROWS=self.rows, R=tile.lanes,
            EPSILON=self.config.rms_norm_eps, BITS=weight.bits, BN=tile.rows, BK=tile.columns,
            num_warps=tile.warps, num_stages=tile.stages,
            **(self.early | constants),
        )  # fmt: skip


class Step:
    """A decode step of so many rows; ``tokens`` in, ``logits`` and the likeliest ``next`` out.

    Args:
        model: whose embedding, norm and head it takes, wherever they are.
        weights: of all layers, in order.
        cache: written and read.
        rows: one for each sequence of the cache, or several for its only one.
    """

    @torch.no_grad()
    def __init__(self, model, weights: list[LayerWeights], cache: FixedCache, rows: int):
        decoder, config = model.language_model, model.config.text_config
        self.rows, self.cache = rows, cache
        self.ranks, self.embed = getattr(model, "ranks", None), decoder.embed_tokens
        self.embedding, self.head = decoder.embed_tokens.weight, Weight.of(model.lm_head.weight)
        self.gain = decoder.norm.weight
        sizes = len(weights), rows, config.hidden_size, self.head.numbers
        self.exchange = Exchange.of(self.ranks, *sizes)
        self.parts = []
        begin = 0
        for end in range(1, len(weights) + 1):
            if end == len(weights) or weights[end].device != weights[begin].device:
                layers, caches = weights[begin:end], cache.layers[begin:end]
                self.parts.append(
                    _Part(config, layers, caches, rows, cache.capacity, self.ranks, self.exchange)
                )
                begin = end
        for part in self.parts:
            part.set_rotation(decoder.rotary_emb.inv_freq)
            part.state.zero_()
            part.choose_tiles()
        self.tokens = torch.zeros(rows, dtype=torch.long, device=self.embedding.device)
        last = self.parts[-1]
        self.next = torch.zeros(rows, dtype=torch.long, device=last.device)
        if self.exchange is not None:
            self.logits = self.exchange.logits
        else:
            shape = (rows, self.head.shape[0])
            self.logits = torch.empty(shape, dtype=last.dtype, device=last.device)
            self._products = self.logits  # of this rank's part of the vocabulary
            if self.ranks is not None:
                self.logits = self.logits.repeat(1, self.ranks.count)
        self.slot = 0  # the furthest of the next step, counted here

        def head(tile):
            self._head_tile = tile
            self._project_head()

        self._head_tile = last.best_tile("head", self.head, 1, head)
        self._work = [self._run_part(index) for index in range(len(self.parts))]
        if self.exchange is not None:
            # Compiles what is not yet, while no rank waits for another: it may take seconds.
            self._work[0]()
            self.exchange.join()
        if self.parts[0].device.type == "cuda":
            self._work = [
                captured(work, part.device).replay
                for work, part in zip(self._work, self.parts, strict=True)
            ]

    def buffers(self) -> list[torch.Tensor]:
        """What it keeps on the cards beside cache and weights."""
        own = [self.tokens, self.next, self.logits]
        parts = (each for part in self.parts for each in vars(part).values())
        return own + [each for each in parts if isinstance(each, torch.Tensor)]

    def _run_part(self, index: int):
        part, exchange = self.parts[index], self.exchange

        def run():
            if exchange is not None:
                exchange.embed(self.tokens, self.embedding, part.x, part.early)
            elif index == 0 and self.ranks is None:
                torch.index_select(self.embedding, 0, self.tokens, out=part.x)
            elif index == 0:
                part.x.copy_(self.embed(self.tokens))
            part.run()
            if part is self.parts[-1]:
                self._project_head()
                if exchange is not None:
                    exchange.choose(self.next, part.state, part.early)
                    return
                if self.ranks is not None:
                    self.logits.copy_(self.ranks.join_features(self._products))
                torch.argmax(self.logits, -1, out=self.next)

        return run

    def _project_head(self):
        part, gain, tile = self.parts[-1], self.gain, self._head_tile
        if self.exchange is not None:
            self.exchange.spread(part._launch, part.x, gain, self.head, tile)
        else:
            part.project(part.x, gain, self.head, None, self._products, tile, part.early)

    def place(self, positions, slots, starts, sequences):
        """Say where the rows of the next step are; each a list of numbers, one a row."""
        state = torch.tensor([positions, slots, starts, sequences], dtype=torch.int32)
        for part in self.parts:
            part.state.copy_(state, non_blocking=True)
        self.slot = max(slots)

    @torch.no_grad()
    def __call__(self):
        """Launch it; then every row is one position further.

        Raises:
            ValueError: a row would be past the end of the cache.
        """
        if self.slot >= self.cache.capacity:
            raise ValueError(
                f"The cache holds {self.cache.capacity:,} positions, and all are taken. Expected"
                " room for one more. Ask for fewer new tokens, or shorten the prompt."
            )
        for index, work in enumerate(self._work):
            if index:
                self.parts[index].x.copy_(self.parts[index - 1].x, non_blocking=True)
            work()
        self.slot += 1
