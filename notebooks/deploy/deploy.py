"""Ask a GLM-4V-9B checkpoint one question; the memory of every stage goes to a log.

python deploy.py FOLDER --image picture.png --question "What is in the picture?"
python deploy.py FOLDER --image known.png --question "How many?" --expect 2
python deploy.py zai-org/glm-4v-9b --simulate L4 --count 2

The last needs no weights and no GPU, and answers nothing: it says what each card would hold. Exit
codes: 0 answered, 1 another answer than --expect, or not deployed.
"""

import argparse
import sys
from pathlib import Path

import psutil
import torch

from glm4v_nb.fit import DTYPES, run_workload
from glm4v_nb.fit import load as load_without_weights
from glm4v_nb.inference import Sampling, generate, load
from glm4v_nb.log import logged_stage
from glm4v_nb.placement import plan_device_map
from glm4v_nb.workload import Workload
from simgpu import Rig


def arguments():
    parser = argparse.ArgumentParser(description="Ask a GLM-4V-9B checkpoint one question.")
    parser.add_argument("checkpoint", help="a folder, or a hub id together with --revision")
    parser.add_argument("--revision", help="commit of the hub repository, 40 digits")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="float16 for a T4")
    parser.add_argument("--room-gib", type=float, default=4, help="kept free on every card")
    parser.add_argument("--image", help="a picture file")
    parser.add_argument("--question", default="Describe the picture.")
    parser.add_argument("--expect", help="text the answer has to contain")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--log", default="stages.jsonl", help="lines are appended")
    parser.add_argument("--simulate", metavar="CARD", help="on simulated cards of this name")
    parser.add_argument("--count", type=int, default=2, help="how many simulated cards")
    options = parser.parse_args()
    if options.image and not Path(options.image).is_file():  # now, not after minutes of loading
        parser.error(f"--image {options.image}: there is no such file")
    return options


def plan(options):
    """A device map that leaves room on every card; ValueError where the weights find none."""
    room = int(options.room_gib * 2**30)
    cards = range(torch.cuda.device_count())
    limits = {card: max(0, torch.cuda.mem_get_info(card)[0] - room) for card in cards}
    limits = limits or {"cpu": psutil.virtual_memory().available}
    placed = plan_device_map("auto", limits, DTYPES[options.dtype], options.checkpoint)
    if "disk" in placed.values():  # what finds no room within the limits
        raise ValueError(f"no room within {limits} bytes. Add a card, or lower --room-gib.")
    return placed


def ask(options, rig, device_map):
    """Load, answer, and say what it took; whether the answer is as expected."""
    with logged_stage(rig, "load", options.log):
        model, processor = load(
            options.checkpoint,
            revision=options.revision,
            dtype=DTYPES[options.dtype],
            device_map=device_map,
        )
    message = {"role": "user", "content": options.question}
    if options.image:
        message["image"] = options.image
    with logged_stage(rig, "answer", options.log):
        sampling = Sampling(max_new_tokens=options.max_new_tokens)
        answer = generate(model, processor, [message], sampling)
    print(answer.text)
    print(f"{answer.finish} after {answer.new_tokens} tokens, {answer.seconds:.1f} s")
    return not options.expect or options.expect in answer.text


def rehearse(options, rig, device_map):
    """As ``ask`` with an image, on tensors without numbers."""
    model = load_without_weights(rig, device_map, DTYPES[options.dtype], options.checkpoint)
    run_workload(rig, model, Workload(text_tokens=64, new_tokens=options.max_new_tokens))
    return True


def deploy(options):
    """Plan, load, ask; returns the exit code, or the sentence that says what is wrong."""
    simulated = options.simulate
    rig = Rig.simulated(simulated, options.count) if simulated else Rig.here()
    with rig:
        device_map = plan(options)
    right = (rehearse if simulated else ask)(options, rig, device_map)
    for memory in rig.memory():
        peak = max(stage.memory[memory.index].peak_allocated_bytes for stage in rig.stages)
        print(f"{memory.card} {memory.index}: peak {peak / 2**30:.2f} GiB")
    print(rig.provenance)
    return 0 if right else f"not the expected answer {options.expect!r}"


def main():
    options = arguments()
    try:
        return deploy(options)
    except torch.OutOfMemoryError as error:
        return f"Out of memory; the log names the stage. {error}"
    except (OSError, ValueError) as error:
        return f"Not deployed: {error}"


if __name__ == "__main__":
    sys.exit(main())
