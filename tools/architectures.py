"""Which of transformers' architectures run on simulated cards, beside a control run on this CPU.

    python tools/architectures.py                  # every one; an hour or two
    python tools/architectures.py Llama Whisper    # those with such a name; stores nothing

Each class of the Auto classes below is made from its default configuration, cut to two layers (or
eight, where two do not run), and goes forward, decodes where it keeps a cache, and goes backward:
once on the CPU, which says whether it runs at all, and once on a simulated H200. Each of the two is
a process of its own.

The figures go to benchmarks/results/architectures.json and the list of what is refused to
simgpu/README.md. Exit 1 where fewer than 95 % of those that run on a CPU run or are refused by
name, or where that list is no longer the stored one.
"""

import argparse
import importlib.metadata
import inspect
import json
import os
import re
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "architectures.json"
README = ROOT / "simgpu" / "README.md"
BEGIN, END = "<!-- refused architectures -->\n", "<!-- end -->"
LEAST_SHARE = 0.95
CPU_SECONDS, CPU_BYTES = 90, 12 * 2**30
HEADS = (
    "CausalLM ImageTextToText MaskedLM Seq2SeqLM ImageClassification SpeechSeq2Seq CTC"
    " AudioClassification ObjectDetection SemanticSegmentation DepthEstimation"
    " VideoClassification ZeroShotImageClassification"
).split()
# Most of what a configuration may have of each; by the ends of the names.
LAYERS = r"(^|_)(n|num|encoder|decoder|num_hidden|num_encoder|num_decoder)_layers?$|^depth$"
MOST = {
    r"(num|n)_(local_|routed_)?experts$": 32,
    r"^vocab_size$": 1024,
    r"intermediate_size$|ffn_dim$|ffn_hidden_size$|^d_ff$": 512,
}
# Tried in this order until the control runs: how many layers, and which type. Some have kinds of
# layers of which one comes late only, and some have parts that are float32 whatever is asked for.
TRIES = ((2, "bfloat16"), (2, "float32"), (8, "bfloat16"))
BATCH, LENGTH, ANSWER = 2, 16, 4


def small(config, layers: int):
    """A configuration with so many layers, few words and narrow layers in between."""
    from transformers import PreTrainedConfig

    wanted = {}
    for name, value in vars(config).items():
        for pattern, most in (MOST | {LAYERS: layers}).items():
            if isinstance(value, int) and value > most and re.search(pattern, name):
                wanted[name] = most
        if name == "pad_token_id" and isinstance(value, int) and value >= 1024:
            wanted[name] = 0
        if isinstance(value, PreTrainedConfig):
            wanted[name] = small(value, layers)
    if not wanted:
        return config
    try:
        return type(config)(**wanted)
    except Exception:
        for name, value in wanted.items():
            setattr(config, name, value)
        return config


def inputs(model, device: str) -> dict:
    """What the model's forward asks for, of a small size."""
    import torch

    config, name = model.config, model.main_input_name
    asked_for = inspect.signature(model.forward).parameters
    parts = [config, getattr(config, "vision_config", None), getattr(config, "audio_config", None)]

    def setting(*names, default):
        for part in parts:
            for one in names:
                if (value := getattr(part, one, None)) is not None:
                    return value
        return default

    def of_ids(length=LENGTH):
        return torch.randint(3, 200, (BATCH, length))

    made = {}
    if name == "pixel_values":
        size = setting("image_size", default=224)
        height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
        shape = (BATCH, setting("num_channels", default=3), height, width)
        if "Video" in type(model).__name__:
            shape = (BATCH, setting("num_frames", default=16), *shape[1:])
        made[name] = torch.rand(shape)
    elif name == "pixel_values_videos":
        size = setting("image_size", "crop_size", default=224)
        frames = setting("num_frames", "frames_per_clip", default=16)
        made[name] = torch.rand(1, frames, 3, size, size)
    elif name == "input_features":
        bins = setting("num_mel_bins", "feature_size", "input_feat_per_channel", default=80)
        frames = 2 * setting("max_source_positions", default=100)
        bins_first = config.model_type in ("whisper", "qwen2_audio", "voxtral")
        made[name] = torch.rand((BATCH, bins, frames) if bins_first else (BATCH, 200, bins))
    elif name == "input_values":
        made[name] = torch.rand(BATCH, 16000)
        if config.model_type == "audio-spectrogram-transformer":
            made[name] = torch.rand(BATCH, config.max_length, config.num_mel_bins)
    if not made or "input_ids" in asked_for:
        made["input_ids"] = of_ids()
    if "qformer_input_ids" in asked_for:
        made["qformer_input_ids"] = of_ids()
    if "mm_token_type_ids" in asked_for:
        made["mm_token_type_ids"] = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    if config.is_encoder_decoder and "decoder_input_ids" in asked_for:
        made["decoder_input_ids"] = of_ids(ANSWER)
    return {
        key: (each.to(model.dtype) if each.is_floating_point() else each).to(device)
        for key, each in made.items()
    }


