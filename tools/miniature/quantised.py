"""What quantising costs the miniature: ``python -m tools.miniature.quantised [--count N]``.

Every row asks the same held-out questions. It has the share of right answers, of all and of each
kind of question, of those that are word for word the answer in bfloat16, and how far the first
logits are from those in bfloat16: the norm of the difference over the norm, of all questions
together. Then how many answers became wrong and how many right, and the first of those that differ.

Four kinds of rows: "formats" load as ``load(weights=, keep=)`` does; of int4, whose kernels need a
GPU, the rounding is torchao's own and the products are bfloat16's. "bits" rounds all but the head
to so many bits. "parts" and "layers" are rounded one at a time to 2 bits, below any format here, so
that the order in which they break is seen. Writes benchmarks/results/miniature_quantised.json.
"""

import argparse
import json
import platform
import time
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from glm4v_nb.inference import load
from glm4v_nb.miniature import CHECKPOINT
from glm4v_nb.miniature.evaluate import answer_all
from tools.miniature.evaluate import HELD_OUT_SEED, held_out_question

RESULT = Path(__file__).resolve().parents[2] / "benchmarks/results/miniature_quantised.json"
HEAD, TOWER, DECODER = "lm_head", "vision_tower", "language_model"
BATCH = 64
GROUP = 64  # 128 does not divide the tower's rows of 192
# Row -> what is left in bfloat16 besides the embedding.
KEPT = {
    "all but the head": [HEAD],
    "the head too": [],
    "decoder alone": [HEAD, TOWER],
    "tower alone": [HEAD, DECODER],
}
PARTS = {
    "decoder, queries, keys, values": r"language_model.*self_attn\.[qkv]_proj",
    "decoder, attention's output": r"language_model.*self_attn\.o_proj",
    "decoder, gate and up": r"language_model.*gate_up_proj",
    "decoder, down": r"language_model.*down_proj",
    "tower, queries, keys, values": r"vision_tower\.layers.*query_key_value",
    "tower, attention's output": r"vision_tower\.layers.*attention\.dense",
    "tower, MLP": r"vision_tower\.layers.*fc[12]",
    "projector": r"vision_tower\.linear_proj.*",
    "embedding": r"language_model\.embed_tokens",
    "head": r"lm_head",
}
# Layers of the miniature's two stacks: every matrix of one, one layer at a time.
LAYERS = {f"tower, layer {n}": rf"vision_tower\.layers\.{n}\..*" for n in range(5)}
LAYERS |= {f"decoder, layer {n}": rf"language_model\.layers\.{n}\..*" for n in range(4)}
SHOWN = 10  # answers that differ, of each row


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """A matrix after torchao's rounding of int4, in groups of 64 of a row, to so many bits."""
    from torchao.quantization import quant_primitives

    block, bounds = (1, GROUP), {"quant_min": 0, "quant_max": 2**bits - 1}
    kinds = {"scale_dtype": weight.dtype, "zero_point_dtype": weight.dtype}
    scale, zero = quant_primitives._choose_qparams_affine_tinygemm(
        weight, quant_primitives.MappingType.ASYMMETRIC, block, torch.int32, **bounds, **kinds
    )
    numbers = quant_primitives._quantize_affine_tinygemm(
        weight, block, scale, zero, torch.int32, **bounds
    )
    return quant_primitives._dequantize_affine_tinygemm(
        numbers, block, scale, zero, torch.int32, **bounds, output_dtype=weight.dtype
    )


@torch.no_grad()
def round_parts(bits: int, keep: list[str] | None = None, only: str | None = None) -> nn.Module:
    """The miniature with matrices rounded: all but those in ``keep``, or those of a pattern."""
    model = load(CHECKPOINT)[0]
    for name, module in model.named_modules():
        chosen = type(module) is nn.Linear and should_convert_module(name, keep)
        if only is not None:
            is_matrix = isinstance(module, nn.Linear | nn.Embedding)
            chosen = is_matrix and not should_convert_module(name, [only])
        if chosen:
            module.weight.copy_(rounded(module.weight, bits))
    return model


