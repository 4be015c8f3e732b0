"""The caching allocator's segments, and the holes in them."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from simgpu.plots.style import COLOURS, MIB, finish, styled

BLOCKS = {"in use": COLOURS["weights"], "free": COLOURS["unused"]}


def plot_segments(
    snapshot: Sequence[dict],
    title: str = "Segments of the allocator, and the blocks in them",
    provenance: str = "simulated",
) -> Figure:
    """A row per segment, as wide as its bytes, with the blocks in use and the holes between them.

    Args:
        snapshot: ``torch.cuda.memory_snapshot()``, or those of its segments that are of interest.
    """
    said = []
    with styled():
        figure, axes = plt.subplots(figsize=(9, 0.5 * len(snapshot) + 1.6))
        for row, segment in enumerate(snapshot):
            left, blocks = 0.0, []
            for block in segment["blocks"]:
                kind = "free" if block["state"] == "inactive" else "in use"
                size = block["size"] / MIB
                axes.barh(row, size, left=left, height=0.7, color=BLOCKS[kind], edgecolor="black")
                ink = "black" if kind == "free" else "white"
                axes.text(left + size / 2, row, f"{size:g}", ha="center", va="center", color=ink)
                blocks.append(f"{size:g} {kind}")
                left += size
            said.append(f"segment {row + 1}: {', '.join(blocks)}")
        axes.set_yticks(range(len(said)), [each.partition(":")[0] for each in said])
        axes.invert_yaxis()
        axes.set_title(title)
        axes.set_xlabel(f"MiB · {provenance}")
        return finish(figure, f"{title}, in MiB. {'; '.join(said)}.", BLOCKS)
