"""Plots show the figures they are given; how they look is for people to judge."""

import pytest
import torch
from benchmark_program import load_benchmark
from PIL import Image

import simgpu.plots
from glm4v_nb import plots
from glm4v_nb.placement import PlacedModule
from glm4v_nb.plots import COLOURS, plot_device_map, plot_frontier, plot_memory_bars, plot_path

GIB = 2**30
BLOCKS = [
    PlacedModule("vision_tower.layers.0", "tower layer", 0, 3 * GIB),
    PlacedModule("vision_tower.layers.1", "tower layer", 0, 3 * GIB),
    PlacedModule("language_model.layers.0", "decoder layer", 1, 5 * GIB),
    PlacedModule("lm_head", "embedding and head", "cpu", 1 * GIB),
]
PEAKS = {"text only": {1000: GIB, 2000: 2 * GIB, 4000: 3 * GIB}}
LAYERS = {"plain": {"weights": [GIB, GIB], "gradients": [0, 2 * GIB]}}


def texts(axes):
    return [text.get_text().strip() for text in axes.texts]


def test_bars_are_stacked_to_their_sum_and_the_sum_is_written():
    figure = plot_memory_bars({"card 0": {"weights": 2 * GIB, "activations": GIB}}, 4 * GIB)
    axes = figure.axes[0]
    assert [patch.get_width() for patch in axes.patches] == [2, 1]
    assert axes.patches[1].get_x() == 2
    assert texts(axes) == ["3.0"]


def test_every_picture_says_where_its_figures_come_from():
    bars = plot_memory_bars({"a": {"weights": GIB}}, provenance="measured on H100")
    assert bars.axes[0].get_xlabel() == "GiB · measured on H100"
    device_map = plot_device_map({"auto": BLOCKS}, 22 * GIB)
    assert device_map.axes[-1].get_xlabel() == "GiB of weights · simulated"
    segments = plots.plot_segments([], provenance="measured on H100")
    assert segments.axes[0].get_xlabel() == "MiB · measured on H100"
    peaks = plots.plot_peaks(PEAKS, "text tokens", 4 * GIB)
    assert peaks.axes[0].get_xlabel() == "text tokens · simulated"
    layers = plots.plot_layers(LAYERS, [("tower", 2)], 4 * GIB, provenance="measured on H100")
    assert layers.axes[0].get_xlabel() == "layer by layer · measured on H100"
    rounding = plots.plot_rounding({"float32": torch.float32})
    assert rounding.axes[0].get_xlabel() == "size of the number · arithmetic"
    levels = plots.plot_levels([0.0, 1.0], {"int1": [0.0, 1.0]})
    assert levels.axes[-1].get_xlabel().endswith("· computed")
    rungs = plots.plot_rungs({"eager": 8.0}, 170.0, provenance="measured on H100")
    assert rungs.axes[0].get_xlabel() == "tokens a second\nmeasured on H100"
    batches = plots.plot_batches({"memory": {1: 170.0}}, {1: 162.0}, provenance="measured on H100")
    assert batches.axes[0].get_xlabel() == "samples in a batch\nmeasured on H100"


def test_every_picture_says_in_words_what_it_shows():
    """As IPython takes it: the words as plain text, and beside the PNG."""
    bars = plot_memory_bars({"card 0": {"weights": 2 * GIB}}, 4 * GIB, "Weights")
    data, metadata = bars._repr_mimebundle_(include=None, exclude=None)
    words = "Stacked bars in GiB. Weights. card 0: weights 2.0, capacity 4.0."
    assert data == {"text/plain": words} and metadata == {"image/png": {"alt": words}}
    device_map = plot_device_map({"auto": BLOCKS}, 22 * GIB)._repr_mimebundle_()[0]["text/plain"]
    assert "auto: card 0 6.0, card 1 5.0, cpu 1.0" in device_map
    frontier = plot_frontier({"text": {32: 40}})._repr_mimebundle_()[0]["text/plain"]
    assert "text: 40 of 32 tokens" in frontier
    picture = plots.describe(Image.new("RGB", (2, 2)), "Two points.")
    assert picture._repr_mimebundle_()[1]["image/jpeg"] == {"alt": "Two points."}


