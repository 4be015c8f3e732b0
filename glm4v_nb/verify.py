"""``verify``: is a checkpoint whole, and do this machine's devices and data types agree on it?

First what needs no memory: the files, and every tensor's name and shape against config.json. Then
one fixed prompt with a picture, on each device and in each type that has room, and how far the
logits of the first new token are from those of the first run.
"""

import hashlib
import platform
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import psutil
import torch
from PIL import Image, ImageDraw
from transformers.utils import logging

from glm4v_nb.cleanup import empty_caches
from glm4v_nb.inference import Sampling, generate
from glm4v_nb.model import GLM4VForConditionalGeneration, official_config
from glm4v_nb.model.checkpoint import check_weights
from glm4v_nb.model.checkpoint_files import check_files
from glm4v_nb.model.configuration import GLM4VConfig, read_config
from glm4v_nb.model.processing import GLM4VProcessor
from glm4v_nb.placement import input_device, meta_model
from simgpu import Rig
from simgpu.checkpoints import INDEX

GIB = 2**30
QUESTION = "What is in the picture? 图中有什么？"
# How far logits may be from the reference's, as a share of its norm. On one H100, 16-bit types were
# up to 5 % from float32 with random weights; float32 elsewhere adds up in another order only.
TOLERANCE = {torch.float32: 0.001, torch.bfloat16: 0.1, torch.float16: 0.1}
VERSIONS = ("glm4v-nb", "torch", "transformers", "accelerate", "safetensors")


@dataclass(frozen=True)
class Run:
    """The prompt on one device in one type.

    Attributes:
        device: "cpu", "cuda:0", or "2 GPUs" for a device map of all.
        needs_bytes: of weights, and a tenth for the rest.
        skipped: why it was not run, or None.
        difference: of the first logits from the reference's, as a share of its norm; None for it.
        first_tokens, first_logits: the five likeliest ids, likeliest first, and their logits.
        answer: 16 tokens, where the checkpoint has a tokenizer.
    """

    device: str
    dtype: str
    needs_bytes: int
    skipped: str | None = None
    difference: float | None = None
    first_tokens: tuple[int, ...] = ()
    first_logits: tuple[float, ...] = ()
    answer: str | None = None
    seconds: float | None = None
    problem: str | None = None


@dataclass
class Verification:
    """What ``verify`` found; ``text`` is a block to copy into a report."""

    checkpoint: str
    commit: str | None
    weights_sha256: str
    config: str
    parameters: int
    tensors: int
    not_taken: list[str]
    versions: dict[str, str]
    provenance: str
    runs: list[Run] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        done = [run for run in self.runs if run.skipped is None]
        return bool(done) and not any(run.problem for run in done)

    @property
    def verdict(self) -> str:
        done = [run for run in self.runs if run.skipped is None]
        if not self.ok:
            return next((run.problem for run in done if run.problem), "nothing could be run")
        return (
            f"ok, {len(done)} runs agree" if len(done) > 1 else "ok, but one run agrees with none"
        )

    def to_dict(self) -> dict:
        return asdict(self) | {"ok": self.ok, "verdict": self.verdict}

    @property
    def text(self) -> str:
        left = f", {len(self.not_taken)} not taken: {self.not_taken[0]}" if self.not_taken else ""
        lines = [
            f"glm4v-nb verify, {time.strftime('%Y-%m-%d')}: {self.verdict}",
            f"checkpoint  {self.checkpoint}, commit {self.commit or 'unknown'}",
            f"weights     sha256 {self.weights_sha256}",
            f"config      {self.config}; {self.parameters:,} parameters",
            f"tensors     {self.tensors:,}, names and shapes as config.json says{left}",
            f"versions    {', '.join(f'{name} {text}' for name, text in self.versions.items())}",
            f"machine     {self.provenance}",
        ]
        for run in self.runs:
            lines.append(f"{run.device:12s}{run.dtype}: {_in_words(run)}")
            if run.answer is not None:
                lines.append(f"{'':12s}answer {run.answer!r}")
        return "\n".join(lines)


