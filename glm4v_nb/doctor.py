"""Is this machine ready? Driver, torch build, every GPU exercised, libraries, memory, disk and
notebook kernel.

Nothing is changed on the machine. A finding is "ok", "look" (works, but read the advice) or "stop"
(mend it first). A machine without GPUs is fine: the notebooks simulate them.
"""

import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import psutil
import pynvml
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from simgpu import Rig

OK, LOOK, STOP = "ok", "look", "stop"
MISSING = "missing"  # in place of a version
CHECKPOINT_BYTES = 27_812_641_792  # the official weights in bfloat16, see notebook 01
GIB = 2**30
# Python versions the tests run on; older ones cannot import the package.
PYTHONS = ((3, 11), (3, 13))
# Shown with their versions; the other dependencies only when something is wrong with them.
MAIN_LIBRARIES = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "jupyterlab",
    "ipywidgets",
    "papermill",
)


@dataclass(frozen=True)
class Finding:
    """One checked thing. ``advice`` is empty when there is nothing to do."""

    subject: str
    status: str
    found: str
    advice: str = ""


def examine() -> Iterator[Finding]:
    """Every finding in turn; a check that breaks is itself a finding, so that the others still
    run."""
    for check in (
        _python, _libraries, _driver, _torch_build, _gpus, _copies, _simulation, _host_memory, _disk, _kernel,
    ):  # fmt: skip
        try:
            yield from check()
        except Exception as error:
            subject = check.__name__.strip("_").replace("_", " ")
            yield Finding(
                subject, STOP, _private(f"the check failed: {type(error).__name__}: {error}")
            )


def verdict(findings: list[Finding]) -> str:
    """The worst status of all."""
    return max((finding.status for finding in findings), key=(OK, LOOK, STOP).index)


def to_json(findings: list[Finding]) -> str:
    """{"status", "findings": [{"subject", "status", "found", "advice"}]}."""
    return json.dumps(
        {"status": verdict(findings), "findings": [asdict(one) for one in findings]}, indent=2
    )


def report(findings: list[Finding]) -> str:
    """One block of text for a bug report; no path of the home directory, no name of user or
    host."""
    lines = [f"{one.status:5s}{one.subject}: {one.found}" for one in findings]
    return _private(
        "\n".join([f"glm4v-nb doctor, {time.strftime('%Y-%m-%d')}: {verdict(findings)}", *lines])
    )


def _python():
    version, low, high = sys.version_info[:2], *PYTHONS
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    tested = low <= version <= high
    advice = (
        ""
        if tested
        else (
            f"Tested are {low[0]}.{low[1]} to {high[0]}.{high[1]}; make PYTHON=python3.13 takes"
            " another."
        )
    )
    yield Finding("Python", OK if tested else LOOK, found, advice)


def _libraries():
    wrong = []
    try:
        lines = metadata.requires("glm4v-nb") or ()
    except metadata.PackageNotFoundError:
        found = (
            "glm4v-nb runs from its source without being installed, so what it requires is not"
            " known"
        )
        yield Finding(
            "libraries", LOOK, found, "Run make setup, or pip install -e . in its folder."
        )
        return
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version == MISSING or not requirement.specifier.contains(
            Version(version), prereleases=True
        ):
            wrong.append(f"{requirement.name} {version}, expected {requirement.specifier}")
    versions = ", ".join(f"{name} {_version(name)}" for name in MAIN_LIBRARIES)
    yield Finding(
        "libraries",
        STOP if wrong else OK,
        "; ".join(wrong) or versions,
        "Run make setup." if wrong else "",
    )
    if _version("torchvision") != MISSING:
        yield Finding(
            "torchvision",
            LOOK,
            f"{_version('torchvision')} is installed",
            "It is not needed, and one that does not match torch breaks importing transformers: pip"
            " uninstall it.",
        )


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return MISSING


def _driver():
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        yield Finding(
            "NVIDIA driver", OK, f"none ({error})", "Cards are simulated; real ones need a driver."
        )
        return
    try:
        number = pynvml.nvmlSystemGetCudaDriverVersion()
        found = (
            f"{pynvml.nvmlSystemGetDriverVersion()}, up to CUDA"
            f" {number // 1000}.{number % 1000 // 10}"
        )
        yield Finding("NVIDIA driver", OK, found)
        for index in range(pynvml.nvmlDeviceGetCount()):
            yield _users(index)
    finally:
        pynvml.nvmlShutdown()


def _users(index: int) -> Finding:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    name, memory = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetMemoryInfo(handle)
    others = [
        one for one in pynvml.nvmlDeviceGetComputeRunningProcesses(handle) if one.pid != os.getpid()
    ]
    found = (
        f"{name}: {memory.used / GIB:.2f} of {memory.total / GIB:.2f} GiB used, {len(others)} other"
        " processes"
    )
    advice = "Others use this card; what they hold, your model cannot have." if others else ""
    return Finding(f"users of GPU {index}", LOOK if others else OK, found, advice)