def test_rungs_are_as_long_as_their_speeds_beside_the_limit():
    figure = plots.plot_rungs({"eager": 8.0, "fast": 162.0}, 170.0, "One prompt")
    axes = figure.axes[0]
    assert [patch.get_width() for patch in axes.patches] == [8, 162]
    assert axes.lines[0].get_xdata() == [170, 170] and texts(axes) == ["8", "162", "limit 170"]
    words = figure._repr_mimebundle_()[0]["text/plain"]
    assert words == "Bars: tokens a second. One prompt. eager 8.0, fast 162.0; limit 170.0."


def test_levels_are_strokes_under_the_weights_that_they_stand_for():
    figure = plots.plot_levels([-1.0, 0.0, 0.1, 1.0], {"int2": [-1, 0, 1], "int1": [0, 1]}, "One")
    above, below = figure.axes
    assert sum(patch.get_height() for patch in above.patches) == 4
    strokes = [[line[0][0] for line in each.get_segments()] for each in below.collections]
    assert strokes == [[-1, 0, 1], [0, 1]]
    assert [label.get_text() for label in below.get_yticklabels()] == ["int2", "int1"]
    words = figure._repr_mimebundle_()[0]["text/plain"]
    assert "int2 has 3; int1 has 2" in words


def test_measured_batches_are_points_beside_lines_of_limits():
    limits = {"memory": {1: 170.0, 8: 1300.0}, "products": {1: 44000.0, 8: 44000.0}}
    figure = plots.plot_batches(limits, {1: 162.0, 8: 1140.0})
    memory, products, points = figure.axes[0].lines
    assert list(memory.get_xdata()) == [1, 8] and list(memory.get_ydata()) == [170, 1300]
    assert list(products.get_ydata()) == [44000, 44000]
    assert list(points.get_ydata()) == [162, 1140] and points.get_linestyle() == "None"
    words = figure._repr_mimebundle_()[0]["text/plain"]
    assert words.endswith("products: 44,000 at 1, 44,000 at 8; measured: 162 at 1, 1,140 at 8.")


def test_segments_are_drawn_with_their_holes():
    blocks = [{"state": state, "size": 6 * 2**20} for state in ("inactive", "active_allocated")]
    figure = plots.plot_segments([{"blocks": blocks}, {"blocks": blocks[1:]}])
    axes = figure.axes[0]
    assert [(patch.get_x(), patch.get_width()) for patch in axes.patches] == [
        (0, 6),
        (6, 6),
        (0, 6),
    ]
    assert axes.patches[0].get_facecolor() != axes.patches[1].get_facecolor()
    words = figure._repr_mimebundle_()[0]["text/plain"]
    assert words.endswith("segment 1: 6 free, 6 in use; segment 2: 6 in use.")


def test_peaks_are_lines_and_sizes_that_do_not_fit_are_marked_at_the_capacity():
    figure = plots.plot_peaks(PEAKS, "text tokens", 4 * GIB, [8000], "Peaks")
    line, capacity, crosses = figure.axes[0].lines
    assert list(line.get_xdata()) == [1000, 2000, 4000] and list(line.get_ydata()) == [1, 2, 3]
    assert set(capacity.get_ydata()) == {4}
    assert (list(crosses.get_xdata()), list(crosses.get_ydata())) == ([8000], [4])
    words = figure._repr_mimebundle_()[0]["text/plain"]
    assert words.endswith("text only: 1.0 at 1000, 3.0 at 4000; capacity 4.0.")


def test_layers_are_stacked_and_their_sections_named():
    figure = plots.plot_layers(LAYERS, [("tower", 1), ("decoder", 1)], 4 * GIB)
    axes = figure.axes[0]
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in axes.collections]
    assert tops == [1, 3]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["tower", "decoder"]
    words = figure._repr_mimebundle_()[0]["text/plain"]
    assert "weights at most 1.0, gradients at most 2.0" in words


def test_a_rounding_error_is_flat_in_a_types_range_and_one_outside():
    axes = plots.plot_rounding({"float16": torch.float16}).axes[0]
    errors = axes.lines[0].get_ydata()
    assert errors[0] == errors[-1] == 1 and min(errors) == pytest.approx(2**-11, rel=0.3)


