"""What each rank does for tests/glm4v_nb/test_parallel.py; torchrun starts four of it.

Arguments: a folder with ``batch.safetensors`` and "checkpoint", where the results go. All four run
the tiny checkpoint; two of them go on, alone, with the miniature, until one is killed.
"""

import json
import os
import signal
import sys
import time
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from glm4v_nb.cli import main
from glm4v_nb.inference import Sampling, fast, generate, load, stream
from glm4v_nb.miniature import CHECKPOINT, EXAMPLES
from glm4v_nb.model.configuration import read_config
from glm4v_nb.parallel import Ranks, load_rank
from glm4v_nb.parallel.exchange import Exchange

FOLDER, RANK = Path(sys.argv[1]), int(os.environ["RANK"])
PICTURE = EXAMPLES / "five_shapes.png"
QUESTION = "How many crosses are there?"
ASK = ["ask", CHECKPOINT, QUESTION, "--image", PICTURE, "--dtype", "float32"]


def tiny():
    """Logits and new tokens of a padded batch with images and without."""
    ranks, checkpoint = Ranks.started(), FOLDER / "checkpoint"
    ranks.join()
    model = load_rank(checkpoint, read_config(checkpoint), ranks, torch.float32)
    batch = load_file(FOLDER / "batch.safetensors")
    with torch.no_grad():
        logits = model(**batch).logits
    new = model.generate(**batch, max_new_tokens=6, do_sample=False)
    found = {"logits": logits, "new": new}
    if find_spec("triton"):
        decoder = fast.FastDecoder()
        lengths = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        found["fast"] = model.generate(**batch, **lengths, custom_generate=decoder)
        found["steps"] = torch.tensor(decoder.steps)
        with patch.object(Exchange, "of", exchange_in_files):
            decoder = fast.FastDecoder()
            found["exchanged"] = model.generate(**batch, **lengths, custom_generate=decoder)
            (step,) = decoder._steps.values()
            assert step.exchange is not None and not step.exchange.lost
            found["logits of the last step"] = step.logits
    save_file(found, FOLDER / f"{ranks.count}-{RANK}.safetensors")


def exchange_in_files(ranks, *sizes) -> Exchange:
    """As where cards are in reach of each other: the memory of each rank is a file, which all have
    mapped, and the kernels wait for each other."""
    own = Exchange(ranks, *sizes)
    files = [f"{FOLDER}/memory of {rank}, {ranks.count}" for rank in range(ranks.count)]
    memory = [
        torch.from_file(file, shared=True, size=own.bytes, dtype=torch.uint8) for file in files
    ]
    own.meet(memory[ranks.rank], [each.data_ptr() for each in memory])
    own.all = memory
    return own


def miniature() -> dict:
    model, processor = load(CHECKPOINT, dtype=torch.float32, parallel="tensor")
    message = {"role": "user", "image": str(PICTURE), "content": QUESTION}
    asked = (model, processor, [message])
    found = {"answer": generate(*asked).text}
    with stream(*asked) as pieces:
        found["streamed"] = "".join(pieces)
    found["drawn"] = [
        generate(*asked, Sampling(temperature=2.0, seed=seed)).text for seed in (None, 5)
    ]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True
    )
    draw = {"max_new_tokens": 6, "do_sample": True, "temperature": 2.0, "top_k": 0}
    for name, seed in {"unseeded": RANK, "seeded": 7}.items():
        torch.manual_seed(seed)
        found[name] = model.generate(**prompt, **draw)[0].tolist()
    try:
        model.generate(**prompt, max_new_tokens=1 + RANK)
    except ValueError as error:
        found["other lengths"] = str(error)
    model.generation_config.eos_token_id = None
    with stream(*asked, Sampling(max_new_tokens=400)) as pieces:
        next(pieces)
        if RANK == 1:
            pieces.cancel()
        for _ in pieces:
            pass
    found["cancelled"] = [pieces.answer.finish, pieces.answer.new_tokens]
    try:
        generate(model, processor, [message | {"content": f"I am rank {RANK}"}])
    except ValueError as error:
        found["differ"] = str(error)
    return found


torch.set_num_threads(1)
fast.CAPACITY_STEP = 64  # each interpreted program costs milliseconds
tiny()
dist.destroy_process_group()
if RANK > 1:
    sys.exit()
os.environ["WORLD_SIZE"] = "2"
meeting = f"file://{FOLDER}/meeting"  # torchrun's own is for the four
dist.init_process_group("gloo", init_method=meeting, rank=RANK, world_size=2)
tiny()
found = miniature()
with redirect_stdout(StringIO()) as printed:
    assert main(ASK) == 0
(FOLDER / f"{RANK}.json").write_text(json.dumps(found | {"printed": printed.getvalue()}))


def die(*_):
    (FOLDER / "killed").write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)


if RANK == 1:
    Ranks.add_up = die  # while the other one waits for its sum
sys.exit(main(ASK))
