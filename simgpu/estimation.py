"""``estimate``: what a function takes of graphics cards that are not there."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version

import torch

from simgpu.attribution import Attribution, Line
from simgpu.catalog import Card, not_measured
from simgpu.oom import parse_out_of_memory
from simgpu.rig import ASSUME
from simgpu.simulated import SimulatedRig
from simgpu.units import bytes_in_words

# Whose code and device maps a figure follows from.
LIBRARIES = ("torch", "transformers", "accelerate")


def versions() -> dict[str, str]:
    """The installed versions that a simulated figure holds for."""
    return {name: version(name) for name in LIBRARIES}


@dataclass(frozen=True)
class CardEstimate:
    """One card's peaks, all in bytes.

    Attributes:
        peak_allocated_bytes, peak_reserved_bytes: most in tensors, and most in segments.
        free_at_peak_bytes: what the driver still had to give when most was reserved.
        by_purpose: the allocated peak's parts: "parameters" (with buffers), "gradients",
            "optimizer", "activations", "KV cache" and "workspace".
        by_line: the same by the line of the caller's own code that was running, largest first.
        needs_bytes: the size of card that holds the run, CUDA's context among it; None if it was
            not run on ample cards.
    """

    index: int
    card: str
    capacity_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    free_at_peak_bytes: int
    by_purpose: dict[str, int]
    by_line: list[Line]
    needs_bytes: int | None = None

    @property
    def short_bytes(self) -> int:
        """How much larger the card would have to be; 0 if it is large enough."""
        return max(0, (self.needs_bytes or 0) - self.capacity_bytes)


@dataclass(frozen=True)
class Estimate:
    """What a function took of simulated cards.

    Attributes:
        cards: a ``CardEstimate`` each.
        oom: PyTorch's message of the out-of-memory error that ended the run, or None.
        caught: messages of those that the program caught and went on after.
        exact: whether every operator's memory is modelled, and no result's length was assumed.
        unmodelled: operators whose scratch memory is not modelled, and its bound in bytes or None.
        assumed: how often an operator was asked for a number that is not known.
        not_measured: kinds of card that no figure was held to: attention follows PyTorch's rules.
        versions: of the libraries; another version may allocate otherwise, or place otherwise.
    """

    cards: list[CardEstimate]
    oom: str | None
    caught: list[str]
    exact: bool
    unmodelled: dict[str, int | None]
    assumed: dict[str, int]
    not_measured: list[str]
    versions: dict[str, str]
    provenance: str
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether the run ended without an out-of-memory error."""
        return self.oom is None

    @property
    def verdict(self) -> str:
        """ "fits" or "oom"."""
        return "fits" if self.fits else "oom"

    @property
    def headroom_bytes(self) -> int:
        """What the fullest card still had when most was reserved; 0 if the run did not fit."""
        return min(card.free_at_peak_bytes for card in self.cards) if self.fits else 0

    @property
    def peak_allocated_bytes(self) -> int:
        """Of the card with the largest."""
        return max(card.peak_allocated_bytes for card in self.cards)

    @property
    def peak_reserved_bytes(self) -> int:
        """Of the card with the largest."""
        return max(card.peak_reserved_bytes for card in self.cards)

    @property
    def by_purpose(self) -> dict[str, int]:
        """Of all cards together, each at its own peak."""
        return dict(sum((Counter(card.by_purpose) for card in self.cards), Counter()))

    @property
    def summary(self) -> str:
        """The answer in a sentence."""
        if self.fits:
            fullest = min(self.cards, key=lambda card: card.free_at_peak_bytes)
            free = bytes_in_words(fullest.free_at_peak_bytes)
            return f"It fits: card {fullest.index} is the fullest, with {free} free at its peak."
        device = parse_out_of_memory(self.oom).device
        short = "; ".join(
            f"{bytes_in_words(card.needs_bytes)}, {bytes_in_words(card.short_bytes)} short on card"
            f" {card.index}"
            for card in self.cards
            if card.short_bytes
        )
        return f"It does not fit: card {device} is full." + (f" It needs {short}." if short else "")

    def to_dict(self) -> dict:
        """What ``simgpu run --json`` prints."""
        answer = {"verdict": self.verdict, "fits": self.fits, "headroom_bytes": self.headroom_bytes}
        answer["devices"] = [asdict(card) for card in self.cards]
        answer["oom"] = self.oom and {
            "device": parse_out_of_memory(self.oom).device,
            "message": self.oom,
        }
        if not self.fits:
            answer["needs_bytes"] = self.cards[answer["oom"]["device"]].needs_bytes
        names = ("caught", "exact", "unmodelled", "assumed", "not_measured", "versions")
        names += ("provenance", "seconds")
        return answer | {name: getattr(self, name) for name in names}


