"""How much of a weight one program takes: tried on this card once, then read from a file."""

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
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
        stages: turns that what goes by way of shared memory is asked for ahead.
        lanes: 1 for plain sums of one row; 8 for tensor cores, of up to 8 rows.
    """

    rows: int
    columns: int
    warps: int
    stages: int = 1
    lanes: int = 1


ONE_ROW = [
    *(Tile(2, 1024, 4), Tile(2, 2048, 4), Tile(2, 4096, 4), Tile(4, 512, 4), Tile(4, 1024, 4)),
    *(Tile(2, 2048, 8), Tile(2, 4096, 8), Tile(4, 1024, 8), Tile(8, 512, 8)),
]
# For tensor cores, which take 16 rows of a weight or more.
_rows = partial(Tile, stages=3, lanes=8)
MORE_ROWS = [
    *(_rows(16, 512, 4), _rows(16, 1024, 8), _rows(16, 1024, 4), _rows(16, 512, 8)),
    *(_rows(16, 256, 2), _rows(16, 256, 4), _rows(32, 256, 4), _rows(64, 128, 4)),
]
INT8 = [
    *(_rows(16, 512, 4, stages=4), _rows(16, 512, 2, stages=4), _rows(16, 512, 2, stages=5)),
    *(_rows(16, 256, 2, stages=2), _rows(16, 256, 2, stages=5), _rows(32, 128, 1)),
    *(_rows(32, 512, 4), _rows(32, 256, 2)),
]
INT8_ONE_ROW = [
    *(Tile(4, 1024, 4), Tile(8, 1024, 4), Tile(4, 2048, 4), Tile(2, 2048, 4), Tile(2, 4096, 8)),
    *(Tile(8, 512, 4), Tile(16, 512, 4), Tile(8, 512, 2), INT8[0], INT8[3]),
]
INT4 = [  # for one row, too
    *(_rows(16, 512, 4), _rows(16, 1024, 4), _rows(16, 2048, 4), _rows(16, 2048, 8)),
    *(_rows(32, 256, 1), _rows(32, 256, 2), _rows(32, 512, 4), _rows(64, 256, 2)),
    _rows(32, 2048, 8),
]
# What the others have while one is tried.
FIRST_TILE = {True: Tile(4, 1024, 4), False: _rows(16, 256, 2)}
# Interpreted programs cost milliseconds, whatever their size.
INTERPRETED = {True: Tile(1024, 512, 4), False: _rows(1024, 512, 4)}


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
        return INTERPRETED[one_row and bits > 4]
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
    if bits == 4:
        return INT4
    if bits == 8:
        return INT8_ONE_ROW if one_row else INT8
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
