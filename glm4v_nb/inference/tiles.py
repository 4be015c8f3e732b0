"""How much of a weight one program takes: tried on this card once, then read from a file."""

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from glm4v_nb.inference.graphs import captured, milliseconds
from simgpu.kernels import OutOfResources, triton
from simgpu.streams import NoTimeError


@dataclass(frozen=True)
class Tile:
    """What a program takes at a time.

    Attributes:
        rows, columns: of the weight.
        warps: its threads, in 32s.
        stages: turns that loads are ahead, in shared memory; 1: one turn, in registers.
        lanes: 1 for a step of one row; else for how many rows there is room, 8 or 16.
    """

    rows: int
    columns: int
    warps: int
    stages: int = 1
    lanes: int = 1


# For one row plain sums; for more tensor cores, which take 16 rows of a weight or more.
ONE_ROW = [
    *(Tile(2, 1024, 4), Tile(2, 2048, 4), Tile(2, 4096, 4), Tile(4, 512, 4), Tile(4, 1024, 4)),
    *(Tile(2, 2048, 8), Tile(2, 4096, 8), Tile(4, 1024, 8), Tile(8, 512, 8), Tile(8, 512, 4, 3)),
]
MORE_ROWS = [
    *(Tile(16, 256, 1, 4, 8), Tile(16, 256, 1, 6, 8), Tile(16, 128, 1, 6, 8)),
    *(Tile(16, 256, 2, 4, 8), Tile(16, 512, 4, 3, 8), Tile(32, 256, 1, 3, 8)),
    *(Tile(32, 128, 1, 4, 8), Tile(32, 128, 2, 4, 8), Tile(32, 256, 2, 4, 8)),
    *(Tile(64, 128, 4, 5, 8), Tile(64, 128, 4, 1, 16), Tile(64, 128, 4, 4, 16)),
]
# Of less bits, for any rows: tensor cores; of 4 bits one turn is ahead in registers besides.
INT8 = [
    *(Tile(16, 512, 4, 4, 8), Tile(16, 512, 2, 4, 8), Tile(16, 512, 2, 5, 8)),
    *(Tile(16, 256, 2, 2, 8), Tile(16, 256, 2, 5, 8), Tile(32, 128, 1, 3, 8)),
    *(Tile(32, 512, 4, 3, 8), Tile(32, 256, 2, 3, 8), Tile(64, 256, 4, 3, 8)),
]
INT4 = [
    *(Tile(16, 512, 4, 3, 8), Tile(16, 1024, 4, 3, 8), Tile(16, 2048, 4, 3, 8)),
    *(Tile(16, 2048, 8, 3, 8), Tile(32, 256, 1, 3, 8), Tile(32, 256, 2, 3, 8)),
    *(Tile(32, 512, 4, 3, 8), Tile(64, 256, 2, 3, 8), Tile(64, 512, 4, 3, 8)),
]
# What the others have while one is tried.
FIRST_TILE = {True: Tile(4, 1024, 4), False: Tile(16, 256, 1, 4, 8)}
# Interpreted programs cost milliseconds, whatever their size.
INTERPRETED = {True: Tile(1024, 512, 4), False: Tile(1024, 512, 4, 2, 8)}


def cache_file() -> Path:
    """Where the best tiles are kept, by card, versions and shapes."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "glm4v-nb" / "tiles.json"


def best_tile(name: str, one_row: bool, least: int, device: torch.device,
              run: Callable[[Tile], None], bits: int = 16) -> Tile:  # fmt: skip
    """The fastest tile of a kernel.

    ``name`` has all that decides it besides card and versions: kernel, shape, dtype; ``least`` is
    how many rows of the weight a program needs, whose numbers have so many bits. ``run`` launches
    the kernel for all layers of a card, so that no weight is found in the card's cache.
    """
    if device.type != "cuda":
        return INTERPRETED[one_row and bits == 16]
    card = torch.cuda.get_device_name(device)
    key = f"{card}, torch {torch.__version__}, triton {triton.__version__}, {name}"
    known = _read()
    if key in known:
        return Tile(**known[key])
    candidates = [tile for tile in _candidates(one_row, bits) if tile.rows >= least]
    try:
        times = {tile: _milliseconds(device, run, tile) for tile in candidates}
    except NoTimeError:  # of a simulated card, which does as well with any
        return candidates[0]
    best = min(times, key=times.get)
    _write({**_read(), key: asdict(best)})
    return best


def _candidates(one_row: bool, bits: int) -> list[Tile]:
    if bits < 16:
        return INT8 if bits == 8 else INT4
    return ONE_ROW if one_row else MORE_ROWS


def _milliseconds(device: torch.device, run: Callable[[Tile], None], tile: Tile) -> float:
    """Endless for a tile that this card cannot hold."""
    try:
        return milliseconds(captured(lambda: run(tile), device), device)
    except OutOfResources:
        return float("inf")


def _read() -> dict:
    try:
        return json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent or damaged: the tiles are tried again
        return {}


def _write(known: dict):
    file = cache_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(known, indent=1), encoding="utf-8")
        part.replace(file)
    except OSError as error:
        warnings.warn(f"The best tiles are not kept for the next time: {error}", stacklevel=2)
