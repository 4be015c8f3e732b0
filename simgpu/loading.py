"""What the reader's own code meets while a simulated rig is active: torch.cuda, "cuda:0" and
from_pretrained.

Everything is put in place by ``simulated_world`` and taken away again when its block ends, but for
two: transformers' loader and accelerate's AlignDevicesHook go on taking bare numbers for CUDA
devices, which PyTorch no longer does (see ``device``).
"""

import os
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from accelerate import hooks
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from torch.optim import optimizer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    masking_utils,
    modeling_utils,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import import_utils
from transformers.utils import logging as transformers_logging

from glm4v_nb.model import GLM4VForConditionalGeneration
from glm4v_nb.model.checkpoint import weight_map
from glm4v_nb.model.configuration import read_config
from simgpu.device import DEVICE_TYPE, fake_mode, machine_device
from simgpu.intercept import CudaFunctions, CudaNames
from simgpu.operators import routed_attention, routed_convolution

# What a notebook may call ``from_pretrained`` of.
MODEL_CLASSES = (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GLM4VForConditionalGeneration,
)
# Taken here and not when a block begins: the machine itself may be simulated, in tests.
_ORIGINAL_LOAD = GLM4VForConditionalGeneration.from_pretrained
_ORIGINAL_WARMUP = modeling_utils.caching_allocator_warmup
_ROUTES = {
    "scaled_dot_product_attention": (routed_attention, functional.scaled_dot_product_attention),
    "conv2d": (routed_convolution, functional.conv2d),
}
# Arguments that say where weights come from; a simulated model has none to fetch.
_DOWNLOAD_ARGUMENTS = (
    "revision",
    "token",
    "cache_dir",
    "local_files_only",
    "force_download",
    "use_safetensors",
)


# transformers asks these once and remembers the answer, which is another one inside the block.
_REMEMBERED_ANSWERS = (
    import_utils.is_torch_cuda_available,
    import_utils.is_torch_bf16_gpu_available,
)


@contextmanager
def simulated_world(rig):
    """Let torch, transformers and accelerate see ``rig``'s cards as CUDA devices until the block
    ends.

    ``rig`` has ``cards``, ``allocators``, ``host``, ``release_workspaces()``, and the context
    managers ``loading()`` and ``deferring_errors()``.
    """
    fake_mode()
    cuda = CudaFunctions(rig)
    with ExitStack() as stack:
        for name in (name for name in dir(cuda) if not name.startswith("_")):
            stack.enter_context(
                mock.patch.object(torch.cuda, name, getattr(cuda, name), create=True)
            )
        stack.enter_context(
            mock.patch.object(
                torch._C, "_cuda_clearCublasWorkspaces", rig.release_workspaces, create=True
            )
        )
        for name, (route, original) in _ROUTES.items():
            stack.enter_context(mock.patch.object(functional, name, route(original, rig)))
        # Prompts on simulated cards have no values to look at: they are neither packed nor padded.
        for name, answer in (
            ("find_packed_sequence_indices", None),
            ("fast_all", True),
            ("is_tracing", False),
        ):
            original = getattr(masking_utils, name)
            stack.enter_context(
                mock.patch.object(masking_utils, name, _unless_simulated(original, answer))
            )
        modeling_utils.caching_allocator_warmup = _warmup_of_cuda_cards
        hooks.AlignDevicesHook.execution_device = _EXECUTION_DEVICE
        load = _simulated_from_pretrained(rig, _ORIGINAL_LOAD)
        for model_class in MODEL_CLASSES:
            stack.enter_context(mock.patch.object(model_class, "from_pretrained", load))
        stack.enter_context(
            mock.patch.object(GLM4VForConditionalGeneration, "generate", _refused_generate())
        )
        offload = _offload_of_numberless_weights(hooks.set_module_tensor_to_device)
        stack.enter_context(mock.patch.object(hooks, "set_module_tensor_to_device", offload))
        # Optimisers take their default way, many tensors at a time, only for types of tensor on
        # this list.
        types = [*optimizer._foreach_supported_types, FakeTensor]
        stack.enter_context(mock.patch.object(optimizer, "_foreach_supported_types", types))
        for answer in _REMEMBERED_ANSWERS:
            answer.cache_clear()
            stack.callback(answer.cache_clear)
        refused = _refused_autocast(torch.autocast.__init__)
        stack.enter_context(mock.patch.object(torch.autocast, "__init__", refused))
        # torch's autograd would start a thread per card, and knows of one simulated card only.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(CudaNames(cuda))
        yield


def _unless_simulated(original, answer):
    def function(tensor=None):
        return (
            answer if tensor is not None and tensor.device.type == DEVICE_TYPE else original(tensor)
        )

    return function


