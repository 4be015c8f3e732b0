"""What integrators and careless fingers write: the right answer, or one sentence that says why."""

import json
import shutil

import numpy as np
import pytest
import torch
from trainer_arguments import quiet_arguments
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    Trainer,
)
from transformers.utils import logging as transformers_logging

from glm4v_nb.training import ExpandingCollator

PICTURE = np.arange(56 * 56 * 3, dtype=np.uint8).reshape(56, 56, 3)
QUESTION = {"role": "user", "image": PICTURE, "content": "What is this?"}


@pytest.fixture(scope="module")
def inputs(chat):
    return chat[1].apply_chat_template([QUESTION], add_generation_prompt=True)


@pytest.fixture(scope="module")
def greedy(chat, inputs):
    return chat[0].generate(**inputs, max_new_tokens=12, do_sample=False)


# --- decoding


@pytest.mark.parametrize("option", ["prompt lookup", "assistant"])
def test_speculative_decoding_with_an_image_gives_greedys_answer(chat, inputs, greedy, option):
    model = chat[0]
    options = {
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "assistant": {"assistant_model": model},
    }
    found = model.generate(**inputs, max_new_tokens=12, do_sample=False, **options[option])
    assert found.tolist() == greedy.tolist()


@pytest.mark.parametrize("at_a_time", [1, 3])
def test_a_decoding_loop_by_hand_continues_the_numbering_after_an_image(
    chat, inputs, greedy, at_a_time
):
    model, length = chat[0], inputs["input_ids"].shape[1]
    answer = greedy[:, length:]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        logits = [model(**inputs, past_key_values=cache).logits[:, -1:]]
        for ids in answer[:, :-1].split(at_a_time, dim=1):
            logits.append(model(input_ids=ids, past_key_values=cache).logits)
    assert torch.cat(logits, dim=1).argmax(-1).tolist() == answer.tolist()


def test_a_loop_by_hand_over_prompts_with_and_without_an_image(model, questions, left_padded):
    batch = left_padded([question for question in questions if "attention_mask" not in question])
    steps = torch.tensor([[3, 5], [7, 11], [13, 17]])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        first = model(**batch, past_key_values=cache)
        mask = torch.ones(3, first.logits.shape[1] + 2, dtype=torch.long)
        # Padding in front of the expanded prompts, as the model lays them out.
        behind = cache.positions_behind
        alone = []
        for row, question in enumerate(questions):
            own = DynamicCache(config=model.config)
            model(**question, past_key_values=own)
            alone.append(model(input_ids=steps[row : row + 1], past_key_values=own).logits)
    assert behind.shape == (3, 1)
    longest = first.logits.shape[1]
    for row, question in enumerate(questions):
        own = question["input_ids"].shape[1]
        image = model.config.vision_config.image_tokens - 3 if "pixel_values" in question else 0
        mask[row, : longest - own - image] = 0
    with torch.no_grad():
        together = model(input_ids=steps, past_key_values=cache, attention_mask=mask).logits
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_a_mask_in_which_the_image_has_three_ids_is_refused_after_the_prompt(chat, inputs):
    model = chat[0]
    first = model(**inputs)
    step = first.logits[:, -1:].argmax(-1)
    mask = torch.cat((inputs["attention_mask"], torch.ones_like(step)), dim=1)
    ids = inputs["input_ids"].shape[1]
    with pytest.raises(
        ValueError, match=rf"\(1, {ids + 1}\).* have {first.logits.shape[1] + 1} pos"
    ):
        model(step, past_key_values=first.past_key_values, attention_mask=mask)


def test_an_image_does_not_come_after_a_cache(chat, inputs):
    model, ids = chat[0], inputs["input_ids"]
    first = model(**inputs)
    again = torch.cat((ids, first.logits[:, -1:].argmax(-1)), dim=1)
    text = model(ids[:, :3]).past_key_values
    for cache, given in (
        (first.past_key_values, {"input_ids": again}),
        (first.past_key_values, {**inputs, "input_ids": again, "attention_mask": None}),
        (text, {"input_ids": ids[:, 3:], "pixel_values": inputs["pixel_values"]}),
    ):
        with pytest.raises(ValueError, match="positions already, and here is an image"):
            model(**given, past_key_values=cache)


