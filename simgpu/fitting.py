"""Will it fit? A model of transformers on simulated cards runs a workload: every card's peak."""

import functools
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from simgpu.attribution import Attribution
from simgpu.catalog import Card, not_measured
from simgpu.estimation import versions
from simgpu.host import HostMemory
from simgpu.loading import once_for_each, read_config
from simgpu.oom import parse_out_of_memory
from simgpu.placement import (
    DEVICE_MAPS,
    Place,
    bytes_by_place,
    check_device_map,
    is_trainable,
    meta_model,
    plan_device_map,
    quantised_model,
    read_device_map,
)
from simgpu.recipes import Recipe, read_recipe
from simgpu.rig import ASSUME, Rig, cards_of
from simgpu.training import first_update
from simgpu.units import MIB
from simgpu.workload import Workload

__all__ = ["Deployment", "FitResult", "LoadedModel", "fit", "load", "read_device_map"]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
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
    loading takes; None where the cards did not hold the weights. ``exact``, ``unmodelled`` and
    ``assumed`` are as of ``estimation.Estimate``, ``decoding_bytes`` as of ``Recipe``,
    ``by_purpose`` is each card's peak (of ``fit`` alone)."""

    verdict: str
    devices: list[DeviceFit]
    oom: OutOfMemory | None
    seconds: float
    provenance: str
    host: HostMemory | None
    asked: tuple["Deployment", Workload] = field(repr=False)
    exact: bool = True
    unmodelled: dict[str, int | None] = field(default_factory=dict)
    assumed: dict[str, int] = field(default_factory=dict)
    decoding_bytes: dict[str, int] = field(default_factory=dict)
    by_purpose: list[dict[str, int]] | None = field(default=None, repr=False)

    @property
    def fits(self) -> bool:
        """Whether the run ended without an out-of-memory error."""
        return self.verdict == "fits"

    @property
    def just_fits(self) -> bool:
        """Whether it fits with less to spare than such cards differ among themselves."""
        cards = zip(self.asked[0].cards, self.devices, strict=True)
        return self.fits and any(
            device.free_at_peak_bytes < card.uncertainty_bytes for card, device in cards
        )

    @functools.cached_property
    def on_ample_cards(self) -> list[DeviceFit]:
        """The same device map on cards that have enough, simulated when first asked for."""
        return self._on_cards_of(_AMPLE_BYTES).devices

    @functools.cached_property
    def needs(self) -> list[int]:
        """Bytes that each card must have, CUDA's context among them, and what the driver and others
        have in use. On cards with the largest of them the run has been seen to fit."""
        sizes = [_AMPLE_BYTES - device.free_at_peak_bytes for device in self.on_ample_cards]
        fullest = sizes.index(max(sizes))
        # transformers first takes one block for all weights where much is free, and smaller ones,
        # with holes between them, where little is.
        while not (tried := self._on_cards_of(sizes[fullest])).fits:
            sizes[fullest] += max(_STEP_BYTES, parse_out_of_memory(tried.oom.message).short_bytes)
        return sizes

    def _on_cards_of(self, total_bytes: int) -> "FitResult":
        deployment, workload = self.asked
        cards = tuple(replace(card, total_bytes=total_bytes) for card in deployment.cards)
        placement = deployment.placement()
        same_map = replace(deployment, card=cards, count=1, free_gib=None, device_map=placement)
        return LoadedModel(same_map).run(workload)

    def to_dict(self) -> dict:
        """What ``fit --json`` prints: the keys it has always had, what the answer holds for, and
        ``needs_bytes``, of the card that was full, where it does not fit."""
        devices = [asdict(device) for device in self.devices]
        for device in devices:
            del device["free_at_peak_bytes"]
        answer = {"verdict": self.verdict, "devices": devices, "oom": self.oom and asdict(self.oom)}
        answer |= {"seconds": self.seconds, "provenance": self.provenance}
        names = ("exact", "unmodelled", "assumed")
        answer |= {"versions": versions()} | {name: getattr(self, name) for name in names}
        answer["not_measured"] = not_measured(self.asked[0].cards)
        if self.asked[0].decoding != "eager":
            answer["decoding"] = {"method": self.asked[0].decoding}
            for name, size in self.decoding_bytes.items():
                answer["decoding"][f"{name.replace(' ', '_')}_bytes"] = size
        return answer | ({"needs_bytes": self.needs[self.oom.device]} if self.oom else {})


