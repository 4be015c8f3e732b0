"""Two cards at one layer, beside the same two by layers: speed, parity, memory, loading.

    python benchmarks/parallel.py --output FILE [--parts limit ranks ...] [--checkpoint DIR]

At full size with random weights, which are written into DIR where it has none (28 GB; /dev/shm
holds them in memory). Each part is a process of its own, or one for each card, and has so many
seconds; what fails is told in the results and the rest goes on. Parts that time nothing run beside
each other: see PARTS. The limit of every row is that of all cards together: what copies on all of
them move in a second, read and written, over the bytes that a token needs.
"""

import argparse
import json
import os
import re
import signal
import time
from functools import partial
from pathlib import Path

import decoding
import memory
import torch
from parts import Part, run_parts
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, GlmForCausalLM, StoppingCriteriaList

from glm4v_nb.fit import fit
from glm4v_nb.inference import load, set_decoding, step
from glm4v_nb.inference.decoding import arguments
from glm4v_nb.inference.fast import FastDecoder
from glm4v_nb.inference.tiles import FIRST_TILE
from glm4v_nb.miniature import CHECKPOINT
from glm4v_nb.model import GLM4VForConditionalGeneration, official_config
from glm4v_nb.parallel import Ranks, load_rank
from glm4v_nb.workload import Workload, make_prompt

SHORT, LONG, TOKENS = decoding.SHORT, decoding.LONG, 4
# One image, and an answer: its memory is compared with that of ``fit``, its tokens with one card's.
ASKED = Workload(images=1, text_tokens=98, new_tokens=64)
PROGRAM, SHARED = Path(__file__), Path("/dev/shm")


def main():
    """Measure the parts asked for, each in its processes, and put together what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--checkpoint", type=Path, default=SHARED / "glm4v-checkpoint")
    parser.add_argument("--scratch", type=Path, default=SHARED / "glm4v-parallel")
    parser.add_argument("--count", type=int, default=2, help="of ranks")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--part", help=argparse.SUPPRESS)  # in one of its processes
    given = parser.parse_args()
    if given.part:
        PARTS[given.part].run(given)
        return
    import triton

    results = {"provenance": {**memory.provenance(), "triton": triton.__version__}, "rows": []}
    results["provenance"].pop("cap")  # there is none here
    results["provenance"]["weights"] = "random"
    card = next(iter(results["provenance"]["cards"])).split()[1]
    on_the_cpu = {"predict": {"CUDA_VISIBLE_DEVICES": "", "PREDICTED_CARD": card}}
    options = ["--output", given.output, "--checkpoint", given.checkpoint]
    options += ["--scratch", given.scratch, "--count", given.count]
    parts = {name: part for name, part in PARTS.items() if name in given.parts}
    for name in run_parts(parts, PROGRAM, options, given.scratch, given.count, on_the_cpu):
        _take(name, given.scratch, results)
        given.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _take(name: str, scratch: Path, results: dict):
    """What a part that has ended has left."""
    log = scratch / f"{name}.log"
    said = log.read_text(errors="replace")
    if (scratch / f"{name}.failed").exists() and name != "loss":
        results.setdefault("failed", {})[name] = said[-3000:]
        print(said[-3000:], flush=True)
    for file in scratch.glob(f"{name}.json"):
        found = json.loads(file.read_text())
        results["rows"] += found.pop("rows", [])
        results |= found
    if name == "loss" and (scratch / "loss.time").exists():
        lines = [line for line in said.splitlines() if re.search("RankLost|error:|failed", line)]
        killed = float((scratch / "loss.time").read_text())
        # The last that torchrun says is said when all have ended.
        results["loss"] = {"seconds_to_the_end": log.stat().st_mtime - killed, "lines": lines}
    files = [scratch / f"{each}.safetensors" for each in ("ranks", "one")]
    if name in ("ranks", "one") and all(file.exists() for file in files):
        results |= _compared(*map(load_file, files))


def _compared(shared: dict, alone: dict) -> dict:
    """How far the ranks' logits, and bfloat16, are from float32; and answers' common beginning."""
    right, answers = alone["float32"], (shared["answer"], alone["answer"])
    logits = {"tensor_parallel": shared["fused"], "one_card": alone["fused"]}
    logits["bfloat16"] = alone["bfloat16"]
    found = {
        name: ((each - right).norm(dim=1) / right.norm(dim=1)).mean().item()
        for name, each in logits.items()
    }
    found["same_tokens"] = (shared["fused"].argmax(1) == right.argmax(1)).sum().item()
    same = torch.eq(*answers).int().cumprod(0).sum().item()
    return {
        "distance_from_float32": found | {"tokens": len(right)},
        "answers": {"new_tokens": len(answers[0]), "first_that_are_as_one_cards": same},
    }


def limit(given):
    """What all cards copy, one after the other, and what a token needs."""
    copied = []
    for card in range(given.count):
        with torch.cuda.device(card):
            copied.append(decoding.measure_limit()["copy_bytes_per_second"])
    with torch.device("meta"):
        model = GLM4VForConditionalGeneration(official_config()).bfloat16()
    found = {"copy_bytes_per_second": sum(copied), "of_each_card": copied}
    _keep(given, "limit", {"limit": found, "bytes": decoding.bytes_of(model)})


def write(given):
    if not list(given.checkpoint.glob("*.safetensors")):
        memory.write_checkpoint(given.checkpoint)


def one(given):
    """One process that has all cards: one of them loads, answers and gives the right logits; then
    it shares its layers with the others."""
    results = {"rows": []} | _limit(given)
    torch.zeros(1, device="cuda")  # which takes a while the first time
    begin = time.perf_counter()
    model = GLM4VForConditionalGeneration.from_pretrained(
        given.checkpoint, dtype=torch.bfloat16, device_map={"": 0}
    )
    torch.cuda.synchronize()
    results["load_seconds_of_one_card"] = time.perf_counter() - begin
    model.eval().requires_grad_(False).generation_config.eos_token_id = None
    _keep(given, "one", results)
    found = {"answer": _answer(model), "fused": _fused_logits(model)} | _right_logits(model)
    save_file(found, given.scratch / "one.safetensors")
    _by_layers(model, results)
    _keep(given, "one", results)


def _answer(model) -> torch.Tensor:
    """The new tokens for an image, greedily; memory's peaks are of it."""
    set_decoding(model, "fast")
    prompt = make_prompt(model, ASKED)
    # What an image takes in the prompt is written as padding, and is none.
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    length = prompt["input_ids"].shape[1]
    options = {"max_new_tokens": ASKED.new_tokens, "do_sample": False}
    ids = model.generate(**prompt, **options, **arguments(model, None))
    set_decoding(model, "eager")
    return ids[0, length:].cpu().clone()


