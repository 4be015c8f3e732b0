"""GPUs without a GPU: a catalogue of cards, and ``Rig``, inside which PyTorch code finds them.

Importing this package imports no torch; the names below bring it when they are first used. So
``simgpu.catalog``, ``simgpu.units`` and ``simgpu.oom`` serve programs that run without it.
"""

import logging
import sys
import warnings
from importlib import import_module

if sys.platform == "win32":
    message = "simgpu is made for Linux and macOS and not tried on Windows: use WSL 2."
    warnings.warn(message, stacklevel=2)
# transformers imports torchao wherever that is installed; on machines without CUDA it then warns of
# kernels that nobody has asked it for, and so does bitsandbytes.
_NEWS = {"torchao": "Failed to load", "torch.utils._pytree": "Enum subclass"}
_NEWS |= {"bitsandbytes.backends.cpu.ops": "Failed to load"}
for _logger, _news in _NEWS.items():
    logging.getLogger(_logger).addFilter(lambda record, news=_news: news not in record.getMessage())
_HOMES = {
    "CARDS": "catalog",
    "Card": "catalog",
    "find_card": "catalog",
    "MAX_CARDS": "catalog",
    "CardMemory": "rig",
    "Rig": "rig",
    "Stage": "rig",
    "HostMemory": "host",
    "Estimate": "estimation",
    "estimate": "estimation",
    "fit": "fitting",
}
__all__ = [*_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__():
    return sorted({*globals(), *_HOMES})
