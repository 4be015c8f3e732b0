"""Loading, answering and streaming, on the shipped miniature."""

import functools
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from glm4v_nb.inference import Sampling, generate, load, stream
from glm4v_nb.miniature import CHECKPOINT
from glm4v_nb.placement import input_device
from glm4v_nb.workload import Workload, make_prompt, prefill
from simgpu import Rig
from tools.miniature.questions import describe
from tools.miniature.scenes import draw, random_scene

SCENE = random_scene(np.random.default_rng(11), 5)
PICTURE = draw(SCENE, (320, 240))
ENDLESS = Sampling(max_new_tokens=400)


@pytest.fixture(scope="module")
def loaded():
    return load(CHECKPOINT)


@pytest.fixture
def model(loaded):
    return loaded[0]


@pytest.fixture
def processor(loaded):
    return loaded[1]


@pytest.fixture
def endless(model, monkeypatch):
    """The miniature without a closing token: it answers until it is stopped."""
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    return model


def question(text="Describe the picture.", **parts):
    return [{"role": "user", "image": PICTURE, "content": text, **parts}]


def before_forward(model, monkeypatch, action):
    """Run ``action(number of the pass)`` before each forward pass."""
    original, passes = model.forward, []

    @functools.wraps(original)  # transformers reads the signature
    def forward(*args, **kwargs):
        passes.append(None)
        action(len(passes))
        return original(*args, **kwargs)

    monkeypatch.setattr(model, "forward", forward)


def test_a_loaded_checkpoint_is_in_bfloat16_and_ready_to_answer(model):
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "abc1234"])
def test_a_hub_checkpoint_is_refused_without_a_commit(revision):
    with pytest.raises(
        ValueError, match=r"zai-org/glm-4v-9b: revision is .*40 hexadecimal digits.*commits/main"
    ):
        load("zai-org/glm-4v-9b", revision=revision)


@pytest.mark.parametrize("path", ["/no/such/place", "./here", "checkpoint"])
def test_a_directory_that_does_not_exist_is_named(path):
    with pytest.raises(FileNotFoundError, match="is no directory"):
        load(path)


def test_an_answer_is_right_and_says_how_it_came_about(model, processor):
    answer = generate(model, processor, question())
    assert answer.text == describe(SCENE.objects, "en")
    assert answer.finish == "end"
    image_tokens = model.config.vision_config.image_tokens
    assert answer.prompt_tokens > image_tokens
    assert 0 < answer.first_token_seconds <= answer.seconds
    assert (
        answer.new_tokens
        == len(processor.tokenizer("\n" + answer.text, add_special_tokens=False)["input_ids"]) + 1
    )


def test_the_pieces_of_a_stream_are_the_whole_answer_in_words(model, processor):
    whole = generate(model, processor, question())
    with stream(model, processor, question()) as pieces:
        received = list(pieces)
    assert len(received) > 20
    assert "".join(received) == whole.text == pieces.answer.text
    assert pieces.answer.new_tokens == whole.new_tokens


def test_a_chinese_answer_streams_without_broken_characters(model, processor):
    with stream(model, processor, question("描述这张图片。")) as pieces:
        received = list(pieces)
    assert "".join(received) == describe(SCENE.objects, "zh")
    assert len(received) > 10 and "\ufffd" not in "".join(received)


def test_a_later_question_still_sees_the_picture(model, processor):
    messages = question("How many objects are there?")
    first = generate(model, processor, messages)
    messages += [
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "Describe the picture."},
    ]
    assert first.text == str(len(SCENE.objects))
    assert generate(model, processor, messages).text == describe(SCENE.objects, "en")


def test_a_cancel_ends_the_answer_within_one_token(endless, processor, monkeypatch):
    before_forward(endless, monkeypatch, lambda number: time.sleep(0.02))
    with stream(endless, processor, question(), ENDLESS) as pieces:
        next(pieces)
        pieces.cancel()
        generated = pieces.new_tokens
        rest = list(pieces)
    assert pieces.answer.finish == "cancelled"
    assert generated <= pieces.answer.new_tokens <= generated + 1
    assert len(rest) <= 2


def test_leaving_the_block_ends_the_worker(endless, processor):
    before = threading.active_count()
    with stream(endless, processor, question(), Sampling(max_new_tokens=4000)) as pieces:
        next(pieces)
    assert threading.active_count() == before
    assert pieces.answer.new_tokens < 4000
    assert pieces.answer.finish == "cancelled"


def test_an_answer_without_an_end_stops_at_max_new_tokens(endless, processor):
    answer = generate(endless, processor, question(), Sampling(max_new_tokens=7))
    assert (answer.finish, answer.new_tokens) == ("length", 7)


def test_an_error_in_the_worker_reaches_the_caller_with_its_type_after_what_came_before(
    endless, processor, monkeypatch
):
    def run_out(number):
        if number == 12:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.16 GiB.")

    before_forward(endless, monkeypatch, run_out)
    received = []
    with (
        pytest.raises(torch.OutOfMemoryError, match=r"1\.16 GiB"),
        stream(endless, processor, question(), ENDLESS) as pieces,
    ):
        received.extend(pieces)
    assert len(received) > 3


