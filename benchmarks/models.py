"""Peak memory of models and programs the simulator was not made for: on real GPUs, and simulated.

    python benchmarks/models.py measure FILE [NAME ...]  # on this machine's GPUs
    python benchmarks/models.py simulate FILE            # the cases of a file of measurements again
    python benchmarks/models.py list

Every case has a process of its own. Configurations are those of public models; the weights are
files without content, which transformers' own loader reads as zeros, in one thread so that their
order is no race, and random numbers that are then drawn in place. A stage begins with an empty
cache.
"""

import argparse
import gc
import json
import math
import multiprocessing
import os
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn

BF16 = torch.bfloat16
MIB = 2**20
WORDS = 500  # random tokens are below, where no vocabulary has a special one
LANGUAGE_MODELS = {
    "Qwen3-1.7B": (
        "Qwen3Config",
        dict(
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=6144,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
        ),
    ),
    "Gemma-2-2B": (
        "Gemma2Config",
        dict(
            vocab_size=256000,
            hidden_size=2304,
            intermediate_size=9216,
            num_hidden_layers=26,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=256,
            query_pre_attn_scalar=256,
            max_position_embeddings=8192,
        ),
    ),
    "Pythia-1.4B": (
        "GPTNeoXConfig",
        dict(
            vocab_size=50304,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=24,
            num_attention_heads=16,
            max_position_embeddings=2048,
        ),
    ),
    "GPT-2 XL": ("GPT2Config", dict(n_embd=1600, n_layer=48, n_head=25, n_positions=2048)),
    "OPT-1.3B": (
        "OPTConfig",
        dict(hidden_size=2048, ffn_dim=8192, num_hidden_layers=24, num_attention_heads=32),
    ),
    "Phi-3-mini": ("Phi3Config", dict(sliding_window=2047, pad_token_id=32000)),
}
LARGE = {
    "Mistral-7B": (
        "MistralConfig",
        dict(vocab_size=32768, sliding_window=None, max_position_embeddings=32768),
    ),
    "Falcon-7B": (
        "FalconConfig",
        dict(hidden_size=4544, num_hidden_layers=32, num_attention_heads=71, alibi=False),
    ),
    "DeepSeek-V2-Lite": (
        "DeepseekV2Config",
        dict(
            vocab_size=102400,
            hidden_size=2048,
            intermediate_size=10944,
            moe_intermediate_size=1408,
            num_hidden_layers=27,
            num_attention_heads=16,
            num_key_value_heads=16,
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
            kv_lora_rank=512,
            q_lora_rank=None,
            qk_rope_head_dim=64,
            qk_nope_head_dim=128,
            v_head_dim=128,
            first_k_dense_replace=1,
        ),
    ),
}
QWEN_14B = (
    "Qwen2Config",
    dict(
        vocab_size=152064,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
    ),
)


def config_of(kind: str, sizes: dict):
    return getattr(transformers, kind)(**sizes)


def class_of(config, auto: str) -> type:
    """The class of a model's configuration that an Auto class of transformers chooses."""
    return getattr(transformers, auto)._model_mapping[type(config)]


def words(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, WORDS, (rows, columns), generator=generator)


def write_weights(folder: Path, cls, config, dtype: torch.dtype):
    """A safetensors file of the right size in which nothing was ever written."""
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = cls(config)
    tensors = dict(model.state_dict())
    for name in getattr(model, "all_tied_weights_keys", None) or {}:
        tensors.pop(name, None)
    names, header, end = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}, {}, 0
    for name, tensor in revert_weight_conversion(model, tensors).items():
        shape = list(tensor.shape)
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


