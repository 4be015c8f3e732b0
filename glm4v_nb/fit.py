"""Will it fit? The full-size model on simulated cards runs a workload: every card's peak."""

import functools
import json
import math
import os
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from glm4v_nb.model.configuration import OFFICIAL, read_config
from glm4v_nb.model.official_names import keys_here
from glm4v_nb.placement import Place, check_device_map, meta_model, place_of, plan_device_map
from glm4v_nb.training import first_update, train_step, trained_parameters
from glm4v_nb.workload import Workload, check_context, decode, make_prompt, prefill
from simgpu import Card, HostMemory, Rig, find_card
from simgpu.oom import parse_out_of_memory
from simgpu.units import MIB

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
# More memory than any weights need, so that placement depends on the cards alone, or on the map.
_AMPLE_BYTES = 2**60
# By how much a card is made larger to see whether a run fits then.
_STEP_BYTES = 64 * MIB


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
    """The answer to ``asked``, a deployment and a workload. ``host`` is the host memory that
    loading takes; None where the cards did not hold the weights."""

    verdict: str
    devices: list[DeviceFit]
    oom: OutOfMemory | None
    seconds: float
    provenance: str
    host: HostMemory | None
    asked: tuple["Deployment", Workload] = field(repr=False)

    @property
    def fits(self) -> bool:
        """Whether the run ended without an out-of-memory error."""
        return self.verdict == "fits"

    @property
    def just_fits(self) -> bool:
        """Whether it fits with less to spare than such cards differ among themselves."""
        spare = min(device.free_at_peak_bytes for device in self.devices)
        return self.fits and spare < find_card(self.asked[0].card).uncertainty_bytes

    @functools.cached_property
    def on_ample_cards(self) -> list[DeviceFit]:
        """The same device map on cards that have enough, simulated when first asked for."""
        return self._on_cards_of(_AMPLE_BYTES).devices

    @functools.cached_property
    def needs(self) -> list[int]:
        """Bytes that each card must have, CUDA's context and the driver's part among them. On cards
        with the largest of them the run has been seen to fit."""
        sizes = [_AMPLE_BYTES - device.free_at_peak_bytes for device in self.on_ample_cards]
        fullest = sizes.index(max(sizes))
        # transformers first takes one block for all weights where much is free, and smaller ones,
        # with holes between them, where little is.
        while not (tried := self._on_cards_of(sizes[fullest])).fits:
            sizes[fullest] += max(_STEP_BYTES, parse_out_of_memory(tried.oom.message).short_bytes)
        return sizes

    def _on_cards_of(self, total_bytes: int) -> "FitResult":
        deployment, workload = self.asked
        card = replace(find_card(deployment.card), total_bytes=total_bytes)
        same_map = replace(deployment, card=card, device_map=deployment.placement())
        return LoadedModel(same_map).run(workload)

    def to_dict(self) -> dict:
        """What ``glm4v-nb fit --json`` prints: the keys it has always had, and ``needs_bytes``, of
        the card that was full, where it does not fit."""
        devices = [asdict(device) for device in self.devices]
        for device in devices:
            del device["free_at_peak_bytes"]
        answer = {"verdict": self.verdict, "devices": devices, "oom": self.oom and asdict(self.oom)}
        answer |= {"seconds": self.seconds, "provenance": self.provenance}
        return answer | ({"needs_bytes": self.needs[self.oom.device]} if self.oom else {})


