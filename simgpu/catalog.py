"""The GPU cards the simulator re-enacts: what PyTorch sees of each, and where every figure comes
from.

The size on the box is not what a program gets: error correction, firmware and the driver take their
part first. A "24 GB" L4 shows 22.03 GiB to PyTorch, a "24 GB" RTX 4090 23.52 GiB. ``total_bytes``
is that visible figure, and the simulator treats it as the card's capacity. It moves by up to 1 %
between driver versions; where there was a choice, the driver is one that runs torch 2.11 or newer.

How the figures were obtained:

- *Total*: the exact bytes that ``get_device_properties(0).total_memory`` or CUDA's deviceQuery printed on
  such a card. Where only GiB were printed, ``round(GiB * 2**30)``, and the source says "converted".
- *Context*: what the CUDA context and loaded kernels hold outside PyTorch's allocator. In an out-of-memory
  message it is "this process has X" less "Y is allocated by PyTorch" less "Z is reserved by PyTorch
  but unallocated". Being a difference of rounded figures it is good to 0.01 GiB, and a program with
  other kernels can differ by 0.1 GiB.
- A source that begins with "estimate:" is not a reading of that card.
"""

import difflib
import re
from dataclasses import dataclass, field

KIB, MIB, GIB = 2**10, 2**20, 2**30
GB = 10**9  # data sheets give bandwidth in decimal units

FIGURES = (
    "total_bytes",
    "compute_capability",
    "multiprocessors",
    "memory_bandwidth_bytes_per_second",
    "cublas_workspace_bytes",
    "context_bytes",
    "kernel_bytes",
    "backward_kernel_bytes",
    "system_bytes",
)


@dataclass(frozen=True)
class Card:
    """One model of GPU card as PyTorch sees it.

    Attributes:
        key: the short name used in this project, e.g. "L4", "RTX 4090", "A100-80".
        device_name: what ``torch.cuda.get_device_name()`` returns.
        total_bytes: what ``get_device_properties().total_memory`` reports and out-of-memory
            messages call "total capacity". The simulator's capacity; less than the size on the box.
        compute_capability: (major, minor).
        multiprocessors: number of streaming multiprocessors.
        memory_bandwidth_bytes_per_second: of the data sheet; a copy on an H100 reaches 90 % of it.
        cublas_workspace_bytes: allocated by PyTorch at the first matrix product on the device, and
            kept.
        context_bytes: held by the CUDA context and loaded kernels, outside PyTorch's allocator.
        sources: for each name in FIGURES where the figure comes from.
        kernel_bytes: what the context grows by when the first matrix product and attention load
            their kernels; 0 where only the sum is known, which then is ``context_bytes``.
        backward_kernel_bytes: the same of the first backward pass.
        system_bytes: held by the driver for no process.
    """

    key: str
    device_name: str
    total_bytes: int
    compute_capability: tuple[int, int]
    multiprocessors: int
    memory_bandwidth_bytes_per_second: int
    cublas_workspace_bytes: int
    context_bytes: int
    sources: dict[str, str] = field(repr=False, compare=False)
    kernel_bytes: int = 0
    backward_kernel_bytes: int = 0
    system_bytes: int = 0

    @property
    def outside_bytes(self) -> int:
        """What inference never has of the card: the context with a prefill's kernels, and the
        driver's own part."""
        return self.context_bytes + self.kernel_bytes + self.system_bytes

    @property
    def bf16_supported(self) -> bool:
        """Whether the tensor cores multiply bfloat16 natively: compute capability 8.0 (Ampere) or
        newer."""
        return self.compute_capability >= (8, 0)


