"""Teach the miniature a new colour by QLoRA: ``python -m tools.miniature.finetune``.

The base is quantised and stays as it is. Small matrices beside the decoder's, the head's and the
embedding's are trained, on questions about the new colour and a share of old ones. The adapter is
saved and loaded onto a fresh base before anything is asked, and at the end it is merged in three
ways. Held-out pictures come from seeds that training never uses; an answer counts if it is exactly
right. Writes benchmarks/results/miniature_finetuned.json.
"""

import argparse
import json
import platform
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from glm4v_nb.inference import load
from glm4v_nb.miniature import CHECKPOINT
from glm4v_nb.miniature.evaluate import answer_all
from glm4v_nb.training import ExpandingCollator, answer_row
from tools.miniature.new_colour import NEW, Example, examples

RESULT = Path(__file__).resolve().parents[2] / "benchmarks/results/miniature_finetuned.json"
HELD_OUT_SEED, TRAINING_SEED = 2_000_000, 2_000_001
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
TARGETS += ["lm_head", "embed_tokens"]  # the new word's tokens were never said before
RANK = 16
NEW_SHARE = 0.7  # of the training questions; the others keep what was known
WARM_UP = 10  # steps


def adapted(model):
    """The model with adapters to be trained; its own weights are not."""
    torch.manual_seed(0)  # the first of two matrices begins with random numbers
    with warnings.catch_warnings():
        # peft asks for a property that transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
        return get_peft_model(model, config)


def train(model, processor, steps: int, batch: int, rate: float) -> Iterator[tuple[int, float]]:
    """Train a model of ``adapted``; yields (step, loss) after every step."""
    rng = np.random.default_rng(TRAINING_SEED)
    collate = ExpandingCollator(model.config)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(step / WARM_UP, 1) * (1 - (step - 1) / steps)
        drawn = examples(rng, batch, NEW_SHARE)
        rows = [answer_row(processor, *one[:3]) for one in drawn]
        loss = model.train()(**collate(rows), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield step, loss.item()


def save(model, directory: Path):
    """Write the adapter alone."""
    # Else peft stores the whole embedding, which has not changed.
    model.save_pretrained(directory, save_embedding_layers=False)


def with_adapter(directory: Path, weights: str | None):
    """A fresh base, as quantised as was asked for, with the stored adapter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return PeftModel.from_pretrained(load(CHECKPOINT, weights=weights)[0], directory).eval()


def merged(directory: Path, weights: str | None):
    """The same with the adapter added to the base's weights; a quantised base is rounded again."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Merge lora module to 4-bit", UserWarning)
        return with_adapter(directory, weights).merge_and_unload()


def answers(model, processor, asked: list[Example]) -> list[str]:
    """To all questions, in batches."""
    batches = (asked[start : start + 64] for start in range(0, len(asked), 64))
    return sum((answer_all(model, processor, [one[:2] for one in some]) for some in batches), [])


def right(asked: list[Example], given: list[str]) -> float:
    """The share of right answers."""
    return round(
        float(np.mean([one[2] == said for one, said in zip(asked, given, strict=True)])), 4
    )


def by_kind(asked: list[Example], given: list[str]) -> dict[str, float]:
    """The same for each kind of question."""
    kinds = defaultdict(list)
    for one, said in zip(asked, given, strict=True):
        kinds[one[3]].append((one, said))
    return {kind: right(*map(list, zip(*pairs, strict=True))) for kind, pairs in kinds.items()}


def measure(options: argparse.Namespace) -> dict:
    """Train, ask and merge."""
    rng, weights = np.random.default_rng(HELD_OUT_SEED), options.weights
    new, old = (examples(rng, options.count, share) for share in (1.0, 0.0))
    model, processor = load(CHECKPOINT, weights=weights)
    untrained = load(CHECKPOINT, weights=weights)[0]
    said = answers(untrained, processor, new)
    before = {"new": right(new, said), "old": right(old, answers(untrained, processor, old))}
    before["kinds"], curve, losses = by_kind(new, said), [{"step": 0, **before}], []
    print("untrained", before, flush=True)
    model, begin = adapted(model), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        for step, loss in train(model, processor, options.steps, options.batch, options.rate):
            losses.append(loss)
            if step % options.every == 0 or step == options.steps:
                save(model, directory)
                after = with_adapter(directory, weights)
                found = {
                    name: answers(after, processor, few)
                    for name, few in (("new", new[: options.few]), ("old", old[: options.few]))
                }
                point = {"step": step, "loss": round(float(np.mean(losses[-options.every :])), 4)}
                point |= {"new": right(new[: options.few], found["new"])}
                point |= {"old": right(old[: options.few], found["old"])}
                curve.append(point)
                print(point, f"{time.monotonic() - begin:.0f} s", flush=True)
        variants = measure_variants(directory, weights, processor, new, old)
    names = ("torch", "transformers", "peft", "bitsandbytes", "torchao")
    trained = [each for each in model.parameters() if each.requires_grad]
    return {
        "measured": f"CPU, {time.strftime('%Y-%m-%d')}",
        "versions": {name: version(name).partition("+")[0] for name in names},
        "python": platform.python_version(),
        "base": weights or "bfloat16",
        "colour": NEW,
        "options": {name: value for name, value in vars(options).items() if name != "output"},
        "rank": RANK,
        "new_share": NEW_SHARE,
        "targets": TARGETS,
        "trained_parameters": sum(each.numel() for each in trained),
        "before": before,
        "curve": curve,
        "after": variants,
    }


def measure_variants(directory: Path, weights: str | None, processor, new, old) -> dict:
    """What the stored adapter answers: on the base it was trained on, on bfloat16, and merged."""
    base = weights or "bfloat16"
    made = {
        f"adapter on {base}": lambda: with_adapter(directory, weights),
        "adapter on bfloat16": lambda: with_adapter(directory, None),
        "merged into bfloat16": lambda: merged(directory, None),
    }
    if weights is not None:
        made[f"merged into bfloat16, saved, loaded as {base}"] = lambda: again(directory, weights)
        made[f"merged into {base}"] = lambda: merged(directory, weights)
    first, found = None, {}
    for name, make in made.items():
        model = make()
        said = answers(model, processor, new)
        first = first or said
        same = np.mean([one == other for one, other in zip(first, said, strict=True)])
        found[name] = {"new": right(new, said), "as_adapter": round(float(same), 4)}
        found[name] |= {"old": right(old, answers(model, processor, old))}
        found[name]["kinds"] = by_kind(new, said)
        print(name, found[name], flush=True)
    return found


def again(directory: Path, weights: str):
    """The adapter merged into bfloat16, saved in the official layout, and loaded quantised."""
    with tempfile.TemporaryDirectory() as folder:
        merged(directory, None).save_pretrained(folder)
        load(CHECKPOINT)[1].save_pretrained(folder)
        return load(folder, weights=weights)[0]


def main():
    """Read the command line, train, measure and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--weights", default="nf4", type=lambda text: text.replace("none", "") or None
    )
    parser.add_argument("--steps", type=int, default=520)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=3e-3, help="of learning, at its highest")
    parser.add_argument("--count", type=int, default=500, help="held-out questions of each sort")
    parser.add_argument("--every", type=int, default=130, help="steps from one point to the next")
    parser.add_argument("--few", type=int, default=200, help="questions of each sort for a point")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    report = measure(options)
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