@dataclass(frozen=True)
class Deployment:
    """A checkpoint on a number of simulated cards: what is asked whether it fits.

    Attributes:
        card, count: the cards' kind, as ``simgpu.find_card`` takes it, and their number.
        dtype: of the weights, one of ``DTYPES``.
        device_map: one of ``DEVICE_MAPS``, or module names, official ones too, and their places.
        checkpoint: the official hub id, or a directory with a GLM-4V config.json. Only the
            configuration is read and, if there is one, the index of the weights' files; never the
            weights.
        alloc_conf: PyTorch's ``PYTORCH_CUDA_ALLOC_CONF``, as of ``Rig.simulated``.
    """

    card: str | Card = "L4"
    count: int = 1
    dtype: str = "bfloat16"
    device_map: str | dict[str, Place] = "auto"
    checkpoint: str | Path = OFFICIAL
    alloc_conf: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "device_map", keys_here(self.device_map, parts=False))

    def rig(self) -> Rig:
        """The cards, with nothing on them."""
        return Rig.simulated(self.card, self.count, self.alloc_conf)

    def check(self, workload: Workload):
        """Refuse what cannot run, before anything is loaded.

        Raises:
            ValueError: unknown card, dtype, device map or checkpoint, an impossible count or
                allocator option, or a workload beyond the model's context.
        """
        self.rig()
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}.")
        if isinstance(self.device_map, str) and self.device_map not in DEVICE_MAPS:
            raise ValueError(
                f"device_map is {self.device_map!r}; expected one of {', '.join(DEVICE_MAPS)}, or"
                " a dictionary of module names and cards."
            )
        check_context(workload, read_config(self.checkpoint))
        if isinstance(self.device_map, dict):
            check_device_map(self.device_map, self.count, self.checkpoint)

    def free_bytes(self) -> dict[int, int]:
        """What PyTorch finds free on each card before anything is loaded."""
        with Rig.simulated(self.card, self.count):
            return {index: torch.cuda.mem_get_info(index)[0] for index in range(self.count)}

    def plan(self, strategy: str, max_memory: dict[Place, int | str]) -> dict[str, Place]:
        """The map transformers makes on these cards; ``max_memory`` as in ``from_pretrained``."""
        sizes = dict(max_memory)  # accelerate turns "20GiB" into a number in place
        with Rig.simulated(self.card, self.count):
            return plan_device_map(strategy, sizes, DTYPES[self.dtype], self.checkpoint)

    def placement(self) -> dict[str, Place]:
        """The device map; what an automatic one would offload is put on the last card instead, so
        that the answer is the error that a user without offloading meets."""
        if not isinstance(self.device_map, str):
            return self.device_map
        if self.count == 1:
            return {"": 0}
        plan = self.plan(self.device_map, self.free_bytes() | {"cpu": _AMPLE_BYTES})
        last = self.count - 1
        return {name: place if isinstance(place, int) else last for name, place in plan.items()}

    def weights_bytes(self, placement: dict[str, Place]) -> Counter[Place]:
        """Bytes of the weights in every place of a map."""
        sizes: Counter[Place] = Counter()
        for name, weight in meta_model(DTYPES[self.dtype], self.checkpoint).named_parameters():
            sizes[place_of(name, placement)] += weight.nbytes
        return sizes


class LoadedModel:
    """A deployment's model on its cards, or the error that loading it ended with.

    ``weights_bytes`` were allocated on each card when loading ended, by an error as well; ``error``
    is PyTorch's out-of-memory message of the load, or None.
    """

    def __init__(self, deployment: Deployment):
        self.deployment, self.rig, self.error = deployment, deployment.rig(), None
        self.device_map = deployment.placement()
        dtype = DTYPES[deployment.dtype]
        try:
            self.model = load(self.rig, self.device_map, dtype, deployment.checkpoint)
        except torch.OutOfMemoryError as error:
            self.error = str(error)
        self.weights_bytes = [memory.allocated_bytes for memory in self.rig.stages[-1].memory]

    def run(self, workload: Workload) -> FitResult:
        """Run a workload; the figures are those of all stages the rig has a record of."""
        started, rig, error = time.perf_counter(), self.rig, self.error
        if error is None:
            try:
                run_workload(rig, self.model, workload)
            except torch.OutOfMemoryError as caught:
                error = str(caught)
        verdict, oom = "fits", None
        if error is not None:
            card = int(re.search(r"GPU (\d+)", error)[1])
            verdict, oom = "oom", OutOfMemory(card, rig.stages[-1].name, error)
        devices = [self._device_fit(index) for index in range(self.deployment.count)]
        seconds = round(time.perf_counter() - started, 2)
        asked = (self.deployment, workload)
        return FitResult(verdict, devices, oom, seconds, rig.provenance, rig.host.memory, asked)

    def _device_fit(self, index: int) -> DeviceFit:
        stages, card = [stage.memory[index] for stage in self.rig.stages], self.rig.card
        allocated = max(memory.peak_allocated_bytes for memory in stages)
        reserved = max(memory.peak_reserved_bytes for memory in stages)
        # What is outside PyTorch's allocator only grows.
        free = stages[-1].free_bytes + stages[-1].reserved_bytes - reserved
        weights = self.weights_bytes[index]
        return DeviceFit(index, card.key, card.total_bytes, weights, allocated, reserved, free)