def test_an_error_kept_by_the_caller_holds_no_tensor_of_the_failed_pass(
    model, processor, monkeypatch
):
    held = []

    @functools.wraps(model.forward)
    def forward(*args, **kwargs):
        activations = torch.zeros(1000)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(model, "forward", forward)
    with (
        pytest.raises(torch.OutOfMemoryError) as kept,
        stream(model, processor, question()) as pieces,
    ):
        list(pieces)
    assert kept.value is not None
    assert held[0]() is None


def test_a_worker_that_falls_silent_is_given_up_after_the_timeout(endless, processor, monkeypatch):
    released = threading.Event()
    before_forward(endless, monkeypatch, lambda number: number < 4 or released.wait(60))
    started = time.monotonic()
    try:
        with (
            pytest.raises(TimeoutError, match="No token for 0.5 s.*raise timeout_seconds"),
            stream(endless, processor, question(), ENDLESS, timeout_seconds=0.5) as pieces,
        ):
            list(pieces)
        assert time.monotonic() - started < 10
    finally:
        released.set()
        pieces._worker.join(10)


def test_tokens_that_finish_no_word_are_no_silence(endless, processor, monkeypatch):
    """A piece is a whole word: a long one comes late although its tokens come in time."""
    letter = processor.tokenizer.encode("x", add_special_tokens=False)[0]
    original = endless.forward

    @functools.wraps(original)
    def forward(*args, **kwargs):
        time.sleep(0.15)
        outputs = original(*args, **kwargs)
        outputs.logits[..., letter] = 1e4
        return outputs

    monkeypatch.setattr(endless, "forward", forward)
    sampling = Sampling(max_new_tokens=20)
    with stream(endless, processor, question(), sampling, timeout_seconds=2) as pieces:
        assert "".join(pieces) == 20 * "x"


def test_a_conversation_longer_than_the_context_is_refused_before_it_runs(model, processor):
    with pytest.raises(
        ValueError, match=r"takes \d+ tokens and the answer may take 8,190 more.*8,192"
    ):
        generate(model, processor, question(), Sampling(max_new_tokens=8190))


def test_a_batch_of_conversations_is_refused(model, processor):
    with pytest.raises(ValueError, match="Expected one conversation"):
        generate(model, processor, [question(), question()])


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"max_new_tokens": 0}, ValueError),
        ({"max_new_tokens": 2.5}, TypeError),
        ({"max_new_tokens": True}, TypeError),
        ({"temperature": -0.1}, ValueError),
        ({"temperature": 2.5}, ValueError),
        ({"temperature": float("nan")}, ValueError),
        ({"top_p": 0.0}, ValueError),
        ({"top_p": 1.1}, ValueError),
    ],
)
def test_an_impossible_sampling_is_refused_by_name(wrong, error):
    with pytest.raises(error, match=next(iter(wrong))):
        Sampling(**wrong)


def test_temperature_0_is_greedy_whatever_the_checkpoint_says(endless, processor, monkeypatch):
    # Past its end the miniature is unsure of every token, so that a drawn one would show.
    monkeypatch.setattr(endless.generation_config, "do_sample", True)
    monkeypatch.setattr(endless.generation_config, "temperature", 2.0)
    sampling = Sampling(max_new_tokens=150)
    assert len({generate(endless, processor, question(), sampling).text for _ in range(3)}) == 1


def test_a_seed_makes_sampling_repeatable(model, processor):
    hot = [
        generate(model, processor, question(), Sampling(temperature=2.0, seed=seed)).text
        for seed in (1, 1, 2)
    ]
    assert hot[0] == hot[1] != hot[2]


def test_a_model_partly_offloaded_to_disk_answers_the_same(processor, tmp_path):
    device_map = {
        "vision_tower": "cpu",
        "language_model.embed_tokens": "disk",
        "language_model.layers": "disk",
        "language_model.norm": "cpu",
        "language_model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    model = AutoModelForCausalLM.from_pretrained(
        CHECKPOINT, dtype=torch.bfloat16, device_map=device_map, offload_folder=tmp_path
    )
    assert model.language_model.embed_tokens.weight.device.type == "meta"
    assert input_device(model) == torch.device("cpu")
    assert generate(model, processor, question("How many objects are there?")).text == "5"


def test_inputs_go_to_the_card_of_the_embedding():
    device_map = {
        "vision_tower": 0,
        "language_model.embed_tokens": 1,
        "language_model.rotary_emb": 1,
        "language_model.layers": 1,
        "language_model.norm": 0,
        "lm_head": 0,
    }
    with Rig("L4", 2):
        model = AutoModelForCausalLM.from_pretrained(
            CHECKPOINT, dtype=torch.bfloat16, device_map=device_map
        )
        assert input_device(model).index == 1
        prompt = make_prompt(model, Workload(text_tokens=4))
        prompt = {name: value.to(input_device(model)) for name, value in prompt.items()}
        assert prefill(model, prompt).logits.shape[1] == 1
