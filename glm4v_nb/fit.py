"""Will it fit? Load the full-size model on simulated cards, run a workload, and report every card's
peak."""

import functools
import json
import math
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from glm4v_nb.model.configuration import OFFICIAL_CHECKPOINTS, GLM4VConfig, read_config
from glm4v_nb.placement import Place, check_device_map, meta_model, plan_device_map
from glm4v_nb.training import first_update, train_step, trained_parameters
from glm4v_nb.workload import Workload, decode, make_prompt, prefill
from simgpu import HostMemory, Rig, find_card

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
# More host memory than any weights need, so that placement depends on the cards alone.
_AMPLE_HOST_BYTES = 2**50


@dataclass(frozen=True)
class DeviceFit:
    """One card's figures, in bytes. After a failed load ``weights_bytes`` is what had been loaded.

    ``free_at_peak_bytes`` is what the driver still had to give when most was reserved.
    """

    index: int
    card: str
    capacity_bytes: int
    weights_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    free_at_peak_bytes: int


@dataclass(frozen=True)
class OutOfMemory:
    """Where a run died: card, phase and PyTorch's message.

    Phases are "load", "prefill", "decode", and for training "backward" and "optimizer".
    """

    device: int
    phase: str
    message: str


@dataclass(frozen=True)
class FitResult:
    """The answer; ``to_dict`` is what ``glm4v-nb fit --json`` prints.

    ``host`` is the host memory that loading takes; None where the cards did not hold the weights.
    The plain JSON keeps to the keys it has always had; that of ``--limits`` has it.
    """

    verdict: str
    devices: list[DeviceFit]
    oom: OutOfMemory | None
    seconds: float
    provenance: str
    host: HostMemory | None

    @property
    def fits(self) -> bool:
        return self.verdict == "fits"

    def to_dict(self) -> dict:
        answer = asdict(self)
        del answer["host"]
        for device in answer["devices"]:
            del device["free_at_peak_bytes"]
        return answer


def fit(
    card: str = "L4",
    count: int = 1,
    dtype: str = "bfloat16",
    device_map: str | dict[str, Place] = "auto",
    workload: Workload | None = None,
    checkpoint: str | Path = OFFICIAL_CHECKPOINTS[0],
    alloc_conf: str | None = None,
) -> FitResult:
    """Run a workload of a checkpoint, by default the full-size model, on ``count`` simulated cards.

    The question is whether the cards alone hold it. Where an automatic map would move modules to
    the CPU, they are put on the last card instead, so that the answer is the error a user without
    offloading meets.

    Args:
        checkpoint: the official hub id, or a directory with a GLM-4V config.json. Only the
            configuration is read and, if there is one, the index of the weights' files; never the
            weights.
        alloc_conf: PyTorch's ``PYTORCH_CUDA_ALLOC_CONF``, as of ``Rig.simulated``.

    Raises:
        ValueError: unknown card, dtype, device map, checkpoint or option, or an impossible
            workload.
    """
    workload = workload or Workload()
    rig = Rig.simulated(card, count, alloc_conf)
    check_arguments(count, dtype, device_map, workload, checkpoint)
    started = time.perf_counter()
    if isinstance(device_map, str):
        device_map = map_without_offload(card, count, DTYPES[dtype], device_map, checkpoint)
    weights = [0] * count
    error = None
    try:
        model = load(rig, device_map, DTYPES[dtype], checkpoint)
        weights = [memory.allocated_bytes for memory in rig.memory()]
        run_workload(rig, model, workload)
    except torch.OutOfMemoryError as caught:
        error = str(caught)
    return describe(rig, weights, error, started)


