"""Writes the tables of docs/accuracy.md and simgpu/README.md: measured, and simulated.

    python tools/accuracy.py             # from the stored figures, in a moment
    python tools/accuracy.py --simulate  # first simulate every measured case again; minutes

Measured figures are benchmarks/results/*.json, simulated ones benchmarks/results/simulated/*.json.
`make test` holds the page to the stored figures, the stored figures to new simulations, and those
to the measurements.
"""

import argparse
import importlib.metadata
import json
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SIMULATED = RESULTS / "simulated"
PAGE = ROOT / "docs" / "accuracy.md"
PAGES = (PAGE, ROOT / "simgpu" / "README.md")
PICTURE = ROOT / "docs" / "measured_memory.png"
MIB = 2**20

sys.path.append(str(ROOT / "benchmarks"))  # programs, no package

import host_memory  # noqa: E402
import memory  # noqa: E402
import models  # noqa: E402
import peers  # noqa: E402


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def measured_files(kind: str) -> list[Path]:
    """The stored measurements of a kind: "memory" (of cards), "quantised_memory" (of quantised
    weights) or "host_memory"."""
    return sorted(RESULTS.glob(f"{kind}_*.json"))


def measured_decodings() -> dict[Path, list[Path]]:
    """The stored measurements of fast decoding's memory, and those that gave the same figures."""
    found = {}
    for path in measured_files("decoding"):
        if memory_found := read(path).get("memory"):
            same = next((each for each in found if read(each)["memory"] == memory_found), None)
            found.setdefault(path if same is None else same, []).append(path)
    return {first: others[1:] for first, others in found.items()}


def versions() -> dict[str, str]:
    """What decides simulated figures besides this repository."""
    names = ("torch", "transformers", "accelerate")
    return {name: importlib.metadata.version(name).partition("+")[0] for name in names}


def simulate(only: str = ""):
    """Simulate every measured case, or those of files with this in their names, and store the
    figures; draws the picture, too."""
    SIMULATED.mkdir(exist_ok=True)
    origin = versions() | {"date": time.strftime("%Y-%m-%d")}

    def chosen(paths):
        return [path for path in paths if only in path.name]

    for path in chosen([*measured_files("memory"), *measured_files("quantised_memory")]):
        loads = [
            {"load": load.name, "records": records}
            for load, _, records in memory.simulate(read(path))
        ]
        store(path, {"provenance": origin, "loads": loads})
    for path in chosen(measured_files("host_memory")):
        figures = [
            {"case": figure.case, "name": figure.name, "least": figure.least, "most": figure.most}
            for figure in host_memory.compare(read(path))
        ]
        store(path, {"provenance": origin, "figures": figures})
    for path in chosen(measured_files("models")):
        store(path, {"provenance": origin, "cases": models.simulate(read(path))})
    import decoding  # which needs torch

    for path in chosen(measured_decodings()):
        store(path, {"provenance": origin, "memory": decoding.simulate(read(path))})
    if not chosen(measured_files("memory")):
        return
    figures = [figure for path in measured_files("memory") for figure in compared(path)[0]]
    origins = [read(path)["provenance"] for path in measured_files("memory")]
    memory.plot(figures, origins, str(PICTURE))


def store(measured: Path, content: dict):
    text = json.dumps(content, indent=1) + "\n"
    (SIMULATED / measured.name).write_text(text, encoding="utf-8")


def compared(path: Path) -> tuple[list, list[str], list[str]]:
    """Figures, differences and rows of the table of one file, from what is stored."""
    figures, differences, rows = [], [], []
    stored = {each["load"]: each["records"] for each in read(SIMULATED / path.name)["loads"]}
    for each in read(path)["loads"]:
        load, measured = memory.read_load(each["load"]), each["records"]
        more, others = memory.compare(load, measured, stored[load.name])
        figures += more
        differences += others
        rows += memory.rows(load, measured, stored[load.name])
    return figures, differences, rows


def machine(origin: dict) -> str:
    """The cards of a measurement in words, "2 x NVIDIA H200"."""
    return ", ".join(f"{count} x {name}" for name, count in origin["cards"].items())


