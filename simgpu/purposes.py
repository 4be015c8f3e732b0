"""What memory of a simulated card is for. Whoever makes a tensor for a purpose says so; nothing is
guessed from sizes or names.

Weights are the parameters and buffers of modules when a load ends, and those an optimiser has;
gradients and optimiser state are what the parameters and the optimiser then hold; the KV cache is
what transformers' caches make and keep; workspaces are taken for cuBLAS. The rest is activations.
"""

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import Cache

WEIGHTS, GRADIENTS, OPTIMIZER_STATE = "weights", "gradients", "optimizer state"
KV_CACHE, WORKSPACE, ACTIVATIONS = "KV cache", "workspace", "activations"


@contextmanager
def registration(accounting):
    """In the block caches and optimisers tell ``accounting`` what their tensors are for."""
    original = Cache.update

    def update(cache, key_states, value_states, layer_idx, *args, **kwargs):
        with accounting.making(KV_CACHE):
            found = original(cache, key_states, value_states, layer_idx, *args, **kwargs)
        accounting.register(KV_CACHE, _tensors_of(vars(cache.layers[layer_idx])))
        return found

    def stepped(optimizer, args, kwargs):
        register_optimizer(accounting, optimizer)

    hook = register_optimizer_step_post_hook(stepped)
    try:
        with mock.patch.object(Cache, "update", update):
            yield
    finally:
        hook.remove()


def register_optimizer(accounting, optimizer: torch.optim.Optimizer):
    """What an optimiser updates are weights; their gradients, and its own numbers."""
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    accounting.register(WEIGHTS, parameters)
    accounting.register(GRADIENTS, gradients_of(parameters))
    for state in optimizer.state.values():
        accounting.register(OPTIMIZER_STATE, _tensors_of(state))


def all_optimizers() -> list[torch.optim.Optimizer]:
    """Every optimiser of this process."""
    found = (each for each in gc.get_objects() if issubclass(type(each), torch.optim.Optimizer))
    return list(found)


def all_modules() -> Iterator[torch.nn.Module]:
    """Every module of this process."""
    # Not isinstance, which asks proxies of other libraries for their __class__ and wakes them.
    return (each for each in gc.get_objects() if issubclass(type(each), torch.nn.Module))


def weights_of(modules: Iterable[torch.nn.Module]) -> Iterator[torch.Tensor]:
    """Parameters and buffers of modules, without those of what they contain."""
    for module in modules:
        yield from module.parameters(recurse=False)
        yield from module.buffers(recurse=False)


def gradients_of(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The gradients that tensors have."""
    return (each.grad for each in tensors if each.is_leaf and each.grad is not None)


def _tensors_of(values: dict) -> Iterator[torch.Tensor]:
    return (each for each in values.values() if isinstance(each, torch.Tensor))


def split(allocated: int, weights: int, kv_cache: int, workspace: int | None) -> dict:
    """Allocated bytes by purpose, each at most what the others leave; the rest is activations."""
    found, rest = {}, allocated
    for name, size in (("weights", weights), ("kv_cache", kv_cache), ("workspace", workspace)):
        found[f"{name}_bytes"] = None if size is None else min(size, rest)
        rest -= found[f"{name}_bytes"] or 0
    return found | {"activations_bytes": rest}
