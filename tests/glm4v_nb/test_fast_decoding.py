"""Fast decoding on the CPU, by Triton's interpreter: the golden checkpoint's answers and logits.

The interpreter multiplies no bfloat16, so float32 and float16 stand for it here; bfloat16 and real
cards are measured by benchmarks/decoding.py. A step costs a second or two, so results are shared.
"""

import copy
import pickle
import threading
import time
import warnings
from functools import partial

import peft
import pytest
import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from glm4v_nb.inference import Sampling, fast, generate, load, set_decoding, stream
from glm4v_nb.inference.fast import FastDecoder, guess_next
from glm4v_nb.inference.supported import why_not
from glm4v_nb.miniature import CHECKPOINT, sample_pictures
from glm4v_nb.model import GLM4VForConditionalGeneration

GOLDEN = "tests/golden/checkpoint"
NEW_TOKENS = 4


@pytest.fixture(scope="module", autouse=True)
def short_caches(interpreter):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "CAPACITY_STEP", 64)  # each program costs milliseconds: few splits
        yield


@pytest.fixture(scope="module")
def own(load):
    """The golden checkpoint, whose queries, keys and values these tests put together."""
    return load().requires_grad_(False)


@pytest.fixture(scope="module")
def decoder():
    return FastDecoder()


def answer(own, inputs, how=None, new_tokens=NEW_TOKENS, **others):
    # min_new_tokens: the recording went on after an end token.
    lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    return own.generate(**inputs, **lengths, custom_generate=how, **others)


def test_an_image_prompts_answer_is_the_originals(own, golden, decoder):
    inputs = {"input_ids": golden["image.input_ids"], "pixel_values": golden["vision.pixel_values"]}
    ids = answer(own, inputs, decoder)
    expected = golden["image.greedy"][:, :NEW_TOKENS]
    assert torch.equal(ids, torch.cat((inputs["input_ids"], expected), dim=1))
    assert decoder.steps == NEW_TOKENS - 1


def test_a_batch_padded_on_the_left_answers_as_eager_does(own, questions, left_padded, decoder):
    inputs = left_padded(questions)
    assert not inputs["attention_mask"].all()
    assert torch.equal(answer(own, inputs, decoder), answer(own, inputs))


def test_padding_on_the_right_is_refused(own, golden, decoder):
    ids = golden["text.input_ids"]
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    with pytest.raises(ValueError, match="padding on the right.*on the left"):
        decoder(
            own, ids, [], [], GenerationConfig(max_length=ids.shape[1] + 1), attention_mask=mask
        )


@pytest.mark.parametrize(
    "other",
    [{"num_beams": 2}, {"return_dict_in_generate": True}, {"penalty_alpha": 0.6, "top_k": 4}],
)
def test_other_modes_are_refused(own, golden, decoder, other):
    with pytest.raises(ValueError, match="num_beams 1 and return_dict_in_generate False"):
        decoder(own, golden["text.input_ids"], [], [], GenerationConfig(max_length=20, **other))


def test_prompt_lookup_gives_greedys_answer_in_fewer_steps(own):
    ids = torch.tensor([[5, 6, 7, 8] * 4])
    plain = own.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    looking = FastDecoder(lookup=True)

    def guesses(known, most):  # the first two right, the third wrong
        right = plain[0, len(known) : len(known) + 2].tolist()
        return [*right, 9][:most]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "guess_next", guesses)
        looked = own.generate(
            ids, max_new_tokens=6, do_sample=False, eos_token_id=None, custom_generate=looking
        )
    assert torch.equal(plain, looked)
    assert (looking.steps, looking.tokens) == (2, 6)  # one from the prompt, 3 and 2 from steps