def summary() -> str:
    """One row a machine: how many runs ended as simulated, and how far peaks are apart."""
    lines = [
        "| measured on | date | loads, runs | out of memory | ended as simulated "
        "| allocated peaks: within 1 MiB, furthest | reserved peaks: equal, furthest |",
        "|---|---|---|---|---|---|---|",
    ]
    messages = []
    for path in measured_files("memory"):
        results = read(path)
        figures, differences, rows = compared(path)
        messages += [
            figure.simulated - figure.measured
            for figure in figures
            if not figure.name.startswith("peak_")
        ]
        apart = {
            name: [figure.simulated - figure.measured for figure in figures if figure.name == name]
            for name in ("peak_allocated_bytes", "peak_reserved_bytes")
        }
        allocated, reserved = apart.values()
        loads = len(results["loads"])
        ended = sum("out of memory" in row for row in rows)
        near = sum(abs(distance) <= MIB for distance in allocated)
        lines.append(
            f"| {machine(results['provenance'])} | {results['provenance']['date']} "
            f"| {loads}, {len(rows) - loads} | {ended} | {len(rows) - len(differences)} of "
            f"{len(rows)} | {near} of {len(allocated)}, {furthest(allocated)} "
            f"| {reserved.count(0)} of {len(reserved)}, {furthest(reserved)} |"
        )
    measured, simulated = (
        read(folder / path.name)["provenance"] for folder in (RESULTS, SIMULATED)
    )
    lines += [
        "",
        f"*Measured with driver {measured['driver']}, torch {measured['torch']}, transformers "
        f"{measured['transformers']}; simulated on a CPU, {simulated['date']}, torch "
        f"{simulated['torch']}, transformers {simulated['transformers']}.*",
        "",
        f"The {len(messages)} figures in out-of-memory messages, which are printed to a hundredth "
        f"of a GiB, are within {max(map(abs, messages)) / MIB:.0f} MiB.",
    ]
    return "\n".join(lines)


def furthest(distances: list[int]) -> str:
    """The largest distance, signed, in MiB."""
    return f"{max(distances, key=abs) / MIB:+,.1f} MiB"


def runs() -> str:
    """Every run on every machine."""
    parts = []
    for path in measured_files("memory"):
        parts += [
            f"**{machine(read(path)['provenance'])}**",
            "",
            "| load | run | allocated | reserved | how it ended |",
            "|---|---|---|---|---|",
            *compared(path)[2],
            "",
        ]
    return "\n".join(parts).rstrip()


