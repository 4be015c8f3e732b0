"""Is this machine ready? Driver, torch, every GPU exercised, libraries, memory, disk, kernel.

Nothing is changed on the machine. A finding is "ok", "look" (works, but read the advice) or "stop"
(mend it first). A machine without GPUs is fine: the notebooks simulate them.
"""

import difflib
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
import pynvml
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from simgpu import Rig
from simgpu.nvml import asked, card_count, driver_version, memory_of, nvml, processes_on
from simgpu.simulated import ALLOC_CONF, SIMULATED_OPTIONS

OK, LOOK, STOP = "ok", "look", "stop"
MISSING = "missing"  # in place of a version
CHECKPOINT_BYTES = 27_812_641_792  # the official weights in bfloat16, see notebook 01
GIB = 2**30
# Shown with their versions; the other dependencies only when something is wrong with them.
MAIN_LIBRARIES = "torch transformers accelerate safetensors jupyterlab ipywidgets papermill".split()

_UPDATED = "It was updated and its older part still runs: restart the machine and its containers."
_NOT_LOADED = "It is not loaded: sudo modprobe nvidia, or restart; remove it if there is no card."
_BROKEN_DRIVER = {
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: _UPDATED,
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: _NOT_LOADED,
}
# What options of PYTORCH_CUDA_ALLOC_CONF mean; those of torch 2.13, c10/core/AllocatorConfig.cpp
# and c10/cuda/CUDAAllocatorConfig.h.
_ALLOCATOR_OPTIONS = {
    "expandable_segments": "segments that grow, which leaves fewer holes",
    "max_split_size_mb": "larger blocks are kept whole",
    "garbage_collection_threshold": "cached blocks are given back early",
    "roundup_power2_divisions": "sizes are rounded up, to be reused more often",
    "max_non_split_rounding_mb": "whole blocks may be larger than what was asked for",
    "large_segment_size_mb": "another size of segments",
    "backend": "another allocator",
    "per_process_memory_fraction": "less than the whole card",
}
_ALLOCATOR_OPTIONS |= dict.fromkeys(
    """graph_capture_record_stream_reuse throw_on_cudamalloc_oom release_lock_on_cudamalloc
    pinned_use_cuda_host_register pinned_num_register_threads pinned_use_background_threads
    pinned_reserve_segment_size_mb pinned_max_round_threshold_mb
    pinned_max_cached_size_mb""".split(),
    "of graphs, locks or pinned host memory",
)


@dataclass(frozen=True)
class Finding:
    """One checked thing. ``advice`` is empty when there is nothing to do."""

    subject: str
    status: str
    found: str
    advice: str = ""


def examine() -> Iterator[Finding]:
    """Every finding in turn; a check that breaks is one too, so that the others still run."""
    for check in (
        _python, _libraries, _driver, _torch_build, _allocator, _gpus,
        _copies, _simulation, _host_memory, _disk, _kernel,
    ):  # fmt: skip
        try:
            yield from check()
        except Exception as error:
            subject = check.__name__.strip("_").replace("_", " ")
            reason = f"the check failed: {type(error).__name__}: {error}"
            yield Finding(subject, STOP, _without_names(reason))


def verdict(findings: list[Finding]) -> str:
    """The worst status of all."""
    return max((finding.status for finding in findings), key=(OK, LOOK, STOP).index)


def report(findings: list[Finding]) -> str:
    """One block of text for a bug report, without home directory and names of user and host."""
    lines = [f"glm4v-nb doctor, {time.strftime('%Y-%m-%d')}: {verdict(findings)}"]
    lines += [f"{one.status:5s}{one.subject}: {one.found}" for one in findings]
    return _without_names("\n".join(lines))


def _finding(subject: str, right: bool, found: str, advice: str = "", otherwise=LOOK) -> Finding:
    """ "ok" where all is right; else the advice with the other status."""
    return Finding(subject, OK, found) if right else Finding(subject, otherwise, found, advice)


def _python():
    # Older ones cannot import the package.
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    advice = "Tested are 3.11 to 3.13; make PYTHON=python3.13 takes another."
    yield _finding("Python", (3, 11) <= sys.version_info[:2] <= (3, 13), found, advice)