def _warmup_of_cuda_cards(model, expanded_device_map, *args, **kwargs):
    """The loader reserves memory ahead in one block, but sizes it by free memory only on "cuda"
    devices."""
    cards = {
        name: (
            torch.device("cuda", device)
            if isinstance(device, int)
            else (
                torch.device("cuda", device.index)
                if isinstance(device, torch.device) and device.type == DEVICE_TYPE
                else device
            )
        )
        for name, device in expanded_device_map.items()
    }
    return _ORIGINAL_WARMUP(model, cards, *args, **kwargs)


def _execution_device(hook):
    """Where accelerate's AlignDevicesHook puts weights and inputs; it first asks whether they are
    there already."""
    try:
        place = vars(hook)["execution_device"]
    except KeyError:
        raise AttributeError("execution_device") from None
    return (machine_device(place) or place) if isinstance(place, int) else place


# On the class, so that it holds for hooks from before the first simulation as well.
_EXECUTION_DEVICE = property(
    _execution_device, lambda hook, place: vars(hook).update(execution_device=place)
)


def _offload_of_numberless_weights(original):
    """Moves a weight in and out of a card as accelerate's hooks do when it is offloaded to the CPU.

    accelerate makes the new parameter by calling the old one's class, which tensors without numbers
    do not allow.
    """

    def set_module_tensor_to_device(module, tensor_name, device, value=None, **kwargs):
        path, _, name = tensor_name.rpartition(".")
        owner = module.get_submodule(path)
        parameter = owner._parameters.get(name)
        if not isinstance(parameter, FakeTensor):
            return original(module, tensor_name, device, value=value, **kwargs)
        moved = (parameter if value is None else value).detach().to(device)
        owner._parameters[name] = torch.nn.Parameter(moved, requires_grad=parameter.requires_grad)
        if device not in ("cpu", "meta"):
            torch.cuda.empty_cache()  # as accelerate does after each

    return set_module_tensor_to_device


def _refused_autocast(original):
    """torch casts only for devices it knows: on simulated cards autocast would do nothing, without
    a word."""

    def __init__(self, device_type, dtype=None, enabled=True, cache_enabled=None):
        if enabled and device_type in ("cuda", DEVICE_TYPE):
            raise NotImplementedError(
                "autocast is not simulated: the weights would be computed in their own type and the"
                " bytes would be wrong. Load the model in the type you want (dtype=torch.bfloat16),"
                " or use autocast on a real device."
            )
        original(self, device_type, dtype, enabled, cache_enabled)

    return __init__


def _refused_generate():
    original = GLM4VForConditionalGeneration.generate

    def generate(self, *args, **kwargs):
        if not isinstance(next(self.parameters()), FakeTensor):
            return original(self, *args, **kwargs)
        raise RuntimeError(
            "generate() looks at the tokens it makes, and tensors on simulated cards have no"
            " numbers. Measure the same steps with glm4v_nb.workload: outputs = prefill(model,"
            " prompt), then decode(rig, model, prompt, outputs, new_tokens); or generate on a real"
            " device."
        )

    return generate


def _simulated_from_pretrained(rig, original):
    """``from_pretrained`` that runs transformers' own loader on tensors that have no numbers."""

    def from_pretrained(name_or_path, *args, config=None, **kwargs):
        if not isinstance(config, PreTrainedConfig):
            config = read_config(config or name_or_path)
        for name in _DOWNLOAD_ARGUMENTS:
            kwargs.pop(name, None)
        if kwargs.pop("trust_remote_code", False):
            raise ValueError(
                "trust_remote_code=True would run code from the hub. glm4v_nb has its own GLM-4V-9B"
                " classes and never runs remote code; leave the argument out."
            )
        files = weight_map(Path(name_or_path or ""))
        progress = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            # In the loader's threads "cuda:0" would not be taken for a simulated card.
            with (
                warnings.catch_warnings(),
                mock.patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}),
                rig.loading(),
                rig.host.loading(),
            ):
                # The loader compares storages by address to find tied weights; without numbers none
                # are tied.
                warnings.filterwarnings(
                    "ignore", message="Accessing the data pointer of FakeTensor"
                )
                # No name here for the tensors: those that the loader drops have to be gone when it
                # returns.
                return original(
                    None,
                    *args,
                    config=config,
                    state_dict=rig.host.map(_empty_checkpoint(config), files),
                    **kwargs,
                )
        finally:
            if progress:
                transformers_logging.enable_progress_bar()

    return from_pretrained


def _empty_checkpoint(config) -> dict[str, torch.Tensor]:
    """All tensors of an official checkpoint of this configuration, on the CPU, without numbers."""
    with torch.device("meta"):
        model = GLM4VForConditionalGeneration(config)
    official = revert_weight_conversion(model, model.state_dict())
    dtype = config.dtype or torch.bfloat16
    with fake_mode():
        return {
            name: torch.empty(tensor.shape, dtype=dtype, device="cpu")
            for name, tensor in official.items()
        }