# fmt: off
_TABLE = (
    # key, device name, total bytes, compute capability, multiprocessors, bandwidth, context bytes
    ("T4",       "Tesla T4",                15_637_086_208,      (7, 5),   40,   320 * GB, round(0.13 * GIB)),
    ("L4",       "NVIDIA L4",               round(22.034 * GIB), (8, 9),   58,   300 * GB, round(0.24 * GIB)),
    ("A10",      "NVIDIA A10",              23_696_375_808,      (8, 6),   72,   600 * GB, round(0.20 * GIB)),
    ("RTX 3090", "NVIDIA GeForce RTX 3090", round(23.56 * GIB),  (8, 6),   82,   936 * GB, round(0.30 * GIB)),
    ("RTX 4090", "NVIDIA GeForce RTX 4090", 25_250_627_584,      (8, 9),  128, 1_008 * GB, round(0.48 * GIB)),
    ("RTX 5090", "NVIDIA GeForce RTX 5090", 33_677_180_928,      (12, 0), 170, 1_792 * GB, round(0.60 * GIB)),
    ("V100-32",  "Tesla V100-SXM2-32GB",    34_072_559_616,      (7, 0),   80,   900 * GB, round(0.37 * GIB)),
    ("A100-40",  "NVIDIA A100-SXM4-40GB",   42_404_806_656,      (8, 0),  108, 1_555 * GB, round(0.49 * GIB)),
    ("A100-80",  "NVIDIA A100-SXM4-80GB",   85_093_777_408,      (8, 0),  108, 2_039 * GB, round(0.49 * GIB)),
    ("L40S",     "NVIDIA L40S",             47_677_177_856,      (8, 9),  142,   864 * GB, round(0.50 * GIB)),
    ("H100",     "NVIDIA H100 80GB HBM3",   85_017_493_504,      (9, 0),  132, 3_350 * GB, 518 * MIB),
    ("H200",     "NVIDIA H200",             150_110_011_392,     (9, 0),  132, 4_800 * GB, 518 * MIB),
)
# fmt: on

_GITHUB = "https://github.com"
_MEASURED_H100 = "measured on H100 80GB HBM3 · 2026-11-13 · driver 580.159.04, torch 2.11"

_HOPPER_CONTEXT = (
    "measured on H100 80GB HBM3 · 2026-11-25 · driver 580.159.04, torch 2.11,"
    " benchmarks/results/memory_h100.json: 518 MiB before the first kernel, 168 more after a"
    " prefill, 240 after a backward pass, and 8.8 MiB of the driver"
)
# After a prefill, and what a backward pass adds to that; long decoding adds DECODE_KERNELS.
_HOPPER_KERNELS, _HOPPER_BACKWARD, _HOPPER_SYSTEM = 168 * MIB, 72 * MIB, round(8.81 * MIB)

