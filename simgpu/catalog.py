"""The GPU cards the simulator re-enacts: what PyTorch sees of each.

Figures, their sources and how they were obtained stand in ``cards.toml``. The size on the box is
not what a program gets: error correction, firmware and the driver take their part first. A "24 GB"
L4 shows 22.03 GiB to PyTorch, a "24 GB" RTX 4090 23.52 GiB. That is ``total_bytes``, which the
simulator treats as capacity. It moves by up to 1 % between drivers; where there was a choice, the
driver is one that runs torch 2.11 or newer.

A card that is not in the catalogue is given by its size, with a name or without: "20GiB",
"My GPU 20GiB". All else is then taken from the catalogue's card that is nearest to it.
"""

import difflib
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from importlib.resources import files

from simgpu.units import GIB, KIB, MIB

MAX_CARDS = 16  # of one rig
_GB = 10**9  # data sheets give bandwidth in decimal units
_UNITS = {"bytes": 1, "mib": MIB, "gib": GIB}
_SIZES = {"gib": GIB, "gb": _GB, "mib": MIB, "mb": 10**6}
MOST_BYTES = 1024 * GIB  # of one card
# Of every figure the key of its source in ``cards.toml``.
FIGURES = {
    "total_bytes": "total",
    "compute_capability": "properties",
    "multiprocessors": "properties",
    "memory_bandwidth_bytes_per_second": "bandwidth",
    "cublas_workspace_bytes": "cublas_workspace",
    "context_bytes": "context",
    "kernel_bytes": "apart",
    "backward_kernel_bytes": "apart",
    "system_bytes": "apart",
}


@dataclass(frozen=True)
class Card:
    """One model of GPU card as PyTorch sees it.

    Attributes:
        key: the short name used in this project, e.g. "L4", "RTX 4090", "A100-80".
        device_name: what ``torch.cuda.get_device_name()`` returns.
        total_bytes: what ``get_device_properties().total_memory`` reports and out-of-memory
            messages call "total capacity".
        compute_capability: (major, minor).
        multiprocessors: number of streaming multiprocessors.
        memory_bandwidth_bytes_per_second: of the data sheet; a copy on an H100 reaches 90 % of it.
        cublas_workspace_bytes: allocated by PyTorch at the first matrix product, and kept.
        context_bytes: held by the CUDA context and loaded kernels, outside PyTorch's allocator.
        sources: for each name in FIGURES where the figure comes from.
        kernel_bytes: what the context grows by with the first matrix product and attention; 0
            where only the sum is known, which then is ``context_bytes``.
        backward_kernel_bytes: the same of the first backward pass.
        system_bytes: held by the driver for no process, or by others' processes.
        assumed: what is not known of a card that was given by its size, and what others use of it,
            in words; else "".
    """

    key: str
    device_name: str
    total_bytes: int
    compute_capability: tuple[int, int]
    multiprocessors: int
    memory_bandwidth_bytes_per_second: int
    cublas_workspace_bytes: int
    context_bytes: int
    sources: dict[str, str] = field(repr=False, compare=False)
    kernel_bytes: int = 0
    backward_kernel_bytes: int = 0
    system_bytes: int = 0
    assumed: str = ""

    @property
    def uncertainty_bytes(self) -> int:
        """By how much what a program gets of such a card differs from what is known: 1 % of the
        total between drivers, and 0.1 GiB of context between programs (see ``cards.toml``)."""
        return self.total_bytes // 100 + GIB // 10

    @property
    def outside_bytes(self) -> int:
        """What inference never has of the card: context, a prefill's kernels, the driver's part."""
        return self.context_bytes + self.kernel_bytes + self.system_bytes

    @property
    def is_measured(self) -> bool:
        """Whether figures were held to such cards: Hopper. What others take for attention follows
        PyTorch's rules and was not measured."""
        return self.compute_capability[0] == 9

    @property
    def bf16_supported(self) -> bool:
        """Whether tensor cores multiply bfloat16: compute capability 8.0 (Ampere) or newer."""
        return self.compute_capability >= (8, 0)


# Bytes and their source by the first number of the compute capability, and of all others:
# parseChosenWorkspaceSize() with CUBLAS_WORKSPACE_CONFIG not set.
_POOL = "PyTorch's aten/src/ATen/cuda/CublasHandlePool.cpp"
_MEASURED = f"measured on H100 80GB HBM3 · 2026-11-24 · torch 2.11; {_POOL} asks for 32 MiB"
_CHANGE = "https://github.com/pytorch/pytorch/pull/175344 (February 2026)"
_BLACKWELL = (32 * MIB, f"{_POOL}, Blackwell; 8.125 MiB before {_CHANGE}")
_WORKSPACES = {9: (32 * MIB, _MEASURED), 10: _BLACKWELL, 12: _BLACKWELL}
_OTHERS = f'{_POOL}, ":4096:2:16:8": 2 x 4096 KiB and 8 x 16 KiB'
_OTHER_WORKSPACES = (2 * 4096 * KIB + 8 * 16 * KIB, _OTHERS)


def _card(key: str, row: dict) -> Card:
    capability = tuple(row["compute_capability"])
    workspace_bytes, workspace_source = _WORKSPACES.get(capability[0], _OTHER_WORKSPACES)
    sources = row["sources"] | {"cublas_workspace": workspace_source}
    unknown = "not known apart: within context_bytes"
    sources["apart"] = sources["context"] if "kernel_mib" in row else unknown
    sizes = {
        f"{name}_bytes": round(sum(row.get(f"{name}_{unit}", 0) * _UNITS[unit] for unit in _UNITS))
        for name in ("total", "context", "kernel", "backward_kernel", "system")
    }
    return Card(
        key=key,
        device_name=row["device_name"],
        compute_capability=capability,
        multiprocessors=row["multiprocessors"],
        memory_bandwidth_bytes_per_second=row["bandwidth_gb_per_second"] * _GB,
        cublas_workspace_bytes=workspace_bytes,
        sources={figure: sources[name] for figure, name in FIGURES.items()},
        **sizes,
    )


