"""How fast answers come, rung by rung, beside what the card's memory allows: on real GPUs.

    python benchmarks/decoding.py --output FILE [--parts steps peers two ...] [--checkpoint DIR]

``simulate`` runs the part memory again, on a simulated card.

Everything in one run on one machine, at full size with random weights. A decode step must read all
weights of decoder and head, and the cache: the limit is these bytes by the bandwidth that a copy
reaches in the same run (bytes read and written). Rows of "step" time the step alone by the card's
clock; all others are answers of ``generate``, from the first token to the last, by the clock of
the computer. Parts: see PARTS.
"""

import argparse
import contextlib
import copy
import gc
import json
import statistics
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from memory import provenance
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, StaticCache, StoppingCriteria, StoppingCriteriaList

from glm4v_nb.inference import set_decoding
from glm4v_nb.inference.decoding import arguments as decoding_arguments
from glm4v_nb.inference.fast import MOST_ROWS, FastDecoder
from glm4v_nb.model import GLM4VForConditionalGeneration, official_config
from glm4v_nb.workload import Workload, make_prompt, prefill
from simgpu import Rig

SHORT, LONG = 1700, 8000
NEW_TOKENS = 64
SIZES = ((1, SHORT), (1, LONG), (4, SHORT))  # batch, context
# Batch, images, text tokens, new tokens.
MEMORY_CASES = ((1, 0, SHORT, 8), (1, 0, LONG, 8), (1, 1, 98, 64), (2, 1, 98, 8), (4, 0, SHORT, 8),
                (8, 0, 500, 64))  # fmt: skip


