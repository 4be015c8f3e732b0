"""Two ranks in one process by the interpreter."""

import os

os.environ["TRITON_INTERPRET"] = "1"
import torch
from types import SimpleNamespace
from glm4v_nb.inference.tiles import Tile
from glm4v_nb.parallel import kernels
from glm4v_nb.parallel.exchange import Exchange
from glm4v_nb.parallel.ranks import Ranks

COUNT = 3
ROWS = 3
H = 32
K = 48
V = 40
torch.manual_seed(0)
head = torch.randn(V * COUNT, H)
ex = [
    Exchange(Ranks(r, COUNT, exchanges=False), 1, ROWS, H, head[r * V : (r + 1) * V])
    for r in range(COUNT)
]
mem = [torch.zeros(e.bytes, dtype=torch.uint8) for e in ex]
for e, m in zip(ex, mem):
    e.meet(m, [x.data_ptr() for x in mem])
    e.looks = 0
early = {"PDL": 0}


def launch(R):
    def l(kernel, rows, tile, *operands, **c):
        kernel[(-(-rows // tile.rows),)](
            *operands,
            ROWS=ROWS,
            R=R,
            EPSILON=1e-6,
            BN=tile.rows,
            BK=tile.columns,
            AHEAD=False,
            PDL=0,
            **c,
        )

    return l


xs = torch.randn(COUNT, ROWS, K)
w = torch.randn(COUNT, H, K)
res = torch.randn(ROWS, H)
ys = [torch.zeros(ROWS, H) for _ in ex]
R = 8
none = dict(ahead=w[0], BYTES=0, GAP=0, CHUNK=0, LANES=0, THREADS=32)
for number in (0, 1, 2):
    for turn in range(2):
        for r, e in enumerate(ex):
            e.lost.zero_()
            launch(R)(
                kernels.project_shared,
                H,
                Tile(16, 64, 4, 2, 8),
                xs[r] * (number + 1),
                w[r],
                res,
                ys[r],
                e.sums_at,
                e.epoch,
                e.lost,
                e.looks,
                number,
                OUTPUTS=H,
                K=K,
                RANK=r,
                COUNT=COUNT,
                **none,
            )
            print(number, turn, r, e.lost.item())
    right = res + (torch.einsum("crk,chk->rh", xs, w)) * (number + 1)
    for y in ys:
        torch.testing.assert_close(y, right, rtol=1e-4, atol=1e-4)
        assert torch.equal(y, ys[0])
# head, choose
x = torch.randn(ROWS, H)
gain = torch.rand(H)
nxt = [torch.zeros(ROWS, dtype=torch.long) for _ in ex]
states = [torch.zeros(4, ROWS, dtype=torch.int32) for _ in ex]
for r, e in enumerate(ex):
    e.spread(launch(R), x, gain, head[r * V : (r + 1) * V], Tile(16, 64, 4, 2, 8))
for r, e in enumerate(ex):
    e.choose(nxt[r], states[r], early)
    print(nxt[r], states[r][:2], e.epoch, e.lost)
n = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * gain
want = n @ head.T
for e in ex:
    torch.testing.assert_close(e.logits, want, rtol=1e-4, atol=1e-4)
for r, e in enumerate(ex):
    e.epoch.sub_(e.exchanges)
    e.lost.zero_()
    e.choose(nxt[r], states[r], early)
print(nxt, want.argmax(-1))
# embedding
emb = torch.randn(V * COUNT, H)
tokens = torch.tensor([3, V + 5, 2 * V + 39])
out = [torch.zeros(ROWS, H) for _ in ex]
for e in ex:
    e.lost.zero_()
for turn in range(2):
    for r, e in enumerate(ex):
        e.embed(tokens, emb[r * V : (r + 1) * V].contiguous(), out[r], early)
for o in out:
    assert torch.equal(o, emb[tokens])
print("ok")