class Bench:
    """A rig, a folder for a checkpoint, and what every case does with them."""

    def __init__(self, rig, folder: Path):
        self.rig, self.folder = rig, folder
        self.simulated = rig.provenance.startswith("simulated")

    def load(self, config, auto: str, dtype=BF16, **options):
        """A model by transformers' own loader, in the stage "load"."""
        cls = class_of(config, auto)
        config.architectures = [cls.__name__]
        config.save_pretrained(self.folder)
        if not self.simulated:
            write_weights(self.folder, cls, config, dtype)
        options = {"device_map": {"": 0}} | options
        with self.rig.stage("load"):
            model = cls.from_pretrained(
                self.folder, dtype=dtype, trust_remote_code=False, **options
            )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.02)
        return model.eval()

    def stage(self, name: str):
        gc.collect()
        torch.cuda.empty_cache()
        return self.rig.stage(name)

    def watch(self, optimizer):
        """Called before the first step."""

    def answer(self, model, name: str, prompt: dict, new_tokens: int = 1):
        """A prefill and a greedy answer, in one stage."""
        with torch.no_grad(), self.stage(name):
            prompt = {key: tensor.to("cuda") for key, tensor in prompt.items()}
            outputs = model(**prompt, use_cache=True, logits_to_keep=1)
            cache, token = outputs.past_key_values, outputs.logits[:, -1:].argmax(dim=-1)
            del outputs

            def step():
                nonlocal token
                logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
                token = logits[:, -1:].argmax(dim=-1)

            self.rig.repeat(step, new_tokens - 1)

    def train(self, model, name: str, loss_of: Callable, optimizer, steps: int = 2, scaler=None):
        """Steps of an optimiser, a stage each."""
        model.train()
        self.watch(optimizer)
        for number in range(1, steps + 1):
            with self.stage(f"{name}, step {number}"):
                loss = loss_of()
                (scaler.scale(loss) if scaler else loss).backward()
                del loss
                if scaler:
                    scaler.step(optimizer)
                    scaler.update()
                else:
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)


def workloads(bench: Bench, model, train: bool = True):
    """Prefills of two shapes, a padded one with an answer, and two steps of AdamW."""
    bench.answer(model, "prefill 1x2000", {"input_ids": words(1, 2000)})
    bench.answer(model, "prefill 6x500", {"input_ids": words(6, 500)})
    mask = torch.ones(3, 700, dtype=torch.long)
    mask[0, :200] = 0
    prompt = {"input_ids": words(3, 700), "attention_mask": mask}
    bench.answer(model, "padded 3x700, 24 new", prompt, 24)
    if train:
        ids = words(2, 512).to("cuda")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        loss_of = lambda: model(input_ids=ids, labels=ids, use_cache=False).loss  # noqa: E731
        bench.train(model, "train 2x512", loss_of, optimizer)


def language_model(kind: str, sizes: dict, train: bool = True, **options):
    """The ``workloads`` of a model that is loaded first."""

    def case(bench: Bench):
        model = bench.load(config_of(kind, sizes), "AutoModelForCausalLM", **options)
        workloads(bench, model, train)

    return case


