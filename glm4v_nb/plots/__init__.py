"""Pictures of memory and speed, in one style.

Functions take plain figures, memory in bytes, return a matplotlib figure, and write its provenance
("simulated" or "measured on ...") under the picture.
"""

from glm4v_nb.plots.device_map import plot_device_map
from glm4v_nb.plots.quantised import plot_levels
from glm4v_nb.plots.speed import plot_batches, plot_rungs
from glm4v_nb.plots.timeline import memory_by_purpose, plot_timeline
from simgpu.plots import (
    COLOURS,
    describe,
    plot_frontier,
    plot_layers,
    plot_memory_bars,
    plot_path,
    plot_peaks,
    plot_rounding,
    plot_segments,
)

__all__ = [
    "COLOURS",
    "describe",
    "memory_by_purpose",
    "plot_batches",
    "plot_device_map",
    "plot_frontier",
    "plot_layers",
    "plot_levels",
    "plot_memory_bars",
    "plot_path",
    "plot_peaks",
    "plot_rounding",
    "plot_rungs",
    "plot_segments",
    "plot_timeline",
]
