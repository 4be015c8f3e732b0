"""Tokens a second with quantised weights: fused kernels beside the libraries' own, on a real GPU.

    python benchmarks/quantised_decoding.py --output FILE [--formats int8 ...] [--parts steps ...]

All in one run on one card, at full size with random weights, which are quantised in place. Each
format has a limit of its own: the bytes of weights and cache that a token needs, by the bandwidth
of a copy. Rows of "step" time the fused step alone by the card's clock, all others are answers of
``generate``. With ", head too" nothing but the embedding is left in bfloat16.
"""

import argparse
import copy
import gc
import json
import time
import traceback
from importlib.metadata import version
from pathlib import Path

import decoding
import torch
from decoding import SHORT, answers, measure_limit, random_model, step_row
from memory import provenance
from torch import nn

from glm4v_nb.inference.fast import FastDecoder
from glm4v_nb.inference.supported import why_not
from glm4v_nb.inference.weights import GROUP, LayerWeights, Weight
from glm4v_nb.model.quantising import parts_of

FORMATS = ("bfloat16", "int8", "int4", "nf4")
PARTS = ("steps", "accuracy", "fast", "library", "head")
SIZES = ((1, SHORT), (4, SHORT))  # batch, context


def main():
    """Measure the formats asked for, and write after each what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True)
    parser.add_argument("--formats", nargs="*", default=FORMATS, choices=FORMATS)
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 2, 4, 8], help="of steps")
    given = parser.parse_args()
    import triton

    results = {"provenance": {**provenance(), "triton": triton.__version__}, "rows": []}
    results["provenance"].pop("cap")  # there is none here
    results["provenance"] |= {name: version(name) for name in ("torchao", "bitsandbytes")}
    results["provenance"]["weights"] = "random"
    results["limit"] = measure_limit()
    print(json.dumps(results["limit"]), flush=True)
    for weights in given.formats:
        begin = time.perf_counter()
        try:
            measure(weights, results, given)
        except Exception:
            results.setdefault("failed", {})[weights] = traceback.format_exc(limit=-3)
            traceback.print_exc(limit=-6)
        gc.collect()
        torch.cuda.empty_cache()
        print(f"{weights}: {time.perf_counter() - begin:.0f} s", flush=True)
        Path(given.output).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def measure(weights: str, results: dict, given):
    """All rows of one format."""
    model = random_model()
    if weights != "bfloat16":
        quantise(model, weights, keep=("lm_head",))
    results["bytes"] = bytes_of(model)
    print(weights, json.dumps(results["bytes"]), flush=True)
    if why_not(model) is None:
        if "steps" in given.parts:
            steps(model, results, f"step {weights}", given.rows)
        if "accuracy" in given.parts and weights != "bfloat16":
            accuracy(model, results, weights)
        if "fast" in given.parts:
            answers_of(model, results, "fast", f"fast {weights}", SIZES)
    if "library" in given.parts:
        library = {"nf4": "bitsandbytes", "bfloat16": "eager"}.get(weights, "torchao")
        answers_of(model, results, "eager", f"{library} {weights}", SIZES[:1])
    if "head" in given.parts and weights in ("int8", "int4"):
        quantise(model, weights, keep=())
        results["bytes"] = bytes_of(model)
        steps(model, results, f"step {weights}, head too", given.rows)


def quantise(model, weights: str, keep: tuple[str, ...]):
    """Every matrix in place, but those of modules in ``keep``."""
    names = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name not in keep and len(parts_of(module.weight)) == 1
    ]
    if weights == "nf4":
        import bitsandbytes as bnb

        for name in names:
            old = model.get_submodule(name)
            packed = bnb.nn.Params4bit(old.weight.data.cpu(), quant_type="nf4")
            new = bnb.nn.Linear4bit(
                old.in_features, old.out_features, old.bias is not None, old.weight.dtype,
                quant_type="nf4", device="meta",
            )  # fmt: skip
            new.weight, new.bias = packed, old.bias
            model.set_submodule(name, new.to("cuda"))
        return
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    config = {
        "int8": Int8WeightOnlyConfig(),
        "int4": Int4WeightOnlyConfig(
            group_size=GROUP, int4_packing_format="tile_packed_to_4d"
        ),
    }[weights]  # fmt: skip
    quantize_(model, config, lambda module, name: name in names)


def bytes_of(model) -> dict:
    """As of ``decoding``; of 4 bits without the columns that torchao fills up."""
    found = decoding.bytes_of(model)
    if any(hasattr(one, "quant_state") for one in model.language_model.layers.parameters()):
        layers = model.language_model.layers.parameters()
        weights = sum(part.nbytes for one in layers for part in parts_of(one))
        return found | {"weights": weights + model.lm_head.weight.nbytes}

    def needed(one: Weight) -> int:
        rows, columns = one.shape
        scales = {16: 0, 8: 4 * rows, 4: 4 * rows * columns // GROUP}
        return rows * columns * one.bits // 8 + scales[one.bits]

    layers = [LayerWeights.of(layer) for layer in model.language_model.layers]
    every = [each for one in layers for each in (one.heads, one.out, one.gate_up, one.down)]
    return found | {"weights": sum(map(needed, [*every, Weight.of(model.lm_head.weight)]))}


def steps(model, results, rung: str, rows):
    """The fused step alone."""
    decoder = FastDecoder()
    for batch in rows:
        step = step_row(decoder, model, results, rung, batch, SHORT)
        tiles = step.parts[0].tiles | {"head": step._head_tile}
        results.setdefault("tiles", {})[f"{rung}, {batch} rows"] = {
            name: str(tile) for name, tile in tiles.items()
        }
        print({name: str(tile) for name, tile in tiles.items()}, flush=True)


def answers_of(model, results, decoding_by: str, rung: str, sizes):
    """``generate`` by one way of decoding, under the name of the format."""
    before = len(results["rows"])
    answers(model, results, None, (decoding_by,), sizes)
    for each in results["rows"][before:]:
        each["rung"] = rung


def accuracy(model, results, weights: str):
    """How far a step's logits are from those of float32 with the same quantised weights, in norm:
    fused kernels and the library's own."""
    wide = copy.copy(model)
    wide._modules = dict(model._modules)
    wide._modules["language_model"] = decoder = copy.copy(model.language_model)
    wide._modules["lm_head"] = copy.deepcopy(model.lm_head).float()
    decoder._modules = {
        name: in_float32(module) for name, module in model.language_model._modules.items()
    }
    decoding.accuracy(model, results, None, wide=wide)
    results.setdefault("accuracy_by_format", {})[weights] = results.pop("accuracy")


