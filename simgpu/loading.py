"""Loading by transformers and accelerate while a simulated rig is active: without weights.

Everything is put in place by ``simulated_loading`` and taken away again when its block ends, but
for two: transformers' loader and accelerate's AlignDevicesHook go on taking bare numbers for CUDA
devices, which PyTorch no longer does (see ``device``).
"""

import itertools
import os
import re
import warnings
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from functools import partial, partialmethod
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import hooks
from accelerate.utils import modeling as accelerate_modeling
from accelerate.utils import offload
from huggingface_hub.errors import StrictDataclassError
from torch._subclasses.fake_tensor import FakeTensor
from transformers import (
    AutoConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    core_model_loading,
    masking_utils,
    modeling_utils,
)
from transformers.models.auto import auto_factory, modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import import_utils
from transformers.utils import logging as transformers_logging

from simgpu import quantised  # noqa: F401  (what it puts in place when a library is imported)
from simgpu.adapters import base_of, simulated_adapters
from simgpu.checkpoints import known_config, read_json, weight_map
from simgpu.device import DEVICE_TYPE, fake_mode, machine_device, on_card
from simgpu.numbers import numbers_of

# Of this module, as its classes copy what they find here when it is first imported.
_AUTO_CLASS = modeling_auto._BaseAutoModelClass
_ORIGINAL_WARMUP = modeling_utils.caching_allocator_warmup
# Arguments that say where weights come from; a simulated model has none to fetch.
_DOWNLOAD_ARGUMENTS = {"revision", "token", "cache_dir", "local_files_only"}
_DOWNLOAD_ARGUMENTS |= {"force_download", "use_safetensors"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_COUNTED, MOST_OF_A_KIND = "layer|expert|label", 10_000
# transformers asks these once and remembers the answer, which is another one inside the block.
_REMEMBERED = (import_utils.is_torch_cuda_available, import_utils.is_torch_bf16_gpu_available)
# Where a prompt's numbers are not known, it is neither packed nor padded.
_MASKING_ANSWERS = {"find_packed_sequence_indices": None, "fast_all": True}


@contextmanager
def simulated_loading(rig):
    """Let transformers and accelerate load on ``rig``'s cards until the block ends."""
    modeling_utils.caching_allocator_warmup = _warmup_of_cuda_cards
    hooks.AlignDevicesHook.execution_device = _EXECUTION_DEVICE
    with ExitStack() as stack:

        def replace(owner, name, changed):
            stack.enter_context(mock.patch.object(owner, name, changed))

        for name, answer in _MASKING_ANSWERS.items():
            replace(masking_utils, name, partial(_on_cards, getattr(masking_utils, name), answer))
        replace(masking_utils, "is_tracing", partial(_is_tracing, masking_utils.is_tracing))
        move = partial(_offload, hooks.set_module_tensor_to_device)
        replace(hooks, "set_module_tensor_to_device", move)
        to_disk = partial(_to_disk, offload.offload_weight)
        for owner in (offload, accelerate_modeling, core_model_loading):
            replace(owner, "offload_weight", to_disk)
        from_disk = partial(_from_disk, offload.load_offloaded_weight)
        for owner in (offload, accelerate_modeling):
            replace(owner, "load_offloaded_weight", from_disk)
        convert = partial(_out_of_memory_passes, core_model_loading.log_conversion_errors)
        replace(core_model_loading, "log_conversion_errors", convert)
        for owner in _defining("generate", GenerationMixin):
            replace(owner, "generate", partialmethod(_generate, rig, vars(owner)["generate"]))
        stack.enter_context(from_pretrained_replaced(partial(_from_pretrained, rig)))
        stack.enter_context(simulated_adapters())
        for owner in _defining("_from_config", PreTrainedModel):
            changed = partial(_from_config, vars(owner)["_from_config"].__func__)
            replace(owner, "_from_config", classmethod(changed))
        for answer in _REMEMBERED:
            answer.cache_clear()
            stack.callback(answer.cache_clear)
        yield


@contextmanager
def _out_of_memory_passes(original, *args, **kwargs):
    """transformers' loader catches what fails while it merges or splits tensors, and reports all at
    the end as another error: a card without room left is no fault of a conversion."""
    out_of_memory = None
    try:
        with original(*args, **kwargs):
            try:
                yield
            except torch.OutOfMemoryError as error:
                out_of_memory = error
                raise
    except core_model_loading.SkipParameters:
        if out_of_memory is None:
            raise
        raise out_of_memory from None


@contextmanager
def from_pretrained_replaced(replacement: Callable):
    """Until the block ends, ``replacement`` stands for the ``from_pretrained`` of every model.

    It is given the original, the class and the arguments. Replaced are those of the Auto classes,
    of ``PreTrainedModel``, and of all models that have one of their own, also if they are first
    imported inside the block.
    """
    with ExitStack() as stack:

        def replace(owner: type):
            original = vars(owner)["from_pretrained"].__func__
            # Unless it is asked for, code of a checkpoint does not run, and nobody is asked.
            changed = partial(replacement, original, trust_remote_code=False)
            stack.enter_context(mock.patch.object(owner, "from_pretrained", classmethod(changed)))

        for owner in _defining("from_pretrained", _AUTO_CLASS, PreTrainedModel):
            replace(owner)
        created = partial(_new_class, PreTrainedModel.__init_subclass__.__func__, replace)
        hook = mock.patch.object(PreTrainedModel, "__init_subclass__", classmethod(created))
        stack.enter_context(hook)
        yield


def _new_class(original, replace, cls, **kwargs):
    original(cls, **kwargs)
    if "from_pretrained" in vars(cls):
        replace(cls)


def _defining(name: str, *roots: type) -> list[type]:
    """Those of these classes and their subclasses that define an attribute themselves."""
    classes = list(roots)
    for each in classes:  # which grows meanwhile
        classes += [below for below in each.__subclasses__() if below not in classes]
    return [each for each in classes if name in vars(each)]


def _on_cards(original, answer, tensor=None):
    is_unknown = tensor is not None and on_card(tensor) and numbers_of(tensor) is None
    return answer if is_unknown else original(tensor)


def _is_tracing(original, tensor=None) -> bool:
    # A tensor without numbers is otherwise a sign of tracing.
    return not (tensor is not None and on_card(tensor)) and original(tensor)


def _warmup_of_cuda_cards(model, expanded_device_map, *args, **kwargs):
    """The loader reserves memory ahead in one block, sized by free memory on "cuda" only."""
    places = dict(expanded_device_map)
    for name, place in places.items():
        index = place.index if getattr(place, "type", None) == DEVICE_TYPE else place
        if isinstance(index, int):
            places[name] = torch.device("cuda", index)
    return _ORIGINAL_WARMUP(model, places, *args, **kwargs)


def _execution_device(hook):
    """Where AlignDevicesHook puts weights and inputs; it first asks whether they are there."""
    if "execution_device" not in vars(hook):
        raise AttributeError("execution_device")
    place = vars(hook)["execution_device"]
    return (machine_device(place) or place) if isinstance(place, int) else place


# On the class, so that it holds for hooks from before the first simulation as well.
_EXECUTION_DEVICE = property(
    _execution_device, lambda hook, place: vars(hook).update(execution_device=place)
)


def _offload(original, module, tensor_name, device, value=None, **kwargs):
    """As accelerate, which calls the old parameter's class; without numbers that is not allowed."""
    path, _, name = tensor_name.rpartition(".")
    owner = module.get_submodule(path)
    parameter = owner._parameters.get(name)
    if not isinstance(parameter, FakeTensor):
        return original(module, tensor_name, device, value=value, **kwargs)
    place = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if value is not None or place != parameter.device:
        moved = (parameter if value is None else value).detach().to(device)
        owner._parameters[name] = torch.nn.Parameter(moved, requires_grad=parameter.requires_grad)
    if device not in ("cpu", "meta"):
        torch.cuda.empty_cache()  # as accelerate does after each


def _to_disk(original, weight, weight_name, offload_folder, index=None):
    """As accelerate; of a weight without numbers only the entry of the index is made."""
    if not isinstance(weight, FakeTensor):
        return original(weight, weight_name, offload_folder, index)
    index = {} if index is None else index
    dtype = str(weight.dtype).removeprefix("torch.")
    index[weight_name] = {"dtype": dtype, "shape": list(weight.shape)}
    return index


def _from_disk(original, weight_file, weight_info):
    if os.path.exists(weight_file):
        return original(weight_file, weight_info)
    with fake_mode():
        return torch.empty(weight_info["shape"], dtype=getattr(torch, weight_info["dtype"]))


def _generate(model, rig, original, *args, **kwargs):
    """``generate`` as far as it may go: every token it finds is one that ends no answer."""
    if not isinstance(next(model.parameters()), FakeTensor):
        return original(model, *args, **kwargs)
    ends = set()
    for config in (kwargs.get("generation_config"), model.generation_config, model.config):
        end = getattr(config, "eos_token_id", None)
        ends.update(end if isinstance(end, list) else [end])
    token = next(each for each in itertools.count() if each not in ends)
    with rig.numbers.assumptions.choosing(token):
        return original(model, *args, **kwargs)


def _from_pretrained(
    rig, original, cls, pretrained_model_name_or_path, *args, config=None, **kwargs
):
    """``from_pretrained`` by transformers' own loader, on tensors that have no numbers."""
    name = pretrained_model_name_or_path
    if "state_dict" in kwargs:  # from below, or the caller's own weights
        return original(cls, name, *args, config=config, **kwargs)
    if kwargs.pop("trust_remote_code", False):
        raise ValueError(
            "trust_remote_code=True would run code from the hub. A simulated rig takes the classes"
            " that are installed and never runs remote code; leave the argument out."
        )
    if config is None and (base := base_of(name)):
        model = cls.from_pretrained(base, *args, **kwargs)
        model.load_adapter(name)
        return model
    reader = AutoConfig if issubclass(cls, _AUTO_CLASS) else cls.config_class
    config = read_config(config or name, reader)
    if issubclass(cls, _AUTO_CLASS):
        model_class, config = _model_class(cls, config)
        return model_class.from_pretrained(name, *args, config=config, **kwargs)
    for argument in _DOWNLOAD_ARGUMENTS:
        kwargs.pop(argument, None)
    files = weight_map(Path(name)) if name else {}
    with _quiet_loader(), rig.loading(), rig.host.loading(), rig.out_of_memory_stays():
        # No name here for the tensors: the loader's own have to be gone when it returns.
        loaded = original(
            cls,
            None,
            *args,
            config=config,
            state_dict=rig.host.map(_empty_checkpoint(cls, config), files),
            **kwargs,
        )
    rig.register_weights([loaded[0] if isinstance(loaded, tuple) else loaded])
    return loaded


_found: dict[tuple, Any] = {}
_MOST_FOUND = 16


def once_for_each(function: Callable, cls: type, config: PreTrainedConfig, *given):
    """What a function finds for a model class and a configuration, kept: whoever looks for an edge
    loads one model again and again."""
    key = function, cls, config.to_json_string(use_diff=False), given
    if key not in _found:
        if len(_found) >= _MOST_FOUND:
            _found.clear()
        _found[key] = function(cls, config, *given)
    return _found[key]


def _from_config(original, cls, config, **kwargs):
    """A new model, whose weights nobody draws: in no memory, and without numbers."""
    if torch.get_default_device().type != "cpu":  # of a loader, or on the cards at once
        return original(cls, config, **kwargs)
    with fake_mode(), modeling_utils.init.no_init_weights():
        return original(cls, config, **kwargs)


@contextmanager
def _quiet_loader():
    """transformers' loader without progress bar, and without threads, which know no rig."""
    with ExitStack() as stack:
        if transformers_logging.is_progress_bar_enabled():
            transformers_logging.disable_progress_bar()
            stack.callback(transformers_logging.enable_progress_bar)
        stack.enter_context(mock.patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"))
        stack.enter_context(warnings.catch_warnings())
        # The loader finds tied weights by address; without numbers none are tied.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield


def read_config(source, reader: type = AutoConfig) -> PreTrainedConfig:
    """A checkpoint's configuration: registered, in a directory, or downloaded before.

    Raises:
        ValueError: there is none on this machine, or it cannot be used; with what to do.
    """
    if isinstance(source, PreTrainedConfig):
        return source
    known = known_config(str(source))
    if known is not None:
        return known
    file = Path(source) / "config.json"
    if file.is_file():
        _check_config(file)
    try:
        return reader.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except (OSError, TypeError, ValueError, AttributeError, StrictDataclassError) as error:
        if file.is_file():
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{file} cannot be used: {reason} Correct it, or download it."
            ) from error
        advice = f"Run: hf download {source} config.json"
        if not _HUB_ID.fullmatch(str(source)):
            advice = f"{str(source)!r} is no hub id: give a directory that has a config.json."
        raise ValueError(
            f"checkpoint is {str(source)!r}, of which this machine has no configuration. Expected"
            " a directory with a config.json, a checkpoint of the hub whose config.json has been"
            f" downloaded, or one registered with simgpu. {advice}"
        ) from error


def _check_config(file: Path):
    """Raise ValueError for a configuration of code that is not installed, or beyond all sense."""
    content = read_json(file)
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(
            f"{file} has model_type {kind!r:.60}, which no installed class stands for; code that"
            " comes with a checkpoint is never run. Expected a model that transformers knows, or"
            " one whose package is imported. Import that package first."
        )
    parts = [content]
    for part in parts:  # which grows meanwhile
        for name, size in part.items():
            if isinstance(size, dict):
                parts.append(size)
            # Modules and names take memory and time, even if tensors are only simulated.
            elif isinstance(size, int) and size > MOST_OF_A_KIND and re.search(_COUNTED, name):
                raise ValueError(
                    f"{file}: {name} is {size:,}. Expected at most {MOST_OF_A_KIND:,}. Correct it."
                )


def _model_class(auto_class: type, config) -> tuple[type, PreTrainedConfig]:
    """The class that an Auto class loads for a configuration, and the part of it for the class."""
    if type(config) not in auto_class._model_mapping:
        raise ValueError(
            f"{auto_class.__name__} has no model for the configuration {type(config).__name__}."
            " Load it with the Auto class, or the model class, that its documentation names."
        )
    model_class = auto_factory._get_model_class(config, auto_class._model_mapping)
    if getattr(model_class, "config_class", None) is config.sub_configs.get("text_config", config):
        config = config.get_text_config()  # the language model of one for images and text
    return model_class, config


def _empty_checkpoint(cls: type, config) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint of this configuration, on the CPU, without numbers."""
    layout = once_for_each(_layout, cls, config)
    with fake_mode():
        return {
            name: torch.empty(shape, dtype=dtype, device="cpu")
            for name, (shape, dtype) in layout.items()
        }


def _layout(cls: type, config) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Name to shape and type of a checkpoint's tensors."""
    with torch.device("meta"):
        model = cls(config)
    # A weight that is another one under a second name is not stored twice.
    tied = getattr(model, "all_tied_weights_keys", {})
    stored = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    floating = config.dtype or torch.bfloat16
    return {
        name: (tensor.shape, floating if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in core_model_loading.revert_weight_conversion(model, stored).items()
    }