def test_the_text_after_an_image_may_come_in_a_chunk_of_its_own(chat, inputs):
    model, ids = chat[0], inputs["input_ids"]
    end = ids[0].tolist().index(model.config.eoi_token_id) + 1
    first = model(ids[:, :end], pixel_values=inputs["pixel_values"])
    rest = model(ids[:, end:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, model(**inputs).logits[:, -rest.shape[1] :])


def test_generation_goes_on_from_a_returned_cache(chat, inputs, greedy):
    model, options = chat[0], {"do_sample": False, "return_dict_in_generate": True}
    first = model.generate(**inputs, max_new_tokens=5, **options)
    given = inputs | {"input_ids": first.sequences, "attention_mask": None}
    rest = model.generate(**given, past_key_values=first.past_key_values, max_new_tokens=7)
    assert rest.tolist() == greedy.tolist()


def test_generating_from_embeddings_gives_the_ids_answer(chat):
    model, processor = chat
    prompt = processor.apply_chat_template([{"role": "user", "content": "hello"}])
    ids = model.generate(**prompt, max_new_tokens=4)[0, prompt["input_ids"].shape[1] :]
    embeddings = model.get_input_embeddings()(prompt["input_ids"])
    found = model.generate(
        inputs_embeds=embeddings, attention_mask=prompt["attention_mask"], max_new_tokens=4
    )
    assert found[0].tolist() == ids.tolist()


@pytest.mark.parametrize(
    "options", [{"max_length": 5}, {"generation_config": GenerationConfig(max_length=5)}]
)
def test_a_max_length_below_the_images_positions_is_explained(chat, inputs, options):
    with pytest.raises(ValueError, match=r"max_length is 5, .* Give max_new_tokens"):
        chat[0].generate(**inputs, **options)


def test_a_picture_without_a_prompt_is_explained(chat, inputs):
    model, picture = chat[0], inputs["pixel_values"]
    with pytest.raises(ValueError, match="neither input_ids nor inputs_embeds"):
        model(pixel_values=picture)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="both input_ids and inputs_embeds"):
        model(inputs["input_ids"], inputs_embeds=embeddings)
    for given in ({}, {"inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="pixel_values but no input_ids"):
            model.generate(pixel_values=picture, **given)
    with pytest.raises(ValueError, match="pixel_values but no input_ids"):
        model(pixel_values=picture, inputs_embeds=embeddings)


@pytest.mark.parametrize("name", ["images", "image", "pixel_value", "video_frames"])
def test_a_picture_under_a_name_that_nobody_reads_is_refused(chat, inputs, name):
    model, processor = chat
    ids = inputs["input_ids"][:, -2:]
    for ask in (model, processor.tokenizer):
        with pytest.raises(ValueError, match=f"{name} is set, and the picture would be lost"):
            ask(ids if ask is model else "a", **{name: inputs["pixel_values"]})


def test_the_official_max_length_beside_max_new_tokens_is_no_warning(chat, inputs, capfd):
    model = chat[0]
    before = model.generation_config.max_length
    model.generation_config.max_length = 8192
    transformers_logging.set_verbosity_warning()
    try:
        model.generate(**inputs, max_new_tokens=2)
    finally:
        model.generation_config.max_length = before
    assert "max_length" not in capfd.readouterr().err


# --- vocabulary


def test_a_resized_vocabulary_reaches_configuration_loss_and_checkpoint(load, golden, tmp_path):
    model = load()
    rows = model.config.padded_vocab_size + 24
    model.resize_token_embeddings(rows)
    assert (model.config.padded_vocab_size, model.lm_head.weight.shape[0]) == (rows, rows)
    ids = golden["text.input_ids"]
    assert torch.isfinite(model(ids, labels=ids).loss)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.padded_vocab_size == rows
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_vocabulary_too_small_for_an_image_is_refused_before_it_is_saved(load):
    model = load()
    last = max(model.config.boi_token_id, model.config.eoi_token_id)
    with pytest.raises(ValueError, match=f"none for id {last}"):
        model.resize_token_embeddings(last)


def test_added_tokens_are_the_same_after_saving(chat_checkpoint, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(chat_checkpoint)
    tokenizer.add_tokens(["<part>"])
    tokenizer.add_tokens([AddedToken("<mark>", special=True)])
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "one <part> and <mark>"
    assert tokenizer.convert_tokens_to_ids("<part>") in tokenizer(text).input_ids
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.get_vocab() == tokenizer.get_vocab()


# --- prompts


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"role": "user", "images": [PICTURE], "content": "a"}, "'images'"),
        ({"role": "user", "image_url": "a.png", "content": "a"}, "'image_url'"),
        ({"role": "user", "img": PICTURE, "content": "a"}, "'img'"),
        ({"role": "user", "content": "a", "pixel_values": 1}, "'pixel_values'"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "image": PICTURE}]}, "'image'"),
        ({"role": "user", "content": [{"type": "image", "image": PICTURE, "text": "a"}]}, "'text'"),
        ({"role": "user", "content": [{"type": "image", "picture": PICTURE}]}, "'picture'"),
    ],
)
def test_what_would_not_be_read_of_a_message_is_refused(chat, message, named):
    with pytest.raises(ValueError, match=f"{named}, which would not be read"):
        chat[1].apply_chat_template([message])