@pytest.mark.parametrize("size", [21.7, 21.99, 22.0])
def test_a_length_is_not_written_across_the_line_at_the_capacity(size):
    bars = {"card 0": {"weights": int(size * GIB)}, "card 1": {"weights": 5 * GIB}}
    ends = [text.get_position()[0] for text in plot_memory_bars(bars, 22 * GIB).axes[0].texts]
    assert ends == [22, 5]


def test_no_plot_is_without_a_test_of_its_label():
    """A notebook's picture counts as labelled if one of these draws it; test_monitor.py tests the
    timeline's."""
    general = (simgpu.plots, simgpu.plots.memory, simgpu.plots.style)
    modules = (plots, plots.device_map, plots.quantised, plots.speed, plots.timeline, *general)
    plots_here = {name for each in modules for name in vars(each) if name.startswith("plot_")}
    assert plots_here == {
        *("plot_memory_bars", "plot_device_map", "plot_frontier", "plot_timeline"),
        *("plot_rounding", "plot_segments", "plot_peaks", "plot_layers"),
        *("plot_rungs", "plot_batches", "plot_levels"),
        "plot_path",  # which draws nothing
    }


def test_a_device_map_has_a_row_per_card_and_a_cell_per_block():
    axes = plot_device_map({"auto": BLOCKS}, 22 * GIB).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["card 0", "card 1", "cpu"]
    assert [patch.get_width() for patch in axes.patches] == [3, 3, 5, 1]
    assert {"6.0", "5.0", "1.0", "tower layers 0–1"} <= set(texts(axes))


def test_capacity_may_differ_per_bar():
    figure = plot_memory_bars(
        {"a": {"weights": GIB}, "b": {"weights": GIB}}, {"a": 2 * GIB, "b": 3 * GIB}
    )
    assert [line.get_xdata()[0] for line in figure.axes[0].lines] == [2, 3]


def test_colours_of_a_picture_differ():
    kinds = ["tower layer", "tower other", "decoder layer", "embedding and head"]
    assert len({COLOURS[kind] for kind in kinds}) == len(kinds)


def test_a_frontier_promises_between_two_lengths_only_what_the_longer_one_allows():
    axes = plot_frontier({"text": {512: 20, 32: 40}, "image": {32: 8, 512: 0}}).axes[0]
    line, shade = axes.patches[:2]
    assert line.get_data().values.tolist() == shade.get_data().values.tolist() == [40, 20]
    assert line.get_data().edges.tolist() == [0, 32, 512]
    assert texts(axes) == ["40", "20", "8", "0"]
    assert axes.get_xlabel() == "text tokens of the prompt, per sample · simulated"


def test_a_picture_that_could_not_be_written_is_refused_before_the_work(tmp_path):
    assert plot_path(str(tmp_path / "a.svg")) == tmp_path / "a.svg"
    assert not list(tmp_path.iterdir()), "asking leaves nothing behind"
    old = tmp_path / "old.png"
    old.write_bytes(b"picture")
    assert plot_path(old).read_bytes() == b"picture"
    (tmp_path / "folder.png").mkdir()
    for name in ("folder.png", f"{'n' * 300}.png"):
        with pytest.raises(ValueError, match="cannot be written: .*. Give a file in a folder"):
            plot_path(tmp_path / name)
    with pytest.raises(ValueError, match="expected a name ending in .png, .svg or .pdf"):
        plot_path(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="There is no folder"):
        plot_path(tmp_path / "missing" / "a.png")


def test_a_training_curve_says_what_it_was_measured_on():
    origin = {
        "device": "NVIDIA H100",
        "torch": "2.11.0",
        "transformers": "5.17.0",
        "date": "2026-11-23",
    }
    steps = [{"step": 1, "seconds": 60, "loss": 2.0}, {"step": 2, "seconds": 120, "loss": 1.0}]
    program = load_benchmark("miniature_curve")
    (axes,) = program.plot_training_curve([origin, *steps]).axes
    assert list(axes.lines[0].get_xdata()) == [1, 2] and list(axes.lines[0].get_ydata()) == [
        2.0,
        1.0,
    ]
    assert axes.get_xlabel() == (
        "minutes · measured on NVIDIA H100\ntorch 2.11.0, transformers 5.17.0, 2026-11-23"
    )
