"""What each of two ranks does for tests/glm4v_nb/test_rank_that_fails.py; torchrun starts it.

Arguments: a folder for what each rank has seen, and cases: both ranks fail alike, or the second in
one of several ways. Every case has a process of its own, which ends when both ranks have written.
"""

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from glm4v_nb.inference import generate, load, stream
from glm4v_nb.miniature import CHECKPOINT, EXAMPLES
from glm4v_nb.parallel import Ranks, telling

FOLDER, CASES, RANK = Path(sys.argv[1]), sys.argv[2:], int(os.environ["RANK"])
SECOND = RANK == 1
QUESTION = {"role": "user", "content": "How many crosses are there?"}
ADD_UP, CALLS = Ranks.add_up, []


def out_of_memory_later(ranks, part):
    """In a sum of the first step after the prompt."""
    CALLS.append(part)
    if SECOND and len(CALLS) == 14:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    return ADD_UP(ranks, part)


def waits_for_a_card(ranks, part):
    """As where the waiting is the card's: no error comes of it."""
    if SECOND:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    time.sleep(300)


def load_it(checkpoint=CHECKPOINT):
    return load(checkpoint, dtype=torch.float32, parallel="tensor")


def ask(model, processor, message):
    return generate(model, processor, [message]).text


def run(how) -> str:
    if how == "before joining":
        return str(load_it("no/such" if SECOND else CHECKPOINT))
    if how == "in loading" and SECOND:
        with patch("glm4v_nb.inference.loading.load_rank", side_effect=OSError("a bad disk")):
            load_it()
    loaded = load_it()
    picture = EXAMPLES / "five_shapes.png"
    if how == "unreadable picture":
        message = QUESTION | {"image": str(FOLDER / "none.png" if SECOND else picture)}
        with stream(*loaded, [message]) as pieces:
            return "".join(pieces)
    if how == "out of memory":
        with patch.object(Ranks, "add_up", out_of_memory_later):
            return ask(*loaded, QUESTION)
    if how == "a card that waits":
        with patch.object(Ranks, "add_up", waits_for_a_card):
            return ask(*loaded, QUESTION)
    assert how == "alike"
    time.sleep(RANK)  # one later than the other
    try:
        ask(*loaded, QUESTION | {"image": str(FOLDER / "none.png")})
    except (OSError, ValueError):
        return ask(*loaded, QUESTION)
    return "no error"


def work(how):
    began = time.monotonic()
    try:
        found = {"answer": str(run(how))}
    except Exception as error:
        found = {"error": type(error).__name__, "text": str(error)}
        found["notes"] = getattr(error, "__notes__", [])
    found["seconds"] = time.monotonic() - began
    (FOLDER / f"{how} {RANK}").write_text(json.dumps(found))
    wait_for(FOLDER / f"{how} {1 - RANK}")


def wait_for(file):
    end = time.monotonic() + 30
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.1)


telling.END_SECONDS = 5
torch.set_num_threads(1)
for how in CASES:
    child = os.fork()
    if not child:
        telling._store = partial(dist.PrefixStore, how, telling._store())
        if how != "before joining":  # torchrun's own meeting is for one group
            meeting = f"file://{FOLDER}/{how}"
            dist.init_process_group("gloo", init_method=meeting, rank=RANK, world_size=2)
        sys.stderr = (FOLDER / f"{how} {RANK}.stderr").open("w")
        work(how)
        sys.exit()
    _, status = os.waitpid(child, 0)
    (FOLDER / f"{how} {RANK}.status").write_text(str(os.waitstatus_to_exitcode(status)))
    if not (FOLDER / f"{how} {RANK}").exists():
        (FOLDER / f"{how} {RANK}").write_text("null")
    wait_for(FOLDER / f"{how} {1 - RANK}.status")