def _libraries():
    try:
        lines = metadata.requires("glm4v-nb") or ()
    except metadata.PackageNotFoundError:
        found = "glm4v-nb runs from its source without being installed: its needs are not known"
        advice = "Run make setup, or pip install -e . in its folder."
        yield Finding("libraries", LOOK, found, advice)
        return
    wrong = []
    for requirement in map(Requirement, lines):
        needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        version, allowed = _version(requirement.name), requirement.specifier
        right = version != MISSING and allowed.contains(Version(version), prereleases=True)
        if needed and not right:
            wrong.append(f"{requirement.name} {version}, expected {allowed}")
    versions = ", ".join(f"{name} {_version(name)}" for name in MAIN_LIBRARIES)
    yield _finding("libraries", not wrong, "; ".join(wrong) or versions, "Run make setup.", STOP)
    if (torchvision := _version("torchvision")) != MISSING:
        advice = (
            "It is not needed, and one that does not match torch breaks importing transformers: pip"
            " uninstall it."
        )
        yield Finding("torchvision", LOOK, f"{torchvision} is installed", advice)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return MISSING


def _driver():
    try:
        with nvml():
            yield from _cards_of_the_driver()
    except pynvml.NVMLError_LibraryNotFound as error:
        advice = "Cards are simulated; real ones need a driver."
        yield Finding("NVIDIA driver", OK, f"none ({error})", advice)
    except pynvml.NVMLError as error:
        otherwise = "Run nvidia-smi, which says more; reinstall the driver or restart the machine."
        advice = _BROKEN_DRIVER.get(error.value, otherwise)
        yield Finding("NVIDIA driver", STOP, f"there is one, and it does not work: {error}", advice)


def _cards_of_the_driver():
    """What the driver does not tell, as of a slice of a card or under WSL, is "unknown"."""
    version = driver_version() or "version unknown"
    cuda = asked(pynvml.nvmlSystemGetCudaDriverVersion)
    newest = f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else "unknown"
    yield Finding("NVIDIA driver", OK, f"{version}, up to CUDA {newest}")
    for index in range(card_count()):
        handle = asked(pynvml.nvmlDeviceGetHandleByIndex, index)
        if handle is None:
            advice = "Look into dmesg for Xid errors; in a container, ask for access to it."
            yield Finding(f"users of GPU {index}", LOOK, "the driver does not open it", advice)
            continue
        memory, processes = memory_of(handle), processes_on(handle)
        used = memory and f"{memory.used / GIB:.2f} of {memory.total / GIB:.2f} GiB used"
        others = sum(process != os.getpid() for process, _ in processes or ())
        found = f"{asked(pynvml.nvmlDeviceGetName, handle) or 'name unknown'}:"
        found += f" {used or 'memory unknown'},"
        found += " other processes unknown" if processes is None else f" {others} other processes"
        advice = "Others use this card; what they hold, your model cannot have."
        yield _finding(f"users of GPU {index}", not others, found, advice)


def _allocator():
    given = {name: os.environ[name] for name in ALLOC_CONF if os.environ.get(name)}
    if not given:
        yield Finding("allocator", OK, "PyTorch's defaults: PYTORCH_CUDA_ALLOC_CONF is not set")
    for variable, text in given.items():
        # A list in brackets has commas of its own.
        parts = [part.strip() for part in re.sub(r"\[.*?\]", "[]", text).split(",")]
        status, advice, meanings = OK, "", []
        for part in filter(None, parts):
            name = part.partition(":")[0]
            meanings.append(_ALLOCATOR_OPTIONS.get(name, f"{name} is unknown to PyTorch"))
            if name not in _ALLOCATOR_OPTIONS:
                close = difflib.get_close_matches(name, _ALLOCATOR_OPTIONS, n=1)
                status, advice = STOP, f"Unset it{', or write ' * bool(close)}{' '.join(close)}."
            elif status != STOP:
                try:
                    Rig.simulated("L4", alloc_conf=part)
                except ValueError as error:
                    wrong = name in SIMULATED_OPTIONS  # the others are for real cards alone
                    status = STOP if wrong else LOOK
                    advice = str(error) if wrong else "Simulated cards refuse it: unset it there."
        yield Finding("allocator", status, f"{variable}={text}: {'; '.join(meanings)}", advice)


