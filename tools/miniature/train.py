"""Train the miniature: ``python -m tools.miniature.train --output DIR``.

The weights are kept in float32 and the forward pass runs under bfloat16 autocast; the checkpoint is
saved in bfloat16 in the official layout, every minute and at the end. Examples are kept on the
device and each is seen ``--repeat`` times, noise added anew each time. ``train.jsonl`` logs step,
seconds, loss, learning rate and pictures.
"""

import argparse
import json
import math
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional

from glm4v_nb.model import GLM4VConfig, GLM4VForConditionalGeneration
from glm4v_nb.model.image_processing import IMAGE_MEAN, IMAGE_STD
from glm4v_nb.model.tokenization import ChatGLM4Tokenizer
from glm4v_nb.training import enable_gradient_checkpointing
from tools.miniature.evaluate import evaluate
from tools.miniature.feed import CHUNK, IGNORED, ROWS, TEXT_LENGTH, ConversationEncoder, Feed
from tools.miniature.vocabulary import save_vocabulary

IMAGE_SIZE = 168
SAVE_SECONDS = 60.0


def miniature_config(special: dict[str, int]) -> GLM4VConfig:
    """The miniature's sizes. ``special``: special token to id."""
    patch = 14
    return GLM4VConfig(
        num_layers=4,
        hidden_size=256,
        ffn_hidden_size=512,
        kv_channels=64,
        num_attention_heads=4,
        multi_query_group_num=2,
        padded_vocab_size=math.ceil(len_of_vocabulary(special) / 64) * 64,
        seq_length=8192,  # the official one; training stays below 150 positions
        initializer_range=0.04,
        boi_token_id=special["<|begin_of_image|>"],
        eoi_token_id=special["<|end_of_image|>"],
        pad_token_id=special["<|endoftext|>"],
        eos_token_id=[special[name] for name in ("<|endoftext|>", "<|user|>", "<|observation|>")],
        vision_config={
            "hidden_size": 192,
            "num_hidden_layers": 5,
            "num_heads": 6,
            "intermediate_size": 512,
            "patch_size": patch,
            "image_size": IMAGE_SIZE,
            "num_positions": (IMAGE_SIZE // patch) ** 2 + 1,
            # The official 8.0 suits features of its own scale; here they are as large as
            # embeddings.
            "scaling_factor": 1.0,
        },
    )


def len_of_vocabulary(special: dict[str, int]) -> int:
    """Ordinary and special tokens together."""
    return max(special.values()) + 1


def initialise(model: GLM4VForConditionalGeneration) -> None:
    """Random weights that suit the tower: scaled by fan-in, positions as waves over the two
    axes."""
    tower = model.vision_tower
    for module in tower.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(tower.boundary.boi, std=0.1)
    nn.init.normal_(tower.boundary.eoi, std=0.1)
    positions = tower.patch_embedding.position_embedding.weight
    side, features = tower.patches_per_side, positions.shape[1]
    frequencies = math.pi * 0.5 * 2 ** torch.linspace(0, 3, features // 4)
    place = (torch.arange(side) + 0.5) / side
    waves = torch.cat(
        ((place[:, None] * frequencies).sin(), (place[:, None] * frequencies).cos()), dim=1
    )
    rows, columns = waves.repeat_interleave(side, 0), waves.repeat(side, 1)
    with torch.no_grad():
        positions[1:] = 0.5 * torch.cat((rows, columns), dim=1)


class Trainer(nn.Module):
    """The loss of a batch of examples; the tower sees each picture once for all its
    conversations."""

    def __init__(self, model: GLM4VForConditionalGeneration, prefix: list[int]):
        super().__init__()
        self.model = model
        image = model.config.vision_config.image_tokens
        before, length = len(prefix), len(prefix) + image + TEXT_LENGTH
        positions = torch.arange(length)
        # begin-of-image, all patches at one position, end-of-image, then counting on (see
        # splicing.py).
        positions[before + 1 : before + image - 1] = before + 1
        positions[before + image - 1 :] = torch.arange(TEXT_LENGTH + 1) + before + 2
        self.register_buffer("prefix", torch.tensor(prefix), persistent=False)
        self.register_buffer("positions", positions[None], persistent=False)
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD).view(3, 1, 1), persistent=False)

    def forward(
        self, pixels: torch.Tensor, ids: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Mean loss per answer token; the arguments as ``Examples``, on the model's device."""
        pixels = pixels.permute(0, 3, 1, 2).float()
        strength = 4 * torch.rand(len(pixels), 1, 1, 1, device=pixels.device)
        pixels = (pixels + strength * torch.randn_like(pixels)).clamp(0, 255) / 255
        features = self.model.get_image_features((pixels - self.mean) / self.std).repeat_interleave(
            ROWS, 0
        )
        ids, labels = ids.flatten(0, 1).long(), labels.flatten(0, 1).long()
        embed = self.model.get_input_embeddings()
        before = embed(self.prefix).expand(len(ids), -1, -1)
        embeddings = torch.cat((before, features.to(before.dtype), embed(ids)), dim=1)
        hidden = self.model.language_model(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long, device=ids.device),
            position_ids=self.positions.expand(len(ids), -1),
            use_cache=False,
        ).last_hidden_state[:, -TEXT_LENGTH:]
        answers = labels != IGNORED
        return functional.cross_entropy(
            self.model.lm_head(hidden[answers]).float(), labels[answers]
        )


