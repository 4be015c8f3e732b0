"""Answers for people: tables and sentences on stdout, and the picture of a peak."""

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from simgpu.catalog import Card
from simgpu.units import GIB, bytes_in_words

# So many lines of the user's code are shown, the largest first.
_LINES = 12


def kinds(cards: Sequence[Card]) -> str:
    """ "2 x L4", or every kind of card with its number."""
    found = Counter(card.key for card in cards)
    return ", ".join(f"{number} x {key}" for key, number in found.items())


def print_fit(result, next_step: str):
    """A ``FitResult`` for people: table, verdict, what to do next."""
    console = Console(highlight=False)
    table = Table("card", title="simulated cards, GiB")
    columns = ("capacity", "weights", "peak allocated", "peak reserved", "free at peak")
    for column in columns:
        table.add_column(column, justify="right")
    for device in result.devices:
        figures = [getattr(device, f"{name.replace(' ', '_')}_bytes") for name in columns]
        cells = [escape(f"{device.index} · {device.card}"), *map(_gib, figures)]
        full = result.oom is not None and result.oom.device == device.index
        table.add_row(*cells, style="bold red" if full else None)
    console.print(table)
    if result.provenance != "simulated":
        console.print(f"The cards are {escape(result.provenance)}.", soft_wrap=True)
    console.print(fit_verdict(result), soft_wrap=True)
    if result.decoding_bytes:
        console.print(_decoding(result), soft_wrap=True)
    if result.host is not None:
        console.print(_host_memory(result), soft_wrap=True)
    if result.unmodelled or result.assumed:
        console.print(_promise(result), soft_wrap=True)
    if next_step:
        console.print(f"Next: {escape(next_step)}", soft_wrap=True)


def fit_verdict(result) -> str:
    """Whether it fits, and by how much, in a sentence; and PyTorch's message."""
    if result.oom is None:
        fullest = min(result.devices, key=lambda device: device.free_at_peak_bytes)
        where = f"card {fullest.index} is the fullest, with"
        free = f"{_gib(fullest.free_at_peak_bytes)} GiB free at its peak"
        if not result.just_fits:
            return f"[green]It fits:[/] {where} {free}."
        differ = _gib(result.asked[0].cards[fullest.index].uncertainty_bytes)
        why = f"drivers and programs make {differ} GiB of difference on such a card"
        return f"[yellow]It just fits:[/] {where} {free}; {why}."
    short = "; ".join(
        f"{bytes_in_words(size)}, {bytes_in_words(size - device.capacity_bytes)} short on card"
        f" {device.index}"
        for device, size in zip(result.devices, result.needs, strict=True)
        if size > device.capacity_bytes
    )
    where = f"card {result.oom.device} is full, phase {result.oom.phase}."
    message = escape(result.oom.message)
    return f"[bold red]It does not fit:[/] {where} It needs {short}.\n{message}"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.2f}"


def _decoding(result) -> str:
    """What another way of decoding took, in a sentence."""
    taken = (f"{name} {bytes_in_words(size)}" for name, size in result.decoding_bytes.items())
    return f"For {result.asked[0].decoding} decoding (simulated), in these: {', '.join(taken)}."


def _host_memory(result) -> str:
    """What loading takes of the host's memory, in a sentence."""
    host = result.host
    bounds = (host.sequential_peak_anonymous_bytes, host.peak_anonymous_bytes)
    span = " to ".join(dict.fromkeys(map(_gib, bounds)))  # one figure where both read alike
    files = "files are read through the page cache."
    if host.view_bytes:
        files = (
            f"{_gib(host.view_bytes)} GiB of weights remain in their files, to be read in every"
            " pass through the page cache."
        )
    return (
        f"Host memory to load (simulated): {span} GiB beside Python and CUDA,"
        f" {_gib(host.anonymous_bytes)} GiB stays; {files}"
    )