def _some_ids(device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    most = min(100_000, official_config().pad_token_id)
    ids = torch.randint(most // 100, most, (SHORT + TOKENS,), generator=generator).to(device)
    return ids[None, :SHORT], ids[SHORT:]


@torch.no_grad()
def _right_logits(model) -> dict[str, torch.Tensor]:
    """Of some tokens behind one prompt: by float32, and by bfloat16 as the model itself has it."""
    found, parts = {}, (model.language_model, model.lm_head)
    ids, tokens = _some_ids(model.device)
    for name in ("bfloat16", "float32"):
        _convert(parts, getattr(torch, name))
        cache = DynamicCache()
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        logits = []
        for token in tokens:
            position = torch.full((1, 1), SHORT, device=ids.device)
            at = {"input_ids": token.view(1, 1), "position_ids": position}
            logits.append(model(**at, past_key_values=cache).logits[0, -1].float().cpu())
            cache.crop(-1)
        found[name] = torch.stack(logits)
    _convert(parts, torch.bfloat16)
    return found


def _convert(parts, dtype: torch.dtype):
    """Parameters alone: buffers, as the frequencies of positions, would be rounded for good."""
    for one in (each for part in parts for each in part.parameters()):
        one.data = one.data.to(dtype)


@torch.no_grad()
def _fused_logits(model) -> torch.Tensor:
    """Of the same tokens, by fused steps."""
    decoder = FastDecoder()
    cache = decoder.prepare(model, 1, SHORT + 100)
    ids, tokens = _some_ids(model.device)
    model(input_ids=ids, past_key_values=cache.empty(), logits_to_keep=1)
    (fused,), logits = decoder._steps.values(), []
    for token in tokens:
        fused.tokens.copy_(token[None])
        fused.place([SHORT], [SHORT], [0], [0])
        fused()
        logits.append(fused.logits[0].float().cpu().clone())
    return torch.stack(logits)


def _by_layers(model, results):
    """The layers in equal parts on all cards."""
    from accelerate import dispatch_model

    count, layers = torch.cuda.device_count(), len(model.language_model.layers)
    place = {"vision_tower": 0, "language_model.embed_tokens": 0, "language_model.rotary_emb": 0}
    for index in range(layers):
        place[f"language_model.layers.{index}"] = index * count // layers
    dispatch_model(model, place | {"language_model.norm": count - 1, "lm_head": count - 1})
    _answers(model, results, "device_map", ((1, SHORT),), lambda speed: speed)


def _answers(model, results, name: str, sizes, of_all):
    """Rows of ``generate``, fast and eager; ``of_all`` makes of a speed that of all ranks."""
    for rung, new_tokens, asked in (("fast", 64, sizes), ("eager", 24, sizes[:1])):
        set_decoding(model, rung)
        for batch, context in asked:
            decoding.answer_speed(model, batch, context, new_tokens)
            measured = decoding.answer_speed(model, batch, context, new_tokens)
            speed = of_all(measured.pop("tokens_per_second"))
            _row(results, f"{name} {rung}", batch, context, speed, **measured)
    set_decoding(model, "eager")


def ranks(given):
    """A process for each card: loading, memory, answers, speed."""
    mine = Ranks.started()
    mine.join()
    mine.numbers(0)
    begin = time.perf_counter()
    model = load_rank(given.checkpoint, official_config(), mine, torch.bfloat16)
    torch.cuda.synchronize()
    seconds = _of_all(mine, time.perf_counter() - begin)
    model.generation_config.eos_token_id = None
    results = {"load_seconds_of_ranks": seconds, "rows": []} | _limit(given)
    keep = partial(_keep, given, "ranks", results, mine.rank == 0)
    keep()
    weights, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    free = torch.cuda.mem_get_info()[0]
    torch.cuda.reset_peak_memory_stats()
    answer = _answer(model)
    free -= torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - reserved
    figures = {
        "weights_bytes": weights,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "taken_beside_the_allocator_bytes": max(0, free),
    }
    measured = zip(*(mine.numbers(one) for one in figures.values()), strict=True)
    results["memory_of_ranks"] = [dict(zip(figures, each, strict=True)) for each in measured]
    found = {"answer": answer, "fused": _fused_logits(model)}
    results["ranks_answer_alike"] = len(set(mine.numbers(int(answer.sum())))) == 1
    if mine.rank == 0:
        save_file(found, given.scratch / "ranks.safetensors")
    decoder = FastDecoder()
    for context in (SHORT, LONG):
        decoder.prepare(model, 1, context + 100)
        fused = decoder._steps[1]
        fused.place([context], [context], [0], [0])
        seconds = max(_of_all(mine, decoding.median_seconds(fused, times=40)))
        _row(results, "tensor step", 1, context, 1 / seconds)
    results["tiles"] = {name: str(tile) for name, tile in fused.parts[0].tiles.items()}
    results["tiles"]["head"] = str(fused._head_tile)
    keep()
    decoder.release()
    sizes = (1, SHORT), (1, LONG)
    _answers(model, results, "tensor", sizes, lambda speed: min(_of_all(mine, speed)))
    keep()


def small(given):
    """Questions to the miniature: answers of the ranks beside those of the first card alone, with
    prompt lookup, so that some steps have one row and some have eight."""
    import numpy as np

    from tools.miniature.evaluate import HELD_OUT_SEED, held_out_question

    step.best_tile = _any_tile
    model, processor = load(CHECKPOINT, decoding="lookup", parallel="tensor")
    rng = np.random.default_rng([HELD_OUT_SEED, HELD_OUT_SEED])
    asked = [held_out_question(rng)[:2] for _ in range(20)]

    @torch.inference_mode()
    def answers(model) -> list[list[int]]:
        found = []
        for question in asked:
            inputs = processor(*([each] for each in question)).to(model.device)
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
                (given.scratch / "loss.time").write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(*given_tokens, **others)

    model.generate(
        **prompt, max_new_tokens=150, do_sample=False, **arguments(model, None),
        stopping_criteria=StoppingCriteriaList([Death()]),
    )  # fmt: skip


def peer(given):
    """transformers' own tensor parallel: the decoder alone, eager, by its plan for such models."""
    mine = Ranks.started()
    mine.join()
    model = GlmForCausalLM.from_pretrained(
        None, config=official_config().text_config, state_dict={}, dtype=torch.bfloat16,
        tp_plan="auto",
    ).eval()  # fmt: skip
    ids = _some_ids(mine.device)[0][:, : SHORT - 12]
    for _ in range(2):
        clock = decoding.Clock()
        model.generate(
            ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
        )  # fmt: skip
    speed = min(_of_all(mine, 23 / (clock.times[-1] - clock.times[0])))
    results = {"rows": []} | _limit(given)
    _row(results, "tensor transformers", 1, SHORT, speed)
    _keep(given, "peer", results, mine.rank == 0)


def predict(given):
    """What ``fit`` says of every rank, on simulated cards of this kind, with these versions."""
    card = os.environ["PREDICTED_CARD"]
    found = fit(card, given.count, parallel="tensor", workload=ASKED, decoding="fast")
    figures = ("weights_bytes", "peak_allocated_bytes", "peak_reserved_bytes")
    predicted = [{name: getattr(each, name) for name in figures} for each in found.devices]
    _keep(given, "predict", {"predicted_of_ranks": predicted, "verdict": found.verdict})


def _of_all(mine: Ranks, number: float) -> list[float]:
    return [each / 1e9 for each in mine.numbers(int(number * 1e9))]


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
    print(json.dumps(results["rows"][-1]), flush=True)


def _keep(given, part: str, results: dict, wanted: bool = True):
    if wanted:
        (given.scratch / f"{part}.json").write_text(json.dumps(results))


PARTS = {
    "limit": Part(limit, 60),
    "write": Part(write, 90, alone=False),
    "small": Part(small, 90, by_torchrun=True, alone=False),
    "loss": Part(loss, 60, by_torchrun=True, alone=False),
    "predict": Part(predict, 90, alone=False),
    "ranks": Part(ranks, 110, by_torchrun=True),
    "one": Part(one, 110),
    "peer": Part(peer, 60, by_torchrun=True),
}

if __name__ == "__main__":
    main()
