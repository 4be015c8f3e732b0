"""What rounding to a data type loses."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from simgpu.plots.style import COLOURS, finish, styled

_NEIGHBOURS = 200


def plot_rounding(dtypes: Mapping[str, torch.dtype]) -> Figure:
    """The largest relative error of rounding to each data type, by the size of the number; 1 means
    that it is lost. ``dtypes``: name → type, at most three."""
    values = torch.logspace(-12, 8, 100 * _NEIGHBOURS, dtype=torch.float64)
    kinds = ("workspace", "requested", "weights")
    used = {name: COLOURS[kind] for name, kind in zip(dtypes, kinds, strict=False)}
    with styled("both"):
        figure, axes = plt.subplots(figsize=(9, 3.6))
        for name, colour in used.items():
            error = (values.to(dtypes[name]).double() / values - 1).abs().clamp(max=1)
            # The error jumps between 0 and its bound; of neighbours the worst is drawn.
            worst = error.view(-1, _NEIGHBOURS).amax(1)
            axes.loglog(values[::_NEIGHBOURS], worst, color=colour, linewidth=2.5)
        axes.set_title("Largest relative error of rounding")
        axes.set_xlabel("size of the number · arithmetic")
        steps = [f"{name} {torch.finfo(dtypes[name]).eps / 2:.1g}" for name in used]
        description = (
            f"Curves: the largest relative error of rounding by the size of the number, from 1e-12"
            f" to 1e8. Within a type's range it is flat: {', '.join(steps)}. Outside it rises to 1."
        )
        return finish(figure, description, used)