def main():
    """Measure the parts asked for, and write after each what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--questions", type=int, default=2000, help="for the part miniature")
    parser.add_argument("--checkpoint", help="for the part load; written where it is missing")
    given = parser.parse_args()
    import triton

    results = {"provenance": {**provenance(), "triton": triton.__version__}, "rows": []}
    results["provenance"].pop("cap")  # there is none here
    results["provenance"]["weights"] = "random"
    results["limit"] = limit = measure_limit()
    print(json.dumps(limit), flush=True)
    model = random_model()
    results["bytes"] = bytes_of(model)
    for part in given.parts:
        begin = time.perf_counter()
        try:
            PARTS[part](model, results, given)
        except Exception:
            results.setdefault("failed", {})[part] = traceback.format_exc(limit=-3)
            traceback.print_exc(limit=-6)
        seconds = time.perf_counter() - begin
        print(f"{part}: {seconds:.0f} s", flush=True)
        Path(given.output).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def measure_limit() -> dict:
    """Bytes a second of a copy, read and written, and operations a second of a product."""
    source = torch.empty(4 * 2**30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / median_seconds(partial(target.copy_, source))
    del source, target
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = 2 * 8192**3 / median_seconds(lambda: left @ right)
    return {"copy_bytes_per_second": copied, "bfloat16_operations_per_second": product}


def median_seconds(run, times: int = 20, warm: int = 3) -> float:
    """By the card's clock."""
    for _ in range(warm):
        run()
    measured = []
    for _ in range(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        measured.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(measured)


def random_model():
    """The full-size model in bfloat16, on the first GPU; it never ends an answer by itself."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = GLM4VForConditionalGeneration(official_config()).eval()
    torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    return model.requires_grad_(False)


def bytes_of(model) -> dict:
    """What a token must read: weights once a step, keys and values once for every position."""
    config = model.config.text_config
    weights = sum(one.nbytes for one in model.language_model.layers.parameters())
    per_position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    return {"weights": weights + model.lm_head.weight.nbytes, "cache_per_position": per_position}


def row(results, rung: str, batch: int, context: int, tokens_per_second: float, cards=1, **more):
    """Add a row; its limit is of one card, whose memory a step reads after the other's."""
    sizes = results["bytes"]
    step = sizes["weights"] + batch * context * sizes["cache_per_position"]
    limit = batch * results["limit"]["copy_bytes_per_second"] / step
    new = {"rung": rung, "cards": cards, "batch": batch, "context": context}
    new |= {"tokens_per_second": tokens_per_second, "share_of_limit": tokens_per_second / limit}
    results["rows"].append(new | more)
    print(json.dumps(results["rows"][-1]), flush=True)


def steps(model, results, given):
    """The step alone, for one row and more, short and long."""
    decoder = FastDecoder()
    plan = [(1, SHORT), (1, LONG), (2, SHORT), (4, SHORT), (8, SHORT), (4, LONG)]
    for batch, context in plan:
        step_row(decoder, model, results, "step", batch, context)
    decoder.prepare(model, 1, SHORT + 100, (1, MOST_ROWS))
    slots = list(range(SHORT, SHORT + MOST_ROWS))
    step = decoder._steps[MOST_ROWS]
    step.place(slots, slots, [0] * MOST_ROWS, [0] * MOST_ROWS)
    seconds = median_seconds(step, times=4, warm=1)
    results["verify_step_seconds"] = seconds
    print("verify", seconds, flush=True)
    results["tiles"] = {
        f"{count} rows": {name: str(tile) for name, tile in one.parts[0].tiles.items()}
        for count, one in decoder._steps.items()
    }


def step_row(decoder, model, results, rung: str, batch: int, context: int):
    """Add a row of a fused step, by the card's clock; returns the step."""
    begin = time.perf_counter()
    decoder.prepare(model, batch, context + 100)
    prepared = time.perf_counter() - begin
    step = decoder._steps[batch]
    step.place([context] * batch, [context] * batch, [0] * batch, list(range(batch)))
    seconds = median_seconds(step, times=40)
    row(results, rung, batch, context, batch / seconds, prepare_seconds=prepared)
    return step


class Clock(StoppingCriteria):
    """When each token was there."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.is_cuda:  # fused kernels' tokens are here already, with the next on their way
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def answer_speed(model, batch: int, context: int, new_tokens: int = NEW_TOKENS) -> dict:
    """Tokens a second of all prompts after the first, and seconds to the first."""
    prompt = make_prompt(model, Workload(batch, images=0, text_tokens=context - new_tokens // 2))
    prompt.pop("image_mask")
    clock = Clock()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    model.generate(
        **prompt, max_new_tokens=new_tokens, do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]), **decoding_arguments(model, None),
    )  # fmt: skip
    speed = batch * (len(clock.times) - 1) / (clock.times[-1] - clock.times[0])
    return {"tokens_per_second": speed, "first_token_seconds": clock.times[0] - begin}


def answers(model, results, given, rungs=("eager", "fast"), sizes=SIZES, cards=1):
    """``generate`` with each rung; the first answer of each builds what it needs."""
    for rung in rungs:
        set_decoding(model, rung)
        for batch, context in sizes:
            begin = time.perf_counter()
            answer_speed(model, batch, context)
            built = time.perf_counter() - begin
            measured = answer_speed(model, batch, context)
            speed = measured.pop("tokens_per_second")
            row(results, rung, batch, context, speed, cards, build_seconds=built, **measured)
    set_decoding(model, "eager")


def peers(model, results, given):
    """The rungs of transformers' own between, and the compiled one in a loop by hand."""
    answers(model, results, given, ("static", "compiled"), ((1, SHORT),))
    hand_loop(model, results)


@torch.no_grad()
def hand_loop(model, results):
    """One compiled step in CUDA graphs and a static cache, token after token."""
    config = model.config.get_text_config(decoder=True)
    cache = StaticCache(config=config, max_cache_len=SHORT + 2 * NEW_TOKENS)
    prompt = make_prompt(model, Workload(images=0, text_tokens=SHORT - NEW_TOKENS // 2))
    logits = model(**prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    position, begin = prompt["position_ids"][:, -1:], 0.0
    for number in range(NEW_TOKENS + 8):
        if number == 8:
            torch.cuda.synchronize()
            begin = time.perf_counter()
        token, position = logits[:, -1:].argmax(-1), position + 1
        torch.compiler.cudagraph_mark_step_begin()
        logits = step(
            input_ids=token, position_ids=position, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        ).logits  # fmt: skip
    torch.cuda.synchronize()
    row(results, "hand loop", 1, SHORT, NEW_TOKENS / (time.perf_counter() - begin))


def memory(model, results, given, cases=MEMORY_CASES):
    """What an answer takes at its peak, each case from an emptied cache."""
    for batch, images, text, new in cases:
        set_decoding(model, "fast")
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        prompt = make_prompt(model, Workload(batch, images=images, text_tokens=text))
        # What an image takes in the prompt is written as padding, and is none.
        prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
        how = decoding_arguments(model, None)
        model.generate(**prompt, max_new_tokens=new, do_sample=False, **how)
        del prompt
        case = {"batch": batch, "images": images, "text_tokens": text, "new_tokens": new}
        case |= {"before_allocated_bytes": before[0], "before_reserved_bytes": before[1]}
        case |= {
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
            "after_allocated_bytes": torch.cuda.memory_allocated(),
        }
        results.setdefault("memory", []).append(case)
        print(json.dumps(case), flush=True)
    set_decoding(model, "eager")


def simulate(measured: dict, numbers=slice(None)) -> list[dict]:
    """The records of ``memory`` on a simulated card of the kind that was measured, after what came
    before them on the real one as far as it left something: cached segments for the weights,
    workspaces, weights that are one. ``numbers`` says which of the cases."""
    results = {}
    (card,) = measured["provenance"]["cards"]
    names = ("batch", "images", "text_tokens", "new_tokens")
    cases = [tuple(each[name] for name in names) for each in measured["memory"][numbers]]
    once = mock.patch.dict(globals(), median_seconds=lambda run, **_: (run(), 1.0)[1])
    with Rig.simulated(card, 1, ""), once, contextlib.redirect_stdout(None):
        measure_limit()
        model = random_model()
        cache = FastDecoder().prepare(model, 1, SHORT).empty()
        prefill(model, make_prompt(model, Workload(images=0)), past_key_values=cache)
        del cache
        memory(model, results, None, cases)
    return results["memory"]


def float32_decoder(model):
    """The model with decoder and head copied to float32; the rest is the same."""
    wide = copy.copy(model)
    wide._modules = dict(model._modules)
    for name in ("language_model", "lm_head"):
        wide._modules[name] = copy.deepcopy(model._modules[name]).float()
    return wide


@torch.no_grad()
def accuracy(model, results, given, tokens: int = 8, wide=None):
    """How far a step's logits are from float32, in norm: fused kernels and plain bfloat16.

    ``wide`` is the model whose decoder and head are in float32, by default made of it.
    """
    decoder = FastDecoder()
    cache = decoder.prepare(model, 1, SHORT + 100)
    step = decoder._steps[1]
    ids = torch.randint(1000, 100_000, (1, SHORT), device="cuda")
    filled = cache.empty()
    model(input_ids=ids, past_key_values=filled, use_cache=True, logits_to_keep=1)
    wide = float32_decoder(model) if wide is None else wide

    def plain(chosen, token, dtype):
        pairs = [(key[..., :SHORT, :].to(dtype), value[..., :SHORT, :].to(dtype))
                 for key, value in cache.layers]  # fmt: skip
        own = DynamicCache()
        for index, pair in enumerate(pairs):
            own.update(*pair, index)
        position = torch.full((1, 1), SHORT, device="cuda")
        return chosen(input_ids=token, position_ids=position, past_key_values=own).logits[0, -1]

    found = []
    for token in torch.randint(1000, 100_000, (tokens, 1, 1), device="cuda"):
        right = plain(wide, token, torch.float32)
        bfloat16 = plain(model, token, torch.bfloat16).float()
        step.tokens.copy_(token[0])
        step.place([SHORT], [SHORT], [0], [0])
        step()
        fused = step.logits[0].float()
        same = fused.argmax().item() == right.argmax().item()
        found.append((distance(fused, right), distance(bfloat16, right), same))
    fused, bfloat16, same = (list(each) for each in zip(*found, strict=True))
    results["accuracy"] = {
        "fused_distance_from_float32": statistics.mean(fused),
        "bfloat16_distance_from_float32": statistics.mean(bfloat16),
        "same_token_as_float32": sum(same),
        "tokens": tokens,
    }
    print(json.dumps(results["accuracy"]), flush=True)


def distance(found: torch.Tensor, right: torch.Tensor) -> float:
    """In norm."""
    return ((found.float() - right).norm() / right.norm()).item()


@torch.no_grad()
def prefill_accuracy(model, prompt, decoder, cache) -> dict:
    """How far logits after an image are from float32, in norm: fused kernels, plain bfloat16."""
    fused = decoder.prefill(model, cache, **prompt).logits[0, -1]
    bfloat16 = prefill(model, prompt).logits[0, -1]
    # First the tower, then the decoder: both in float32 beside the model are too much for 80 GB.
    features = copy.deepcopy(model.vision_tower).float()(prompt["pixel_values"])
    wide = float32_decoder(model)
    wide.get_image_features = lambda _: features
    right = prefill(wide, prompt).logits[0, -1]
    return {
        "fused_distance_from_float32": distance(fused, right),
        "bfloat16_distance_from_float32": distance(bfloat16, right),
        "same_token_as_float32": fused.argmax().item() == right.argmax().item(),
    }


@torch.no_grad()
def prompts(model, results, given):
    """Prefill of an image and 98 tokens: seconds, and the share of the product rate; the model's
    own and fast decoding's, by the same operations, those of the model's own."""
    prompt = make_prompt(model, Workload(images=1, text_tokens=98))
    implementation = model.config._attn_implementation
    # The counter does not know grouped queries: it counts what plain attention does.
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        prefill(model, prompt)
    model.set_attn_implementation(implementation)
    operations = counter.get_total_flops()
    rate = results["limit"]["bfloat16_operations_per_second"]
    seconds = median_seconds(lambda: prefill(model, prompt), times=7)
    share = operations / seconds / rate
    results["prefill"] = {"seconds": seconds, "operations": operations, "share_of_product": share}
    decoder = FastDecoder()
    cache = decoder.prepare(model, *prompt["input_ids"].shape)
    seconds = median_seconds(lambda: decoder.prefill(model, cache, **prompt), times=7)
    share = operations / seconds / rate
    results["prefill"] |= {"fast_seconds": seconds, "fast_share_of_product": share}
    results["prefill"] |= prefill_accuracy(model, prompt, decoder, cache)
    decoder.release()
    # Text of the long context, into the model's own cache and into one of a fixed place, and by
    # fast decoding.
    long = make_prompt(model, Workload(images=0, text_tokens=LONG))
    cache = decoder.prepare(model, 1, LONG + 8)
    for name, made in (("growing", DynamicCache), ("fixed", cache.empty)):
        given_cache = (dict(past_key_values=made()) for _ in iter(int, 1))
        results["prefill"][f"long_{name}_cache_seconds"] = median_seconds(
            lambda each=given_cache: model(**long, **next(each), logits_to_keep=1), times=3, warm=1
        )
    results["prefill"]["long_fast_seconds"] = median_seconds(
        lambda: decoder.prefill(model, cache, **long), times=3, warm=1
    )
    print(json.dumps(results["prefill"]), flush=True)


def two(model, results, given):
    """Half of the layers on a second card: hooks of accelerate, and fused kernels."""
    from accelerate import dispatch_model

    place = {"vision_tower": 0, "language_model.embed_tokens": 0, "language_model.rotary_emb": 0}
    place |= {f"language_model.layers.{index}": index // 20 for index in range(40)}
    place |= {"language_model.norm": 1, "lm_head": 1}
    prompt = {"input_ids": torch.arange(1000, 1000 + SHORT, device="cuda")[None]}
    lengths = {"max_new_tokens": 16, "do_sample": False}
    alone = model.generate(**prompt, **lengths, custom_generate=FastDecoder())
    dispatch_model(model, place)
    together = model.generate(**prompt, **lengths, custom_generate=FastDecoder())
    results["two_cards_answer_as_one"] = torch.equal(alone, together)
    print("as one card:", results["two_cards_answer_as_one"], flush=True)
    answers(model, results, given, ("fast",), ((1, SHORT), (1, LONG)), cards=2)
    answers(model, results, given, ("eager",), ((1, SHORT),), cards=2)


def load(model, results, given):
    """Loading a checkpoint beside one plain read into pinned memory with a copy."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(given.checkpoint or scratch)
        if not list(directory.glob("*.safetensors")):
            model.save_pretrained(directory, max_shard_size="2GB")
        model.to("cpu")
        gc.collect()
        torch.cuda.empty_cache()
        files = sorted(directory.glob("*.safetensors"))
        pinned = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
        target = torch.empty(2**28, dtype=torch.uint8, device="cuda")

        def plain() -> float:
            begin = time.perf_counter()
            for file in files:
                with open(file, "rb") as stream:
                    while read := stream.readinto(memoryview(pinned.numpy())):
                        target[:read].copy_(pinned[:read], non_blocking=True)
                        torch.cuda.synchronize()
            return time.perf_counter() - begin

        read = plain()
        begin = time.perf_counter()
        loaded = GLM4VForConditionalGeneration.from_pretrained(
            directory, dtype=torch.bfloat16, device_map={"": 0}
        )
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        read = min(read, plain())
        size = sum(file.stat().st_size for file in files)
        results["load"] = {"seconds": seconds, "plain_read_seconds": read, "bytes": size}
        results["load"]["share_of_plain_read"] = read / seconds
        print(json.dumps(results["load"]), flush=True)
        del loaded
        model.to("cuda")  # for the parts that follow


@torch.inference_mode()
def miniature(model, results, given):
    """The trained miniature's answers, fused beside eager; where they differ, by how much eager
    preferred its own: one step of bfloat16 or none is a tie."""
    import numpy as np

    from glm4v_nb.inference import load as load_checkpoint
    from glm4v_nb.miniature import CHECKPOINT
    from tools.miniature.evaluate import HELD_OUT_SEED, held_out_question

    small, processor = load_checkpoint(CHECKPOINT, device_map={"": 0}, decoding="lookup")
    rng = np.random.default_rng([HELD_OUT_SEED, HELD_OUT_SEED])
    asked = [held_out_question(rng)[:2] for _ in range(given.questions)]

    def answer(some, how) -> tuple[dict, list[list[int]]]:
        inputs = processor(*map(list, zip(*some, strict=True))).to("cuda")
        output = small.generate(**inputs, max_new_tokens=72, do_sample=False, **how)
        return inputs, output[:, inputs["input_ids"].shape[1] :].tolist()

    def gap(some, own: list[int], other: list[int]) -> float:
        at = next(n for n, pair in enumerate(zip(own, other, strict=False)) if len(set(pair)) > 1)
        inputs, _ = answer([some], {})
        before = torch.tensor([own[:at]], device="cuda", dtype=torch.long)
        ids = torch.cat((inputs["input_ids"], before), 1)
        logits = small(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -1]
        return (logits[own[at]] - logits[other[at]]).item() / (logits[own[at]].item() / 128)

    def all_answers(at_a_time: int, how: dict) -> list[list[int]]:
        groups = (asked[start : start + at_a_time] for start in range(0, len(asked), at_a_time))
        return [ids for some in groups for ids in answer(some, how)[1]]

    fused, gaps = {"custom_generate": small.fast_decoder}, []
    pairs = zip(asked, all_answers(64, {}), all_answers(MOST_ROWS, fused), strict=True)
    for one, own, other in pairs:
        width = max(len(own), len(other))
        own, other = (
            each + [small.config.pad_token_id] * (width - len(each)) for each in (own, other)
        )
        if own != other:
            gaps.append(gap(one, own, other))
    steps_taken, tokens, alone = 0, 0, []
    for one in asked[: given.questions // 20]:
        (_, plain), (_, looked) = answer([one], {}), answer([one], fused)
        steps_taken, tokens = steps_taken + small.fast_decoder.steps, tokens + len(looked[0])
        if plain != looked:
            alone.append(gap(one, plain[0], looked[0]))
    results["miniature"] = {
        "questions": len(asked),
        "differ": len(gaps),
        "preferred_by_steps_of_bfloat16": gaps,
        "lookup": {
            "questions": given.questions // 20,
            "differ": len(alone),
            "preferred_by_steps_of_bfloat16": alone,
            "tokens_per_step": tokens / steps_taken,
        },
    }
    print(json.dumps(results["miniature"]), flush=True)


PARTS = {
    "steps": steps,
    "accuracy": accuracy,
    "memory": memory,
    "prompts": prompts,
    "answers": answers,
    "miniature": miniature,
    "peers": peers,
    "two": two,
    "load": load,
}

if __name__ == "__main__":
    main()
