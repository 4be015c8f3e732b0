"""Mixed precision on simulated cards is CUDA's: which operators cast, and which casts are kept."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional

from simgpu import Rig

# One H100 80GB HBM3, 2026-11-27, torch 2.11.0+cu130: after each half of a step the peaks of
# allocated and reserved memory, in bytes.
MEASURED = {
    "load": (498558976, 555745280),
    "forward and backward 1": (7677656576, 8571060224),
    "update 1": (2576484352, 8571060224),
    "forward and backward 2": (8706035200, 10221518848),
    "update 2": (2576484352, 10221518848),
}


@pytest.fixture
def rig():
    with Rig.simulated("L4") as rig:
        yield rig


def on_card(*shape, dtype=torch.float32) -> torch.Tensor:
    return torch.zeros(shape, device="cuda", dtype=dtype)


def with_bfloat16(function, *tensors):
    with torch.autocast("cuda", torch.bfloat16):
        return function(*tensors)


SINGLE, HALF = torch.float32, torch.bfloat16
# A version of PyTorch that lists it has a kernel for it here.
LISTED = torch._C._dispatch_has_kernel_for_dispatch_key("aten::rms_norm", "AutocastCUDA")
# Per case: types of the arguments, and of the result (autocast_mode.h).
CASES = {
    "a product": (torch.mm, (SINGLE, SINGLE), HALF),
    "a sum of products": (lambda a, b: torch.einsum("ij,kj->ik", a, b), (HALF, SINGLE), HALF),
    "attention": (
        lambda a, b: functional.scaled_dot_product_attention(*([a.view(1, 1, 4, 4)] * 3)),
        (SINGLE, SINGLE),
        HALF,
    ),
    "softmax": (lambda a, b: a.softmax(-1), (HALF, HALF), SINGLE),
    "a norm": (lambda a, b: a.norm(), (HALF, HALF), SINGLE),
    "a norm over a dimension": (lambda a, b: a.norm(2, 0), (HALF, HALF), SINGLE),
    "a sum": (lambda a, b: a.sum(), (HALF, HALF), SINGLE),
    "a sum whose type is given": (lambda a, b: a.sum(dtype=HALF), (HALF, HALF), HALF),
    "layer normalisation": (lambda a, b: functional.layer_norm(a, (4,)), (HALF, HALF), SINGLE),
    "another normalisation": (
        lambda a, b: functional.rms_norm(a, (4,)),
        (HALF, HALF),
        SINGLE if LISTED else HALF,
    ),
    "a layer": (lambda a, b: functional.linear(a, b), (SINGLE, HALF), HALF),
    "the wider of two": (lambda a, b: torch.addcmul(a, a, b), (HALF, SINGLE), SINGLE),
    "neither list": (lambda a, b: functional.gelu(a), (HALF, HALF), HALF),
    "double is left alone": (lambda a, b: a.exp(), (torch.float64, HALF), torch.float64),
}


@pytest.mark.parametrize("case", CASES)
def test_an_operator_computes_in_the_type_that_pytorch_lists_for_it(rig, case):
    function, given, expected = CASES[case]
    arguments = [on_card(4, 4, dtype=dtype) for dtype in given]
    assert with_bfloat16(function, *arguments).dtype is expected


def test_autocast_ends_with_its_block_and_holds_in_its_thread_alone(rig):
    found = []
    with torch.autocast("cuda"):
        assert torch.is_autocast_enabled("cuda") and (on_card(2, 2) @ on_card(2, 2)).dtype is (
            torch.float16
        )
        with torch.autocast("cuda", enabled=False):
            assert (on_card(2, 2) @ on_card(2, 2)).dtype is SINGLE
        thread = threading.Thread(target=lambda: found.append(on_card(2, 2) @ on_card(2, 2)))
        thread.start()
        thread.join()
    assert found[0].dtype is SINGLE
    assert (on_card(2, 2) @ on_card(2, 2)).dtype is SINGLE


def test_the_casts_of_weights_are_kept_until_the_outermost_block_ends(rig):
    layer = nn.Linear(512, 512, bias=False, device="cuda")
    given = on_card(1, 512, dtype=HALF)
    with torch.no_grad(), torch.autocast("cuda", HALF):
        layer(given)
        with_a_cast = torch.cuda.memory_allocated()
        with torch.autocast("cuda", HALF):
            layer(given)
        assert torch.cuda.memory_allocated() == with_a_cast
        torch.clear_autocast_cache()
        assert with_a_cast - torch.cuda.memory_allocated() == 512 * 512 * 2
        layer(given)
    assert with_a_cast - torch.cuda.memory_allocated() == 512 * 512 * 2
    with torch.no_grad(), torch.autocast("cuda", HALF, cache_enabled=False):
        layer(given)
        assert with_a_cast - torch.cuda.memory_allocated() == 512 * 512 * 2


def test_float16_becomes_float32_inside_the_softmax_as_in_cudas_kernel(rig):
    for inside in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with inside:
            scores = on_card(256, 1024, dtype=torch.float16)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            kept = functional.softmax(scores, -1, dtype=torch.float32)
            assert torch.cuda.max_memory_allocated() - before == kept.nbytes == 2**20


def test_a_gradient_scaler_finds_gradients_finite_and_says_that_it_assumes_so(rig):
    layer = nn.Linear(4, 4, device="cuda")
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0, growth_interval=2)
    scales = []
    for _ in range(3):
        with torch.autocast("cuda"):
            loss = layer(on_card(2, 4)).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales == [8.0, 16.0, 16.0]
    assert optimizer.state[layer.weight]["momentum_buffer"].shape == (4, 4)
    assert rig.numbers.assumptions.made == {"_amp_foreach_non_finite_check_and_unscale_": 3}


def test_functions_of_ones_own_are_cast_and_recomputed_as_they_were_computed(rig):
    seen = []

    class Product(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.float32)
        def forward(context, a, b):
            context.save_for_backward(a, b)
            return a @ b

        @staticmethod
        @torch.amp.custom_bwd(device_type="cuda")
        def backward(context, gradient):
            a, b = context.saved_tensors
            return gradient @ b.mT, a.mT @ gradient

    weight = on_card(4, 4).requires_grad_()
    with torch.autocast("cuda", HALF):
        assert Product.apply(weight, on_card(4, 4, dtype=HALF)).dtype is SINGLE
        layer = nn.Sequential(nn.Linear(4, 4, device="cuda"), nn.GELU())
        layer[0].register_forward_hook(lambda *call: seen.append(call[-1].dtype))
        result = torch.utils.checkpoint.checkpoint(layer, weight, use_reentrant=False)
    result.sum().backward()
    assert seen == [HALF, HALF] and weight.grad.dtype is SINGLE


def test_what_is_unsafe_to_autocast_is_refused_in_one_sentence(rig):
    with pytest.raises(RuntimeError, match="simulated cards.*BCEWithLogitsLoss"):
        with_bfloat16(functional.binary_cross_entropy, on_card(2), on_card(2))


class Transformer(nn.Module):
    """A language model of 124 million weights, whose first and last layer are tied."""

    def __init__(self, words=50304, width=768, length=1024):
        super().__init__()
        self.word, self.place = nn.Embedding(words, width), nn.Embedding(length, width)
        parts = {"before": nn.LayerNorm, "after": nn.LayerNorm}
        sizes = {"attend": (1, 3), "project": (1, 1), "widen": (1, 4), "narrow": (4, 1)}
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {name: kind(width) for name, kind in parts.items()}
                | {name: nn.Linear(a * width, b * width) for name, (a, b) in sizes.items()}
            )
            for _ in range(12)
        )
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        self.head.weight = self.word.weight

    def forward(self, words):
        batch, length = words.shape
        x = self.word(words) + self.place(torch.arange(length, device=words.device))
        for layer in self.layers:
            query, key, value = (
                part.view(batch, length, 12, 64).transpose(1, 2)
                for part in layer["attend"](layer["before"](x)).split(x.shape[-1], dim=2)
            )
            y = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            x = x + layer["project"](y.transpose(1, 2).contiguous().view(x.shape))
            x = x + layer["narrow"](functional.gelu(layer["widen"](layer["after"](x))))
        scores = self.head(self.last(x))
        return functional.cross_entropy(scores.view(-1, scores.shape[-1]), words.view(-1))


def test_training_in_mixed_precision_takes_what_was_measured_on_an_h100():
    rig = Rig.simulated("H100")
    with rig:
        with rig.stage("load"):
            model = Transformer().to("cuda")
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
        words = torch.zeros(8, 1024, dtype=torch.long).to("cuda")
        for step in (1, 2):
            with rig.stage(f"forward and backward {step}"):
                with torch.autocast("cuda", torch.bfloat16):
                    loss = model(words)
                loss.backward()
                del loss
            with rig.stage(f"update {step}"):
                optimizer.step()
                optimizer.zero_grad()
    found = {
        stage.name: (stage.memory[0].peak_allocated_bytes, stage.memory[0].peak_reserved_bytes)
        for stage in rig.stages
    }
    assert found == MEASURED


def test_the_lists_are_those_of_the_pytorch_that_is_installed():
    names = torch._C._dispatch_get_all_op_names()
    listed = {
        name.removeprefix("aten::")
        for name in names
        if name.startswith("aten::")
        and torch._C._dispatch_has_kernel_for_dispatch_key(name, "AutocastCUDA")
    }
    here = {
        name.removeprefix("aten::")
        for name in names
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, "AutocastPrivateUse1")
    }
    assert listed - here <= {"cudnn_convolution", "cudnn_convolution_transpose"}
    assert here <= listed