def test_empty_fields_of_a_data_set_are_no_unknown_keys(chat):
    message = {"role": "user", "content": "a", "images": None, "name": None}
    chat[1].apply_chat_template([message])


def test_an_image_url_part_with_a_data_url_is_the_image(chat, tmp_path):
    from base64 import b64encode

    from PIL import Image

    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    url = f"data:image/png;base64,{b64encode((tmp_path / 'a.png').read_bytes()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "a"}]
    found = chat[1].apply_chat_template([{"role": "user", "content": parts}])
    expected = chat[1].apply_chat_template([{"role": "user", "image": PICTURE, "content": "a"}])
    assert torch.equal(found["pixel_values"], expected["pixel_values"])


def test_a_rendered_prompt_is_refused_by_the_tokenizer_and_stays_text_in_a_message(chat):
    tokenizer = chat[1].tokenizer
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    for given in (rendered, [rendered, rendered]):
        with pytest.raises(ValueError, match="rendered prompt.*apply_chat_template"):
            tokenizer(given, padding=True)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": rendered}])["input_ids"]
    assert ids.count(tokenizer.convert_tokens_to_ids("<|user|>")) == 1


def test_the_tokenizer_alone_with_a_picture_ends_at_the_name_of_the_processor(chat):
    model, processor = chat
    ids = processor.tokenizer.apply_chat_template([QUESTION], return_tensors="pt")
    with pytest.raises(ValueError, match="AutoProcessor"):
        model.generate(**ids, max_new_tokens=1)


# --- training


def accuracy(prediction):
    labels = prediction.label_ids[:, 1:]
    hits = (prediction.predictions.argmax(-1)[:, :-1] == labels)[labels != -100]
    return {"accuracy": float(hits.mean()), "counted": len(hits)}


def own_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())


@pytest.mark.parametrize("collator", [ExpandingCollator, None], ids=["expanding", "Trainer's own"])
def test_metrics_smoothing_and_own_losses_see_labels_of_the_logits_length(chat, tmp_path, collator):
    model, processor = chat
    turns = ([QUESTION, {"role": "assistant", "content": "4"}], [{"role": "user", "content": "a"}])
    # Trainer's own collator takes rows of equal lengths.
    turns = turns if collator else turns[:1]
    rows = [
        {name: value[0] for name, value in processor.apply_chat_template(turn).items()}
        for turn in turns
    ]
    for row in rows:
        row["labels"] = row["input_ids"]
    text_ids = sum(len(row["input_ids"]) for row in rows) - 3  # the image's three are no targets

    def trainer(**options):
        given = {"compute_metrics": options.pop("compute_metrics", None)}
        given |= {"compute_loss_func": options.pop("compute_loss_func", None)}
        return Trainer(
            model,
            quiet_arguments(tmp_path, 2, max_steps=1, learning_rate=0.0, **options),
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=collator and collator(model.config),
            **given,
        )

    found = trainer(compute_metrics=accuracy).evaluate()
    # The first token of each prompt has nothing before it to be foretold from.
    assert text_ids - 2 <= found["eval_counted"] <= text_ids
    plain = trainer().evaluate()["eval_loss"]
    own = trainer(compute_loss_func=own_loss).evaluate()["eval_loss"]
    assert own == pytest.approx(plain, rel=1e-4)
    assert trainer(label_smoothing_factor=0.1).evaluate()["eval_loss"] != pytest.approx(plain)


