"""Write docs/speed.md and its picture from what benchmarks/decoding.py, quantised_decoding.py and
parallel.py measured.

python tools/speed.py
"""

from pathlib import Path

from glm4v_nb.measured import RESULTS, measured_decoding
from glm4v_nb.plots import plot_rungs

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "decoding.png"
PAGE = ROOT / "docs" / "speed.md"
# As a reader climbs them; "step" is the fused step by the card's clock, without generate.
RUNGS = ("eager", "static", "compiled", "hand loop", "fast", "step")
ABOUT = {
    "eager": "transformers' `generate`",
    "static": "its static cache",
    "compiled": "that, compiled",
    "hand loop": "that, compiled, in a loop by hand",
    "fast": '`decoding="fast"`: fused kernels',
    "step": "a fused step alone",
}
# Of cards together, in files decoding_tensor_*.json.
TOGETHER = {
    "device_map eager": "layers on the one, then on the other: transformers' `generate`",
    "device_map fast": 'the same, `decoding="fast"`',
    "tensor transformers": "a part of every layer on each: transformers' `tp_plan`, decoder alone",
    "tensor eager": 'a part of every layer on each: `parallel="tensor"`',
    "tensor fast": 'the same, `decoding="fast"`',
    "tensor step": "a fused step of it alone",
}


def page() -> str:
    """The page, from stored results alone."""
    one, two, before = (
        measured_decoding(f"decoding_{name}") for name in ("h100", "h200_x2", "h100_before")
    )
    accuracy, small = one["accuracy"], before["miniature"]
    lookup = small["lookup"]
    lines = [
        "# How fast answers come",
        "",
        "Written by `python tools/speed.py` from what `benchmarks/decoding.py` measured at full",
        "size, with random weights. Every token needs all weights of decoder and head once, and",
        "the cache. The *limit* is a copy's bandwidth in the same run, divided by these bytes.",
        "",
        *(f"- {each['measured_on']}: a copy moves {_terabytes(each)} TB/s." for each in (one, two)),
        "",
        "![Tokens a second, rung by rung, beside the limit](decoding.png)",
        "",
        "| decoding | cards | batch | context | tokens/s | of the limit |",
        "|---|---|---|---|---|---|",
        *(_line(row, _cards(row, each)) for each in (one, two) for row in _ordered(each)),
        "",
        "Two cards by layers take turns, so their limit is that of one card.",
        "",
        f"- Logits of a fused step are {accuracy['fused_distance_from_float32']:.1%} from float32"
        f" in norm, those of a plain bfloat16 step {accuracy['bfloat16_distance_from_float32']:.1%}"
        f" ({accuracy['tokens']} tokens, random weights).",
        f"- Of {small['questions']:,} answers of the miniature, in batches of 8,"
        f" {small['differ']} differ from eager's; of {lookup['questions']} with prompt lookup"
        f" {lookup['differ']}, at {lookup['tokens_per_step']:.2f} tokens a step"
        f" ({before['provenance']['date']}, with the kernels of that day).",
        f"- A step that verifies 8 tokens takes {one['verify_step_seconds'] * 1e3:.2f} ms.",
        _prefill(one["prefill"]),
        "",
        f"The run on H200 ({two['provenance']['processes']}):",
        "",
        _prefill(two["prefill"]),
        _loading(two["load"]),
        f"- Over two cards an answer is {'' if two['two_cards_answer_as_one'] else 'not '}that of"
        " one, token by token.",
        *(line for file in sorted(RESULTS.glob("decoding_tensor_*.json"))
          for line in _together(measured_decoding(file.stem))),
    ]  # fmt: skip
    for file in sorted(RESULTS.glob("decoding_quantised_*.json")):
        lines += _quantised(measured_decoding(file.stem))
    lines += _service([measured_decoding(file.stem) for file in sorted(RESULTS.glob("serving_*"))])
    return "\n".join(lines) + "\n"


