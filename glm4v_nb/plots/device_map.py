"""The blocks of a device map, a cell each."""

from collections.abc import Mapping, Sequence
from itertools import groupby

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from glm4v_nb.placement import PlacedModule
from simgpu.plots.style import CAPACITY, COLOURS, GIB, finish, label_end, styled


def plot_device_map(
    placements: Mapping[str, Sequence[PlacedModule]],
    capacity_bytes: int,
    title: str = "Where every block of the model lives",
    provenance: str = "simulated",
) -> Figure:
    """Layers x cards x bytes: a panel per device map, a row per card, a cell per block.

    ``placements``: panel's name → blocks of ``explain_device_map``; a cell is as wide as its bytes.
    """
    places = {name: {block.place for block in blocks} for name, blocks in placements.items()}
    rows = {name: sorted(found, key=str) for name, found in places.items()}
    used: dict[str, str] = {}
    with styled():
        figure, panels = plt.subplots(
            len(placements),
            sharex=True,
            squeeze=False,
            figsize=(10, sum(0.52 * len(row) + 0.45 for row in rows.values()) + 1.5),
            height_ratios=[len(row) + 0.6 for row in rows.values()],
        )
        for axes, (name, blocks) in zip(panels[:, 0], placements.items(), strict=True):
            for row, place in enumerate(rows[name]):
                here = [block for block in blocks if block.place == place]
                _draw_blocks(axes, row, here, capacity_bytes / GIB)
                used |= {block.kind: COLOURS[block.kind] for block in here}
            axes.axvline(capacity_bytes / GIB, **CAPACITY)
            labels = [f"card {place}" if isinstance(place, int) else place for place in rows[name]]
            axes.set_yticks(range(len(labels)), labels)
            axes.set_ylim(len(labels) - 0.45, -0.55)
            axes.set_title(name)
        axes.set_xlim(0, capacity_bytes / GIB * 1.06)
        axes.set_xlabel(f"GiB of weights · {provenance}")
        description = f"{title}, in GiB of weights. {_in_words(placements)}."
        return finish(figure, description, used, True, title)


def _in_words(placements: Mapping[str, Sequence[PlacedModule]]) -> str:
    said = []
    for name, blocks in placements.items():
        sizes: dict[str, float] = {}
        for block in blocks:
            place = f"card {block.place}" if isinstance(block.place, int) else str(block.place)
            sizes[place] = sizes.get(place, 0) + block.bytes / GIB
        said.append(f"{name}: " + ", ".join(f"{at} {size:.1f}" for at, size in sizes.items()))
    return "; ".join(said)


def _draw_blocks(axes, row: int, blocks: Sequence[PlacedModule], capacity_gib: float):
    """One row: cells as wide as the blocks' bytes, with the layers' numbers where there is room."""
    left = 0.0
    look = {"edgecolor": "white", "linewidth": 0.5}
    series = groupby(blocks, key=lambda block: (block.kind, block.name.rpartition(".")[0]))
    for (kind, _), series_blocks in series:
        start, numbers = left, []
        for block in series_blocks:
            axes.barh(row, block.bytes / GIB, left=left, color=COLOURS[kind], **look)
            left += block.bytes / GIB
            numbers.append(block.name.rpartition(".")[2])
        if kind.endswith("layer"):
            span = f"{numbers[0]}–{numbers[-1]}"
            for text in (f"{kind}s {span}", span):
                if len(text) * capacity_gib / 105 < left - start:
                    middle = (start + left) / 2
                    axes.text(middle, row, text, ha="center", va="center", fontsize=10.5)
                    break
    label_end(axes, left, row, [capacity_gib])