# key: sources of the total, of capability and multiprocessors, of the bandwidth, of the context.
_SOURCES = {
    "T4": (
        (
            "Colab's Tesla T4, torch 2.11.0+cu128, driver 580.82.07; prints 14.56 GiB, as in "
            f"{_GITHUB}/Zheng-Chong/CatVTON/issues/133"
        ),
        "deviceQuery printouts of Tesla T4",
        "NVIDIA T4 product page",
        f"{_GITHUB}/Zheng-Chong/CatVTON/issues/133: 4.11 GiB - 3.72 GiB - 264.21 MiB",
    ),
    "L4": (
        (
            "Colab's NVIDIA L4, torch 2.11+cu130: 22.034 GiB, converted; driver 535 showed"
            f" 23583784960 bytes, {_GITHUB}/bottlerocket-os/bottlerocket-kernel-kit/pull/139"
        ),
        f"{_GITHUB}/bottlerocket-os/bottlerocket-kernel-kit/pull/139",
        "NVIDIA L4 data sheet",
        "message of a 22.03 GiB L4 in a public run log: 21.96 GiB - 21.65 GiB - 66.83 MiB",
    ),
    "A10": (
        "deviceQuery printout of NVIDIA A10, driver 570.133.20; prints 22.07 GiB",
        "deviceQuery printout of NVIDIA A10, driver 570.133.20",
        "NVIDIA A10 data sheet",
        "estimate: messages of unnamed 22.05 GiB cards, taken for A10G, leave 0.18 and 0.21 GiB",
    ),
    "RTX 3090": (
        f"{_GITHUB}/noonghunna/club-3090/issues/58, driver 580.126.09: 23.56 GiB, converted",
        "deviceQuery printouts of NVIDIA GeForce RTX 3090",
        "NVIDIA GeForce RTX 3090 specifications",
        (
            "Giles Thomas, Writing an LLM from scratch, part 28, on an RTX 3090: 20.99 - 18.67 -"
            " 2.02 GiB"
        ),
    ),
    "RTX 4090": (
        (
            "deviceQuery printout of NVIDIA GeForce RTX 4090, CUDA 13.0 driver; prints 23.52 GiB,"
            f" as in {_GITHUB}/pytorch/torchchat/issues/1341"
        ),
        "deviceQuery printout of NVIDIA GeForce RTX 4090, CUDA 13.0 driver",
        "NVIDIA GeForce RTX 4090 specifications",
        f"{_GITHUB}/pytorch/torchchat/issues/1341: 22.80 GiB - 22.10 GiB - 222.14 MiB",
    ),
    "RTX 5090": (
        f"{_GITHUB}/aikitoria/open-gpu-kernel-modules/issues/1, driver 570.133; prints 31.36 GiB",
        f"{_GITHUB}/aikitoria/open-gpu-kernel-modules/issues/1",
        "NVIDIA GeForce RTX 5090 specifications",
        (
            f"{_GITHUB}/TrajectoryCrafter/TrajectoryCrafter/issues/20: 26.89 GiB - 25.95 GiB -"
            " 343.86 MiB"
        ),
    ),
    "V100-32": (
        "deviceQuery printouts of Tesla V100-SXM2-32GB, CUDA 12.9 driver; prints 31.73 GiB",
        "deviceQuery printouts of Tesla V100-SXM2-32GB",
        "NVIDIA V100 data sheet, SXM2",
        "estimate: message of an unnamed 31.73 GiB card: 31.54 - 28.49 - 2.68 GiB",
    ),
    "A100-40": (
        (
            f"{_GITHUB}/VectorInstitute/tabctx, NVIDIA A100-SXM4-40GB, torch 2.9.1+cu129; prints"
            " 39.49 GiB"
        ),
        f"{_GITHUB}/bottlerocket-os/bottlerocket/pull/3873",
        "NVIDIA A100 data sheet, 40 GB SXM",
        (
            f"{_GITHUB}/TianheWu/CoSeR/issues/10, an A100 of 39.50 GiB: 14.25 GiB - 12.87 GiB -"
            " 912.01 MiB"
        ),
    ),
    "A100-80": (
        (
            "device records of NVIDIA A100-SXM4-80GB in public repositories; prints 79.25 GiB, as"
            f" in {_GITHUB}/wbfwonderful/Vad-R1/issues/11"
        ),
        "deviceQuery printouts of NVIDIA A100-SXM4-80GB",
        "NVIDIA A100 data sheet, 80 GB SXM",
        "estimate: as the A100-40, the same chip",
    ),
    "L40S": (
        (
            "device records of NVIDIA L40S in public repositories; prints 44.40 GiB; older drivers,"
            " 44.53"
        ),
        "deviceQuery printout of NVIDIA L40S in the README of the crate cuda-device-query",
        "NVIDIA L40S data sheet",
        (
            f"{_GITHUB}/bmaltais/kohya_ss/issues/2724: 44.51 - 42.17 - 1.83 GiB; the L40, the same"
            f" chip, in {_GITHUB}/QwenLM/Qwen3-VL/issues/2097: 11.13 GiB - 10.25 GiB - 394.50 MiB"
        ),
    ),
    "H100": (
        f"{_MEASURED_H100}; prints 79.18 GiB",
        "deviceQuery printouts of NVIDIA H100 80GB HBM3",
        "NVIDIA H100 data sheet, SXM",
        (
            f"{_HOPPER_CONTEXT}; {_MEASURED_H100}: 22.94 GiB - 22.02 GiB - 332.87 MiB with all"
            " kernels loaded"
        ),
    ),
    "H200": (
        (
            "printed properties of NVIDIA H200, total_memory=143156MB (139.80 GiB); to the byte as"
            " recorded by the H200 adapter of a public repository"
        ),
        "printed properties of NVIDIA H200, torch.cuda.get_device_properties(0)",
        "NVIDIA H200 data sheet, SXM",
        "estimate: as the H100, the same chip",
    ),
}