def models():
    """(kind, row, a function that loads it)"""
    from torchao.quantization import Int8WeightOnlyConfig

    yield "formats", "bfloat16", lambda: load(CHECKPOINT)[0]
    for row, keep in KEPT.items():
        for weights in ("int8", "nf4"):
            yield (
                "formats",
                f"{weights}, {row}",
                lambda weights=weights, keep=keep: load(CHECKPOINT, weights=weights, keep=keep)[0],
            )
        yield "formats", f"int4, {row}", lambda keep=keep: round_parts(4, keep)
    whole = TorchAoConfig(Int8WeightOnlyConfig(), include_input_output_embeddings=True)
    eight = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[HEAD])
    for row, config in (
        ("int8, head and embedding too", whole),
        ("LLM.int8, all but the head", eight),
    ):
        yield (
            "formats",
            row,
            lambda config=config: AutoModelForCausalLM.from_pretrained(
                CHECKPOINT,
                quantization_config=config,
                dtype=torch.bfloat16,
                trust_remote_code=False,
            ).eval(),
        )
    for bits in (3, 2):
        yield "bits", f"{bits} bits", lambda bits=bits: round_parts(bits, [HEAD])
    for kind, patterns in (("parts", PARTS), ("layers", LAYERS)):
        for row, pattern in patterns.items():
            yield kind, row, lambda pattern=pattern: round_parts(2, only=pattern)


@torch.inference_mode()
def first_logits(model, processor, questions) -> torch.Tensor:
    """The logits of the first token of every answer."""
    inputs = processor(*map(list, zip(*questions, strict=True)))
    return model(**inputs, logits_to_keep=1).logits[:, -1].float()


def compare(asked: list[tuple], plain: list[str], answers: list[str]) -> dict:
    """What became of the answers ``plain``, given to the questions ``asked`` in bfloat16."""
    right: dict[str, list[bool]] = defaultdict(list)
    changed = []
    for one, before, given in zip(asked, plain, answers, strict=True):
        question, expected, kind = one[1:4]
        right[kind].append(given == expected)
        if given != before:
            said = {"question": question, "expected": expected}
            changed.append({"kind": kind, **said, "bfloat16": before, "given": given})
    return {
        "right": share(sum(right.values(), [])),
        "as_bfloat16": round(1 - len(changed) / len(asked), 4),
        "became_wrong": sum(one["bfloat16"] == one["expected"] for one in changed),
        "became_right": sum(one["given"] == one["expected"] for one in changed),
        "kinds": {kind: share(hits) for kind, hits in sorted(right.items())},
        "changed": changed[:SHOWN],
    }


def share(hits: list[bool]) -> float:
    """Of a list of hits and misses, to four digits."""
    return round(float(np.mean(hits)), 4)


def measure(count: int) -> dict:
    """Ask every model ``count`` questions."""
    rng = np.random.default_rng([HELD_OUT_SEED, HELD_OUT_SEED])
    asked = [held_out_question(rng) for _ in range(count)]
    processor, rows, exact = load(CHECKPOINT)[1], defaultdict(dict), None
    for kind, row, made in models():
        model, answers, logits, begin = made(), [], [], time.monotonic()
        for start in range(0, count, BATCH):
            some = [one[:2] for one in asked[start : start + BATCH]]
            answers += answer_all(model, processor, some)
            logits.append(first_logits(model, processor, some))
        logits = torch.cat(logits)
        exact = exact or (answers, logits)
        found = compare(asked, exact[0], answers)
        away = ((logits - exact[1]).norm() / exact[1].norm()).item()
        rows[kind][row] = {"logits_off": round(away, 4), **found}
        print(
            f"{row:32} {found['right']:.2%} {found['as_bfloat16']:.2%} {away:.4f}"
            f" ({time.monotonic() - begin:.0f} s)",
            flush=True,
        )
    names = ("torch", "transformers", "torchao", "bitsandbytes")
    return {
        "measured": f"CPU, {time.strftime('%Y-%m-%d')}",
        "versions": {name: version(name).partition("+")[0] for name in names},
        "python": platform.python_version(),
        "questions": count,
        "kinds": dict(sorted(Counter(one[3] for one in asked).items())),
        "seed": HELD_OUT_SEED,
        **rows,
    }


def main():
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    report = measure(options.count)
    options.output.write_text(
        json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
