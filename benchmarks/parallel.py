"""Two cards at one layer, beside the same two by layers: speed, parity, memory, loading.

    python benchmarks/parallel.py --output FILE [--parts one ranks ...] [--scratch DIR]

At full size with random weights, written once into DIR (28 GB, and 19 GB for transformers' own
tensor parallel: /dev/shm holds them in memory). Each part is one or two processes of its own; see
PARTS. The limit of every row is that of all cards together: what copies on all of them move in a
second, read and written, over the bytes that a token needs.
"""

import argparse
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import decoding
import torch
from memory import provenance
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, GlmForCausalLM, StoppingCriteriaList

from glm4v_nb.fit import fit
from glm4v_nb.inference import load, set_decoding, step
from glm4v_nb.inference.decoding import arguments
from glm4v_nb.inference.fast import FastDecoder
from glm4v_nb.inference.tiles import FIRST_TILE
from glm4v_nb.miniature import CHECKPOINT
from glm4v_nb.model import GLM4VForConditionalGeneration, official_config
from glm4v_nb.model.configuration import OFFICIAL
from glm4v_nb.parallel import Ranks, load_rank
from glm4v_nb.workload import Workload, make_prompt

SHORT, LONG, TOKENS = decoding.SHORT, decoding.LONG, 4
SIZES = ((1, SHORT), (1, LONG))  # batch, context
# One image, and an answer: its memory is compared with that of ``fit``, its tokens with one card's.
ASKED = Workload(images=1, text_tokens=98, new_tokens=64)
PROGRAM = Path(__file__)


def main():
    """Measure the parts asked for, each in its processes, and put together what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm/glm4v-parallel"))
    parser.add_argument("--count", type=int, default=2, help="of ranks")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--layers", type=int, help="so few, and any tiles: to try the program")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # in one of its processes
    given = parser.parse_args()
    if given.layers:
        decoding.official_config, step.best_tile = partial(_config, given), _any_tile
    if given.part:
        PARTS[given.part][0](given)
        return
    import triton

    given.scratch.mkdir(parents=True, exist_ok=True)
    results = {"provenance": {**provenance(), "triton": triton.__version__}, "rows": []}
    results["provenance"].pop("cap")  # there is none here
    results["provenance"]["weights"] = "random"
    cards = next(iter(results["provenance"]["cards"]))
    begun = {"predict": _begin("predict", given, cards)} if "predict" in given.parts else {}
    for part in sorted(given.parts, key=list(PARTS).index):
        begin = time.perf_counter()
        process = begun.get(part) or _begin(part, given, cards)
        said = process.communicate()[1]
        seconds = time.perf_counter() - begin
        print(f"{part}: {seconds:.0f} s, ended with {process.returncode}", flush=True)
        if part == "loss":
            results["loss"] = _what_a_loss_said(given, process.returncode, said, time.time())
            print(results["loss"], flush=True)
        for file in given.scratch.glob(f"{part}.json"):
            found = json.loads(file.read_text())
            results["rows"] += found.pop("rows", [])
            results |= found
        given.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _begin(part: str, given, card: str) -> subprocess.Popen:
    """The processes of a part; that which needs no card has none."""
    command, environment = [sys.executable, "-u"], dict(os.environ)
    if part == "predict":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "PREDICTED_CARD": card.split()[1]}
    if PARTS[part][1]:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", given.count]
        command += ["--master-port", os.environ.get("PARALLEL_PORT", "29613")]
    command += [PROGRAM, "--part", part, "--output", given.output, "--scratch", given.scratch]
    command += ["--count", given.count]
    command += ["--layers", given.layers] if given.layers else []
    said = subprocess.PIPE if part == "loss" else None
    return subprocess.Popen(list(map(str, command)), stderr=said, text=True, env=environment)


def _config(given):
    config = official_config()
    if given.layers:
        sizes = config.to_dict()
        sizes["num_layers"] = sizes["vision_config"]["num_hidden_layers"] = given.layers
        config = type(config).from_dict(sizes)
    return config


def limit(given):
    """What all cards copy, one after the other, and what a token needs."""
    copied = []
    for card in range(given.count):
        with torch.cuda.device(card):
            copied.append(decoding.measure_limit()["copy_bytes_per_second"])
    with torch.device("meta"):
        model = GLM4VForConditionalGeneration(_config(given)).bfloat16()
    found = {"copy_bytes_per_second": sum(copied), "of_each_card": copied}
    _keep(given, "limit", {"limit": found, "bytes": decoding.bytes_of(model)})


def one(given):
    """One process that has all cards: the weights are written, one card answers and gives the
    right logits, loads, and shares its layers with the others."""
    results = {"rows": []} | _limit(given)
    model = decoding.random_model()
    keep = partial(_keep, given, "one", results)
    if not list((given.scratch / "whole").glob("*.safetensors")):
        model.save_pretrained(given.scratch / "whole", max_shard_size="2GB")
    answered = {"answer": _answer(model, "fast")}
    answered |= _right_logits(model)
    save_file(answered, given.scratch / "one.safetensors")
    _by_layers(model, results)
    keep()
    del model
    gc.collect()
    torch.cuda.empty_cache()
    begin = time.perf_counter()
    GLM4VForConditionalGeneration.from_pretrained(
        given.scratch / "whole", dtype=torch.bfloat16, device_map={"": 0}
    )
    torch.cuda.synchronize()
    results["load_seconds_of_one_card"] = time.perf_counter() - begin
    keep()


def _answer(model, how: str) -> torch.Tensor:
    """The new tokens for an image, greedily; memory's peaks are of it."""
    set_decoding(model, how)
    prompt = make_prompt(model, ASKED)
    # What an image takes in the prompt is written as padding, and is none.
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    length = prompt["input_ids"].shape[1]
    options = {"max_new_tokens": ASKED.new_tokens, "do_sample": False}
    ids = model.generate(**prompt, **options, **arguments(model, None))
    return ids[0, length:].cpu()