def estimate(
    function: Callable[[], object],
    card: str | Card | Sequence[str | Card] = "L4",
    count: int = 1,
    *,
    free_gib: float | Sequence[float] | None = None,
    assume: str = ASSUME[1],
    alloc_conf: str | None = None,
    needs: bool = True,
) -> Estimate:
    """Run a function on simulated cards and say what it takes of them.

    Inside, "cuda" is the cards: the function makes its model, moves it there and runs or trains it
    as it would on a GPU. If it runs out of memory it is called once more, on cards of the same
    names that never do, for what it would need; leave that out with ``needs=False`` if it must not
    be called twice.

    Args:
        function: called without arguments; a ``functools.partial`` gives it some.
        card, count, free_gib, assume, alloc_conf: as of ``SimulatedRig``; by default a number that
            is not known, as a loss that is printed, is assumed and counted.

    Raises:
        ValueError: impossible cards. What the function raises but for an out-of-memory error.
    """
    started = time.perf_counter()
    options = {"free_gib": free_gib, "assume": assume, "alloc_conf": alloc_conf}
    found = _run(function, SimulatedRig(card, count, **options))
    if needs and not found.fits:
        ample = _run(function, SimulatedRig(card, count, **options, capped=False))
        found = _with_needs(found, ample)
    return replace(found, seconds=round(time.perf_counter() - started, 2))


def _with_needs(found: Estimate, ample: Estimate) -> Estimate:
    """An estimate that ran out of memory, with what each card needs by a run that did not."""
    message, cards = parse_out_of_memory(found.oom), []
    for card, other in zip(found.cards, ample.cards, strict=True):
        needs = card.capacity_bytes - other.free_at_peak_bytes
        if card.index == message.device:  # where memory is in pieces more is needed than it shows
            needs = max(needs, card.capacity_bytes + message.short_bytes)
        cards.append(replace(card, needs_bytes=needs))
    return replace(found, cards=cards)


def _run(function: Callable[[], object], rig: SimulatedRig) -> Estimate:
    oom = None
    with rig, Attribution(rig) as attribution:
        try:
            function()
        except torch.OutOfMemoryError as error:
            oom = str(error)
            attribution.settle()
    cards = []
    for index, each in enumerate(rig.cards):
        allocator, peak = rig.allocators[index], attribution.peaks[index]
        cards.append(
            CardEstimate(
                index=index,
                card=each.key,
                capacity_bytes=each.total_bytes,
                peak_allocated_bytes=peak.allocated_bytes,
                peak_reserved_bytes=peak.reserved_bytes,
                free_at_peak_bytes=allocator.available_bytes - peak.reserved_bytes,
                by_purpose=peak.by_purpose(),
                by_line=peak.by_line(),
            )
        )
    return Estimate(
        cards=cards,
        oom=oom,
        caught=[message for message in attribution.failures if message != oom],
        exact=rig.exact,
        unmodelled=rig.unmodelled,
        assumed=rig.assumed,
        not_measured=not_measured(rig.cards),
        versions=versions(),
        provenance=rig.provenance,
        seconds=0.0,
    )
