"""Batches, conversations, options of generate, training, compilation: all around a single forward
pass."""

import pytest
import torch
from PIL import Image
from transformers import StaticCache, TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

from glm4v_nb.model import GLM4VForConditionalGeneration
from glm4v_nb.model.splicing import expand_image_positions

# Padding changes the shape of the matrix products and so the order of their sums; measured 2e-6. A
# position or a mask that is off by one shows as 1e-2 or more.
BATCH_TOLERANCE = 1e-4
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
BATCHES = {
    "with images": (0, 2),
    "text only": (1, 1),
    "mixed, image first": (0, 1, 2),
    "mixed, text first": (1, 2, 0),
}
RED, BLUE = Image.new("RGB", (30, 20), "red"), Image.new("RGB", (20, 30), "blue")


@pytest.fixture(params=BATCHES.values(), ids=BATCHES.keys())
def prompts(request, questions):
    chosen = [questions[number] for number in request.param]
    if request.param == (1, 1):
        chosen[0] = {"input_ids": chosen[0]["input_ids"][:, :4]}
    return chosen


def new_tokens(ids, prompt):
    return ids[:, prompt["input_ids"].shape[1] :]


def test_left_padded_prompts_have_the_logits_each_has_alone(model, prompts, left_padded):
    batch = model(**left_padded(prompts)).logits
    for row, prompt in zip(batch, prompts, strict=True):
        alone = model(**prompt).logits[0]
        assert (row[-len(alone) :] - alone).abs().max() <= BATCH_TOLERANCE * alone.abs().max()


def test_each_prompt_of_a_batch_is_numbered_as_if_alone(model, prompts, left_padded):
    # Rotary positions are relative, so the logits alone would not show a shift by the padding.
    batch = left_padded(prompts)
    images = [len(prompt.get("pixel_values", ())) for prompt in prompts]
    together = expand_image_positions(
        model.config, batch["input_ids"], batch["attention_mask"], image_count=sum(images)
    )
    for row, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        alone = expand_image_positions(model.config, prompt["input_ids"], image_count=image)
        length = alone.position_ids.shape[1]
        assert together.position_ids[row, -length:].tolist() == alone.position_ids[0].tolist()
        assert together.image_mask[row].sum() == alone.image_mask.sum() == 6 * image
        assert together.attention_mask[row].sum() == length


@pytest.mark.parametrize(
    "cache",
    [{}, {"cache_implementation": "static"}, {"use_cache": False}],
    ids=["dynamic", "static", "none"],
)
def test_left_padded_prompts_get_the_answer_each_gets_alone(model, prompts, left_padded, cache):
    batch = left_padded(prompts)
    answers = new_tokens(model.generate(**batch, **cache, **GREEDY), batch)
    for answer, prompt in zip(answers, prompts, strict=True):
        assert torch.equal(answer, new_tokens(model.generate(**prompt, **GREEDY), prompt)[0])


def test_beams_and_returned_sequences_of_a_batch_are_those_of_each_prompt_alone(
    model, prompts, left_padded
):
    options = {"num_beams": 3, "num_return_sequences": 2, **GREEDY}
    batch = left_padded(prompts)
    ids = model.generate(**batch, **options)
    assert torch.equal(
        ids[:, : batch["input_ids"].shape[1]], batch["input_ids"].repeat_interleave(2, dim=0)
    )
    for number, prompt in enumerate(prompts):
        alone = new_tokens(model.generate(**prompt, **options), prompt)
        assert torch.equal(new_tokens(ids, batch)[2 * number : 2 * number + 2], alone)


def test_sampling_returns_several_sequences_for_each_prompt(model, questions, left_padded):
    batch = left_padded(questions)
    torch.manual_seed(0)
    ids = model.generate(**batch, do_sample=True, num_return_sequences=3, max_new_tokens=5)
    length = batch["input_ids"].shape[1]
    assert torch.equal(ids[:, :length], batch["input_ids"].repeat_interleave(3, dim=0))
    assert len(new_tokens(ids, batch).unique(dim=0)) > 3


def test_prompt_lookup_gives_the_same_tokens(model, questions):
    prompt = questions[0]
    expected = model.generate(**prompt, **GREEDY)
    assert torch.equal(model.generate(**prompt, **GREEDY, prompt_lookup_num_tokens=2), expected)