def test_a_step_is_no_further_from_float32_than_the_model_itself_in_float16(golden, load):
    ids = golden["text.input_ids"][:1]
    known, new = ids[:, :-3], ids[:, -3:]
    right = load()(ids).logits[0, -3:].detach()
    half = GLM4VForConditionalGeneration.from_pretrained(GOLDEN, dtype=torch.float16).eval()
    half.requires_grad_(False)
    decoder = FastDecoder()
    cache = decoder.prepare(half, 1, ids.shape[1], rows=(3,))
    half(known, past_key_values=cache.empty())
    length = known.shape[1]
    slots = [length, length + 1, length + 2]
    step = decoder._steps[3]
    step.place(slots, slots, [0] * 3, [0] * 3)
    step.tokens.copy_(new[0])
    step()
    past = DynamicCache()
    half(known, past_key_values=past)
    plain = half(new, past_key_values=past).logits[0]
    far, plain_far = ((one.float() - right).norm().item() for one in (step.logits, plain))
    assert far < 1.2 * plain_far  # a step rounds less often; 1.2: three tokens are few
    assert far / right.norm().item() < 1e-2


def test_a_full_cache_is_refused_in_words(own, decoder):
    cache = decoder.prepare(own, 1, 20)
    step = decoder._steps[1]
    step.place([cache.capacity], [cache.capacity], [0], [0])
    with pytest.raises(ValueError, match="holds 64 positions, and all are taken.*fewer new"):
        step()


@pytest.mark.parametrize(
    ("sequences", "length", "said"),
    [(9, 20, "9 prompts; fast decoding takes 1 to 8"), (1, 257, "257 positions.*context is 256")],
)
def test_what_does_not_fit_is_refused_before_the_prefill(own, decoder, sequences, length, said):
    with pytest.raises(ValueError, match=said):
        decoder.prepare(own, sequences, length)


def test_out_of_memory_leaves_nothing_behind(own, monkeypatch):
    from glm4v_nb.inference import step

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    decoder = FastDecoder()
    decoder.prepare(own, 1, 20)
    monkeypatch.setattr(step, "Step", full)
    with pytest.raises(torch.OutOfMemoryError):
        decoder.prepare(own, 2, 20)
    assert not decoder._steps
    monkeypatch.undo()
    decoder.prepare(own, 1, 20)
    assert decoder._steps


class StopAfter(StoppingCriteria):
    def __init__(self, tokens):
        self.left = tokens

    def __call__(self, input_ids, scores, **kwargs):
        self.left -= 1
        return torch.full((len(input_ids),), self.left <= 0)


def test_an_answer_ends_within_one_token_of_being_told_to(own, golden, decoder):
    ids = golden["text.input_ids"][:1]
    told = StoppingCriteriaList([StopAfter(2)])
    output = own.generate(
        ids, max_new_tokens=50, do_sample=False, custom_generate=decoder, stopping_criteria=told
    )
    assert output.shape[1] == ids.shape[1] + 2
    assert decoder.steps <= 3


def test_the_loaders_parts_are_taken_as_one_tensor_and_others_become_one(load):
    from glm4v_nb.inference.weights import LayerWeights

    for model in (load(), load(attn_implementation="eager")):
        layer = model.language_model.layers[1]
        attention = layer.self_attn
        expected = torch.cat([attention.q_proj.weight, attention.k_proj.weight,
                              attention.v_proj.weight]).detach()  # fmt: skip
        assert torch.equal(LayerWeights.of(layer).heads.numbers, expected)
        attention.k_proj.weight.data = attention.k_proj.weight.data.clone()
        heads = LayerWeights.of(layer).heads.numbers
        assert torch.equal(heads, expected)
        assert attention.v_proj.weight.untyped_storage().data_ptr() == heads.data_ptr()
        assert torch.equal(attention.k_proj.weight, expected[64:96])


@pytest.mark.parametrize(
    "name",
    ["layers.0.self_attn.q_proj", "layers.1.mlp.gate_up_proj", "layers.1.mlp.down_proj"]
    + ["layers.0.input_layernorm", "norm", "embed_tokens"],
)
def test_other_weights_are_noticed(load, name):
    model, decoder = load().requires_grad_(False), FastDecoder()
    before = decoder.prepare(model, 1, 20)
    assert decoder.prepare(model, 1, 20) is before
    module = model.language_model.get_submodule(name)
    module.weight.data = module.weight.data.clone()
    assert decoder.prepare(model, 1, 20) is not before


def hooked(model):
    model.language_model.layers[0].mlp.register_forward_hook(lambda module, args, output: -output)


