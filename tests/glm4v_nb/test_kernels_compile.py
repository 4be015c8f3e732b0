"""Triton compiles the fused kernels for real cards, which takes none: what its interpreter accepts
may be no kernel."""

import json
import sys

import pytest
from own_process import compiled_output

# Compute capabilities of Ampere and Hopper; lanes and bits of the weights.
CARDS = [80, 90]
KINDS = {"one row": (1, 16), "rows": (8, 16), "one row, int8": (1, 8), "int8": (8, 8)}
KINDS["int4"] = (8, 4)
SIZES = {"K": 4096, "EPSILON": 1e-5, "BN": 16, "BK": 512}
KERNELS = {
    "project": {"OUTPUTS": 4096, "NORM": True, "RESIDUAL": True},
    "project_gated": {"OUTPUTS": 13696},
    "project_heads": {"HEADS": 32, "GROUPS": 2, "D": 128, "ROTARY": 64},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return compiled_output(__file__, CARDS, tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("card", CARDS)
def test_kernels_compile_and_no_number_changes_hands(card, found):
    moves = found[card]
    assert len(moves) == len(KERNELS) * len(KINDS)
    # Sums over threads and x take some. Of numbers a thread has 64 in a turn here, which in another
    # order would take 32 or more besides.
    assert max(moves[name] for name in moves if not name.endswith("one row")) < 45, moves


def compiled(name: str, kind: str, card: int):
    from triton import compile as compile_for
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from glm4v_nb.inference import kernels

    lanes, bits = KINDS[kind]
    kernel = getattr(kernels, name)
    pdl = card >= 90
    constants = {**SIZES, **KERNELS[name], "ROWS": 1, "R": lanes, "BITS": bits, "PDL": pdl}
    types = {"weight": {16: "*bf16", 8: "*i8", 4: "*i32"}[bits], "capacity": "i32"}
    types |= {"scales": {16: "*bf16", 8: "*fp32", 4: "*i32"}[bits]}
    types |= dict.fromkeys(("positions", "slots", "sequences"), "*i32")
    types |= dict.fromkeys(("cosines", "sines"), "*fp32")
    types |= dict.fromkeys(constants, "constexpr")
    signature = {argument: types.get(argument, "*bf16") for argument in kernel.arg_names}
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (at,): aligned for at, kind in enumerate(signature.values()) if kind.startswith("*")
    }
    return compile_for(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", card, 32),
        options={"num_warps": 4, "num_stages": 3, "launch_pdl": pdl},
    )


def moves_of(ptx: str) -> int:
    """How often numbers go between threads: directly, or by memory that they share."""
    return ptx.count("shfl.sync") + ptx.count("st.shared")


if __name__ == "__main__":
    for card in map(int, sys.argv[1:]):
        made = {
            f"{name}, {kind}": moves_of(compiled(name, kind, card).asm["ptx"])
            for name in KERNELS
            for kind in KINDS
        }
        print(json.dumps(made))