def _torch_build():
    built = f"torch {torch.__version__}, " + (
        f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    )
    if torch.cuda.is_available():
        yield Finding("torch build", OK, f"{built}, sees {torch.cuda.device_count()} GPUs")
    elif hidden := _gpus_of_driver():
        yield Finding(
            "torch build",
            STOP,
            f"{built}, sees none of the driver's {hidden} GPUs",
            (
                "Install a build for your driver's CUDA from pytorch.org, or unset"
                " CUDA_VISIBLE_DEVICES."
                if not torch.version.cuda or os.environ.get("CUDA_VISIBLE_DEVICES") is not None
                else (
                    "The driver is older than this build's CUDA: update it, or install torch for an"
                    " older CUDA."
                )
            ),
        )
    else:
        yield Finding("torch build", OK, f"{built}, no GPU here")


def _gpus_of_driver() -> int:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    try:
        return pynvml.nvmlDeviceGetCount()
    finally:
        pynvml.nvmlShutdown()


def _gpus():
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(index)
        name = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
        try:
            _multiply(torch.device("cuda", index))
        except (RuntimeError, ValueError) as error:
            advice = "Reset the GPU or restart the machine; look into dmesg for Xid errors."
            yield Finding(f"GPU {index}", STOP, f"{name}: {_first_line(error)}", advice)
            continue
        advice = (
            ""
            if major >= 8
            else "No bfloat16 in hardware: load with dtype=torch.float16 (notebook 04)."
        )
        yield Finding(
            f"GPU {index}", OK if major >= 8 else LOOK, f"{name}: allocates and multiplies", advice
        )


def _multiply(device: torch.device):
    """Allocate, multiply and check the result.

    Raises:
        ValueError: the product is wrong.
        RuntimeError: from CUDA.
    """
    ones = torch.ones(1024, 1024, dtype=torch.float16, device=device)
    if not bool(((ones @ ones) == 1024).all()):
        raise ValueError("a matrix product came out wrong")


def _copies():
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wrong, direct = [], True
    for source in range(count):
        numbers = torch.arange(2**20, device=torch.device("cuda", source))
        for target in set(range(count)) - {source}:
            direct &= torch.cuda.can_device_access_peer(source, target)
            if not torch.equal(numbers.to(torch.device("cuda", target)).cpu(), numbers.cpu()):
                wrong.append(f"{source} to {target}")
    if count > 1:
        found = f"wrong data from GPU {', '.join(wrong)}" if wrong else f"between all {count} GPUs"
        found += ", direct" if direct else ", through the host"
        advice = "Known with IOMMU on: switch it off, or set NCCL_P2P_DISABLE=1." if wrong else ""
        yield Finding("copies", STOP if wrong else OK, found, advice)


def _simulation():
    rig = Rig("L4")
    try:
        with rig:
            torch.empty(40 * GIB, dtype=torch.uint8, device="cuda:0")
    except torch.OutOfMemoryError:
        yield Finding("simulated cards", OK, "a simulated L4 runs out of memory as it should")
        return
    yield Finding("simulated cards", STOP, "40 GiB fitted on a simulated L4", "Please report this.")


def _host_memory():
    memory = psutil.virtual_memory()
    found = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    enough = memory.available > CHECKPOINT_BYTES
    advice = (
        "" if enough else "Enough for the notebooks; offloading GLM-4V-9B to the CPU needs 26 GiB."
    )
    yield Finding("host memory", OK if enough else LOOK, found, advice)


def _disk():
    from huggingface_hub.constants import HF_HUB_CACHE

    place = Path(HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    enough = free > 1.1 * CHECKPOINT_BYTES
    advice = (
        "" if enough else "The checkpoint takes 28 GB: free some, or set HF_HOME to another disk."
    )
    yield Finding(
        "disk",
        OK if enough else LOOK,
        f"{free / 1e9:.0f} GB free where checkpoints are kept",
        advice,
    )


def _kernel():
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        command = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except NoSuchKernel:
        yield Finding(
            "notebook kernel", STOP, "there is no kernel named python3", "Run make setup."
        )
        return
    # ipykernel's own specification names no path: it starts the interpreter Jupyter runs on.
    same = not os.path.isabs(command) or Path(command).resolve() == Path(sys.executable).resolve()
    advice = (
        ""
        if same
        else (
            "Notebooks would run without this environment: python -m ipykernel install"
            " --sys-prefix."
        )
    )
    yield Finding(
        "notebook kernel",
        OK if same else LOOK,
        f"python3, {'this' if same else 'another'} Python",
        advice,
    )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"


def _private(text: str) -> str:
    """Without the home directory, the user's name and the host's."""
    for secret, shown in (
        (str(Path.home()), "~"),
        (platform.node(), "HOST"),
        (Path.home().name, "USER"),
    ):
        if len(secret) > 2:
            text = re.sub(rf"(?<![\w]){re.escape(secret)}(?![\w])", shown, text)
    return text