def check_arguments(
    count: int,
    dtype: str,
    device_map: str | dict[str, Place],
    workload: Workload,
    checkpoint: str | Path = OFFICIAL_CHECKPOINTS[0],
):
    """Refuse what cannot run before anything is loaded; arguments as in ``fit``.

    Raises:
        ValueError: unknown dtype, device map or checkpoint, or a workload beyond the model's
            context.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")
    if isinstance(device_map, str) and device_map not in DEVICE_MAPS:
        raise ValueError(
            f"device_map is {device_map!r}; expected one of {', '.join(DEVICE_MAPS)}, or a"
            " dictionary of module names and cards."
        )
    _check_context(workload, read_config(checkpoint))
    if isinstance(device_map, dict):
        check_device_map(device_map, count, checkpoint)


def load(
    rig: Rig, device_map, dtype: torch.dtype, checkpoint: str | Path = OFFICIAL_CHECKPOINTS[0]
):
    """The checkpoint's model on the rig, in a stage "load".

    Raises:
        torch.OutOfMemoryError: a card has no room.
    """
    with rig, rig.stage("load"):
        return AutoModelForCausalLM.from_pretrained(
            checkpoint, config=read_config(checkpoint), device_map=device_map, dtype=dtype
        )


def run_workload(rig: Rig, model, workload: Workload):
    """Run a workload on a loaded model, in the stages "prefill" and "decode", or for training
    "prefill" (the inputs), "backward" and "optimizer".

    Raises:
        torch.OutOfMemoryError: a card has no room; the last of ``rig.stages`` says in which stage.
    """
    with rig:
        with rig.stage("prefill"):
            prompt = make_prompt(model, workload)
            if workload.train:
                parameters = trained_parameters(model, workload.trained)
            else:
                outputs = prefill(model, prompt)
        if workload.train:
            with rig.stage("backward"):
                train_step(model, prompt, workload.gradient_checkpointing)
            if workload.optimizer:
                with rig.stage("optimizer"):
                    first_update(parameters)
        elif workload.new_tokens > 1:
            with rig.stage("decode"):
                decode(rig, model, prompt, outputs, workload.new_tokens)


def describe(rig: Rig, weights: list[int], error: str | None, started: float) -> FitResult:
    """What the stages of a rig say about a run.

    Args:
        weights: bytes of weights per card; after a failed load the stage itself knows them.
        error: the out-of-memory error's message, None for a run that ended.
        started: ``time.perf_counter()`` at its beginning.
    """
    oom = None
    if error is not None:
        failed = rig.stages[-1]
        if failed.name == "load":
            weights = [memory.allocated_bytes for memory in failed.memory]
        oom = OutOfMemory(int(re.search(r"GPU (\d+)", error)[1]), failed.name, error)
    devices = []
    for index, last in enumerate(rig.stages[-1].memory):
        most = max(stage.memory[index].peak_reserved_bytes for stage in rig.stages)
        devices.append(
            DeviceFit(
                index=index,
                card=rig.card.key,
                capacity_bytes=rig.card.total_bytes,
                weights_bytes=weights[index],
                peak_allocated_bytes=max(
                    stage.memory[index].peak_allocated_bytes for stage in rig.stages
                ),
                peak_reserved_bytes=most,
                # What is outside PyTorch's allocator only grows.
                free_at_peak_bytes=last.free_bytes + last.reserved_bytes - most,
            )
        )
    seconds = round(time.perf_counter() - started, 2)
    return FitResult(
        "oom" if oom else "fits", devices, oom, seconds, rig.provenance, rig.host.memory
    )


def read_device_map(text: str) -> str | dict[str, Place]:
    """A device map as the command line takes it: a strategy's name, a JSON object, or a JSON file's
    path.

    Raises:
        ValueError: neither of these, or not valid JSON.
    """
    if text in DEVICE_MAPS:
        return text
    is_object = text.lstrip().startswith("{")
    if not is_object and not Path(text).is_file():
        raise ValueError(
            f"device_map is {text!r}; expected one of {', '.join(DEVICE_MAPS)}, a JSON object such"
            " as '{\"\": 0}', or the path of a JSON file. There is no file of that name."
        )
    source = "device_map" if is_object else text
    try:
        device_map = json.loads(text if is_object else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f'{source} is not JSON: {error}. Expected {{"module": card, ...}}.'
        ) from None
    if not isinstance(device_map, dict):
        raise ValueError(f'{source} holds no JSON object. Expected {{"module": card, ...}}.')
    return device_map


def cards_for_weights(card: str, dtype: str) -> int:
    """How many such cards hold the weights, by division; what else a run needs is not counted."""
    usable_bytes = find_card(card).total_bytes - find_card(card).context_bytes
    weight_bytes = (
        sum(parameter.numel() for parameter in meta_model().parameters()) * DTYPES[dtype].itemsize
    )
    return math.ceil(weight_bytes / usable_bytes)


def _check_context(workload: Workload, config: GLM4VConfig):
    positions = workload.text_tokens + workload.images * config.vision_config.image_tokens
    if positions > config.seq_length:
        image = (
            f" ({config.vision_config.image_tokens} of them the image)" if workload.images else ""
        )
        raise ValueError(
            f"The prompt takes {positions} positions{image}, but the model's context is"
            f" {config.seq_length}. Lower text_tokens."
        )
    if workload.new_tokens > config.seq_length:
        raise ValueError(
            f"new_tokens is {workload.new_tokens}, but the model's whole context is"
            f" {config.seq_length}. Lower new_tokens."
        )


def map_without_offload(
    card: str,
    count: int,
    dtype: torch.dtype,
    strategy: str,
    checkpoint: str | Path = OFFICIAL_CHECKPOINTS[0],
) -> dict[str, int]:
    """The device map transformers makes on these cards, with what it would offload put on the last
    card."""
    if count == 1:
        return {"": 0}
    with Rig.simulated(card, count):
        max_memory = {index: torch.cuda.mem_get_info(index)[0] for index in range(count)}
        max_memory["cpu"] = _AMPLE_HOST_BYTES
        placement = plan_device_map(strategy, max_memory, dtype, checkpoint)
    return {
        name: place if isinstance(place, int) else count - 1 for name, place in placement.items()
    }


# Parameters of a notebook that say how large its workload is.
_WORKLOAD = ("batch_size", "images", "text_tokens", "new_tokens")


def predict_run(notebook: str, parameters: dict) -> str | None:
    """What ``fit`` says of the full-size model with a notebook's cards and workload, in a few
    words; None for a notebook without a card among its parameters, or where ``fit`` refuses."""
    card = parameters.get("card")
    if not isinstance(card, str) or not card:
        return None
    sizes = tuple((k, parameters[k]) for k in _WORKLOAD if isinstance(parameters.get(k), int))
    count, dtype = parameters.get("count", 1), parameters.get("dtype", "bfloat16")
    return _predicted(card, count, dtype, sizes)


@functools.cache
def _predicted(card: str, count: int, dtype: str, sizes: tuple) -> str | None:
    try:
        result = fit(card, count, dtype, workload=Workload(**dict(sizes)))
    except ValueError:
        return None
    if result.fits:
        return "fits"
    return f"does not fit: card {result.oom.device}, {result.oom.phase}"
