"""Write docs/speed.md and its picture from what benchmarks/decoding.py measured.

python tools/speed.py
"""

from pathlib import Path

from glm4v_nb.measured import measured_decoding
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


def page() -> str:
    """The page, from stored results alone."""
    one, two, again = (
        measured_decoding(f"decoding_{name}") for name in ("h100", "h200_x2", "h100_again")
    )
    accuracy, small = one["accuracy"], one["miniature"]
    lookup = small["lookup"]
    lines = [
        "# How fast answers come",
        "",
        "Written by `python tools/speed.py` from what `benchmarks/decoding.py` measured at full",
        "size, with random weights. Every token needs all weights of decoder and head once, and",
        "the cache: the *limit* is these bytes by the bandwidth of a copy in the same run.",
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
        f" {lookup['differ']}, at {lookup['tokens_per_step']:.2f} tokens a step.",
        f"- A step that verifies 8 tokens takes {one['verify_step_seconds'] * 1e3:.2f} ms.",
        _prefill(one["prefill"]),
        *(f"- Not in the table: {each}." for each in one.get("left_out", ())),
        "",
        f"On another machine, {again['measured_on']}, whose processor is faster:",
        "",
        "| decoding | batch | context | tokens/s | of the limit | seconds to the first token |",
        "|---|---|---|---|---|---|",
        *(
            _line(row, after=f"{row['first_token_seconds']:.2f}")
            for row in _ordered(again)
            if row["rung"] != "step"
        ),
        "",
        _prefill(again["prefill"]),
        f"- Loading takes {again['load']['seconds']:.1f} s, a plain read into pinned memory with a"
        f" copy {again['load']['plain_read_seconds']:.1f} s:"
        f" {again['load']['share_of_plain_read']:.0%} of its speed; the files had just been"
        " written.",
    ]
    return "\n".join(lines) + "\n"


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


def _ordered(results: dict) -> list[dict]:
    return sorted(results["rows"], key=lambda row: (RUNGS.index(row["rung"]), row["batch"],
                                                    row["context"]))  # fmt: skip


def _line(row: dict, cards: str = "", after: str = "") -> str:
    cells = (ABOUT[row["rung"]], cards, str(row["batch"]), f"{row['context']:,}")
    cells += (f"{row['tokens_per_second']:.1f}", f"{row['share_of_limit']:.1%}", after)
    return f"| {' | '.join(filter(None, cells))} |"


def _cards(row: dict, results: dict) -> str:
    return f"{row['cards']} {next(iter(results['provenance']['cards'])).split()[1]}"


def _terabytes(results: dict) -> str:
    return f"{results['limit']['copy_bytes_per_second'] / 1e12:.2f}"


def draw(path: Path):
    """A bar a rung, for one prompt on one card, and the limit."""
    one = measured_decoding("decoding_h100")
    rows = [row for row in _ordered(one) if row["batch"] == 1 and row["context"] < 2000]
    rows = [row for row in rows if row["rung"] != "step"]
    speeds = {ABOUT[row["rung"]].replace("`", ""): row["tokens_per_second"] for row in rows}
    limit = rows[0]["tokens_per_second"] / rows[0]["share_of_limit"]
    title = f"One prompt of {rows[0]['context']:,} tokens, random weights"
    figure = plot_rungs(speeds, limit, title, one["measured_on"])
    figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    draw(PICTURE)
