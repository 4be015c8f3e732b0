"""peft's adapters on simulated cards, from their configuration alone or with their weights.

A file of safetensors that is opened for a card is read on the CPU, and what is taken of it is moved
there: the library's own way to a device that is called "cuda" leads past the simulated cards.
"""

import warnings
from contextlib import ExitStack, contextmanager
from functools import partialmethod
from pathlib import Path
from unittest import mock

import safetensors
import safetensors.torch
import torch
from accelerate.utils import modeling as accelerate_modeling
from transformers import modeling_utils
from transformers.integrations.peft import PeftAdapterMixin
from wrapt import when_imported

from simgpu.checkpoints import read_json
from simgpu.device import as_card

CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.*"
_OPENERS = (safetensors, safetensors.torch, modeling_utils, accelerate_modeling)
_active = 0  # blocks of ``simulated_adapters``


@contextmanager
def simulated_adapters():
    """Let safetensors, peft and transformers load adapters until the block ends."""
    global _active
    with ExitStack() as stack:
        for owner in _OPENERS:
            stack.enter_context(mock.patch.object(owner, "safe_open", _Opened))
        load = partialmethod(_load_adapter, PeftAdapterMixin.load_adapter)
        stack.enter_context(mock.patch.object(PeftAdapterMixin, "load_adapter", load))
        _active += 1
        try:
            yield
        finally:
            _active -= 1


def base_of(name) -> str | None:
    """The model that an adapter's directory is for; None for any other place."""
    path = Path(name or "")
    if not name or not (path / CONFIG).is_file() or (path / "config.json").is_file():
        return None
    return read_json(path / CONFIG).get("base_model_name_or_path")


def _is_without_weights(name) -> bool:
    return (Path(name) / CONFIG).is_file() and not any(Path(name).glob(_WEIGHTS))


class _Opened:
    """A file that is open for a card."""

    _original = safetensors.safe_open

    def __new__(cls, filename, *args, device="cpu", **kwargs):
        place = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if as_card(place) is place:  # no card
            return cls._original(filename, *args, device=device, **kwargs)
        self = super().__new__(cls)
        self._place = place
        self._file = cls._original(filename, *args, device="cpu", **kwargs)
        return self

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *exception):
        return self._file.__exit__(*exception)

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name).to(self._place)

    def get_tensors(self, *names) -> dict[str, torch.Tensor]:
        found = self._file.get_tensors(*names)
        return {name: tensor.to(self._place) for name, tensor in found.items()}


def _load_adapter(model, original, peft_model_id=None, adapter_name=None, *args, **kwargs):
    """transformers' ``load_adapter``; without weights the adapter is added as a new one is."""
    if peft_model_id is None or not _is_without_weights(peft_model_id):
        return original(model, peft_model_id, adapter_name, *args, **kwargs)
    from peft import PeftConfig

    return model.add_adapter(PeftConfig.from_pretrained(peft_model_id), adapter_name)


@when_imported("peft.peft_model")
def _replace_loader(peft_model):
    original = peft_model.load_peft_weights

    def load_peft_weights(model_id, *args, **kwargs):
        if not _active or not _is_without_weights(model_id):
            return original(model_id, *args, **kwargs)
        # What is missing stays as it was made, and peft would list every name of it.
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        return {}

    peft_model.load_peft_weights = load_peft_weights