def llava(bench: Bench):
    """Two prompts of LLaVA-1.5-7B with an image each."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=transformers.LlamaConfig(vocab_size=32064),
        image_token_index=32000,
    )
    model = bench.load(config, "AutoModelForImageTextToText")
    ids = words(2, 576 + 60)
    ids[:, 10 : 10 + 576] = 32000
    prompt = {"input_ids": ids, "pixel_values": torch.rand(2, 3, 336, 336).to(BF16)}
    bench.answer(model, "2 images, 20 new", prompt, 20)


def t5(bench: Bench):
    """Flan-T5-XL: an encoder pass and a teacher-forced answer."""
    config = transformers.T5Config(
        d_model=2048,
        d_kv=64,
        d_ff=5120,
        num_layers=24,
        num_heads=32,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    model = bench.load(config, "AutoModelForSeq2SeqLM")
    with torch.no_grad(), bench.stage("8x400, answer of 60"):
        model(input_ids=words(8, 400).to("cuda"), labels=words(8, 60).to("cuda"))


def bert(bench: Bench):
    """BERT-large for masked words: a padded batch in float32, and a step of plain SGD."""
    config = transformers.BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    model = bench.load(config, "AutoModelForMaskedLM", torch.float32)
    ids, mask = words(8, 384).to("cuda"), torch.ones(8, 384, dtype=torch.long)
    mask[:3, 200:] = 0
    mask = mask.to("cuda")
    with torch.no_grad(), bench.stage("8x384 padded"):
        model(input_ids=ids, attention_mask=mask)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss_of = lambda: model(input_ids=ids, attention_mask=mask, labels=ids).loss  # noqa: E731
    bench.train(model, "train 8x384 SGD", loss_of, optimizer)


def vit(bench: Bench):
    """ViT-L/16 classifies and learns in bfloat16."""
    config = transformers.ViTConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        num_labels=1000,
    )
    model = bench.load(config, "AutoModelForImageClassification")
    pixels = torch.rand(16, 3, 224, 224).to("cuda", BF16)
    labels = torch.randint(1000, (16,)).to("cuda")
    with torch.no_grad(), bench.stage("16 images"):
        model(pixel_values=pixels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, foreach=False)
    loss_of = lambda: model(pixel_values=pixels, labels=labels).loss  # noqa: E731
    bench.train(model, "train 16 images", loss_of, optimizer)


def checkpointed(bench: Bench):
    """GPT-2 XL trained with gradient checkpointing and fused AdamW."""
    kind, sizes = LANGUAGE_MODELS["GPT-2 XL"]
    model = bench.load(config_of(kind, sizes), "AutoModelForCausalLM")
    model.gradient_checkpointing_enable()
    ids = words(8, 512).to("cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    loss_of = lambda: model(input_ids=ids, labels=ids, use_cache=False).loss  # noqa: E731
    bench.train(model, "train 8x512 checkpointing", loss_of, optimizer)


def lora(kind: str, sizes: dict, rows: int, **options):
    """Adapters in float32 on a bfloat16 base, under autocast, as ``Trainer(bf16=True)`` does."""

    def case(bench: Bench):
        from peft import LoraConfig, get_peft_model

        model = bench.load(config_of(kind, sizes), "AutoModelForCausalLM", **options)
        adapters = LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        with bench.stage("adapters"):
            model = get_peft_model(model, adapters)
        ids = words(rows, 512).to("cuda")
        trained = [each for each in model.parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)

        def loss_of():
            with torch.autocast("cuda", BF16):
                return model(input_ids=ids, labels=ids, use_cache=False).loss

        bench.train(model, f"train {rows}x512 LoRA autocast", loss_of, optimizer)

    return case


def glm4v_autocast(trained: str, images: int):
    """GLM-4V-9B's own training, autocast to bfloat16."""

    def case(bench: Bench):
        from glm4v_nb.model import official_config
        from glm4v_nb.training import trained_parameters
        from glm4v_nb.workload import Workload, make_prompt

        model = bench.load(official_config(), "AutoModelForCausalLM")
        prompt = make_prompt(model, Workload(1, images, 256))
        parameters = trained_parameters(model, trained)
        if trained == "lora":
            for parameter in parameters:
                parameter.data = parameter.data.float()
        model.activation_checkpointing_enable() if images else None
        optimizer = torch.optim.AdamW(parameters, lr=1e-5)

        def loss_of():
            with torch.autocast("cuda", BF16):
                return model(**prompt, labels=prompt["input_ids"], use_cache=False).loss

        bench.train(model, f"train {trained}, {images} images, autocast", loss_of, optimizer)

    return case


def glm4v_float16(bench: Bench):
    """GLM-4V-9B in float16 with several images at once."""
    from glm4v_nb.model import official_config
    from glm4v_nb.workload import Workload, make_prompt

    model = bench.load(official_config(), "AutoModelForCausalLM", torch.float16)
    for images in (2, 4, 8):
        with bench.stage(f"{images} images"), torch.no_grad():
            model(**make_prompt(model, Workload(images, 1, 40)), use_cache=True, logits_to_keep=1)


class Recommender(nn.Module):
    """Bags of items and a few products, as in ranking."""

    def __init__(self):
        super().__init__()
        self.items = nn.EmbeddingBag(2_000_000, 64, mode="sum")
        self.users = nn.Embedding(500_000, 64)
        self.rank = nn.Sequential(nn.Linear(128, 1024), nn.ReLU(), nn.Linear(1024, 1))

    def forward(self, users, bags):
        return self.rank(torch.cat((self.users(users), self.items(bags)), dim=1)).squeeze(1)


def recommender(bench: Bench):
    """Dense gradients of two embeddings, Adagrad."""
    with bench.stage("load"):
        model = Recommender().to("cuda")
    generator = torch.Generator().manual_seed(0)
    users = torch.randint(500_000, (16_384,), generator=generator).to("cuda")
    bags = torch.randint(2_000_000, (16_384, 20), generator=generator).to("cuda")
    truth = torch.rand(16_384, generator=generator).to("cuda")
    optimizer = torch.optim.Adagrad(model.parameters())
    loss_of = lambda: nn.functional.mse_loss(model(users, bags), truth)  # noqa: E731
    bench.train(model, "train 16384", loss_of, optimizer)