def _some_ids() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 100_000, (SHORT + TOKENS,), generator=generator).cuda()
    return ids[None, :SHORT], ids[SHORT:]


@torch.no_grad()
def _right_logits(model) -> dict[str, torch.Tensor]:
    """Of some tokens behind one prompt: by float32, and by bfloat16 as the model itself has it."""
    found = {}
    ids, tokens = _some_ids()
    for name in ("bfloat16", "float32"):
        if name == "float32":
            for part in (model.language_model, model.lm_head):
                part.float()
        cache = DynamicCache()
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        logits = []
        for token in tokens:
            position = torch.full((1, 1), SHORT, device="cuda")
            at = {"input_ids": token.view(1, 1), "position_ids": position}
            logits.append(model(**at, past_key_values=cache).logits[0, -1].float().cpu())
            cache.crop(SHORT)
        found[name] = torch.stack(logits)
    for part in (model.language_model, model.lm_head):
        part.bfloat16()
    return found


@torch.no_grad()
def _fused_logits(model) -> torch.Tensor:
    """Of the same tokens, by fused steps."""
    decoder = FastDecoder()
    cache = decoder.prepare(model, 1, SHORT + 100)
    ids, tokens = _some_ids()
    model(input_ids=ids, past_key_values=cache.empty(), logits_to_keep=1)
    (fused,), logits = decoder._steps.values(), []
    for token in tokens:
        fused.tokens.copy_(token[None])
        fused.place([SHORT], [SHORT], [0], [0])
        fused()
        logits.append(fused.logits[0].float().cpu())
    return torch.stack(logits)


def _by_layers(model, results):
    """The layers in equal parts on all cards."""
    from accelerate import dispatch_model

    count, layers = torch.cuda.device_count(), len(model.language_model.layers)
    place = {"vision_tower": 0, "language_model.embed_tokens": 0, "language_model.rotary_emb": 0}
    for index in range(layers):
        place[f"language_model.layers.{index}"] = index * count // layers
    dispatch_model(model, place | {"language_model.norm": count - 1, "lm_head": count - 1})
    for rung, new_tokens in (("fast", 64), ("eager", 24)):
        set_decoding(model, rung)
        decoding.answer_speed(model, 1, SHORT, new_tokens)
        measured = decoding.answer_speed(model, 1, SHORT, new_tokens)
        _row(results, f"device_map {rung}", 1, SHORT, **measured)
    set_decoding(model, "eager")