def loss_of(output):
    """A scalar of everything that the model gave and that leads back to its weights."""
    from torch.utils import _pytree

    leaves = _pytree.tree_leaves(dict(output) if hasattr(output, "keys") else output)
    parts = [each for each in leaves if getattr(each, "requires_grad", False)]
    return sum(part.float().mean() for part in parts if part.is_floating_point())


def run(model_class, config, device: str, dtype: str, note):
    """Forward, decode, backward; ``note`` is told which comes next."""
    import torch
    from transformers.initialization import no_init_weights

    note("load")
    dtype = getattr(torch, dtype)
    if device == "cuda":
        model = model_class.from_pretrained(None, config=config, device_map={"": 0}, dtype=dtype)
    else:
        with no_init_weights():
            model = model_class._from_config(config, dtype=dtype)
        for parameter in model.parameters():
            parameter.data.fill_(0.01)
    note("forward")
    model.eval()
    with torch.no_grad():
        given = inputs(model, device)
        output = model(**given)
    cache = getattr(output, "past_key_values", None)
    if cache is not None and "past_key_values" in inspect.signature(model.forward).parameters:
        note("decode")
        answer = "decoder_input_ids" if "decoder_input_ids" in given else "input_ids"
        of_prompt = {answer, "mm_token_type_ids"}
        rest = {name: each for name, each in given.items() if name not in of_prompt}
        one = torch.full((BATCH, 1), 5).to(device)
        with torch.no_grad():
            model(**rest, **{answer: one}, past_key_values=cache, use_cache=True)
    del output, cache
    note("backward")
    model.train()
    loss_of(model(**inputs(model, device))).backward()


def configuration(model_class, config_class, layers: int):
    """The part of the default configuration that is for this class, made small."""
    config = small(config_class(), layers)
    if model_class.config_class is not config_class:
        config = config.get_text_config(decoder=True)
    if "CausalLM" in model_class.__name__ and hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def in_a_child(model_class, config_class, device: str, layers: int, dtype: str):
    """The step that a run did not survive, or "done", and the error; never raises."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        if device == "cpu":
            resource.setrlimit(resource.RLIMIT_AS, (CPU_BYTES, CPU_BYTES))
        signal.alarm(5 * CPU_SECONDS)
        step, error = "configuration", ""

        def note(name):
            nonlocal step
            step = name

        try:
            config = configuration(model_class, config_class, layers)
            if device == "cuda":
                from simgpu import Rig

                with Rig.simulated("H200"):
                    run(model_class, config, device, dtype, note)
            else:
                run(model_class, config, device, dtype, note)
            step = "done"
        except BaseException as problem:
            frames = traceback.extract_tb(problem.__traceback__)
            places = [f"{Path(each.filename).name}:{each.lineno}" for each in frames]
            error = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
            error = f"{error[:600]} [{' '.join(places[-3:])}]"
        os.write(writer, json.dumps([step, error]).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return tuple(json.loads(text)) if text else ("ended", f"by signal {status & 127}")


def classes(names: list[str]) -> dict[str, tuple[type, type]]:
    """Model and configuration by the model's name, each once."""
    import transformers

    found = {}
    for head in HEADS:
        mapping = getattr(transformers, f"AutoModelFor{head}")._model_mapping
        for config_class in mapping:
            models = mapping[config_class]
            for model in models if isinstance(models, tuple) else (models,):
                if not names or any(name.lower() in model.__name__.lower() for name in names):
                    found.setdefault(model.__name__, (model, config_class))
    return found