@dataclass(frozen=True)
class Deployment:
    """A checkpoint on a number of simulated cards: what is asked whether it fits.

    Attributes:
        card, count, free_gib, assume: as of ``SimulatedRig``.
        dtype: of the weights, one of ``DTYPES``.
        device_map: one of ``DEVICE_MAPS``, or module names and their places.
        checkpoint: a directory with a config.json, a hub id whose config.json has been downloaded,
            or one registered with ``checkpoints``. Only the configuration is read and, if there is
            one, the index of the weights' files; never the weights. Or a configuration itself.
        alloc_conf: PyTorch's ``PYTORCH_CUDA_ALLOC_CONF``, as of ``Rig.simulated``.
        decoding: how tokens are decoded, of the ways that the model's recipe knows.
        weights: how they are quantised while loading, as the recipe names it; None: they are not.
        keep: names of modules that are then not quantised; None is what the recipe leaves.
    """

    card: str | Card | Sequence[str | Card] = "L4"
    count: int = 1
    dtype: str = "bfloat16"
    device_map: str | dict[str, Place] = "auto"
    checkpoint: str | Path | PreTrainedConfig = ""
    alloc_conf: str | None = None
    free_gib: float | Sequence[float] | None = None
    assume: str = ASSUME[1]
    decoding: str = "eager"
    weights: str | None = None
    keep: Sequence[str] | None = None

    @functools.cached_property
    def cards(self) -> list[Card]:
        """Every card, with what others leave of it."""
        return cards_of(self.card, self.count, self.free_gib)

    @functools.cached_property
    def recipe(self) -> Recipe:
        """How the checkpoint's model is asked."""
        return read_recipe(read_config(self.checkpoint)).decode_by(self.decoding)

    @functools.cached_property
    def meta_model(self) -> PreTrainedModel:
        """The model without memory."""
        recipe, dtype = self.recipe, DTYPES[self.dtype]
        if self.weights is not None:
            return quantised_model(
                meta_model(recipe.model_class, recipe.config, dtype), self.quantiser
            )
        return once_for_each(meta_model, recipe.model_class, recipe.config, dtype)

    @property
    def quantiser(self):
        """``quantization_config`` of ``from_pretrained``."""
        return self.weights and self.recipe.quantiser(self.weights, DTYPES[self.dtype], self.keep)

    def rig(self) -> Rig:
        """The cards, with nothing on them."""
        return Rig.simulated(self.cards, alloc_conf=self.alloc_conf, assume=self.assume)

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
        self.recipe.check(workload)
        if self.weights is None and self.keep is not None:
            raise ValueError(
                f"keep is {self.keep!r}, but no weights are quantised. Give weights, too."
            )
        if self.weights is not None and workload.train and workload.trained != "lora":
            raise ValueError(
                f"weights is {self.weights!r} and trained {workload.trained!r}; expected"
                ' trained="lora": packed weights stay as they are, and adapters on them learn.'
            )
        if self.quantiser and workload.train and not is_trainable(self.quantiser):
            raise ValueError(
                f"weights is {self.weights!r}, whose products have no derivative. Take nf4 or int8."
            )
        if isinstance(self.device_map, dict):
            check_device_map(self.placement(), len(self.cards), self.meta_model)

    def fit(self, workload: Workload | None = None) -> FitResult:
        """Run a workload, by default what suits the model.

        Raises:
            ValueError: as ``check``; an impossible workload.
        """
        started = time.perf_counter()
        rig = self.rig()  # what is wrong with the cards is said before the model is looked at
        workload = workload or self.recipe.workload()
        self.check(workload)
        with Attribution(rig, lines=False) as attribution:
            result = LoadedModel(self, rig).run(workload)
        found = [peak.by_purpose() for peak in attribution.peaks]
        seconds = round(time.perf_counter() - started, 2)
        return replace(result, by_purpose=found, seconds=seconds)

    def free_bytes(self) -> dict[int, int]:
        """What PyTorch finds free on each card before anything is loaded."""
        with Rig.simulated(self.cards) as rig:
            return {card.index: card.free_bytes for card in rig.memory()}

    def plan(self, strategy: str, max_memory: dict[Place, int | str]) -> dict[str, Place]:
        """The map transformers makes on these cards; ``max_memory`` as in ``from_pretrained``."""
        sizes = dict(max_memory)  # accelerate turns "20GiB" into a number in place
        with Rig.simulated(self.cards):
            return plan_device_map(self.meta_model, strategy, sizes)

    def placement(self) -> dict[str, Place]:
        """The device map; what an automatic one would offload is put on the last card instead, so
        that the answer is the error that a user without offloading meets."""
        if not isinstance(self.device_map, str):
            return self.recipe.names_here(self.device_map)
        if len(self.cards) == 1:
            return {"": 0}
        plan = self.plan(self.device_map, self.free_bytes() | {"cpu": _AMPLE_BYTES})
        last = len(self.cards) - 1
        return {name: place if isinstance(place, int) else last for name, place in plan.items()}

    def weights_bytes(self, placement: dict[str, Place]) -> Counter[Place]:
        """Bytes of the weights in every place of a map."""
        return bytes_by_place(self.meta_model, placement)