def verify(directory: str | Path, report: Callable[[str], object] = lambda text: None):
    """Verify a checkpoint's directory; ``report`` is told what is done now.

    Raises:
        ValueError: there is no such directory.
        RuntimeError: the checkpoint is damaged, lacks something, or is of another model.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(
            f"{directory} is no directory. Expected the folder of a checkpoint. Download one first:"
            " hf download zai-org/glm-4v-9b --revision COMMIT --local-dir FOLDER."
        )
    report("names and shapes")
    try:
        check_files(directory)
        config = read_config(directory)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(
                f"{directory} was saved quantised, and verify compares data types that it no longer"
                " has. Verify the checkpoint it was made of."
            )
        tensors, left = check_weights(directory, GLM4VForConditionalGeneration, config)
        has_tokenizer = (directory / "tokenizer.model").is_file()
        processor = GLM4VProcessor.from_pretrained(directory) if has_tokenizer else None
    except (ValueError, OSError) as error:
        raise RuntimeError(str(error)) from error
    parameters = meta_model(checkpoint=directory).num_parameters()
    found = Verification(
        checkpoint=directory.resolve().name,
        commit=_commit(directory),
        weights_sha256=_sha256(directory),
        config="official" if _same(config, official_config()) else "not that of GLM-4V-9B",
        parameters=parameters,
        tensors=tensors,
        # A buffer that the original saved and every loader computes anew.
        not_taken=[name for name in left if not name.endswith("rotary_pos_emb.inv_freq")],
        versions={name: metadata.version(name) for name in VERSIONS}
        | {"Python": platform.python_version()},
        provenance=Rig.here().provenance,
    )
    reference = None
    for place, dtype in places():
        run, logits = _run(
            directory, config, processor, parameters, place, dtype, reference, report
        )
        found.runs.append(run)
        reference = logits if reference is None else reference
    return found


def places() -> list[tuple[str, torch.dtype]]:
    """Where the prompt runs: the CPU in two types, the first GPU, all of them together."""
    found = [("cpu", torch.float32), ("cpu", torch.bfloat16)]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        old = torch.cuda.get_device_capability(0) < (8, 0)
        dtype = torch.float16 if old else torch.bfloat16
        found += [("cuda:0", dtype), *([(f"{count} GPUs", dtype)] if count > 1 else [])]
    return found


def _run(directory, config, processor, parameters, place, dtype, reference, report):
    """One run, and its logits in float64 on the CPU; (a skipped run, None) where room lacks."""
    name = str(dtype).removeprefix("torch.")
    needs = int(1.1 * parameters * dtype.itemsize)
    free = _free_bytes(place)
    report(f"{name} on {place}: needs {needs / GIB:.1f} GiB, {free / GIB:.1f} GiB free")
    if needs > free:
        skipped = f"needs {needs / GIB:.1f} GiB, {free / GIB:.1f} GiB are free"
        return Run(place, name, needs, skipped=skipped), None
    began, answer = time.monotonic(), None
    device_map = "auto" if place.endswith("GPUs") else place
    logging.disable_progress_bar()
    model = GLM4VForConditionalGeneration.from_pretrained(
        directory, dtype=dtype, device_map=device_map
    ).eval()
    with torch.no_grad():
        inputs = _prompt(config, processor)
        inputs = {key: value.to(input_device(model)) for key, value in inputs.items()}
        logits = model(**inputs, logits_to_keep=1).logits[0, -1].double().cpu()
    if processor:
        answer = generate(model, processor, _messages(), Sampling(max_new_tokens=16)).text
    del model
    empty_caches()
    difference = problem = None
    if not logits.isfinite().all():
        problem = f"{name} on {place}: logits are not finite"
    elif reference is not None:
        difference = ((logits - reference).norm() / reference.norm()).item()
        if difference > TOLERANCE[dtype]:
            problem = f"{name} on {place}: logits are {difference:.1%} from the first run's"
    highest, ids = logits.topk(5)
    run = Run(
        place,
        name,
        needs,
        difference=difference,
        first_tokens=tuple(ids.tolist()),
        first_logits=tuple(round(value, 4) for value in highest.tolist()),
        answer=answer,
        seconds=round(time.monotonic() - began, 1),
        problem=problem,
    )
    return run, logits


def _prompt(config: GLM4VConfig, processor) -> dict[str, torch.Tensor]:
    """The picture and the question; without a tokenizer ids and pixels by formula. The same on
    every machine and in every version, as no random numbers are drawn."""
    if processor:
        return dict(processor.apply_chat_template(_messages(), add_generation_prompt=True))
    ordinary = min(config.boi_token_id, config.pad_token_id)
    text = [7919 * position % ordinary for position in range(1, 25)]
    image = [config.boi_token_id, config.pad_token_id, config.eoi_token_id]
    side = config.vision_config.image_size
    ramp = torch.linspace(-1, 1, side)
    pixels = torch.stack(
        (ramp.expand(side, side), ramp[:, None].expand(side, side), ramp.outer(ramp))
    )
    return {"input_ids": torch.tensor([[*image, *text]]), "pixel_values": pixels[None]}


def _messages() -> list[dict]:
    """The question about a red circle and a blue square, drawn here."""
    picture = Image.new("RGB", (320, 240), "white")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((30, 60, 150, 180), fill=(220, 30, 30))
    draw.rectangle((190, 70, 290, 170), fill=(30, 60, 220))
    return [{"role": "user", "image": picture, "content": QUESTION}]


def _free_bytes(place: str) -> int:
    if place == "cpu":
        return psutil.virtual_memory().available
    cards = range(torch.cuda.device_count()) if place.endswith("GPUs") else [0]
    return sum(torch.cuda.mem_get_info(card)[0] for card in cards)


def _commit(directory: Path) -> str | None:
    """The hub's commit, where `hf download` has noted it: in a name, or beside the files."""
    if re.fullmatch(r"[0-9a-f]{40}", directory.resolve().name):
        return directory.resolve().name
    notes = directory / ".cache" / "huggingface" / "download" / "config.json.metadata"
    text = notes.read_text(encoding="utf-8") if notes.is_file() else ""
    found = re.match(r"[0-9a-f]{40}\b", text)
    return found[0] if found else None


def _sha256(directory: Path) -> str:
    """Of the index; of a single file's header, which names all tensors, where there is none."""
    index = directory / INDEX
    if index.is_file():
        return f"{hashlib.sha256(index.read_bytes()).hexdigest()} of {INDEX}"
    with (directory / "model.safetensors").open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return f"{hashlib.sha256(file.read(size)).hexdigest()} of the header of model.safetensors"


def _same(config: GLM4VConfig, official: GLM4VConfig) -> bool:
    """Whether all that decides sizes and results is equal."""
    names = [*GLM4VConfig.__annotations__]
    pairs = [(getattr(config, name), getattr(official, name)) for name in names]
    plain = [(a.to_dict(), b.to_dict()) if hasattr(a, "to_dict") else (a, b) for a, b in pairs]
    return all(a == b for a, b in plain)


def _in_words(run: Run) -> str:
    if run.skipped:
        return f"not run, {run.skipped}"
    compared = "the reference" if run.difference is None else f"{run.difference:.2%} from it"
    pairs = zip(run.first_tokens, run.first_logits, strict=True)
    first = ", ".join(f"{token} ({logit:.2f})" for token, logit in pairs)
    return f"{compared}, first tokens {first}; {run.seconds} s"