def test_the_image_and_its_place_in_the_batch_matter(model, questions, left_padded):
    first, _, third = questions
    logits = model(**left_padded([first, third])).logits
    swapped = left_padded([first, third])
    swapped["pixel_values"] = swapped["pixel_values"].flip(0)
    # Far above the tolerances of this file, so that no test here passes on a model that ignores its
    # images.
    assert (model(**swapped).logits - logits)[:, -1].abs().amax(dim=1).min() > 0.01


class Recorder(BaseStreamer):
    def __init__(self):
        self.received, self.ended = [], False

    def put(self, value):
        self.received.append(value.clone())

    def end(self):
        self.ended = True


def test_a_streamer_gets_the_prompt_as_given_and_then_each_token(model, questions):
    prompt, recorder = questions[0], Recorder()
    ids = model.generate(**prompt, streamer=recorder, **GREEDY)
    assert torch.equal(recorder.received[0], prompt["input_ids"])
    assert torch.equal(torch.cat(recorder.received[1:]), new_tokens(ids, prompt)[0])
    assert recorder.ended


@pytest.mark.parametrize("streamer_class", [TextStreamer, TextIteratorStreamer])
def test_a_text_streamer_that_skips_the_prompt_gives_the_answer_only(chat, capsys, streamer_class):
    model, processor = chat
    inputs = processor(RED, "What colour is the circle?")
    streamer = streamer_class(processor.tokenizer, skip_prompt=True)
    ids = model.generate(**inputs, streamer=streamer, **GREEDY)
    streamed = (
        "".join(streamer) if streamer_class is TextIteratorStreamer else capsys.readouterr().out
    )
    assert streamed.removesuffix("\n") == processor.decode(new_tokens(ids, inputs)[0]).removesuffix(
        "\n"
    )


def test_a_detailed_result_holds_the_unexpanded_sequences_and_the_rest(model, questions):
    prompt = questions[0]
    result = model.generate(**prompt, **GREEDY, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(result.sequences, model.generate(**prompt, **GREEDY))
    tokens = torch.stack([step[0] for step in result.logits]).argmax(dim=-1)
    assert torch.equal(tokens, new_tokens(result.sequences, prompt)[0])
    # The cache counts the image as its positions: 6 instead of 3 ids, and not yet the last token.
    assert result.past_key_values.get_seq_length() == prompt["input_ids"].shape[1] + 3 + 8 - 1


def test_max_length_counts_the_image_as_its_positions(model, questions):
    prompt = questions[0]
    ids = model.generate(**prompt, max_length=prompt["input_ids"].shape[1] + 3 + 2, do_sample=False)
    assert new_tokens(ids, prompt).shape[1] == 2


def conversation(image):
    """The image comes with the first message, the last message asks again."""
    return [
        {"role": "user", "image": image, "content": "What colour is the circle?"},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "Are you sure about the colour of it?"},
    ]


def test_an_image_of_an_earlier_turn_is_still_seen(chat):
    model, processor = chat
    red, blue = (
        processor.apply_chat_template(conversation(image), add_generation_prompt=True)
        for image in (RED, BLUE)
    )
    difference = (model(**red).logits - model(**blue).logits)[:, -1].abs().max()
    assert difference > 0.01  # padding alone gives 1e-5
    assert model.generate(**red, **GREEDY).shape[1] == red["input_ids"].shape[1] + 8


# Below and above the image's place in the prompt: the two may not be confused.
@pytest.mark.parametrize("follow_up", [1, 4, 7, 12])
def test_a_later_turn_that_continues_the_cache_equals_a_fresh_start(model, questions, follow_up):
    first = questions[0]
    turn = model.generate(**first, **GREEDY, return_dict_in_generate=True)
    asked = torch.arange(30, 30 + follow_up)[None]
    later = {**first, "input_ids": torch.cat((turn.sequences, asked), dim=1)}
    expected = model.generate(**later, **GREEDY)
    assert torch.equal(
        model.generate(**later, **GREEDY, past_key_values=turn.past_key_values), expected
    )


def test_an_image_that_the_cache_holds_is_not_computed_again(model, questions, monkeypatch):
    turn = model.generate(**questions[0], **GREEDY, return_dict_in_generate=True)
    later = {
        **questions[0],
        "input_ids": torch.cat((turn.sequences, questions[1]["input_ids"]), dim=1),
    }
    monkeypatch.setattr(model.vision_tower, "forward", lambda *_: pytest.fail("the tower ran"))
    model.generate(**later, **GREEDY, past_key_values=turn.past_key_values)