def fit(
    card: str = "L4",
    count: int = 1,
    dtype: str = "bfloat16",
    device_map: str | dict[str, Place] = "auto",
    workload: Workload | None = None,
    checkpoint: str | Path = OFFICIAL,
    alloc_conf: str | None = None,
) -> FitResult:
    """Run a workload of a ``Deployment``, whose arguments the others are, on simulated cards.

    Raises:
        ValueError: as ``Deployment.check``; an impossible workload.
    """
    deployment = Deployment(card, count, dtype, device_map, checkpoint, alloc_conf)
    workload = workload or Workload()
    deployment.check(workload)
    started = time.perf_counter()
    result = LoadedModel(deployment).run(workload)
    return replace(result, seconds=round(time.perf_counter() - started, 2))


def load(rig: Rig, device_map, dtype: torch.dtype, checkpoint: str | Path = OFFICIAL, **options):
    """The checkpoint's model on the rig, in a stage "load".

    ``options`` are others of ``from_pretrained``, as ``max_memory``.

    Raises:
        torch.OutOfMemoryError: a card has no room.
    """
    with rig, rig.stage("load"):
        options |= {"config": read_config(checkpoint), "device_map": device_map, "dtype": dtype}
        return AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=False, **options)


def run_workload(rig: Rig, model, workload: Workload, **optimizer_options):
    """Run a workload on a loaded model, in the phases of ``OutOfMemory`` as stages.

    In training "prefill" only makes the inputs. ``optimizer_options`` are for ``first_update``.

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
                    first_update(parameters, **optimizer_options)
        elif workload.new_tokens > 1:
            with rig.stage("decode"):
                decode(rig, model, prompt, outputs, workload.new_tokens)


def read_device_map(text: str) -> str | dict[str, Place]:
    """A device map as the command line takes it: a strategy's name, a JSON object, a JSON file;
    ValueError for anything else."""
    if text in DEVICE_MAPS:
        return text
    is_object = text.lstrip().startswith("{")
    if not is_object and not os.path.isfile(text):
        raise ValueError(
            f"device_map is {text[:200]!r}; expected one of {', '.join(DEVICE_MAPS)}, a JSON object"
            " such as '{\"\": 0}', or the path of a JSON file. There is no file of that name."
        )
    source, expected = "device_map" if is_object else text, 'Expected {"module": card, ...}.'
    try:
        text = text if is_object else Path(text).read_text(encoding="utf-8")
        device_map = json.loads(text, object_pairs_hook=_without_repetition)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not JSON: {error}. {expected}") from None
    if not isinstance(device_map, dict):
        raise ValueError(f"{source} holds no JSON object. {expected}")
    return device_map


def _without_repetition(pairs: list[tuple[str, object]]) -> dict:
    """JSON allows a name twice, and Python would silently take the last."""
    for name, times in Counter(name for name, _ in pairs).items():
        if times > 1:
            raise ValueError(f"{name!r} stands there {times} times; give each module one place")
    return dict(pairs)


def cards_for_weights(card: str, dtype: str) -> int:
    """How many such cards hold the weights, by division; what else a run needs is not counted."""
    usable = find_card(card).total_bytes - find_card(card).context_bytes
    return math.ceil(Deployment(card, dtype=dtype).weights_bytes({"": 0})[0] / usable)


@functools.cache
def _fit_once(card: str, count: int, dtype: str, workload: Workload) -> FitResult:
    return fit(card, count, dtype, workload=workload)  # runs of a sweep often share their sizes


def predict_run(notebook: str, parameters: dict) -> str | None:
    """What ``fit`` says of the full-size model with a notebook's cards and workload, in a few
    words; None for a notebook without a card among its parameters, or where ``fit`` refuses."""
    card, count = parameters.get("card"), parameters.get("count", 1)
    if not isinstance(card, str) or not card:
        return None
    names = ("batch_size", "images", "text_tokens", "new_tokens")
    sizes = {name: parameters[name] for name in names if isinstance(parameters.get(name), int)}
    try:
        dtype = parameters.get("dtype", "bfloat16")
        result = _fit_once(card, count, dtype, Workload(**sizes))
    except ValueError:
        return None
    if result.fits:
        return "fits"
    return f"does not fit: card {result.oom.device}, {result.oom.phase}"