def _cublas_workspace(compute_capability: tuple[int, int]) -> tuple[int, str]:
    """Bytes and their source: parseChosenWorkspaceSize() with CUBLAS_WORKSPACE_CONFIG not set."""
    file = "PyTorch's aten/src/ATen/cuda/CublasHandlePool.cpp"
    if compute_capability[0] == 9:
        return (
            32 * MIB,
            f"measured on H100 80GB HBM3 · 2026-11-24 · torch 2.11; {file} asks for 32 MiB",
        )
    if compute_capability[0] == 12:
        return (
            32 * MIB,
            f"{file}; 8.125 MiB before {_GITHUB}/pytorch/pytorch/pull/175344 (February 2026)",
        )
    return 2 * 4096 * KIB + 8 * 16 * KIB, f'{file}, ":4096:2:16:8": 2 x 4096 KiB and 8 x 16 KiB'


def _card(
    key: str,
    device_name: str,
    total_bytes: int,
    compute_capability: tuple[int, int],
    multiprocessors: int,
    bandwidth: int,
    context_bytes: int,
) -> Card:
    workspace_bytes, workspace_source = _cublas_workspace(compute_capability)
    total_source, properties_source, bandwidth_source, context_source = _SOURCES[key]
    is_hopper = compute_capability == (9, 0)
    return Card(
        key=key,
        device_name=device_name,
        total_bytes=total_bytes,
        compute_capability=compute_capability,
        multiprocessors=multiprocessors,
        memory_bandwidth_bytes_per_second=bandwidth,
        cublas_workspace_bytes=workspace_bytes,
        context_bytes=context_bytes,
        sources={
            "total_bytes": total_source,
            "compute_capability": properties_source,
            "multiprocessors": properties_source,
            "memory_bandwidth_bytes_per_second": bandwidth_source,
            "cublas_workspace_bytes": workspace_source,
            "context_bytes": context_source,
        }
        | dict.fromkeys(
            ("kernel_bytes", "backward_kernel_bytes", "system_bytes"),
            context_source if is_hopper else "not known apart: within context_bytes",
        ),
        kernel_bytes=_HOPPER_KERNELS if is_hopper else 0,
        backward_kernel_bytes=_HOPPER_BACKWARD if is_hopper else 0,
        system_bytes=_HOPPER_SYSTEM if is_hopper else 0,
    )


CARDS: dict[str, Card] = {row[0]: _card(*row) for row in _TABLE}


def _plain(name: str) -> str:
    """A name without maker, brand, case, spaces and hyphens: "rtx4090" for "NVIDIA GeForce RTX
    4090"."""
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())


def _spellings(card: Card) -> set[str]:
    """All plain spellings of a card: "rtx4090" and "4090"; "a10080", "a10080gb" and
    "a100sxm480gb"."""
    key = _plain(card.key)
    return {
        key,
        key.removeprefix("rtx"),
        f"{key}gb" if "-" in card.key else key,
        _plain(card.device_name),
    }


_BY_SPELLING = {spelling: card for card in CARDS.values() for spelling in _spellings(card)}


def find_card(name: str) -> Card:
    """The card of this name. "rtx4090", "NVIDIA L4", "a100-80gb" and torch's own device names are
    understood.

    Raises:
        ValueError: no such card, or a name that fits several ("A100"); the message lists the
            accepted names.
    """
    plain = _plain(name) if isinstance(name, str) else ""
    if plain in _BY_SPELLING:
        return _BY_SPELLING[plain]
    accepted = ", ".join(CARDS)
    begun = list(
        dict.fromkeys(card.key for s, card in _BY_SPELLING.items() if plain and s.startswith(plain))
    )
    if len(begun) > 1:
        raise ValueError(
            f"card {name!r} fits several cards: {', '.join(begun)}. Accepted names: {accepted}. "
            f'Name one exactly, for example "{begun[0]}".'
        )
    close = begun or [
        _BY_SPELLING[s].key for s in difflib.get_close_matches(plain, _BY_SPELLING, n=1)
    ]
    advice = f'Did you mean "{close[0]}"?' if close else "Choose one of these."
    raise ValueError(f"card {name!r} is not in the catalogue. Accepted names: {accepted}. {advice}")