def quantised() -> str:
    """Every run of quantised weights, and how far the peaks of each format are apart."""
    parts = []
    for path in measured_files("quantised_memory"):
        origin, versions = read(path)["provenance"], read(SIMULATED / path.name)["provenance"]
        libraries = ", ".join(
            f"{name} {origin[name]}"
            for name in ("torch", "transformers", "torchao", "bitsandbytes", "peft")
        )
        figures, differences, rows = compared(path)
        peaks = {
            name: [figure.simulated - figure.measured for figure in figures if figure.name == name]
            for name in ("peak_allocated_bytes", "peak_reserved_bytes")
        }
        allocated, reserved = peaks.values()
        parts += [
            f"**{machine(origin)}** ({origin['date']}, driver {origin['driver']}, {libraries};"
            f" random weights; simulated {versions['date']}, torch {versions['torch']})",
            "",
            f"{len(rows) - len(differences)} of {len(rows)} ended as simulated. Of {len(allocated)}"
            f" allocated peaks {sum(abs(each) <= MIB for each in allocated)} are within 1 MiB, the"
            f" furthest {furthest(allocated)}; of {len(reserved)} reserved ones {reserved.count(0)}"
            f" are equal, the furthest {furthest(reserved)}.",
            "",
            "| load | run | allocated | reserved | how it ended |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    return "\n".join(parts).rstrip()


HOST_FIGURES = (
    "peak_anonymous_bytes",
    "loaded_anonymous_bytes",
    "peak_file_bytes",
    "loaded_file_bytes",
)


def host() -> str:
    """The computer's own memory: every load that was measured and can be simulated."""
    parts = []
    for path in measured_files("host_memory"):
        results, bounds = read(path), {}
        for figure in read(SIMULATED / path.name)["figures"]:
            bounds[figure["case"], figure["name"]] = (figure["least"], figure["most"])
        origin = results["provenance"]
        cards = machine(origin) or "no GPU"
        parts += [
            f"**{origin['cores']} cores, {origin['ram_bytes'] / 2**30:.1f} GiB, {cards}** "
            f"({origin['date']}, torch {origin['torch']}, safetensors {origin['safetensors']})",
            "",
            "| load | anonymous, peak | anonymous, after | file, peak | file, after |",
            "|---|---|---|---|---|",
        ]
        for each in results["cases"]:
            case = host_memory.read_case(each["case"]).name
            if (case, HOST_FIGURES[0]) in bounds:
                cells = [
                    beside(each["measured"][name], *bounds[case, name]) for name in HOST_FIGURES
                ]
                parts.append(f"| {case} | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts).rstrip()


def beside(measured: int, least: int, most: int) -> str:
    """A measured figure in MiB, and how far the simulated one is, or its range."""
    apart = f"{(most - measured) / MIB:+,.0f}".replace("-0", "+0")
    if least != most:
        apart = f"{least / MIB:,.0f} to {most / MIB:,.0f}"
    return f"{measured / MIB:,.0f} ({apart})"


def miniature() -> str:
    """How often the miniature's answer is exactly the right one."""
    results = read(RESULTS / "miniature_evaluation.json")
    lines = ["| questions | how many | answered exactly |", "|---|---|---|"]
    groups = {"all": {"all": results}, "kind": results["kinds"], "picture": results["forms"]}
    for group, members in groups.items():
        for name, each in members.items():
            words = name if group == "all" else f"{group}: {name}"
            lines.append(f"| {words} | {each['count']:,} | {each['accuracy']:.2%} |")
    origin = f"{results['device']}, {results['date']}, torch {results['torch']}"
    return "\n".join([*lines, "", f"*Measured: {origin}, transformers {results['transformers']}.*"])


def others() -> str:
    """Models and programs the simulator was not made with, on every machine."""
    parts = []
    for path in measured_files("models"):
        measured, simulated = read(path), read(SIMULATED / path.name)
        origin, versions = measured["provenance"], simulated["provenance"]
        parts += [
            f"**{machine(origin)}** ({origin['date']}, torch {origin['torch']}, transformers "
            f"{origin['transformers']}, {origin['weights']}; simulated {versions['date']}, torch "
            f"{versions['torch']}, transformers {versions['transformers']})",
            "",
            *models.table(measured["cases"], simulated["cases"]),
            "",
        ]
    return "\n".join(parts).rstrip()


def beside_peers() -> str:
    """What other programs say of six of the models."""
    return peers.table(read(peers.OUTPUT))


def fast() -> str:
    """Fast decoding: every answer whose memory was measured."""
    parts = []
    for path, again in measured_decodings().items():
        measured, simulated = read(path), read(SIMULATED / path.name)
        origin, versions = measured["provenance"], simulated["provenance"]
        parts += [
            f"**{machine(origin)}** ({origin['date']}, torch {origin['torch']}, Triton "
            f"{origin['triton']}, {origin['weights']} weights; simulated {versions['date']}, torch "
            f"{versions['torch']})",
            "",
            "| prompts x images, text tokens, new tokens | peak allocated | peak reserved "
            "| kept allocated |",
            "|---|---|---|---|",
        ]
        for real, ours in zip(measured["memory"], simulated["memory"], strict=True):
            names = ("peak_allocated_bytes", "peak_reserved_bytes", "after_allocated_bytes")
            cells = [beside(real[name], ours[name], ours[name]) for name in names]
            case = "{batch} x {images}, {text_tokens:,}, {new_tokens}".format(**real)
            parts.append(f"| {case} | {' | '.join(cells)} |")
        parts += ["", *(f"*The same figures again: {each.name}.*" for each in again), ""]
    return "\n".join(parts).rstrip()


SECTIONS = {"summary": summary, "runs": runs, "host": host, "miniature": miniature, "fast": fast}
SECTIONS |= {"quantised": quantised, "others": others, "peers": beside_peers}


def page(path: Path = PAGE) -> str:
    """A page with its tables written anew; what stands outside the marks stays."""

    def written(found: re.Match) -> str:
        return f"<!-- table: {found[1]} -->\n{SECTIONS[found[1]]()}\n<!-- end -->"

    text = path.read_text(encoding="utf-8")
    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", written, text, flags=re.DOTALL)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--simulate", action="store_true", help="simulate every case again")
    parser.add_argument("--only", default="", help="of files with this in their names")
    given = parser.parse_args()
    if given.simulate:
        simulate(given.only)
    for path in PAGES:
        path.write_text(page(path), encoding="utf-8")


if __name__ == "__main__":
    main()