def ranks(given):
    """A process for each card: loading, memory, answers, speed."""
    mine = Ranks.started()
    mine.join()
    config = _config(given)
    mine.numbers(0)
    begin = time.perf_counter()
    model = load_rank(given.scratch / "whole", config, mine, torch.bfloat16)
    torch.cuda.synchronize()
    seconds = _seconds_of_all(mine, time.perf_counter() - begin)
    model.generation_config.eos_token_id = None
    results = {"load_seconds_of_ranks": seconds, "rows": []}
    results |= _limit(given)
    keep = partial(_keep, given, "ranks", results, mine.rank == 0)
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    free = torch.cuda.mem_get_info()[0]
    answer = _answer(model, "fast")
    figures = {
        "weights_allocated_bytes": before[0],
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "taken_beside_the_allocator_bytes": free
        - torch.cuda.mem_get_info()[0]
        - (torch.cuda.memory_reserved() - before[1]),
    }
    results["memory_of_ranks"] = [
        dict(zip(figures, each, strict=True))
        for each in zip(*(mine.numbers(one) for one in figures.values()), strict=True)
    ]
    recorded = load_file(given.scratch / "one.safetensors")
    same = (answer == recorded["answer"]).int().cumprod(0).sum().item()
    results["answers"] = {
        "new_tokens": len(answer),
        "first_that_are_as_one_cards": mine.numbers(same),
        "ranks_agree": len(set(mine.numbers(int(answer.sum())))) == 1,
    }
    fused, right = _fused_logits(model), recorded["float32"]
    distances = {
        name: ((each - right).norm(dim=1) / right.norm(dim=1)).mean().item()
        for name, each in (("tensor_parallel", fused), ("bfloat16", recorded["bfloat16"]))
    }
    same = (fused.argmax(1) == right.argmax(1)).sum().item()
    results["distance_from_float32"] = distances | {"same_tokens": same, "tokens": TOKENS}
    keep()
    decoder = FastDecoder()
    for batch, context in SIZES:
        decoder.prepare(model, batch, context + 100)
        fused_step = decoder._steps[batch]
        fused_step.place([context] * batch, [context] * batch, [0] * batch, list(range(batch)))
        seconds = max(_seconds_of_all(mine, decoding.median_seconds(fused_step, times=40)))
        _row(results, "tensor step", batch, context, batch / seconds)
    tiles = fused_step.parts[0].tiles
    results["tiles"] = {name: str(tile) for name, tile in tiles.items()}
    keep()
    decoder.release()
    for rung, sizes, new_tokens in (("fast", SIZES, 64), ("eager", ((1, SHORT),), 24)):
        set_decoding(model, rung)
        for batch, context in sizes:
            decoding.answer_speed(model, batch, context, new_tokens)
            measured = decoding.answer_speed(model, batch, context, new_tokens)
            speed = min(mine.numbers(int(1e3 * measured.pop("tokens_per_second")))) / 1e3
            _row(results, f"tensor {rung}", batch, context, speed, **measured)
            keep()


def small(given):
    """Questions to the miniature: answers of the ranks beside those of the first card alone, with
    prompt lookup, so that some steps have one row and some have eight."""
    import numpy as np

    from tools.miniature.evaluate import HELD_OUT_SEED, held_out_question

    step.best_tile = _any_tile
    model, processor = load(CHECKPOINT, decoding="lookup", parallel="tensor")
    rng = np.random.default_rng([HELD_OUT_SEED, HELD_OUT_SEED])
    asked = [held_out_question(rng)[:2] for _ in range(30)]

    @torch.inference_mode()
    def answers(model) -> list[list[int]]:
        found = []
        for question in asked:
            inputs = processor(*([each] for each in question)).to("cuda")
            options = {"max_new_tokens": 72, "do_sample": False, **arguments(model, None)}
            found.append(model.generate(**inputs, **options)[0].tolist())
        return found

    shared = answers(model)
    if model.ranks.rank == 0:
        alone = answers(load(CHECKPOINT, decoding="lookup", device_map={"": 0})[0])
        differ = sum(one != other for one, other in zip(shared, alone, strict=True))
        _keep(given, "small", {"miniature": {"questions": len(asked), "differ": differ}})


def _any_tile(name, one_row, *_):
    """Of the miniature, whose speed is not measured."""
    return FIRST_TILE[one_row]


