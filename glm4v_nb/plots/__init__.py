"""Pictures of memory, in one style.

Functions take plain figures, memory in bytes, return a matplotlib figure, and write its provenance
("simulated" or "measured on ...") under the picture.
"""

from glm4v_nb.plots.memory import plot_device_map, plot_frontier, plot_memory_bars, plot_path
from glm4v_nb.plots.style import COLOURS
from glm4v_nb.plots.timeline import memory_by_purpose, plot_timeline

__all__ = [
    "COLOURS",
    "memory_by_purpose",
    "plot_device_map",
    "plot_frontier",
    "plot_memory_bars",
    "plot_path",
    "plot_timeline",
]
