"""How fast the service answers 1, 4, 16 and 64 users, beside one request at a time.

    python benchmarks/serving.py --output FILE [--checkpoint DIR] [--users 1 4 16 64] [--rows 8]

Each user asks one question after the other about a picture, streamed, over HTTP with the official
openai client, in a thread of this process, whose time is part of what is measured. All answers have
one length.
Without --checkpoint it is the full-size model with random weights on the first GPU, which asks
through the miniature's tokenizer. "one by one" is the same service with a single row.
"""

import argparse
import base64
import io
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import torch
from memory import provenance
from PIL import Image

from glm4v_nb.inference import load
from glm4v_nb.miniature import CHECKPOINT
from glm4v_nb.model import GLM4VConfig, GLM4VForConditionalGeneration, official_config
from glm4v_nb.model.image_processing import GLM4VImageProcessor
from glm4v_nb.model.processing import GLM4VProcessor
from glm4v_nb.serving.command import running
from glm4v_nb.serving.options import Options
from simgpu.fitting import DTYPES


def main(arguments: list[str] | None = None):
    """Measure every number of users with all rows and with one; write after each what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True)
    parser.add_argument("--checkpoint", help="a folder; random weights at full size without it")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--users", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--rows", type=int, default=8, help="requests that share a step")
    parser.add_argument("--decoding", choices=("eager", "fast"), default="eager")
    parser.add_argument("--questions", type=int, default=3, help="of each user")
    parser.add_argument("--new-tokens", type=int, default=128)
    given = parser.parse_args(arguments)
    if given.checkpoint:
        model, processor = load(given.checkpoint, dtype=DTYPES[given.dtype])
    else:
        model, processor = random_model(DTYPES[given.dtype])
    results = {"provenance": provenance(), "decoding": given.decoding, "rows": []}
    results["provenance"] |= {"threads": torch.get_num_threads(), "dtype": given.dtype}
    results["provenance"]["weights"] = given.checkpoint and Path(given.checkpoint).name or "random"
    results["provenance"].pop("cap")  # there is none here
    model.generation_config.eos_token_id = []  # answers end by their length
    for rows in (given.rows, 1):
        options = Options("model", port=0, rows=rows, queue=256, decoding=given.decoding)
        with running(options, model, processor) as (service, address):
            capacity = service.engine.cache.capacity
            ask(address, 1, 1, given.new_tokens)  # kernels are loaded, tiles are chosen
            for users in given.users:
                found = ask(address, users, given.questions, given.new_tokens)
                method = "one by one" if rows == 1 else f"{rows} rows"
                found = {"method": method, "users": users, "capacity": capacity, **found}
                results["rows"].append(found)
                print(json.dumps(found), flush=True)
                text = json.dumps(results, indent=1) + "\n"
                Path(given.output).write_text(text, encoding="utf-8")


def random_model(dtype: torch.dtype):
    """The full-size model on the first GPU, with the ids of the miniature's tokenizer."""
    ids = ("boi_token_id", "eoi_token_id", "pad_token_id", "eos_token_id")
    small, config = GLM4VConfig.from_pretrained(CHECKPOINT), official_config().to_dict()
    config = GLM4VConfig.from_dict(config | {name: getattr(small, name) for name in ids})
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = GLM4VForConditionalGeneration(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    tokenizer = GLM4VProcessor.from_pretrained(CHECKPOINT).tokenizer
    # Of other tokens there would be no text; a head of full size is read all the same.
    model.lm_head.weight[len(tokenizer) :] = 0
    tokenizer.image_size = config.vision_config.image_size
    return model, GLM4VProcessor(GLM4VImageProcessor(tokenizer.image_size), tokenizer)


def ask(address: str, users: int, questions: int, new_tokens: int) -> dict:
    """All users at once: tokens a second together, and seconds to a user's first words."""
    file = io.BytesIO()
    Image.effect_noise((640, 480), 50).convert("RGB").save(file, "JPEG")
    url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    parts.append({"type": "text", "text": "What is in the picture?"})
    asked = {"model": "model", "messages": [{"role": "user", "content": parts}]}
    asked |= {"max_tokens": new_tokens, "stream": True, "stream_options": {"include_usage": True}}

    def one_user(_):
        with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
            return [one_answer(client) for _ in range(questions)]

    def one_answer(client):
        begin, first, tokens = time.perf_counter(), None, 0
        for chunk in client.chat.completions.create(**asked):
            if first is None and chunk.choices and chunk.choices[0].delta.content:
                first = time.perf_counter() - begin
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        return first, tokens

    begin = time.perf_counter()
    with ThreadPoolExecutor(users) as pool:
        answers = [answer for user in pool.map(one_user, range(users)) for answer in user]
    seconds = time.perf_counter() - begin
    firsts = sorted(first for first, _ in answers if first is not None)
    tokens = sum(count for _, count in answers)
    return {
        "answers": len(answers),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "first_token_seconds_median": statistics.median(firsts),
        "first_token_seconds_most": firsts[-1],
    }


if __name__ == "__main__":
    main()