def encoder(bench: Bench):
    """torch's own encoder layers in float16 under autocast with a gradient scaler."""
    layer = nn.TransformerEncoderLayer(1024, 16, 4096, batch_first=True, norm_first=True)
    with bench.stage("load"):
        model = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False).to("cuda")
    inputs = torch.rand(8, 600, 1024).to("cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def loss_of():
        with torch.autocast("cuda", torch.float16):
            return model(inputs).float().pow(2).mean()

    scaler = torch.amp.GradScaler("cuda")
    bench.train(model, "train 8x600 autocast", loss_of, optimizer, scaler=scaler)


def recurrent_cell(bench: Bench):
    """A gated recurrent classifier over many short sequences, without cuDNN's own cell."""
    with bench.stage("load"):
        cell, head = nn.GRUCell(512, 1024).to("cuda"), nn.Linear(1024, 4000).to("cuda")
    model = nn.ModuleList((cell, head))
    inputs = torch.rand(64, 256, 512).to("cuda")
    labels = torch.randint(4000, (256,)).to("cuda")
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-4)

    def loss_of():
        state = torch.zeros(256, 1024, device="cuda")
        for each in inputs:
            state = cell(each, state)
        return nn.functional.cross_entropy(head(state), labels)

    bench.train(model, "train 64 steps", loss_of, optimizer)


ONE = {
    **{name: language_model(*each) for name, each in LANGUAGE_MODELS.items()},
    **{name: language_model(*each, train=False) for name, each in LARGE.items()},
    "LLaVA-1.5-7B": llava,
    "Flan-T5-XL": t5,
    "BERT-large": bert,
    "ViT-L": vit,
    "GPT-2 XL, checkpointing": checkpointed,
    "Mistral-7B, LoRA": lora(*LARGE["Mistral-7B"], rows=2),
    "GLM-4V-9B, LoRA, autocast": glm4v_autocast("lora", 0),
    "GLM-4V-9B, decoder, autocast": glm4v_autocast("decoder", 1),
    "GLM-4V-9B, float16, images": glm4v_float16,
    "recommender": recommender,
    "encoder layers, autocast": encoder,
    "recurrent cell": recurrent_cell,
}
TWO = {
    "Qwen2.5-14B, two cards": language_model(*QWEN_14B, train=False, device_map="auto"),
    "Mistral-7B, LoRA, two cards": lora(*LARGE["Mistral-7B"], rows=4, device_map="auto"),
}


@dataclass(frozen=True)
class Cards:
    """Figures of one stage on one card, in bytes."""

    stage: str
    card: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int


def perform(name: str, rig) -> dict:
    """One case on a rig: figures of every stage and card, and what ended it."""
    error, started = None, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, rig:
        try:
            (ONE | TWO)[name](Bench(rig, Path(folder)))
        except Exception as caught:  # a case that ends is a finding, others go on
            error = f"{type(caught).__name__}: {str(caught)[:400]}"
    stages = [
        vars(Cards(stage.name, card.index, card.peak_allocated_bytes, card.peak_reserved_bytes))
        for stage in rig.stages
        for card in stage.memory
    ]
    seconds = round(time.perf_counter() - started, 1)
    return {"case": name, "error": error, "seconds": seconds, "figures": stages}


def perform_here(name: str) -> dict:
    """One case on this machine's GPUs."""
    from simgpu import Rig

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return perform(name, Rig.here())


