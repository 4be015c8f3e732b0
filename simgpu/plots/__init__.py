"""Pictures of memory, in one style.

Functions take plain figures, memory in bytes, return a matplotlib figure, and write its provenance
("simulated" or "measured on ...") under the picture.
"""

from simgpu.plots.curves import plot_layers, plot_peaks
from simgpu.plots.memory import plot_frontier, plot_memory_bars, plot_path
from simgpu.plots.rounding import plot_rounding
from simgpu.plots.segments import plot_segments
from simgpu.plots.style import COLOURS, describe

__all__ = [
    "COLOURS",
    "describe",
    "plot_frontier",
    "plot_layers",
    "plot_memory_bars",
    "plot_path",
    "plot_peaks",
    "plot_rounding",
    "plot_segments",
]