def learning_rate(done: float, peak: float) -> float:
    """Warm-up over the first 3 % of the time, then a cosine to 1 % of the peak. ``done``: 0 to
    1."""
    if done < 0.03:
        return peak * (0.02 + 0.98 * done / 0.03)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - 0.03) / 0.97))))


def save(
    model: GLM4VForConditionalGeneration, tokenizer: ChatGLM4Tokenizer, directory: Path
) -> None:
    """Write the checkpoint in bfloat16 without changing the model."""
    copy = GLM4VForConditionalGeneration(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())  # rounds, and brings them to the CPU
    copy.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _batches(feed: Feed, size: int, repeat: int, pool: int, device: torch.device, seed: int):
    """Batches of ``size`` examples from a pool on the device; ``size / repeat`` of the pool is
    replaced a step."""
    pixels = torch.empty(pool, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8, device=device)
    ids = torch.empty(pool, ROWS, TEXT_LENGTH, dtype=torch.int16, device=device)
    labels = torch.empty_like(ids)
    rng = np.random.default_rng([seed, 1_000_003])
    chunks, drawn, owed = iter(feed), 0, float(4 * size)
    while True:
        while owed > 0:
            chunk = next(chunks)
            place = drawn % pool
            for target, source in (
                (pixels, chunk.pixels),
                (ids, chunk.ids),
                (labels, chunk.labels),
            ):
                target[place : place + CHUNK].copy_(torch.from_numpy(source))
            drawn += CHUNK
            owed -= CHUNK
        filled = min(drawn, pool)
        chosen = torch.from_numpy(rng.integers(filled, size=size)).to(device)
        yield drawn, pixels[chosen], ids[chosen], labels[chosen]
        owed += size / repeat


def _optimizer(model: nn.Module, rate: float, device: torch.device) -> torch.optim.AdamW:
    """Matrices decay, vectors do not."""
    decayed = [value for value in model.parameters() if value.ndim > 1]
    others = [value for value in model.parameters() if value.ndim < 2]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=rate,
        betas=(0.9, 0.98),
        fused=device.type == "cuda",
    )


def train(options: argparse.Namespace) -> None:
    """Train, log, save and evaluate as the options say."""
    directory = Path(options.output)
    special = save_vocabulary(directory, IMAGE_SIZE)
    tokenizer = ChatGLM4Tokenizer.from_pretrained(directory)
    feed = Feed(directory, IMAGE_SIZE, options.seed, options.workers)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(options.seed)
    model = GLM4VForConditionalGeneration(miniature_config(special))
    initialise(model)
    model.to(device).train()
    if options.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    trainer = Trainer(model, ConversationEncoder(tokenizer).prefix()).to(device)
    optimizer = _optimizer(model, options.learning_rate, device)
    autocast = torch.autocast(device.type, torch.bfloat16)
    start, saved, step = time.monotonic(), 0.0, 0
    pool = math.ceil(options.pool / CHUNK) * CHUNK
    with open(directory / "train.jsonl", "w", encoding="utf-8") as log:
        log.write(json.dumps(provenance(device, model, options)) + "\n")
        batches = _batches(feed, options.batch_size, options.repeat, pool, device, options.seed)
        for drawn, *batch in batches:
            seconds = time.monotonic() - start
            done = seconds / (60 * options.minutes) if options.minutes else step / options.steps
            if done >= 1:
                break
            rate = learning_rate(done, options.learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with autocast:
                loss = trainer(*batch)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % options.log_every == 0 or step == 1:
                record = {"step": step, "seconds": round(seconds, 2), "loss": round(loss.item(), 5)}
                record |= {"learning_rate": rate, "pictures": drawn}
                log.write(json.dumps(record) + "\n")
                log.flush()
                print(record, flush=True)
            if seconds - saved > SAVE_SECONDS:
                saved = seconds
                save(model, tokenizer, directory)
    feed.close()
    save(model, tokenizer, directory)
    if options.evaluate:
        report = evaluate(
            directory, seed=options.seed + 1_000_000, count=options.evaluate, device=str(device)
        )
        (directory / "evaluation.json").write_text(
            json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        )
        print(json.dumps(report, indent=2, ensure_ascii=False))


def provenance(device: torch.device, model: nn.Module, options: argparse.Namespace) -> dict:
    """What was trained, with what, on what and when."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": sum(value.numel() for value in model.parameters()),
        # The name of a directory says nothing on another machine.
        "options": {name: value for name, value in vars(options).items() if name != "output"},
    }


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, or these arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="directory of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--steps", type=int, default=6400, help="of the optimiser: 8 minutes on an H100"
    )
    parser.add_argument(
        "--minutes", type=float, help="instead of --steps: the learning rate follows the clock"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 1))
    parser.add_argument("--batch-size", type=int, default=512, help="pictures a step")
    parser.add_argument(
        "--repeat", type=float, default=2.0, help="how often a picture is seen on average"
    )
    parser.add_argument("--pool", type=int, default=100_000, help="pictures kept on the device")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--log-every", type=int, default=25)
    parser.add_argument("--evaluate", type=int, default=1000, help="questions asked at the end")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    train(read_options())
