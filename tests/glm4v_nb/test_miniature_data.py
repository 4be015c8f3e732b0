"""The miniature's pictures, questions, tokenizer and training examples."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from glm4v_nb.miniature import sample_pictures
from glm4v_nb.miniature.evaluate import COLUMNS, SIDE, held_out_questions
from glm4v_nb.model import GLM4VForConditionalGeneration
from glm4v_nb.model.splicing import IGNORED_LABEL
from glm4v_nb.model.tokenization import ChatGLM4Tokenizer
from tools.miniature import examples, feed, questions, scenes, train
from tools.miniature.vocabulary import grammar_words, save_vocabulary

CHINESE = {questions.CHINESE[word]: word for word in (*scenes.SHAPES, *scenes.COLOURS)}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("miniature")
    save_vocabulary(path, train.IMAGE_SIZE)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory) -> ChatGLM4Tokenizer:
    return ChatGLM4Tokenizer.from_pretrained(directory)


def samples(count: int, seed: int = 7):
    rng = np.random.default_rng(seed)
    return [questions.sample(rng) for _ in range(count)]


def to_english(text: str) -> str:
    """Names of shapes and colours in English words, whatever the language."""
    for chinese, english in CHINESE.items():
        text = text.replace(chinese, f" {english} ")
    return text.lower()


def matching(scene, text: str) -> list:
    """Objects that fit the shape and colour named in the text: an independent reading of the
    question."""
    words = set(re.findall(r"[a-z]+", to_english(text)))
    words |= {"cross" if word == "crosses" else word.removesuffix("s") for word in words}
    shapes, colours = words & set(scenes.SHAPES), words & set(scenes.COLOURS)
    return [
        one
        for one in scene.objects
        if (not shapes or one.shape in shapes) and (not colours or one.colour in colours)
    ]


def test_every_answer_agrees_with_the_objects_of_its_scene():
    for scene, question, answer, kind, _ in samples(1500):
        found, given = matching(scene, question), to_english(answer).strip()
        if kind == "count":
            assert answer == str(len(found)), question
        elif kind == "exists":
            assert (answer in ("yes", "有")) == bool(found), question
        elif kind == "absent":
            assert not found and matching(scene, answer) == [], question
        elif kind in ("shape", "colour"):
            assert [getattr(one, kind) for one in found] == [given], question
        elif kind == "where":
            (one,) = found
            cell = scenes.CELLS[one.cell]
            assert answer in (cell, questions.CHINESE[cell])
        elif kind == "larger":
            (one,) = matching(scene, answer)
            assert one in scene.objects and to_english(answer).split()[0] in to_english(question)
        elif kind == "describe":
            assert len(re.split("[,，]", answer)) == len(scene.objects)


def test_shapes_lie_in_their_cells_and_do_not_touch():
    rng = np.random.default_rng(1)
    for _ in range(300):
        objects = scenes.random_scene(rng).objects
        assert 1 <= len(objects) <= 5
        for number, one in enumerate(objects):
            assert one.cell == int(one.y * 3) * 3 + int(one.x * 3)
            for other in objects[number + 1 :]:
                assert np.hypot(one.x - other.x, one.y - other.y) > one.radius + other.radius


def test_the_same_seed_gives_the_same_questions_and_pictures():
    first, second = samples(10, seed=3), samples(10, seed=3)
    assert first == second
    picture, again = (scenes.draw(found[0][0], (160, 120)) for found in (first, second))
    assert picture.size == (160, 120) and picture.tobytes() == again.tobytes()
    assert first != samples(10, seed=4)


def test_a_shape_has_its_colour_at_its_centre():
    rng = np.random.default_rng(5)
    for _ in range(100):
        scene = scenes.random_scene(rng)
        picture = scenes.draw(scene, (300, 200))
        for one in scene.objects:
            pixel = np.array(picture.getpixel((int(one.x * 300), int(one.y * 200))), float)
            assert np.abs(pixel - one.rgb).max() <= 5 * scene.noise + 1


def test_every_question_and_answer_survives_the_tokenizer_and_words_are_single_tokens(tokenizer):
    for _, question, answer, *_ in samples(500):
        for text in (question, answer):
            assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    for word in grammar_words():
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1, word


def test_the_longest_description_fits_one_conversation(tokenizer):
    encoder = feed.ConversationEncoder(tokenizer)
    rng = np.random.default_rng(0)
    for language in questions.LANGUAGES:
        for _ in range(200):
            scene = scenes.random_scene(rng, count=5)
            ids, labels = encoder.turns([questions.ask(scene, "describe", language, rng)])
            assert len(ids) == len(labels) <= feed.TEXT_LENGTH


def test_the_trainers_loss_is_that_of_the_models_own_forward(directory, tokenizer):
    torch.manual_seed(0)
    special = save_vocabulary(directory, train.IMAGE_SIZE)
    config = train.miniature_config(special)
    model = GLM4VForConditionalGeneration(config)
    train.initialise(model)
    encoder = feed.ConversationEncoder(tokenizer)
    trainer = train.Trainer(model.eval(), encoder.prefix())
    examples = next(iter(feed.Feed(directory, train.IMAGE_SIZE, seed=0, workers=0)))
    pixels, ids, labels = (torch.from_numpy(part[:3].copy()) for part in
                           (examples.pixels, examples.ids, examples.labels))  # fmt: skip
    with torch.no_grad():
        torch.manual_seed(1)
        loss = trainer(pixels, ids, labels)
        torch.manual_seed(1)
        image = pixels.permute(0, 3, 1, 2).float()
        strength = 4 * torch.rand(3, 1, 1, 1)
        image = (image + strength * torch.randn_like(image)).clamp(0, 255) / 255
        image = ((image - trainer.mean) / trainer.std).repeat_interleave(feed.ROWS, 0)
        before = [*encoder.prefix(), config.boi_token_id, config.pad_token_id, config.eoi_token_id]
        rows = ids.flatten(0, 1).long()
        full = torch.cat((torch.tensor(before).expand(len(rows), -1), rows), dim=1)
        # The model shifts labels itself, so each moves one position on.
        shifted = torch.full_like(full, IGNORED_LABEL)
        shifted[:, len(before) + 1 :] = labels.flatten(0, 1)[:, :-1]
        expected = model(input_ids=full, pixel_values=image, labels=shifted).loss
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


def test_the_stored_examples_are_what_the_task_draws():
    for name, picture in examples.samples().items():
        assert sample_pictures()[name].tobytes() == picture.tobytes(), name
    sheet, asked = examples.held_out()
    stored = held_out_questions()
    assert [pair for _, *pair in stored] == [list(pair) for pair in asked]
    drawn = np.asarray(sheet, dtype=np.float32)
    for number, (picture, *_) in enumerate(stored):
        top, left = SIDE * (number // COLUMNS), SIDE * (number % COLUMNS)
        there = drawn[top : top + SIDE, left : left + SIDE]
        # JPEG of quality 90, which smooths noise; another picture differs by far more.
        assert np.abs(np.asarray(picture) - there).mean() < 6, number