_TABLE = tomllib.loads(files("simgpu").joinpath("cards.toml").read_text(encoding="utf-8"))
CARDS: dict[str, Card] = {key: _card(key, row) for key, row in _TABLE.items()}


def _plain(name: str) -> str:
    """A name without maker, brand and case: "rtx4090" for "NVIDIA GeForce RTX 4090"."""
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())


def _spellings(card: Card) -> set[str]:
    """All plain spellings of a card: "rtx4090", "4090"; "a10080", "a10080gb", "a100sxm480gb"."""
    key = _plain(card.key)
    with_unit = f"{key}gb" if "-" in card.key else key
    return {key, key.removeprefix("rtx"), with_unit, _plain(card.device_name)}


def not_measured(cards: Iterable[Card]) -> list[str]:
    """Which kinds among these cards no figure was ever held to."""
    return list(dict.fromkeys(card.key for card in cards if not card.is_measured))


def with_free(card: Card, free_gib: float) -> Card:
    """A card of which others have in use what is not free; ValueError if it cannot have so much."""
    if not isinstance(free_gib, int | float) or not 0 < free_gib * GIB <= card.total_bytes:
        raise ValueError(
            f"free_gib is {free_gib!r}; expected more than 0 and at most the"
            f" {card.total_bytes / GIB:.2f} GiB of {card.device_name}. Give what nvidia-smi shows."
        )
    used = max(card.system_bytes, card.total_bytes - int(free_gib * GIB))
    remark = f"{card.key}: {free_gib:g} GiB free, the rest in use by others"
    remarks = "; ".join(filter(None, (card.assumed, remark)))
    return replace(card, system_bytes=used, assumed=remarks)


_WITH_SIZE = re.compile(r"(?:(\S(?:.*?\S)??)(?:\s+|-))?(\d+(?:\.\d+)?)\s*([GM]i?B)", re.IGNORECASE)
_BY_SPELLING = {spelling: card for card in CARDS.values() for spelling in _spellings(card)}


def find_card(name: str | Card) -> Card:
    """The card of this name. "rtx4090", "NVIDIA L4", "a100-80gb", "RTX 3060-12" and torch's own
    device names are understood, and sizes of other cards: "20GiB", "My GPU 20GiB", "L4 48GiB". A
    card is itself.

    Raises:
        ValueError: no such card, a name that fits several ("A100"), or an impossible size; the
            message lists the accepted names.
    """
    if isinstance(name, Card):
        return name
    plain = _plain(name) if isinstance(name, str) else ""
    if plain in _BY_SPELLING:
        return _BY_SPELLING[plain]
    if plain and (sized := _WITH_SIZE.fullmatch(name.strip())):
        kind, number, unit = sized.groups()
        return _card_of_size(name.strip(), kind or "", float(number), unit.lower())
    key, _, box = name.rpartition("-") if plain else ("", "", "")
    if (card := _BY_SPELLING.get(_plain(key))) and re.fullmatch("[0-9]{1,4}", box):
        if _is_on_its_box(int(box), card):
            return card
    begun = [spelling for spelling in _BY_SPELLING if plain and spelling.startswith(plain)]
    close = begun or difflib.get_close_matches(plain, _BY_SPELLING, n=1)
    keys = list(dict.fromkeys(_BY_SPELLING[spelling].key for spelling in close))
    fault, advice = "is not in the catalogue", "Choose one of these."
    if len(keys) > 1:
        fault = f"fits several cards: {', '.join(keys)}"
        advice = f'Name one exactly, for example "{keys[0]}".'
    elif keys:
        advice = f'Did you mean "{keys[0]}"?'
    accepted = f"Accepted names: {', '.join(CARDS)}, and any with its size, as 'My GPU 20GiB'."
    raise ValueError(f"card {name!r} {fault}. {accepted} {advice}")


def _is_on_its_box(number: float, card: Card) -> bool:
    return 0.9 * number * GIB < card.total_bytes < number * GIB


def _card_of_size(name: str, kind: str, number: float, unit: str) -> Card:
    """A card that is not in the catalogue; else like the one called so, or the nearest in size of
    those that know bfloat16. "L4 24GB" is the L4: the size on its box."""
    total_bytes, like = round(number * _SIZES[unit]), _BY_SPELLING.get(_plain(kind))
    if like is None:
        modern = [card for card in CARDS.values() if card.bf16_supported]
        like = min(modern, key=lambda card: abs(card.total_bytes - total_bytes))
    elif unit == "gb" and _is_on_its_box(number, like):
        return like
    if not like.outside_bytes < total_bytes <= MOST_BYTES:
        raise ValueError(
            f"card {name!r} has {total_bytes:,} bytes; expected more than the"
            f" {like.outside_bytes:,} that CUDA takes of a card like {like.key}, and at most"
            f" {MOST_BYTES:,}. Give what torch.cuda.mem_get_info() says is there."
        )
    size = f"{total_bytes / GIB:.2f} GiB as PyTorch sees it"
    sources = dict.fromkeys(FIGURES, f"assumed: as the {like.key}")
    return replace(
        like,
        key=name,
        device_name=name,
        total_bytes=total_bytes,
        sources=sources | {"total_bytes": "given with the name"},
        assumed=f"{name}: {size}, all else assumed as of {like.key}",
    )
