"""Will it fit? Of a model that several processes share, every rank alone, one after the other.

A rank exchanges nothing here. What collectives do to PyTorch's allocator is in the model's own
code: sums are made in place, and what is gathered is allocated. What NCCL takes for itself is
beside that allocator and not counted.
"""

import functools
from collections import Counter
from dataclasses import dataclass, field

from simgpu.fitting import Deployment, DeviceFit, FitResult
from simgpu.placement import Place
from simgpu.recipes import Recipe
from simgpu.workload import Workload

_REMARK = "each rank alone; what NCCL takes beside PyTorch's allocator is not counted"


def deployment_class(parallel: str | None) -> type[Deployment]:
    """``Deployment`` for one process that has all cards, ``TensorParallel`` for "tensor";
    ValueError for another word."""
    if parallel not in (None, "tensor"):
        raise ValueError(
            f"parallel is {parallel!r}; expected 'tensor', by which every card has a part of each"
            " layer. Leave it out for one process with a device map."
        )
    return Deployment if parallel is None else TensorParallel


@dataclass(frozen=True)
class Rank(Deployment):
    """One process of several: all cards are there, and it uses its own."""

    rank: int = 0

    @functools.cached_property
    def recipe(self) -> Recipe:
        whole = super().recipe
        return whole.of_rank(self.rank, len(self.cards))

    def placement(self) -> dict[str, Place]:
        return {"": self.rank}


@dataclass(frozen=True)
class TensorParallel(Deployment):
    """A checkpoint of which every card has a part of each layer, by a process for each card."""

    def check(self, workload: Workload):
        """As ``Deployment.check``; ValueError as well for training, a device map, quantised
        weights, or cards among which the model cannot be shared."""
        super().check(workload)
        named = {
            "training": workload.train,
            f"device_map {self.device_map!r:.60}": self.device_map != "auto",
            f"weights {self.weights!r}": self.weights is not None,
        }
        for what, is_there in named.items():
            if is_there:
                raise ValueError(
                    f"parallel is 'tensor', and there is {what}. Expected inference, with a part of"
                    " each layer on every card. Leave one of the two out."
                )
        self.recipe.of_rank(0, len(self.cards))

    def fit(self, workload: Workload | None = None) -> "ParallelFit":
        workload = workload or self.recipe.workload()
        self.rig()
        self.check(workload)
        same = {name: getattr(self, name) for name in Deployment.__dataclass_fields__}
        ranks = [Rank(**same, rank=rank).fit(workload) for rank in range(len(self.cards))]
        full = next((one for one in ranks if not one.fits), ranks[0])
        taken: Counter[str] = Counter()
        for one in ranks:
            taken.update(one.decoding_bytes)
        return ParallelFit(
            full.verdict,
            [one.devices[rank] for rank, one in enumerate(ranks)],
            full.oom,
            round(sum(one.seconds for one in ranks), 2),
            f"{full.provenance}, {_REMARK}",
            host=None,
            asked=(self, workload),
            exact=all(one.exact for one in ranks),
            unmodelled=functools.reduce(dict.__or__, (one.unmodelled for one in ranks)),
            assumed=functools.reduce(dict.__or__, (one.assumed for one in ranks)),
            decoding_bytes=dict(taken),
            by_purpose=[one.by_purpose[rank] for rank, one in enumerate(ranks)],
            ranks=ranks,
        )


@dataclass(frozen=True)
class ParallelFit(FitResult):
    """The answer for all ranks, each of which has the card of its number; ``ranks`` are theirs.

    The host's memory is not told: each rank reads slices of the files, which ``host`` does not
    model.
    """

    ranks: list[FitResult] = field(default_factory=list, repr=False)

    @functools.cached_property
    def on_ample_cards(self) -> list[DeviceFit]:
        return [one.on_ample_cards[rank] for rank, one in enumerate(self.ranks)]

    @functools.cached_property
    def needs(self) -> list[int]:
        return [one.needs[rank] for rank, one in enumerate(self.ranks)]
