"""A checkpoint of random weights in the official layout, written by several threads: 28 GB in
seconds where the folder is in memory.

Matrices are pieces of one block of random numbers, each from another place in it; norms are ones
and biases zeros. It is for measuring memory and speed: what the model answers means nothing.
"""

import json
import math
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SHARD_BYTES, SPREAD = 2 * 10**9, 0.02  # as large as the official ones; standard deviation
THREADS = 8


def layout(config) -> dict[str, list[int]]:
    """Name and shape of every tensor, as the official files have them."""
    import torch
    from transformers import core_model_loading

    from glm4v_nb.model import GLM4VForConditionalGeneration

    with torch.device("meta"):
        model = GLM4VForConditionalGeneration(config)
    stored = core_model_loading.revert_weight_conversion(model, model.state_dict())
    return {name: list(tensor.shape) for name, tensor in stored.items()}


def shards_of(shapes: dict[str, list[int]]) -> list[dict[str, tuple[list[int], int, int]]]:
    """Name to shape, begin and end in bytes of the tensors of each file, in bfloat16."""
    shards, end = [{}], 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if end and end + size > SHARD_BYTES:
            shards.append({})
            end = 0
        shards[-1][name] = (shape, end, end + size)
        end += size
    return shards


def write(directory: str | Path, config):
    """Write config.json, the shards and their index; numbers are made on a GPU if there is one."""
    import torch

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config.dtype = torch.bfloat16
    config.save_pretrained(directory)
    shards = shards_of(layout(config))
    largest = max(end - begin for each in shards for _, begin, end in each.values())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    numbers = torch.empty(largest, dtype=torch.bfloat16, device=device).normal_(std=SPREAD)
    block = memoryview(numbers.cpu().view(torch.uint8).numpy())
    names = [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    with ThreadPoolExecutor(THREADS) as pool:
        files = [directory / name for name in names]
        list(pool.map(_write_shard, files, shards, [block] * len(shards)))
    index = {
        "metadata": {"total_size": sum(max(end for *_, end in each.values()) for each in shards)},
        "weight_map": {
            name: file for file, each in zip(names, shards, strict=True) for name in each
        },
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _write_shard(file: Path, tensors: dict, block: memoryview):
    described = {
        name: {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        for name, (shape, begin, end) in tensors.items()
    }
    header = json.dumps({"__metadata__": {"format": "pt"}} | described).encode()
    header += b" " * (-len(header) % 8)
    place = random.Random(file.name)
    with file.open("wb", buffering=0) as opened:
        opened.write(len(header).to_bytes(8, "little") + header)
        for name, (shape, begin, end) in tensors.items():
            size = end - begin
            if len(shape) > 1:
                start = 2 * place.randrange((len(block) - size) // 2 + 1)
                content = block[start : start + size]
            else:  # of 16 bits, 1 in bfloat16 is 0x3F80
                content = memoryview((b"\0\0" if name.endswith("bias") else b"\x80\x3f") * shape[0])
            while content:  # one call writes 2 GiB at most
                content = content[opened.write(content) :]
