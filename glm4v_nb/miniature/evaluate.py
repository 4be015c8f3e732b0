"""How often the miniature is right about a hundred stored pictures that training never saw."""

import random
import tomllib
from pathlib import Path

import torch
from PIL import Image

from glm4v_nb.inference import load
from glm4v_nb.miniature import CHECKPOINT, EXAMPLES

SIDE = 168  # of a picture in pixels, which is what the miniature sees
COLUMNS = 10


def held_out_questions() -> list[tuple[Image.Image, str, str]]:
    """Picture, question and the only right answer, a hundred of each."""
    table = tomllib.loads((EXAMPLES / "held_out.toml").read_text(encoding="utf-8"))
    sheet, asked = Image.open(EXAMPLES / "held_out.jpeg").convert("RGB"), []
    for number, (question, answer) in enumerate(table["questions"]):
        left, top = SIDE * (number % COLUMNS), SIDE * (number // COLUMNS)
        asked.append((sheet.crop((left, top, left + SIDE, top + SIDE)), question, answer))
    return asked


def evaluate(
    checkpoint: str | Path = CHECKPOINT,
    seed: int = 0,
    count: int = 100,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    weights: str | None = None,
) -> dict:
    """Ask ``count`` of the held-out questions, chosen by ``seed``; an answer counts if it is
    exactly right. ``weights`` is as of ``inference.load``.

    Returns:
        ``accuracy``, 0 to 1, and ``wrong``: question, expected and given answer of every other.

    Raises:
        ValueError: more questions than there are, or none.
    """
    asked = held_out_questions()
    if not 1 <= count <= len(asked):
        raise ValueError(
            f"count is {count}; expected 1 to {len(asked)} questions, which is how many are stored."
            " `python -m tools.miniature.evaluate`, in a clone, draws as many as you like."
        )
    chosen = [asked[n] for n in sorted(random.Random(seed).sample(range(len(asked)), count))]
    model, processor = load(checkpoint, dtype=dtype, device_map=device, weights=weights)
    wrong = []
    for some in (chosen[start : start + 64] for start in range(0, count, 64)):
        given = answer_all(model, processor, [one[:2] for one in some])
        for (_, question, expected), answer in zip(some, given, strict=True):
            if answer != expected:
                wrong.append({"question": question, "expected": expected, "given": answer})
    return {"accuracy": 1 - len(wrong) / count, "wrong": wrong}


@torch.inference_mode()
def answer_all(model, processor, questions: list[tuple], max_new_tokens: int = 72) -> list[str]:
    """Greedy answers to (picture, question) pairs, in one batch, without space around them."""
    pictures, texts = zip(*questions, strict=True)
    inputs = processor(list(pictures), list(texts)).to(model.device)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    texts = processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in texts]