def measure(output: Path, names: list[str]):
    """Every case for this number of GPUs, or the named ones, in a process of its own."""
    from memory import provenance

    os.environ |= {"HF_DEACTIVATE_ASYNC_LOAD": "1", "HF_HUB_OFFLINE": "1"}
    # Which import what all need once, and never touch a GPU.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["models", "peft", "simgpu.machine", "glm4v_nb.model"])
    cases = {1: ONE, 2: TWO}[torch.cuda.device_count()]
    if unknown := set(names) - set(cases):
        raise SystemExit(f"error: unknown {sorted(unknown)}; expected some of {sorted(cases)}")
    results = {"cases": []}
    for name in names or cases:
        with ProcessPoolExecutor(1, mp_context=context) as process:
            try:
                record = process.submit(perform_here, name).result()
            except BrokenProcessPool as error:
                print(f"error: {name} ended without a result: {error}", file=sys.stderr)
                continue
        print(f"{record['seconds']:6.1f} s  {name}  {record['error'] or ''}", flush=True)
        results["cases"].append(record)
        output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        origin = process.submit(provenance).result()
    origin |= {"weights": "random, read by one thread", "cap": "none"}
    results = {"provenance": origin, **results}
    output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def simulate(results: dict, names: list[str] = ()) -> list[dict]:
    """The cases of a file of measurements on simulated cards of the same kind."""
    from simgpu import Rig

    ((card, count),) = results["provenance"]["cards"].items()
    return [
        perform(each["case"], Rig.simulated(card, count, ""))
        for each in results["cases"]
        if not names or each["case"] in names
    ]


def apart(real: dict, ours: dict) -> list[tuple[str, int, float, float]]:
    """Stage, card, and by how much simulated peaks differ: MiB allocated, percent reserved."""
    found = []
    for one, two in zip(real["figures"], ours["figures"], strict=True):
        allocated = (two["peak_allocated_bytes"] - one["peak_allocated_bytes"]) / MIB
        reserved = 100 * (two["peak_reserved_bytes"] / one["peak_reserved_bytes"] - 1)
        found.append((one["stage"], one["card"], allocated, reserved))
    return found


# Where more than half a MiB or half a percent is allowed. Which of two equal holes is filled depends
# on the addresses the driver gives, which differ here; ViT's is cuDNN's choice for its convolution.
_FURTHER = {
    "Qwen3-1.7B": (0.5, 1.2),
    "Gemma-2-2B": (9, 2.3),
    "Mistral-7B, LoRA": (0.5, 0.7),
    "GLM-4V-9B, decoder, autocast": (2.5, 0.5),
    "ViT-L": (0.5, 4.2),
}


def bounds(case: str) -> tuple[float, float]:
    """By how much a case's peaks may differ: MiB allocated, percent reserved."""
    return _FURTHER.get(case, (0.5, 0.5))


def end_of(record: dict) -> str:
    """How a case ended, without the sizes in a message."""
    return "to the end" if not record["error"] else record["error"].partition(".")[0]


def table(measured: list[dict], simulated: list[dict]) -> list[str]:
    """Markdown, a row a case: the furthest of its peaks, and how it ended."""
    lines = [
        "| model or program | peaks | allocated, furthest | reserved, furthest | ended |",
        "|---|---|---|---|---|",
    ]
    for real, ours in zip(measured, simulated, strict=True):
        ended = [end_of(record) for record in (real, ours)]
        if len(real["figures"]) != len(ours["figures"]):
            lines.append(f"| {real['case']} | | | | {ended[0]}; simulated {ended[1]} |")
            continue
        _, _, allocated, reserved = zip(*apart(real, ours), strict=True)
        furthest = (max(allocated, key=abs), max(reserved, key=abs))
        lines.append(
            f"| {real['case']} | {len(allocated)} | {furthest[0]:+.2f} MiB | {furthest[1]:+.2f} % "
            f"| {ended[0] if ended[0] == ended[1] else f'{ended[0]}; simulated {ended[1]}'} |"
        )
    return [line.replace("-0.00", "+0.00") for line in lines]


def details(measured: list[dict], simulated: list[dict]) -> list[str]:
    """A line a figure."""
    return [
        f"{real['case']}: {stage}, card {card}: {allocated:+.2f} MiB, {reserved:+.2f} %"
        for real, ours in zip(measured, simulated, strict=True)
        if len(real["figures"]) == len(ours["figures"])
        for stage, card, allocated, reserved in apart(real, ours)
        if round(allocated, 2) or round(reserved, 2)
    ]


def main():
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("measure", "simulate", "list"))
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    names = arguments.names
    if arguments.action == "list":
        print("\n".join(ONE | TWO))
    elif arguments.action == "measure":
        measure(arguments.file, names)
    else:
        results = json.loads(arguments.file.read_text(encoding="utf-8"))
        measured = [each for each in results["cases"] if not names or each["case"] in names]
        simulated = simulate(results, names)
        print("\n".join([*table(measured, simulated), "", *details(measured, simulated)]))


if __name__ == "__main__":
    main()