def patched(model):
    model.language_model.layers[1].self_attn.forward = lambda *args, **options: None


def compiled(model):
    model.vision_tower.layers[0].compile()


def transposed(model):
    weight = model.language_model.layers[1].mlp.down_proj.weight
    weight.data = weight.data.t().contiguous().t()


def biased(model):
    model.lm_head.bias = nn.Parameter(torch.ones(320))


def without_biases(model):
    model.language_model.layers[0].self_attn.q_proj.bias = None


def tuned_norms(model):
    peft.get_peft_model(model, peft.LNTuningConfig(target_modules=["input_layernorm"]))


def adapted(model):
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["down_proj"]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (hooked, r"layers\.0\.mlp has a forward hook"),
        (patched, r"layers\.1\.self_attn has another forward"),
        (compiled, r"vision_tower\.layers\.0 has another forward, or is compiled"),
        (transposed, "numbers do not lie in a row"),
        (biased, "biases elsewhere than at queries"),
        (without_biases, "or none there"),
        (tuned_norms, "a norm is a LNTuningLayer"),
        (adapted, "a weight is in a Linear of peft"),
        (nn.Module.double, "torch.float64"),
    ],
)
def test_what_the_kernels_would_pass_over_is_refused(load, change, said):
    model = load().requires_grad_(False)
    assert why_not(model) is None
    change(model)
    with pytest.raises(ValueError, match=f"^No fast decoding: .*{said}.* Load with decoding='ea"):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, custom_generate=FastDecoder())


def test_prompts_of_an_adapter_are_refused(load):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(load(), config)
    with pytest.raises(ValueError, match="No fast decoding: an adapter puts tokens of its own"):
        model.generate(
            input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=2, custom_generate=FastDecoder()
        )


def test_hidden_states_asked_for_before_leave_no_hook_that_matters(load):
    model = load()
    model(torch.tensor([[5, 6, 7]]), output_hidden_states=True)
    assert why_not(model) is None


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"inputs_embeds": torch.zeros(1, 3, 64)}, "has no ids of the prompt, or embeddings"),
        ({"past_key_values": DynamicCache()}, "past_key_values is given, but fast decoding"),
    ],
)
def test_prompts_that_are_no_ids_alone_are_refused(own, decoder, asked, said):
    ids = None if "inputs_embeds" in asked else torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match=said):
        own.generate(ids, max_new_tokens=2, custom_generate=decoder, **asked)


def test_copies_and_files_have_buffers_of_their_own(own, decoder):
    decoder.prepare(own, 1, 20)
    for other in (copy.deepcopy(decoder), pickle.loads(pickle.dumps(FastDecoder(lookup=True)))):
        assert not other._steps
    assert other.lookup


class Ids(BaseStreamer):
    """What a streamer is given; told to, it asks for another answer meanwhile."""

    def __init__(self, ask=lambda: None):
        self.ids, self.ended, self.ask = [], False, ask

    def put(self, value):
        self.ask()
        self.ids += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_a_streamer_of_generate_has_the_prompt_as_given_and_every_token(own, golden, decoder):
    inputs = {
        "input_ids": golden["image.input_ids"][:1],
        "pixel_values": golden["vision.pixel_values"][:1],
    }
    streamer = Ids()
    ids = answer(own, inputs, decoder, new_tokens=2, streamer=streamer)
    assert streamer.ids == ids[0].tolist()
    assert streamer.ended


def test_an_answer_within_another_is_refused_and_the_next_one_given(own, decoder):
    ask = partial(answer, own, {"input_ids": torch.tensor([[5, 6, 7]])}, decoder, 1)
    with pytest.raises(ValueError, match="Within an answer of fast decoding"):
        ask(streamer=Ids(ask))
    assert ask().shape == (1, 4)


def test_threads_wait_for_each_other(own, decoder):
    ask = partial(answer, own, {"input_ids": torch.tensor([[5, 6, 7]])}, decoder, 1)
    asked, inside = threading.Event(), []
    other = threading.Thread(target=lambda: (asked.set(), ask(), inside.append("other")))

    def wait():
        if not asked.is_set():
            other.start()
            asked.wait(10)
        time.sleep(0.05)
        inside.append("first")

    ask(streamer=Ids(wait))
    other.join(20)
    assert inside == ["first", "first", "other"]