def in_float32(module: nn.Module) -> nn.Module:
    """A copy whose quantised weights are the numbers that they stand for."""
    if type(module) is nn.Linear and len(parts_of(module.weight)) > 1:
        new = nn.Linear(module.in_features, module.out_features, device="meta", bias=False)
        new.weight = nn.Parameter(dequantised(Weight.of(module.weight)), requires_grad=False)
        new.bias = None if module.bias is None else nn.Parameter(module.bias.float(), False)
        return new
    new = copy.copy(module)
    new._parameters = {
        name: None if one is None else nn.Parameter(one.float(), False)
        for name, one in module._parameters.items()
    }
    new._modules = {name: in_float32(one) for name, one in module._modules.items()}
    return new


def dequantised(weight: Weight) -> torch.Tensor:
    """(rows, columns) in float32."""
    rows, columns = weight.shape
    if weight.bits == 8:
        return weight.numbers.float() * weight.scales[:, None]
    # Tiles of 8 rows, groups; then rows by 2s of columns, 32s; then 8s by 1s.
    words = weight.numbers.view(rows // 8, -1, 8, 4, 4)
    numbers = torch.stack([words >> shift & 15 for shift in (0, 16, 4, 20, 8, 24, 12, 28)], -1)
    numbers = numbers.view(*words.shape, 4, 2).permute(0, 2, 1, 4, 5, 3, 6)
    numbers = numbers.reshape(rows, -1)[:, :columns].float() - 8
    pairs = weight.scales.view(torch.bfloat16).view(-1, rows, 2)[: columns // GROUP].float()
    scale, zero = pairs.transpose(0, 1).repeat_interleave(GROUP, 1).unbind(-1)
    return numbers * scale + zero


if __name__ == "__main__":
    main()
