"""How long the simulator takes for the full-size model on two L4, and how much memory: run it on an
idle machine.

    python benchmarks/simulator.py [--json]

Times are seconds of wall clock after import; the limits are what the project promises on two cores.
"""

import argparse
import json
import platform
import resource
import time

started = time.perf_counter()

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import glm4v_nb  # noqa: E402, F401
from glm4v_nb.workload import Workload, decode, make_prompt, prefill  # noqa: E402
from simgpu import Rig  # noqa: E402

LIMITS = {"load_and_prefill_seconds": 4.0, "with_32_tokens_seconds": 5.0, "resident_megabytes": 600}


def measure() -> dict:
    """Load, one prefill with an image, 32 new tokens, then a second answer of 1,000; seconds since
    the load began."""
    figures = {"import_seconds": time.perf_counter() - started}
    begin = time.perf_counter()
    rig = Rig("L4", 2)
    with rig:
        model = AutoModelForCausalLM.from_pretrained(
            "zai-org/glm-4v-9b", device_map="auto", dtype=torch.bfloat16, trust_remote_code=False
        )
        figures["load_seconds"] = time.perf_counter() - begin
        prompt = make_prompt(model, Workload(images=1, text_tokens=32))
        outputs = prefill(model, prompt)
        figures["load_and_prefill_seconds"] = time.perf_counter() - begin
        decode(rig, model, prompt, outputs, 32)
        figures["with_32_tokens_seconds"] = time.perf_counter() - begin
        outputs = prefill(model, prompt)
        begin_answer = time.perf_counter()
        decode(rig, model, prompt, outputs, 1000)
        figures["decode_1000_tokens_seconds"] = time.perf_counter() - begin_answer
    # Linux reports kilobytes, macOS bytes.
    unit = 1e6 if platform.system() == "Darwin" else 1e3
    figures["resident_megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return {name: round(value, 2) for name, value in figures.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    figures = measure()
    if arguments.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        limit = f"  (limit {LIMITS[name]:g})" if name in LIMITS else ""
        print(f"{name:26s} {value:8.2f}{limit}")


if __name__ == "__main__":
    main()