def test_only_labelled_text_counts_in_the_loss(model, questions):
    prompt = questions[2]
    ids = prompt["input_ids"]
    labels = ids.clone()
    labels[:, 9:11] = -100
    output = model(**prompt, labels=labels)
    # Positions 4..9 are the image; the text after it follows in the same order, three positions
    # further on.
    text = torch.tensor([1, 2, 3, 10, 11, 14, 15])
    targets = torch.tensor([304, 305, 10, 20, 21, 41, 42])
    expected = torch.nn.functional.cross_entropy(output.logits[0, text - 1], targets)
    # One mean over seven numbers of fp32.
    assert abs(output.loss - expected) <= 1e-6


def test_the_loss_is_divided_by_the_number_of_items_the_trainer_gives(model, questions):
    prompt = questions[1]
    loss = model(**prompt, labels=prompt["input_ids"]).loss
    summed = model(**prompt, labels=prompt["input_ids"], num_items_in_batch=1).loss
    # Nine targets; the sum and the mean are rounded differently.
    assert abs(summed / 9 - loss) <= 1e-6


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_gradient_checkpointing_gives_the_same_gradients(load, questions, left_padded):
    model = load().train()
    inputs = left_padded(questions)
    plain = gradients(model, inputs)
    # The old name warns on new versions of transformers, the new name is missing on old ones.
    enable = (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )
    enable()
    runs = []
    for layer in (model.vision_tower.layers[0], model.language_model.layers[0]):
        layer.mlp.register_forward_pre_hook(lambda module, _: runs.append(type(module).__name__))
    checkpointed = gradients(model, inputs)
    assert sorted(runs) == ["GLM4VVisionMLP"] * 2 + ["GlmMLP"] * 2  # once more, for backward
    # Every parameter is trained, the tower's included, and recomputation repeats the same
    # operations.
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        assert (checkpointed[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name


def test_a_tuple_is_returned_on_request(model, questions):
    expected = model(**questions[0])
    result = model(**questions[0], return_dict=False)
    assert isinstance(result, tuple)
    assert torch.equal(result[0], expected.logits)


def test_bfloat16_takes_pixels_in_float32_and_answers(load, golden):
    model = load(dtype=torch.bfloat16)
    inputs = {"input_ids": golden["image.input_ids"], "pixel_values": golden["vision.pixel_values"]}
    features, expected = model.get_image_features(inputs["pixel_values"]), golden["vision.features"]
    assert features.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits; measured 3.8e-2 after the tower's layers of random weights.
    assert (features - expected).abs().max() <= 8e-2 * expected.abs().max()
    text, expected = model(golden["text.input_ids"]).logits, golden["text.logits"]
    # Measured 2.1e-2.
    assert (text - expected).abs().max() <= 5e-2 * expected.abs().max()
    assert model.generate(**inputs, **GREEDY).shape == (2, 21)


def test_the_decode_step_compiles_without_a_graph_break_and_gives_the_same_logits(model, golden):
    # One decoder layer: the compiler's time grows with the number of layers, and they are all
    # alike.
    config = type(model.config).from_dict(model.config.to_dict(), num_layers=1)
    small = GLM4VForConditionalGeneration(config).eval().requires_grad_(False)
    small.load_state_dict(model.state_dict(), strict=False)
    inputs = {"input_ids": golden["image.input_ids"], "pixel_values": golden["vision.pixel_values"]}

    def decode(step):
        past = StaticCache(config=config.text_config, max_cache_len=24)
        small(**inputs, past_key_values=past)
        return [
            step(
                input_ids=torch.full((2, 1), token),
                position_ids=torch.full((2, 1), 13 + number),
                past_key_values=past,
                logits_to_keep=1,
            ).logits
            for number, token in enumerate((40, 41, 42))
        ]

    torch.compiler.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return torch._inductor.compile(graph, example_inputs)

    with torch.no_grad():
        compiled = torch.stack(
            decode(torch.compile(small.forward, fullgraph=True, backend=backend))
        )
        plain = torch.stack(decode(small))
    assert len(graphs) <= 2  # not compiled again for every position
    # The compiler fuses operations and so rounds elsewhere; fp32.
    assert (compiled - plain).abs().max() <= 1e-5 * plain.abs().max()