def test_no_processor_is_asked_what_follows_the_end(own, decoder):
    allowed = {3: [9], 4: [8]}  # by the length so far; there is no entry beyond the end
    ids = own.generate(
        torch.tensor([[5, 6, 7]]),
        max_new_tokens=6,
        eos_token_id=8,
        prefix_allowed_tokens_fn=lambda _, known: allowed[len(known)],
        custom_generate=decoder,
    )
    assert ids[0].tolist() == [5, 6, 7, 9, 8]


class EndsFirst(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([True] + [input_ids.shape[1] > 4] * (len(input_ids) - 1))


def test_rows_that_a_criterion_ends_go_on_as_in_transformers_own_loop(own):
    inputs = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]])}
    ends = {"stopping_criteria": StoppingCriteriaList([EndsFirst()]), "eos_token_id": None}
    options = {"max_new_tokens": 4, "do_sample": False} | ends
    assert torch.equal(
        own.generate(**inputs, **options, custom_generate=FastDecoder()),
        own.generate(**inputs, **options),
    )


def test_the_rung_below_is_taken_with_a_sentence(monkeypatch):
    picture = sample_pictures()["One shape"]
    asked = [{"role": "user", "image": picture, "content": "What colour is the heart?"}]
    with pytest.warns(UserWarning, match="No fast decoding: Triton's interpreter multiplies no"):
        model, processor = load(CHECKPOINT, decoding="fast")
    with pytest.warns(UserWarning, match="eager is taken instead"):
        assert generate(model, processor, asked, Sampling(4)).text == "orange"
    set_decoding(model, "static")
    assert generate(model, processor, asked, Sampling(4)).text == "orange"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert why_not(model) == "weights are on the CPU"
    model.language_model.layers[0].mlp.down_proj = nn.Identity()
    assert why_not(model).startswith("a weight is in a Identity")


def test_streams_go_through_the_kernels():
    picture = sample_pictures()["One shape"]
    model, processor = load(CHECKPOINT, dtype=torch.float32, decoding="fast")
    asked = [{"role": "user", "image": picture, "content": "What colour is the heart?"}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with stream(model, processor, asked, Sampling(3)) as pieces:
            assert "".join(pieces) == "orange"
    assert pieces.answer.finish == "end"
    assert model.fast_decoder.steps >= 2


def test_an_unknown_way_of_decoding_is_refused(own):
    with pytest.raises(ValueError, match="decoding is 'faster'; expected one of eager, static"):
        set_decoding(own, "faster")


@pytest.mark.parametrize(
    ("ids", "most", "guess"),
    [
        ([1, 2, 3, 9, 1, 2, 3], 7, [9, 1, 2, 3]),
        ([1, 2, 3, 9, 1, 2, 3], 2, [9, 1]),
        ([7, 3, 8, 3, 5, 3], 7, [5, 3]),  # of several the latest
        ([1, 2, 3], 7, []),
        ([4], 7, []),
    ],
)
def test_guesses_are_what_followed_the_same_words(ids, most, guess):
    assert guess_next(ids, most) == guess


def test_the_fastest_tile_is_kept_in_a_file(tmp_path, monkeypatch):
    from glm4v_nb.inference import tiles

    tried = []

    def milliseconds(device, run, tile):
        tried.append(tile)
        return 1.0 if tile == tiles.Tile(4, 1024, 4) else 2.0

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    monkeypatch.setattr(tiles, "_milliseconds", milliseconds)
    card = torch.device("cuda", 0)
    best = tiles.best_tile("heads 8x8", True, 2, card, None)
    assert best == tiles.Tile(4, 1024, 4)
    assert all(tile.rows >= 2 for tile in tried)
    tried.clear()
    assert tiles.best_tile("heads 8x8", True, 2, card, None) == best
    assert not tried
    tiles.cache_file().write_text("{", encoding="utf-8")
    assert tiles.best_tile("heads 8x8", True, 2, card, None) == best
    assert tried
