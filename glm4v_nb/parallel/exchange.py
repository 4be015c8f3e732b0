"""Memory of all ranks that each of them writes into, and the kernels of a step that do."""

import os
import warnings

import torch
import torch.distributed as dist

from glm4v_nb.inference.weights import Weight
from glm4v_nb.parallel import kernels
from glm4v_nb.parallel.ranks import Ranks

# How often a program looks for what another rank sends before it takes that one for lost, about a
# microsecond each time. A multiple of 16, as 0 is: Triton compiles others anew.
LOOKS = 1 << 24
# So many bytes of the next weights are brought into the card's second cache while sums are on their
# way: what its memory reads in that time.
AHEAD = 16 * 2**20
_PACKET = 8


class Exchange:
    """What the ranks exchange in a step of so many rows, each on a card in reach of the others'.

    The memory is PyTorch's symmetric memory: each rank allocates as much, and has that of the
    others among its addresses. It holds packets of sums, packets of the likeliest tokens, and the
    logits. PyTorch 2.11 takes it beside its allocator, 2 MiB at a time; 2.13 from a pool of the
    allocator, and so do simulated cards, which count it among the rest.

    Attributes:
        logits: (rows, vocabulary), of all ranks, when the step is done.
        looks: see ``LOOKS``; 0 until all have joined: until then a step waits for nobody, gives
            nonsense and may be launched by one rank alone.
    """

    def __init__(self, ranks: Ranks, layers: int, rows: int, hidden: int, head: torch.Tensor):
        self.rank, self.count, self.rows, self.hidden = ranks.rank, ranks.count, rows, hidden
        self.head_rows, self.exchanges = len(head), 2 * layers + 2
        self.looks, self.device, self.dtype = 0, head.device, head.dtype
        self.ranks, self.number = ranks, 0
        sums, chosen = 2 * self.count * rows * hidden * _PACKET, self.count * rows * 2 * _PACKET
        self.starts = 0, sums, sums + chosen
        self.bytes = sums + chosen + rows * self.count * len(head) * head.itemsize
        self.epoch = torch.ones(rows, dtype=torch.int32, device=self.device)
        self.lost = torch.zeros(1, dtype=torch.int32, device=self.device)

    @classmethod
    def of(cls, ranks: Ranks | None, *sizes) -> "Exchange | None":
        """One for these ranks; None where there are none, or not all in reach of each other."""
        if ranks is None or ranks.count == 1 or ranks.device.type != "cuda":
            return None
        if not ranks.exchanges:
            own = cls(ranks, *sizes)
            own.meet(torch.zeros(own.bytes, dtype=torch.uint8, device=own.device), None)
            return own
        if not all(ranks.numbers(int(_in_reach(ranks)))):
            return None
        own = cls(ranks, *sizes)
        if not all(ranks.numbers(int(own._allocate()))):
            return None
        there = (
            own._handle.get_buffer(rank, own._held.shape, own._held.dtype)
            for rank in range(own.count)
        )
        own.meet(own._held, [each.data_ptr() for each in there])
        return own

    def _allocate(self) -> bool:
        """Take this rank's memory, zeroed, and a handle that knows the others'; False where the
        system does not let processes share it."""
        # Multicast, which nothing here uses, would be set up as well.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        from torch.distributed import _symmetric_memory as symmetric

        try:
            self._held = symmetric.empty(self.bytes, dtype=torch.uint8, device=self.device).zero_()
            self._handle = symmetric.rendezvous(self._held, dist.group.WORLD)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            warnings.warn(f"The ranks add up by NCCL, which is slower: {reason}", stacklevel=2)
            return False
        return True

    def meet(self, memory: torch.Tensor, addresses: list[int] | None):
        """Take this rank's memory, of bytes, and where that of all ranks is; None if nowhere."""
        addresses = addresses or [0] * self.count
        table = [[address + start for address in addresses] for start in self.starts]
        self.sums_at, self.chosen_at, self.logits_at = torch.tensor(table, device=self.device)
        self.logits = memory[self.starts[2] :].view(self.dtype).view(self.rows, -1)

    def embed(self, tokens: torch.Tensor, embedding: torch.Tensor, y: torch.Tensor, early: dict):
        """y (rows, hidden): the tokens' rows of an embedding of which each rank has a part."""
        block = 512
        kernels.embed_shared[(self.rows, -(-self.hidden // block))](
            tokens, embedding, y, self.sums_at, self.epoch, self.lost, self.looks, 0,
            TOKENS=len(embedding), OUTPUTS=self.hidden, B=block, PDL=early["PDL"], num_warps=4,
            **self._sizes(),
        )  # fmt: skip

    def join(self):
        """From now on all ranks launch the same, and wait for each other."""
        self.ranks.numbers(0)  # what they have launched before has ended
        self.lost.zero_()
        self.looks = LOOKS
        self.ranks.numbers(0)

    def begin(self):
        """The sums of the layers follow, from the first."""
        self.number = 0

    def add_up(self, launch, x, weight: Weight, residual, y, tile, ahead: Weight | None = None):
        """y (rows, hidden) = the sum over the ranks of weight x, plus residual.

        ``ahead`` are weights of gates and ups, of which the card's cache is to have the first when
        they are asked for.
        """
        self.number += 1
        outputs, columns = weight.shape
        operands = residual, y, self.sums_at, self.epoch, self.lost, self.looks, self.number
        ahead = None if ahead is None else ahead.numbers
        pieces = _pieces(ahead, -(-outputs // tile.rows), tile.warps)
        launch(kernels.project_shared, weight, tile, x, x, *operands,
               weight.numbers if ahead is None else ahead, OUTPUTS=outputs, K=columns,
               RANK=self.rank, COUNT=self.count, **pieces)  # fmt: skip

    def spread(self, launch, x, gain, weight: Weight, tile):
        """The logits, on every rank."""
        outputs, columns = weight.shape
        launch(kernels.project_spread, weight, tile, x, gain, self.logits_at, self.logits,
               OUTPUTS=outputs, K=columns, RANK=self.rank, COUNT=self.count)  # fmt: skip

    def choose(self, likeliest: torch.Tensor, state: torch.Tensor, early: dict):
        """The likeliest token of each row into ``likeliest``; then ``state`` is one further."""
        kernels.choose[(self.rows,)](
            self.logits, likeliest, self.chosen_at, self.epoch, self.lost, self.looks, state,
            self.exchanges - 1, OUTPUTS=self.head_rows, EXCHANGES=self.exchanges,
            B=min(16384, 1 << (self.head_rows - 1).bit_length()), num_warps=16, **self._sizes(),
            **early,
        )  # fmt: skip

    def _sizes(self) -> dict:
        return {"RANK": self.rank, "COUNT": self.count, "ROWS": self.rows}


def _pieces(ahead: torch.Tensor | None, programs: int, warps: int) -> dict:
    """Which pieces each program asks for of the weights ahead."""
    half = 0 if ahead is None else ahead.nbytes // 2
    most, pieces = min(AHEAD // 2, half), 16
    piece = -(-2 * most // (programs * pieces * 128)) * 128
    return {"HALF": half, "BYTES": most, "PIECE": piece, "PIECES": pieces, "THREADS": 32 * warps}


def _in_reach(ranks: Ranks) -> bool:
    """Whether this rank's card can write into those of all others."""
    own, others = ranks.device.index, range(ranks.count)
    return int(os.environ.get("LOCAL_WORLD_SIZE", 0)) == ranks.count and all(
        other == own or torch.cuda.can_device_access_peer(own, other) for other in others
    )