class LoadedModel:
    """A deployment's model on its cards, or the error that loading it ended with.

    ``rig`` is the deployment's, if not a new one. ``weights_bytes`` were allocated on each card as
    loading ended, by an error as well; ``error`` is PyTorch's out-of-memory message of the load, or
    None.
    """

    def __init__(self, deployment: Deployment, rig: Rig | None = None):
        self.deployment, self.rig, self.error = deployment, rig or deployment.rig(), None
        self.device_map = deployment.placement()
        quantised = {"quantization_config": deployment.quantiser} if deployment.weights else {}
        try:
            self.model = load(
                self.rig,
                deployment.recipe,
                deployment.checkpoint,
                device_map=self.device_map,
                dtype=DTYPES[deployment.dtype],
                **quantised,
            )
        except torch.OutOfMemoryError as error:
            self.error = str(error)
        self.weights_bytes = [memory.allocated_bytes for memory in self.rig.stages[-1].memory]

    def run(self, workload: Workload) -> FitResult:
        """Run a workload; the figures are those of all stages the rig has a record of."""
        started, rig, error = time.perf_counter(), self.rig, self.error
        if error is None:
            try:
                run_workload(rig, self.model, workload, self.deployment.recipe)
            except torch.OutOfMemoryError as caught:
                error = str(caught)
        verdict, oom = "fits", None
        if error is not None:
            card = int(re.search(r"GPU (\d+)", error)[1])
            verdict, oom = "oom", OutOfMemory(card, rig.stages[-1].name, error)
        devices = [self._device_fit(index) for index in range(len(rig.cards))]
        seconds = round(time.perf_counter() - started, 2)
        where = (rig.provenance, rig.host.memory, (self.deployment, workload))
        known = (rig.exact, rig.unmodelled, rig.assumed, self.deployment.recipe.decoding_bytes)
        return FitResult(verdict, devices, oom, seconds, *where, *known)

    def _device_fit(self, index: int) -> DeviceFit:
        stages, card = [stage.memory[index] for stage in self.rig.stages], self.rig.cards[index]
        allocated = max(memory.peak_allocated_bytes for memory in stages)
        reserved = max(memory.peak_reserved_bytes for memory in stages)
        # What is outside PyTorch's allocator only grows.
        free = stages[-1].free_bytes + stages[-1].reserved_bytes - reserved
        weights = self.weights_bytes[index]
        return DeviceFit(index, card.key, card.total_bytes, weights, allocated, reserved, free)


def fit(
    model: str | Path | PreTrainedConfig,
    card: str | Card | Sequence[str | Card] = "L4",
    count: int = 1,
    *,
    dtype: str = "bfloat16",
    device_map: str | dict[str, Place] = "auto",
    alloc_conf: str | None = None,
    free_gib: float | Sequence[float] | None = None,
    assume: str = ASSUME[1],
    **sizes,
) -> FitResult:
    """Will a model of transformers fit? Loads and runs it at full size on simulated cards.

    Args:
        model: as ``checkpoint`` of ``Deployment``.
        card, count, free_gib, assume, alloc_conf: as of ``SimulatedRig``.
        dtype, device_map: as of ``Deployment``.
        sizes: of the ``Workload``; those left out are what suits the model.

    Raises:
        ValueError: as ``Deployment.check``; an impossible workload.
    """
    options = (dtype, device_map, model, alloc_conf, free_gib, assume)
    deployment = Deployment(card, count, *options)
    return deployment.fit(deployment.recipe.workload(**sizes))


def load(rig: Rig, recipe: Recipe, checkpoint, **options) -> PreTrainedModel:
    """The checkpoint's model on the rig, in a stage "load"; ``options`` of ``from_pretrained``.

    Raises:
        torch.OutOfMemoryError: a card has no room.
    """
    with rig, rig.stage("load"):
        options |= {"config": recipe.config, "trust_remote_code": False}
        name = None if isinstance(checkpoint, PreTrainedConfig) else checkpoint
        return recipe.model_class.from_pretrained(name, **options)


def run_workload(rig: Rig, model, workload: Workload, recipe: Recipe | None = None, **options):
    """Run a workload on a loaded model, in the phases of ``OutOfMemory`` as stages.

    In training "prefill" only makes the inputs. ``options`` are for ``first_update``; the recipe is
    by default that of the model's configuration.

    Raises:
        torch.OutOfMemoryError: a card has no room; the last of ``rig.stages`` says in which stage.
    """
    recipe = recipe or read_recipe(model.config)
    with rig:
        with rig.stage("prefill"):
            prompt = recipe.prompt(model, workload)
            if workload.train:
                parameters = recipe.trained_parameters(model, workload.trained)
            else:
                outputs = recipe.prefill(model, prompt, workload.new_tokens)
        if workload.train:
            with rig.stage("backward"):
                recipe.train_step(model, prompt, workload.gradient_checkpointing)
            if workload.optimizer:
                with rig.stage("optimizer"):
                    first_update(parameters, **options)
        elif workload.new_tokens > 1:
            with rig.stage("decode"):
                recipe.decode(rig, model, prompt, outputs, workload.new_tokens)