def _service(runs: list[dict]) -> list[str]:
    """What benchmarks/serving.py measured of users at the same time."""
    new_tokens = {row["tokens"] // row["answers"] for run in runs for row in run["rows"]}
    lines = [
        "",
        "## The service",
        "",
        "By `benchmarks/serving.py`: every user asks about a picture at the same time, and has an",
        f"answer of {' or '.join(map(str, sorted(new_tokens)))} tokens. Random weights,"
        f" {runs[0]['measured_on']}.",
        "",
        "| steps | requests at a time | users | tokens/s, all | seconds to the first token, median"
        " | longest |",
        "|---|---|---|---|---|---|",
    ]
    for run in runs:
        for row in run["rows"]:
            cells = [run["decoding"], row["method"].removesuffix(" rows"), row["users"]]
            cells.append(f"{row['tokens_per_second']:.0f}")
            for name in ("median", "most"):
                cells.append(f"{row[f'first_token_seconds_{name}']:.2f}")
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _loading(found: dict) -> str:
    return (
        f"- Loading takes {found['seconds']:.1f} s, a plain read into pinned memory with a copy"
        f" {found['plain_read_seconds']:.1f} s: {found['share_of_plain_read']:.0%} of its speed;"
        " the files had just been written."
    )


def _prefill(found: dict) -> str:
    """Eager's, and fast decoding's where the run had it."""
    said = f"- Prefill of an image and 98 tokens: {found['seconds'] * 1e3:.0f} ms,"
    said += f" {found['share_of_product']:.1%} of the rate of a large product, eager"
    if "fast_seconds" in found:
        said += f"; {found['fast_seconds'] * 1e3:.0f} ms,"
        said += f" {found['fast_share_of_product']:.1%}, with fused kernels. Their logits are"
        said += f" {found['fused_distance_from_float32']:.1%} from float32, eager's"
        said += f" {found['bfloat16_distance_from_float32']:.1%}"
    return said + "."


def _quantised(results: dict) -> list[str]:
    """Steps and answers of one run beside those of bfloat16 in it."""
    formats = [row["rung"].split()[1].strip(",") for row in results["rows"]]
    named = " and ".join(dict.fromkeys(each for each in formats if each != "bfloat16"))
    speeds = {
        (row["rung"], row["batch"], row["context"]): row["tokens_per_second"]
        for row in results["rows"]
    }
    lines = [
        "",
        f"## Weights in {named}",
        "",
        "By `benchmarks/quantised_decoding.py`, with random weights. Each limit is of the format's"
        " own bytes.",
        "",
        f"- {results['measured_on']}: a copy moves {_terabytes(results)} TB/s.",
        *(
            f"- {name}: logits of a fused step are {each['fused_distance_from_float32']:.1%} from"
            " float32 with the same quantised weights, in norm, those of the library's own step"
            f" {each['bfloat16_distance_from_float32']:.1%}; the likeliest token is float32's in"
            f" {each['same_token_as_float32']} of {each['tokens']} steps."
            for name, each in results.get("accuracy_by_format", {}).items()
        ),
        "",
        "| decoding | batch | context | tokens/s | times bfloat16 | of the limit |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        step = row["rung"].startswith("step")
        plain = speeds.get((f"{'step' if step else 'fast'} bfloat16", row["batch"], row["context"]))
        speed = row["tokens_per_second"]
        times = "" if plain is None else f"{speed / plain:.2f}"
        what = row["rung"].replace("step", "a fused step,").replace("fast", "fused kernels,")
        lines.append(f"| {what} | {row['batch']} | {row['context']:,} | {speed:.1f} | {times} |"
                     f" {row['share_of_limit']:.1%} |")  # fmt: skip
    return lines


def _together(results: dict) -> list[str]:
    """What benchmarks/parallel.py measured of cards that have a part of every layer each."""
    rows = sorted(results["rows"], key=lambda row: (list(TOGETHER).index(row["rung"]),
                                                    row["batch"], row["context"]))  # fmt: skip
    limit = results["limit"]["copy_bytes_per_second"] / 1e12
    count = len(results["limit"]["of_each_card"])
    lines = [
        "",
        f"## {count} cards at one layer",
        "",
        f"Written by `benchmarks/parallel.py`, {results['measured_on']}. Copies on all cards move",
        f"{limit:.2f} TB/s together, and the limit here is that of all of them, also where they",
        "take turns.",
        "",
        "| decoding | batch | context | tokens/s | of the limit of all |",
        "|---|---|---|---|---|",
        *(_line(row, about=TOGETHER) for row in rows),
        "",
    ]
    if distance := results.get("distance_from_float32"):
        lines.append(
            f"- Logits of a fused step on all cards are {distance['tensor_parallel']:.1%} in norm"
            f" from one card's in float32, those of one card's plain bfloat16"
            f" {distance['bfloat16']:.1%} ({distance['tokens']} tokens, random weights;"
            f" {distance['same_tokens']} times the same likeliest token)."
        )
    if small := results.get("miniature"):
        lines.append(
            f"- Of {small['questions']} answers of the miniature with prompt lookup"
            f" {small['differ']} differ from one card's."
        )
    if answers := results.get("answers"):
        lines.append(
            f"- An answer to an image: its first {answers['first_that_are_as_one_cards']} of"
            f" {answers['new_tokens']} tokens are as on one card (random weights, where the next"
            " token is often a close call)."
        )
    alone = results.get("load_seconds_of_one_card")
    if alone and (seconds := results.get("load_seconds_of_ranks")):
        lines.append(
            f"- Loading takes {max(seconds):.1f} s a rank, {max(seconds) / alone:.0%} of the"
            f" {alone:.1f} s of one card, from files in memory."
        )
    predicted = results.get("predicted_of_ranks")
    if predicted and (measured := results.get("memory_of_ranks")):
        name = "peak_{}_bytes".format
        pairs = list(zip(measured, predicted, strict=True))
        said = (
            f"{kind} {max(real[name(kind)] for real, _ in pairs) / 2**30:.2f} GiB at the peak, of"
            f" which `fit` says {max(ours[name(kind)] for _, ours in pairs) / 2**30:.2f}"
            for kind in ("allocated", "reserved")
        )
        beside = max(real["taken_beside_the_allocator_bytes"] for real in measured) / 2**20
        lines.append(
            f"- A rank has {'; '.join(said)}. Beside the allocator it took {beside:.0f} MiB more"
            " while it answered (NCCL, graphs, memory that all reach)."
        )
    if loss := results.get("loss"):
        lines.append(
            f"- {loss['seconds_to_the_end']:.1f} s after a rank was killed, all had ended."
        )
    return lines


def _ordered(results: dict) -> list[dict]:
    return sorted(results["rows"], key=lambda row: (RUNGS.index(row["rung"]), row["batch"],
                                                    row["context"]))  # fmt: skip


def _line(row: dict, cards: str = "", after: str = "", about: dict = ABOUT) -> str:
    cells = (about[row["rung"]], cards, str(row["batch"]), f"{row['context']:,}")
    cells += (f"{row['tokens_per_second']:.1f}", f"{row['share_of_limit']:.1%}", after)
    return f"| {' | '.join(filter(None, cells))} |"


def _cards(row: dict, results: dict) -> str:
    return f"{row['cards']} {next(iter(results['provenance']['cards'])).split()[1]}"


def _terabytes(results: dict) -> str:
    return f"{results['limit']['copy_bytes_per_second'] / 1e12:.2f}"


def draw(path: Path):
    """A bar a rung, for one prompt on one card, and the limit."""
    one = measured_decoding("decoding_h200_x2")
    rows = [row for row in _ordered(one) if row["batch"] == row["cards"] == 1]
    rows = [row for row in rows if row["context"] < 2000]
    rows = [row for row in rows if row["rung"] != "step"]
    speeds = {ABOUT[row["rung"]].replace("`", ""): row["tokens_per_second"] for row in rows}
    limit = rows[0]["tokens_per_second"] / rows[0]["share_of_limit"]
    title = f"One prompt of {rows[0]['context']:,} tokens, random weights"
    figure = plot_rungs(speeds, limit, title, one["measured_on"])
    figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    draw(PICTURE)
