"""Compile the kernels for sm_90 without a GPU."""

import triton, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from glm4v_nb.parallel import kernels as S
from glm4v_nb.inference import kernels as K

T = GPUTarget("cuda", 90, 32)


def comp(fn, types, consts, warps=4, stages=1, **o):
    sig = {n: ("constexpr" if n in consts else types[n]) for n in fn.arg_names}
    src = ASTSource(
        fn,
        signature=sig,
        constexprs={k: v for k, v in consts.items()},
        attrs={
            (fn.arg_names.index(n),): [["tt.divisibility", 16]]
            for n in fn.arg_names
            if n not in consts and (types[n][0] == "*")
        },
    )
    k = triton.compile(src, target=T, options=dict(num_warps=warps, num_stages=stages, **o))
    ptx = k.asm["ptx"]
    import re

    print(
        fn.__name__,
        "regs?",
        k.metadata.num_warps,
        "shared",
        k.metadata.shared,
        "griddep",
        ptx.count("griddepcontrol"),
        "volatile",
        ptx.count("ld.volatile"),
        "prefetch",
        ptx.count("bulk.prefetch"),
    )
    return k


B = "*bf16"
I = "*i32"
L = "*i64"
for bn, bk, w, ah in ((4, 2048, 4, True), (2, 1024, 4, True), (1, 8192, 8, True)):
    k = comp(
        S.project_shared,
        dict(
            x=B,
            weight=B,
            residual=B,
            y=B,
            peers=L,
            epoch=I,
            lost=I,
            looks="i32",
            exchange="i32",
            ahead=B,
        ),
        dict(
            OUTPUTS=4096,
            K=2048,
            ROWS=1,
            R=1,
            EPSILON=1e-6,
            RANK=0,
            COUNT=2,
            BYTES=16 << 20,
            GAP=0,
            CHUNK=1024,
            LANES=16,
            THREADS=32 * w,
            BN=bn,
            BK=bk,
            AHEAD=ah,
            PDL=2,
        ),
        w,
        launch_pdl=True,
    )
open("/tmp/tp_shared.ptx", "w").write(k.asm["ptx"])
comp(
    S.project_shared,
    dict(
        x=B,
        weight=B,
        residual=B,
        y=B,
        peers=L,
        epoch=I,
        lost=I,
        looks="i32",
        exchange="i32",
        ahead=B,
    ),
    dict(
        OUTPUTS=4096,
        K=6848,
        ROWS=8,
        R=8,
        EPSILON=1e-6,
        RANK=1,
        COUNT=4,
        BYTES=0,
        GAP=0,
        CHUNK=0,
        LANES=16,
        THREADS=32,
        BN=16,
        BK=256,
        AHEAD=False,
        PDL=2,
    ),
    1,
    4,
)
comp(
    S.embed_shared,
    dict(tokens=L, embedding=B, y=B, peers=L, epoch=I, lost=I, looks="i32", exchange="i32"),
    dict(TOKENS=75776, OUTPUTS=4096, RANK=0, COUNT=2, ROWS=1, B=512, PDL=2),
)
comp(
    S.project_spread,
    dict(x=B, gain=B, weight=B, peers=L, logits=B),
    dict(
        OUTPUTS=75776,
        K=4096,
        ROWS=1,
        R=1,
        EPSILON=1e-6,
        RANK=0,
        COUNT=2,
        BN=4,
        BK=1024,
        AHEAD=True,
        PDL=2,
    ),
)
comp(
    S.choose,
    dict(logits=B, likeliest=L, peers=L, epoch=I, lost=I, looks="i32", state=I, exchange="i32"),
    dict(OUTPUTS=75776, EXCHANGES=82, RANK=0, COUNT=2, ROWS=1, B=16384, PDL=2),
    16,
)
F = "*fp32"
comp(
    K.attend,
    dict(
        queries=B,
        keys=B,
        values=B,
        starts=I,
        slots=I,
        sequences=I,
        parts=F,
        maxima=F,
        totals=F,
        capacity="i32",
    ),
    dict(ROWS=1, SCALE=0.1, HEADS=16, GROUPS=1, H=16, D=128, SPLITS=32, BT=64, PDL=2),
)
comp(K.combine, dict(parts=F, maxima=F, totals=F, y=B), dict(D=128, SPLITS=32, PDL=2))
