"""Held-out accuracy: ``python -m glm4v_nb.miniature.evaluate --checkpoint DIR --seed N --count M --json``.

Questions come from seeds that training never uses (above a million); an answer counts if it is exactly right.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoProcessor

from glm4v_nb.miniature.questions import sample
from glm4v_nb.miniature.scenes import draw, random_size
from glm4v_nb.model import register

HELD_OUT_SEED = 1_000_000


def evaluate(
    checkpoint: str | Path,
    seed: int = HELD_OUT_SEED,
    count: int = 2000,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    batch_size: int = 128,
    examples: int = 20,
) -> dict:
    """Ask ``count`` questions, drawn from ``seed``, and compare the answers.

    Returns:
        ``accuracy`` over all, ``kinds`` and ``languages`` as name → accuracy and count, ``wrong``: at most
        ``examples`` wrong answers.
    """
    register()
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(device).eval()
    rng = np.random.default_rng([HELD_OUT_SEED, seed])
    right: dict[str, list[bool]] = defaultdict(list)
    wrong = []
    for start in range(0, count, batch_size):
        asked = []
        for _ in range(min(batch_size, count - start)):
            scene, question, answer, kind, language = sample(rng)
            asked.append((draw(scene, random_size(rng)), question, answer, kind, language))
        answers = answer_all(model, processor, [(picture, question) for picture, question, *_ in asked])
        for (_, question, expected, kind, language), given in zip(asked, answers, strict=True):
            for group in ("all", f"kind {kind}", f"language {language}", f"{kind} {language}"):
                right[group].append(given == expected)
            if given != expected and len(wrong) < examples:
                wrong.append({"question": question, "expected": expected, "given": given})
    summary = {name: {"accuracy": float(np.mean(hits)), "count": len(hits)} for name, hits in right.items()}

    def group(prefix: str) -> dict:
        found = {name for name in summary if name.startswith(prefix)}
        return {name.removeprefix(prefix): summary[name] for name in sorted(found)}

    known = ("all", "kind ", "language ")
    return {
        "seed": seed,
        "count": count,
        "accuracy": summary["all"]["accuracy"],
        "kinds": group("kind "),
        "languages": group("language "),
        "kinds_and_languages": {k: v for k, v in sorted(summary.items()) if not k.startswith(known)},
        "wrong": wrong,
    }


@torch.inference_mode()
def answer_all(model, processor, questions: list[tuple], max_new_tokens: int = 72) -> list[str]:
    """Greedy answers to (picture, question) pairs, in one batch, without the surrounding white space."""
    conversations = [
        [{"role": "user", "image": picture, "content": question}] for picture, question in questions
    ]
    inputs = processor.apply_chat_template(conversations, add_generation_prompt=True).to(model.device)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]


def main() -> None:
    """Read the command line, evaluate and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")
    options = parser.parse_args()
    report = evaluate(options.checkpoint, options.seed, options.count, options.device)
    if options.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return
    print(f"accuracy {report['accuracy']:.2%} over {report['count']} questions")
    for part in ("kinds", "languages"):
        for name, result in report[part].items():
            print(f"  {name:10} {result['accuracy']:.2%} of {result['count']}")


if __name__ == "__main__":
    main()
