"""Will GLM-4V-9B fit? ``simgpu.fitting`` with the official checkpoint where none is named."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from glm4v_nb.model.configuration import OFFICIAL, read_config
from glm4v_nb.workload import Workload
from simgpu import Card, Rig, fitting
from simgpu.advice import cards_for_weights as cards_for_weights_of
from simgpu.fitting import DTYPES, FitResult, read_device_map, run_workload
from simgpu.placement import Place
from simgpu.ranks import deployment_class

__all__ = [
    "DTYPES",
    "Deployment",
    "cards_for_weights",
    "fit",
    "load",
    "predict_run",
    "read_device_map",
    "run_workload",
]


@dataclass(frozen=True)
class Deployment(fitting.Deployment):
    """As ``fitting.Deployment``, by default of the official checkpoint."""

    checkpoint: str | Path = OFFICIAL


def fit(
    card: str | Card | Sequence[str | Card] = "L4",
    count: int = 1,
    dtype: str = "bfloat16",
    device_map: str | dict[str, Place] = "auto",
    workload: fitting.Workload | None = None,
    checkpoint: str | Path = OFFICIAL,
    alloc_conf: str | None = None,
    parallel: str | None = None,
    **others,
) -> FitResult:
    """Run a workload of a ``Deployment``, whose arguments the others are, on simulated cards; with
    ``parallel="tensor"`` of a ``TensorParallel``, a part of each layer on every card.

    Raises:
        ValueError: as ``Deployment.check``; an impossible workload.
    """
    kind = deployment_class(parallel)
    deployment = kind(card, count, dtype, device_map, checkpoint, alloc_conf, **others)
    return deployment.fit(workload)


def load(rig: Rig, device_map, dtype: torch.dtype, checkpoint: str | Path = OFFICIAL, **options):
    """The checkpoint's model on the rig, in a stage "load".

    ``options`` are others of ``from_pretrained``, as ``max_memory``.

    Raises:
        torch.OutOfMemoryError: a card has no room.
    """
    with rig, rig.stage("load"):
        options |= {"config": read_config(checkpoint), "device_map": device_map, "dtype": dtype}
        return AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=False, **options)


def cards_for_weights(card: str, dtype: str) -> int:
    """How many such cards hold the weights, by division; what else a run needs is not counted."""
    return cards_for_weights_of(Deployment(card, dtype=dtype))


@functools.cache
def _fit_once(card: str, count: int, dtype: str, device_map: str, workload: Workload) -> FitResult:
    return fit(card, count, dtype, device_map, workload)  # runs of a sweep often share their sizes


def predict_run(notebook: str, parameters: dict) -> str | None:
    """What ``fit`` says of the full-size model with a notebook's cards, map and workload, in a
    few words; None for a notebook without a card among its parameters, or where ``fit`` refuses."""
    card, count = parameters.get("card"), parameters.get("count", 1)
    device_map = parameters.get("device_map", "auto")
    if not isinstance(card, str) or not card or not isinstance(device_map, str):
        return None
    names = ("batch_size", "images", "text_tokens", "new_tokens")
    sizes = {name: parameters[name] for name in names if isinstance(parameters.get(name), int)}
    try:
        dtype = parameters.get("dtype", "bfloat16")
        result = _fit_once(card, count, dtype, device_map, Workload(**sizes))
    except ValueError:
        return None
    if result.fits:
        return "fits"
    return f"does not fit: card {result.oom.device}, {result.oom.phase}"
