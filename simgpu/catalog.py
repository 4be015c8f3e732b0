"""The GPU cards the simulator re-enacts: what PyTorch sees of each.

Figures, their sources and how they were obtained stand in ``cards.toml``. The size on the box is
not what a program gets: error correction, firmware and the driver take their part first. A "24 GB"
L4 shows 22.03 GiB to PyTorch, a "24 GB" RTX 4090 23.52 GiB. That is ``total_bytes``, which the
simulator treats as capacity. It moves by up to 1 % between drivers; where there was a choice, the
driver is one that runs torch 2.11 or newer.
"""

import difflib
import re
import tomllib
from dataclasses import dataclass, field
from importlib.resources import files

from simgpu.units import GIB, KIB, MIB

MAX_CARDS = 16  # of one rig
_GB = 10**9  # data sheets give bandwidth in decimal units
_UNITS = {"bytes": 1, "mib": MIB, "gib": GIB}
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
        system_bytes: held by the driver for no process.
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

    @property
    def outside_bytes(self) -> int:
        """What inference never has of the card: context, a prefill's kernels, the driver's part."""
        return self.context_bytes + self.kernel_bytes + self.system_bytes

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


_BY_SPELLING = {spelling: card for card in CARDS.values() for spelling in _spellings(card)}


def find_card(name: str) -> Card:
    """The card of this name. "rtx4090", "NVIDIA L4", "a100-80gb" and torch's own device names are
    understood.

    Raises:
        ValueError: no such card, or a name that fits several ("A100"); the message lists the
            accepted names.
    """
    plain = _plain(name) if isinstance(name, str) else ""
    if plain in _BY_SPELLING:
        return _BY_SPELLING[plain]
    begun = [spelling for spelling in _BY_SPELLING if plain and spelling.startswith(plain)]
    close = begun or difflib.get_close_matches(plain, _BY_SPELLING, n=1)
    keys = list(dict.fromkeys(_BY_SPELLING[spelling].key for spelling in close))
    fault, advice = "is not in the catalogue", "Choose one of these."
    if len(keys) > 1:
        fault = f"fits several cards: {', '.join(keys)}"
        advice = f'Name one exactly, for example "{keys[0]}".'
    elif keys:
        advice = f'Did you mean "{keys[0]}"?'
    raise ValueError(f"card {name!r} {fault}. Accepted names: {', '.join(CARDS)}. {advice}")