def judge(control: tuple, simulated: tuple | None) -> tuple[str, str]:
    """ "runs", "refused", "fails", or "no control", and why."""
    if simulated is None:
        return "no control", f"{control[0]}: {control[1]}"
    step, error = simulated
    if step == "done":
        return "runs", ""
    return ("refused" if "simulated" in error else "fails"), f"{step}: {error}"


def share(results: dict) -> float:
    """Of those that run on a CPU, the share that runs or is refused by name."""
    kinds = [kind for kind, _ in results.values() if kind != "no control"]
    return sum(kind in ("runs", "refused") for kind in kinds) / max(1, len(kinds))


def in_readme(results: dict) -> str:
    """What simgpu/README.md says of them."""
    kinds = [kind for kind, _ in results.values()]
    count = {kind: kinds.count(kind) for kind in ("runs", "refused", "fails")}
    text = (
        f"- Of {sum(count.values())} classes of transformers that run on a CPU cut to two layers,"
        f" {count['runs']} run (forward, decode, backward)"
    )
    by_reason: dict[str, list[str]] = {}
    for name, (kind, message) in sorted(results.items()):
        if kind in ("refused", "fails"):
            by_reason.setdefault(reason(kind, message), []).append(name)
    for words, names in by_reason.items():
        text += f"; {words}: {', '.join(names)}"
    return _wrapped(f"{text}.")


def reason(kind: str, message: str) -> str:
    """Why a class does not run, in a few words."""
    if asked := re.search(r"(\S+) needs the numbers", message):
        operator = asked[1].split(".")[1]
        asks = "an `.item()`" if operator == "_local_scalar_dense" else f"`{operator}`"
        return f"refused by name, as {asks} asks for numbers that are not there"
    return f"refused by name ({message[:80]})" if kind == "refused" else "failing, not refused"


def place_in(text: str) -> tuple[int, int]:
    """Where in simgpu/README.md that is."""
    start = text.index(BEGIN) + len(BEGIN)
    return start, text.index(END, start)


def _wrapped(text: str) -> str:
    import textwrap

    return textwrap.fill(text, 100, subsequent_indent="  ", break_long_words=False) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="parts of classes' names; without, every class")
    parser.add_argument("--result", type=Path, default=RESULT, help="where the figures are stored")
    parser.add_argument("--resume", action="store_true", help="keep what the file has already")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from rich.progress import track
    from transformers.utils import logging

    import simgpu.simulated  # noqa: F401  (here once, and not in every process)

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    stored = {}
    if arguments.result.is_file():
        stored = json.loads(arguments.result.read_text(encoding="utf-8"))["results"]
    results = dict(stored) if arguments.resume else {}
    chosen = classes(arguments.names)
    for name in track(chosen, "architectures"):
        if name in results:
            continue
        for attempt in TRIES:
            control = in_a_child(*chosen[name], "cpu", *attempt)
            if control[0] == "done":
                break
        ran = control[0] == "done"
        simulated = in_a_child(*chosen[name], "cuda", *attempt) if ran else None
        results[name] = judge(control, simulated)
        print(name, *results[name], flush=True)
        if not arguments.names:
            write(arguments.result, results)
    found = share(results)
    print(f"{found:.1%} of those that run on a CPU run on simulated cards or are refused by name")
    if arguments.names:
        return 0
    start, end = place_in(text := README.read_text(encoding="utf-8"))
    README.write_text(text[:start] + in_readme(results) + text[end:], encoding="utf-8")
    changed = differences(stored, results)
    for name in changed:
        print(f"{name}: was {stored[name][0]}, is {results[name][0]}")
    return 0 if found >= LEAST_SHARE and not changed else 1


def differences(before: dict, after: dict) -> list[str]:
    """Those that ran before and do not now, or the other way round, where both had a control."""
    common = [name for name in before if name in after]
    return [
        name
        for name in sorted(common)
        if "no control" not in (before[name][0], after[name][0])
        and before[name][0] != after[name][0]
    ]


def write(path: Path, results: dict):
    versions = {
        name: importlib.metadata.version(name).partition("+")[0]
        for name in ("torch", "transformers", "accelerate")
    }
    provenance = versions | {"date": time.strftime("%Y-%m-%d"), "card": "simulated H200"}
    text = json.dumps({"provenance": provenance, "results": results}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