def _torch_build():
    cuda = torch.version.cuda
    built = f"torch {torch.__version__}, {f'CUDA {cuda}' if cuda else 'no CUDA'}"
    available, hidden = torch.cuda.is_available(), card_count()
    if available or not hidden:
        sees = f"sees {torch.cuda.device_count()} GPUs" if available else "no GPU here"
        yield Finding("torch build", OK, f"{built}, {sees}")
        return
    advice = "The driver is older than this build's: update it, or install torch for an older CUDA."
    if not cuda or "CUDA_VISIBLE_DEVICES" in os.environ:
        build = "Install a build for your driver's CUDA from pytorch.org"
        advice = f"{build}, or unset CUDA_VISIBLE_DEVICES."
    found = f"{built}, sees none of the driver's {hidden} GPUs"
    yield Finding("torch build", STOP, found, advice)


def _visible_gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _gpus():
    for index in range(_visible_gpus()):
        major, minor = torch.cuda.get_device_capability(index)
        name = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
        try:
            _multiply(torch.device("cuda", index))
        except (RuntimeError, ValueError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
            advice = "Reset the GPU or restart the machine; look into dmesg for Xid errors."
            yield Finding(f"GPU {index}", STOP, f"{name}: {reason}", advice)
        else:
            advice = "No bfloat16 in hardware: load with dtype=torch.float16 (notebook 04)."
            found = f"{name}: allocates and multiplies"
            yield _finding(f"GPU {index}", major >= 8, found, advice)


def _multiply(device: torch.device, side: int = 1024):
    """ValueError where a product is wrong; ``side`` up to 2048, which float16 holds exactly."""
    ones = torch.ones(side, side, dtype=torch.float16, device=device)
    if not bool(((ones @ ones) == side).all()):
        raise ValueError("a matrix product came out wrong")


def _copies():
    count, wrong, direct = _visible_gpus(), [], True
    for source in range(count):
        numbers = torch.arange(2**20, device=torch.device("cuda", source))
        for target in set(range(count)) - {source}:
            direct &= torch.cuda.can_device_access_peer(source, target)
            if not torch.equal(numbers.to(torch.device("cuda", target)).cpu(), numbers.cpu()):
                wrong.append(f"{source} to {target}")
    if count > 1:
        found = f"wrong data from GPU {', '.join(wrong)}" if wrong else f"between all {count} GPUs"
        found += ", direct" if direct else ", through the host"
        advice = "Known with IOMMU on: switch it off, or set NCCL_P2P_DISABLE=1."
        yield _finding("copies", not wrong, found, advice, STOP)


def _simulation():
    found, advice = "40 GiB fitted on a simulated L4", "Please report this."
    try:
        with Rig.simulated("L4", alloc_conf=""):  # the variable for it has a check of its own
            torch.empty(40 * GIB, dtype=torch.uint8, device="cuda:0")
    except torch.OutOfMemoryError:
        found, advice = "a simulated L4 runs out of memory as it should", ""
    yield _finding("simulated cards", not advice, found, advice, STOP)


def _host_memory():
    memory = psutil.virtual_memory()
    found = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    advice = "Enough for the notebooks; offloading GLM-4V-9B to the CPU needs 26 GiB."
    yield _finding("host memory", memory.available > CHECKPOINT_BYTES, found, advice)


def _disk():
    from huggingface_hub.constants import HF_HUB_CACHE

    place = Path(HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    found = f"{free / 1e9:.0f} GB free where checkpoints are kept"
    advice = "The checkpoint takes 28 GB: free some, or set HF_HOME to another disk."
    yield _finding("disk", free > 1.1 * CHECKPOINT_BYTES, found, advice)


def _kernel():
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        command = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except NoSuchKernel:
        found = "there is no kernel named python3"
        yield Finding("notebook kernel", STOP, found, "Run make setup.")
        return
    # ipykernel's own specification names no path: it starts the interpreter Jupyter runs on.
    same = not os.path.isabs(command) or Path(command).resolve() == Path(sys.executable).resolve()
    found = f"python3, {'this' if same else 'another'} Python"
    advice = "Notebooks would run without this environment: python -m ipykernel install"
    yield _finding("notebook kernel", same, found, f"{advice} --sys-prefix.")


def _without_names(text: str) -> str:
    """Without the home directory, the user's name and the host's."""
    home = Path.home()
    for secret, shown in ((str(home), "~"), (platform.node(), "HOST"), (home.name, "USER")):
        if len(secret) > 2:
            text = re.sub(rf"(?<![\w]){re.escape(secret)}(?![\w])", shown, text)
    return text