def peer(given):
    """transformers' own tensor parallel: the decoder alone, eager, by its plan for such models."""
    directory = given.scratch / "decoder"
    mine = Ranks.started()
    mine.join()
    if mine.rank == 0 and not list(directory.glob("*.safetensors")):
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            whole = GlmForCausalLM(_config(given).text_config)
        torch.set_default_dtype(torch.float32)
        whole.save_pretrained(directory, max_shard_size="2GB")
        del whole
        gc.collect()
        torch.cuda.empty_cache()
    mine.numbers(0)
    model = GlmForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, tp_plan="auto").eval()
    ids = torch.randint(1000, 100_000, (1, SHORT - 12), generator=torch.Generator().manual_seed(0))
    speeds = []
    for _ in range(2):
        clock = decoding.Clock()
        options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
        model.generate(
            ids.cuda(), **options, pad_token_id=0, stopping_criteria=StoppingCriteriaList([clock])
        )
        speeds.append(23 / (clock.times[-1] - clock.times[0]))
    results = {"rows": []} | _limit(given)
    speed = min(mine.numbers(int(1e3 * speeds[-1]))) / 1e3
    _row(results, "tensor transformers", 1, SHORT, speed)
    _keep(given, "peer", results, mine.rank == 0)


def loss(given):
    """The last rank is killed while the others decode."""
    step.best_tile = _any_tile
    model, _ = load(CHECKPOINT, decoding="fast", parallel="tensor")
    model.generation_config.eos_token_id = None
    mine, number = model.ranks, 0
    prompt = make_prompt(model, Workload(images=0, text_tokens=32))

    class Death(decoding.Clock):
        def __call__(self, *given_tokens, **others):
            nonlocal number
            number += 1
            if number == 50 and mine.rank == mine.count - 1:
                (given.scratch / "killed").write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(*given_tokens, **others)

    model.generate(
        **prompt, max_new_tokens=150, do_sample=False, **arguments(model, None),
        stopping_criteria=StoppingCriteriaList([Death()]),
    )  # fmt: skip


def _what_a_loss_said(given, returncode: int, said: str, now: float) -> dict:
    lines = [line for line in said.splitlines() if re.search(r"RankLost|error:|failed", line)]
    killed = float((given.scratch / "killed").read_text())
    return {"seconds_to_the_end": now - killed, "returncode": returncode, "lines": lines}


def predict(given):
    """What ``fit`` says of every rank, on simulated cards of this kind, with these versions."""
    found = fit(
        os.environ["PREDICTED_CARD"],
        given.count,
        parallel="tensor",
        workload=ASKED,
        decoding="fast",
        checkpoint=_config(given) if given.layers else OFFICIAL,
    )
    figures = ("weights_bytes", "peak_allocated_bytes", "peak_reserved_bytes")
    predicted = [{name: getattr(each, name) for name in figures} for each in found.devices]
    _keep(given, "predict", {"predicted_of_ranks": predicted, "verdict": found.verdict})


def _seconds_of_all(mine: Ranks, seconds: float) -> list[float]:
    return [each / 1e9 for each in mine.numbers(int(seconds * 1e9))]


def _limit(given) -> dict:
    return json.loads((given.scratch / "limit.json").read_text())


def _row(results, rung: str, batch: int, context: int, tokens_per_second: float, **more):
    """Add a row; its limit is of all cards together, also where they take turns."""
    sizes, most = results["bytes"], results["limit"]
    needed = sizes["weights"] + batch * context * sizes["cache_per_position"]
    cards, most = len(most["of_each_card"]), batch * most["copy_bytes_per_second"] / needed
    row = {"rung": rung, "cards": cards, "batch": batch, "context": context}
    row |= {"tokens_per_second": tokens_per_second, "share_of_limit": tokens_per_second / most}
    results["rows"].append(row | more)
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(results["rows"][-1]), flush=True)


def _keep(given, part: str, results: dict, wanted: bool = True):
    if wanted:
        (given.scratch / f"{part}.json").write_text(json.dumps(results))
        print(json.dumps({name: each for name, each in results.items() if name != "rows"}))


# What is run, and whether it is by torchrun.
PARTS = {
    "limit": (limit, False),
    "one": (one, False),
    "ranks": (ranks, True),
    "small": (small, True),
    "loss": (loss, True),
    "peer": (peer, True),
    "predict": (predict, False),
}

if __name__ == "__main__":
    main()