def print_limits(found):
    """Largest batch, longest context, and the recommended map with its lines of Python."""
    console = Console(highlight=False, soft_wrap=True)
    reasons = {
        "memory": "one more does not fit",
        "model": "the model's context ends there",
        "decoding": "this way of decoding ends there",
        "search": "the search ends there",
    }
    batch, context, best = found.largest_batch, found.longest_context, found.recommendation
    for edge, label, unit in (
        (batch, "Largest batch", "samples like this"),
        (context, "Longest context", "text tokens"),
    ):
        reason = reasons[edge.limited_by] if edge.size else "not even one fits"
        console.print(f"[bold]{label}:[/] {edge.size} {unit} ({reason})")
    if best is None:
        console.print("[bold]Device map:[/] none of the automatic ones fits.")
        return
    headroom = ", ".join(f"{size / GIB:.1f}" for size in best.headroom_bytes)
    name = best.device_map if isinstance(best.device_map, str) else "everything on the one card"
    memory = " with max_memory" if best.max_memory else ""
    free = f"free at peak, per card: {headroom} GiB."
    console.print(f"[bold]Device map:[/] {name}{memory}; {free} To paste:\n\n{escape(best.code)}\n")


def print_estimate(found, what: str):
    """An ``Estimate`` for people: table, the largest lines, verdict, and what it holds for."""
    console = Console(highlight=False)
    table = Table(escape(what), title="simulated cards, GiB")
    for card in found.cards:
        table.add_column(escape(f"{card.index} · {card.card}"), justify="right")
    for name in ("capacity", "peak reserved", "peak allocated"):
        sizes = (getattr(card, f"{name.replace(' ', '_')}_bytes") for card in found.cards)
        table.add_row(name, *map(_gib, sizes))
    for purpose in found.cards[0].by_purpose:
        table.add_row(f"  {purpose}", *(_gib(card.by_purpose[purpose]) for card in found.cards))
    console.print(table)
    for card in found.cards:
        lines = Table("line", "GiB", "", title=f"Card {card.index} at its peak, by line", box=None)
        for line in card.by_line[:_LINES]:
            place = f"{line.file}:{line.line}"
            lines.add_row(escape(place), _gib(line.bytes), escape(line.text))
        if card.by_line:
            console.print(lines)
    for message in found.caught:
        console.print(f"The program caught: {escape(message)}", soft_wrap=True)
    colour = "green" if found.fits else "bold red"
    console.print(f"[{colour}]{escape(found.summary)}[/]", soft_wrap=True)
    if not found.fits:
        console.print(escape(found.oom), soft_wrap=True)
    console.print(_promise(found), soft_wrap=True)
    installed = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    said = f"They are {found.provenance}, with {installed}."
    if found.not_measured:
        said += f" Attention on {' and '.join(found.not_measured)}: PyTorch's rules, not measured."
    console.print(escape(said), soft_wrap=True)


def _promise(found) -> str:
    """Whether figures are exact, and what was assumed, in a sentence or two."""
    from simgpu.scratch import Unmodelled  # which brings torch

    said = str(Unmodelled(found.unmodelled))
    if not found.unmodelled and not found.exact:
        said = "not exact: the length of a result was assumed, as long as it can be"
    said = f"Figures are {said}."
    if found.assumed:
        times = ", ".join(f"{name} {count} x" for name, count in found.assumed.items())
        said += f" Numbers that nobody knows were assumed: {times}."
    return escape(said)


def plot_fit(result):
    """Every card's peak by purpose, a bar each, and the capacity."""
    from simgpu.plots import plot_memory_bars

    bars, capacities = {}, {}
    for device, parts in zip(result.devices, result.by_purpose, strict=True):
        name = f"{device.index} · {device.card}"
        bars[name] = {kind: size for kind, size in parts.items() if size}
        capacities[name] = device.capacity_bytes
    return plot_memory_bars(bars, capacities, "Every card at its peak", result.provenance)
