"""Held-out accuracy: ``python -m tools.miniature.evaluate --seed N --count M --json``.

Questions come from seeds that training never uses; an answer counts if it is exactly right.
Pictures reach the model as image files, half of them as training draws them (``FORMS``), the others
as people have them.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoProcessor

from glm4v_nb.miniature import CHECKPOINT
from glm4v_nb.miniature.evaluate import answer_all
from tools.miniature.questions import sample
from tools.miniature.scenes import draw, encode, is_wide, random_size

HELD_OUT_SEED = 1_000_000
# Share of the questions. "drawn": sizes as in training, PNG; "wide": sides from 2 : 1 to 4 : 1;
# "large": 700 to 1400 pixels; the rest are file formats, of which "grey" and "alpha" are PNG with
# one and with four channels.
FORMS = {"drawn": 0.5, "jpeg": 0.1, "alpha": 0.1, "grey": 0.1, "wide": 0.1, "large": 0.1}


def evaluate(
    checkpoint: str | Path = CHECKPOINT,
    seed: int = HELD_OUT_SEED,
    count: int = 2000,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    examples: int = 20,
    progress: bool = False,
) -> dict:
    """Ask ``count`` questions, drawn from ``seed``, and compare the answers.

    Returns:
        ``accuracy`` over all; ``kinds``, ``languages``, ``kinds_and_languages`` and ``forms`` as
        name → accuracy and count; ``wrong``: at most ``examples`` wrong answers.
    """
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, trust_remote_code=False)
    model.to(device).eval()
    rng = np.random.default_rng([HELD_OUT_SEED, seed])
    right: dict[tuple[str, str], list[bool]] = defaultdict(list)
    wrong = []
    console = Console(stderr=True)
    for start in track(range(0, count, 64), "questions", console=console, disable=not progress):
        asked = [held_out_question(rng) for _ in range(min(64, count - start))]
        answers = answer_all(model, processor, [one[:2] for one in asked])
        for one, given in zip(asked, answers, strict=True):
            _, question, expected, kind, language, form = one
            names = {"all": "", "kinds": kind, "languages": language, "forms": form}
            names["kinds_and_languages"] = f"{kind} {language}"
            for group, name in names.items():
                right[group, name].append(given == expected)
            if given != expected and len(wrong) < examples:
                said = {"question": question, "expected": expected, "given": given}
                wrong.append({"form": form, **said})
    report = {"seed": seed, "count": count, "accuracy": float(np.mean(right.pop(("all", ""))))}
    for (group, name), hits in sorted(right.items()):
        report.setdefault(group, {})[name] = {"accuracy": float(np.mean(hits)), "count": len(hits)}
    return {**report, "wrong": wrong}


def held_out_question(rng: np.random.Generator) -> tuple[bytes, str, str, str, str, str]:
    """(image file, question, answer, kind, language, form)."""
    form = str(rng.choice(list(FORMS), p=list(FORMS.values())))
    if form == "wide":
        longer, shorter = int(rng.integers(240, 401)), int(rng.integers(100, 121))
        size = (longer, shorter) if rng.random() < 0.5 else (shorter, longer)
    elif form == "large":
        size = (int(rng.integers(700, 1401)), int(rng.integers(700, 1401)))
    else:
        size = random_size(rng)
    scene, *asked = sample(rng, wide=is_wide(size), grey=form == "grey")
    picture = draw(scene, size)
    if form == "jpeg":
        file = encode(picture, "JPEG", quality=int(rng.integers(40, 96)))
    else:
        file = encode(picture.convert({"alpha": "RGBA", "grey": "L"}.get(form, "RGB")), "PNG")
    return file, *asked, form


def main() -> None:
    """Read the command line, evaluate and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default=CHECKPOINT, help="the shipped one if not given")
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")
    options = vars(parser.parse_args())
    as_json = options.pop("json")
    report = evaluate(**options, progress=not as_json)
    if as_json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return
    print(f"accuracy {report['accuracy']:.2%} over {report['count']} questions")
    for part in ("kinds_and_languages", "languages", "forms"):
        for name, result in report[part].items():
            print(f"  {name:12} {result['accuracy']:.2%} of {result['count']}")


if __name__ == "__main__":
    main()
