"""Triton compiles what ranks exchange for real cards, which takes none: its interpreter knows
neither the instruction that fills the card's cache nor that kernels follow each other early."""

import json
import sys

import pytest
from own_process import compiled_output

CARDS = [80, 90]  # compute capabilities of Ampere and Hopper
TYPES = {
    **dict.fromkeys(("epoch", "lost", "state"), "*i32"),
    **dict.fromkeys(("tokens", "likeliest", "peers"), "*i64"),
    **dict.fromkeys(("looks", "exchange"), "i32"),
}
SIZES = {"ROWS": 1, "R": 1, "RANK": 1, "COUNT": 4, "EPSILON": 1e-5, "BN": 4, "BK": 1024}
SIZES |= {"K": 2048, "OUTPUTS": 4096, "TOKENS": 4096, "B": 512, "EXCHANGES": 82}
SIZES |= {"BITS": 16, "HALF": 2**26, "PIECE": 1024, "PIECES": 16, "THREADS": 128}
KERNELS = "project_shared", "embed_shared", "project_spread", "choose"


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    return compiled_output(__file__, CARDS, tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("card", CARDS)
def test_kernels_compile_and_look_again_at_what_others_write(card, counts):
    found = counts[card]
    # Of each of three other ranks: once, and again in a loop, which looks for lost ones, too.
    assert found["project_shared"]["ld.volatile"] >= 9
    assert found["embed_shared"]["ld.volatile"] and found["choose"]["ld.volatile"]
    is_hopper = card >= 90
    assert found["project_shared"]["prefetch.L2"] == is_hopper
    for each in ("project_shared", "project_spread"):
        assert found[each]["griddepcontrol"] == 2 * is_hopper  # one lets the next come, one waits


def compiled(name: str, card: int) -> str:
    from triton import compile as compile_for
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from glm4v_nb.parallel import kernels

    kernel, early = getattr(kernels, name), 2 if card >= 90 else 0
    known = SIZES | {"PDL": early, "BYTES": 2**23 if early else 0}
    constants = {argument: known[argument] for argument in kernel.arg_names if argument in known}
    types = TYPES | dict.fromkeys(constants, "constexpr")
    signature = {argument: types.get(argument, "*bf16") for argument in kernel.arg_names}
    made = compile_for(
        ASTSource(kernel, signature, constants),
        target=GPUTarget("cuda", card, 32),
        options={"num_warps": 4, "launch_pdl": bool(early)},
    )
    return made.asm["ptx"]


if __name__ == "__main__":
    words = "ld.volatile", "prefetch.L2", "griddepcontrol"
    for card in map(int, sys.argv[1:]):
        texts = {each: compiled(each, card) for each in KERNELS}
        counted = {each: {word: text.count(word) for word in words} for each, text in texts.items()}
        print(json.dumps(counted))