# --- loading


def test_the_name_of_a_type_may_begin_with_torch(load):
    assert load(dtype="torch.bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["bf16", "half precision", "torch.bf16", "int8", torch.int8])
def test_an_unknown_name_of_a_type_is_refused_with_the_known_ones(checkpoint, dtype):
    with pytest.raises(ValueError, match=r"dtype is .*; expected torch\.bfloat16"):
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)


@pytest.mark.parametrize(
    "attention", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn"]
)
@pytest.mark.parametrize("where", ["argument", "config.json"])
def test_attention_from_elsewhere_is_refused_with_sdpa(damaged, attention, where):
    options = {"attn_implementation": attention} if where == "argument" else {}
    if where == "config.json":
        config = json.loads((damaged / "config.json").read_text())
        key = {"_attn_implementation": attention, "attn_implementation": attention}
        (damaged / "config.json").write_text(json.dumps(config | key))
    with pytest.raises(ValueError, match='Expected "sdpa" or "eager"'):
        AutoModelForCausalLM.from_pretrained(damaged, **options)


def test_other_chatglm_checkpoints_are_left_to_their_own_code_where_it_is_allowed(tmp_path):
    auto_map = {"AutoConfig": "configuration_small.SmallConfig"}
    text_only = {"model_type": "chatglm", "auto_map": auto_map, "width": 8}
    (tmp_path / "config.json").write_text(json.dumps(text_only))
    (tmp_path / "configuration_small.py").write_text(
        "from transformers import PretrainedConfig\n\n\n"
        "class SmallConfig(PretrainedConfig):\n    model_type = 'chatglm'\n"
    )
    assert AutoConfig.from_pretrained(tmp_path, trust_remote_code=True).width == 8
    with pytest.raises(ValueError, match="text-only ChatGLM checkpoint"):
        AutoConfig.from_pretrained(tmp_path)


def test_the_official_checkpoint_is_read_by_the_class_here_whatever_is_allowed(damaged):
    config = json.loads((damaged / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_chatglm.ChatGLMConfig"}
    (damaged / "config.json").write_text(json.dumps(config))
    (damaged / "configuration_chatglm.py").write_text(
        "raise SystemExit('code of a checkpoint ran')\n"
    )
    shutil.rmtree(damaged / "__pycache__", ignore_errors=True)
    assert (
        type(AutoConfig.from_pretrained(damaged, trust_remote_code=True)).__name__ == "GLM4VConfig"
    )


# --- what would be dropped without a word


@pytest.mark.parametrize("name", ["images", "image", "pixel_values", "videos"])
def test_a_picture_beside_the_messages_is_refused_with_its_place(chat, name):
    for one in (chat[1], chat[1].tokenizer):
        with pytest.raises(ValueError, match=f"{name} is set.*into its message"):
            one.apply_chat_template([{"role": "user", "content": "a"}], **{name: PICTURE})


def test_the_tokenizer_alone_refuses_pictures(chat):
    with pytest.raises(ValueError, match="text only.*AutoProcessor"):
        chat[1].tokenizer("What is this?", images=[PICTURE])


def test_labels_of_another_length_are_refused(chat, inputs):
    with pytest.raises(ValueError, match=r"labels has the shape \(1, 3\), but input_ids"):
        chat[0](**inputs, labels=torch.zeros(1, 3, dtype=torch.long))


def test_a_field_of_the_configuration_may_be_assigned_to_before_a_model_is_made(checkpoint):
    config = AutoConfig.from_pretrained(checkpoint)
    config.num_layers, config.rope_ratio = 1, 4
    model = AutoModelForCausalLM.from_config(config)
    assert len(model.language_model.layers) == 1
    assert model.language_model.config.rope_parameters["rope_theta"] == 40_000
