"""The service, asked as its clients ask it: the official openai client against a server here.

One server for all tests, in a thread of this process, with the miniature in float32. What is long
or many is made so by the engine's own limits, so that no test takes long.
"""

import asyncio
import base64
import io
import logging
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from PIL import Image
from waiting import until

from glm4v_nb.cli import main
from glm4v_nb.fit import load as load_without_weights
from glm4v_nb.inference import Sampling, fast, generate, load
from glm4v_nb.miniature import CHECKPOINT, sample_pictures
from glm4v_nb.serving import capacity
from glm4v_nb.serving.app import read_body
from glm4v_nb.serving.cache import STEPS, RowCache, best_steps, prefill
from glm4v_nb.serving.command import Server, running
from glm4v_nb.serving.engine import Engine
from glm4v_nb.serving.job import Failure, Job
from glm4v_nb.serving.metrics import Metrics
from glm4v_nb.serving.options import Options, bind, read_key
from glm4v_nb.serving.protocol import Refusal
from glm4v_nb.serving.service import Service
from simgpu import Rig

ROWS, QUEUE, POSITIONS = 4, 40, 2000
AT_ONCE = 2  # seconds; the answers of ``endless`` take longer
QUESTIONS = (
    "How many crosses are there?",
    "What is in the picture?",
    "图中有什么？",
    "How many objects are there?",
)


def data_url(image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def message(text: str, url: str | None = None) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": url}}] if url else []
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


@pytest.fixture(scope="module")
def picture():
    given = sample_pictures()["Five shapes"]
    return given if isinstance(given, Image.Image) else Image.open(given)


@pytest.fixture(scope="module")
def url(picture):
    return data_url(picture)


@pytest.fixture(scope="module")
def loaded():
    return load(CHECKPOINT, dtype=torch.float32, device_map="cpu")


@pytest.fixture(scope="module")
def options():
    return Options(
        str(CHECKPOINT), name="miniature", port=0, rows=ROWS, queue=QUEUE, positions=POSITIONS,
        body_mib=8,
    )  # fmt: skip


@pytest.fixture(scope="module")
def served(loaded, options):
    """(service, http://…)"""
    with running(options, *loaded) as (service, address):
        yield service, address.removesuffix("/v1")


@pytest.fixture
def ask(client):
    def call(*messages, **more):
        return client.chat.completions.create(model="miniature", messages=list(messages), **more)

    return call


@pytest.fixture
def endless(service, monkeypatch):
    """Answers end at max_tokens alone, and take 20 ms a token at least: 1500 of them 30 s."""
    steps = service.engine._steps

    def slowly(*given):
        time.sleep(0.02)
        return steps(*given)

    monkeypatch.setattr(service.engine, "_end_ids", set())
    monkeypatch.setattr(service.engine, "_steps", slowly)


@pytest.fixture(scope="module")
def alone(loaded, picture):
    """The answers of ``generate``, one question at a time."""
    asked = [{"role": "user", "image": picture, "content": text} for text in QUESTIONS]
    return [generate(*loaded, [each]) for each in asked]


def idle(service) -> bool:
    engine = service.engine
    return not engine._running and not engine._waiting and engine._inside == 0


def figure(http, served, name: str) -> float:
    text = http.get(served[1] + "/metrics").text
    return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])


# --- answers


def test_an_answer_about_a_picture_is_that_of_generate_with_the_usage(ask, url, alone):
    got = ask(message(QUESTIONS[0], url))
    assert got.choices[0].message.content == alone[0].text == "4"
    assert got.choices[0].finish_reason == "stop"
    assert got.usage.prompt_tokens == alone[0].prompt_tokens
    assert got.usage.completion_tokens == alone[0].new_tokens
    assert got.usage.total_tokens == alone[0].prompt_tokens + alone[0].new_tokens


def test_text_alone_and_a_conversation_are_answered_as_by_generate(ask, loaded):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "What is a star?"},
    ]
    got = ask(*turns, max_tokens=20)
    assert got.choices[0].message.content == generate(*loaded, turns, Sampling(20)).text


def test_a_stream_has_the_same_text_in_pieces_and_the_usage_at_its_end(ask, url, alone):
    question = message(QUESTIONS[1], url)
    chunks = list(ask(question, stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    texts = [each.choices[0].delta.content for each in pieces if each.choices[0].delta.content]
    assert len(texts) > 2
    assert "".join(texts) == alone[1].text
    assert [each.choices[0].finish_reason for each in pieces[-2:]] == [None, "stop"]
    assert last.choices == [] and last.usage.completion_tokens == alone[1].new_tokens
    assert all(each.usage is None for each in ask(question, stream=True))


def test_thirty_two_clients_at_once_each_get_the_answer_that_they_would_get_alone(
    ask, url, alone, service
):
    most = []
    with pytest.MonkeyPatch.context() as patch:
        steps = service.engine._steps

        def counted(rows, *state):
            most.append(len(rows))
            return steps(rows, *state)

        patch.setattr(service.engine, "_steps", counted)
        with ThreadPoolExecutor(32) as pool:
            asked = [message(QUESTIONS[number % 4], url) for number in range(32)]
            got = list(pool.map(ask, asked))
    texts = [each.choices[0].message.content for each in got]
    assert texts == [alone[number % 4].text for number in range(32)]
    assert max(most) == ROWS, "requests shared steps"
    until(lambda: idle(service), AT_ONCE)


def test_a_request_joins_those_that_run_and_leaves_before_them(ask, url, alone, endless, service):
    with ask(message("Hello"), stream=True, max_tokens=1500) as long:
        next(iter(long))
        short = ask(message(QUESTIONS[0], url), max_tokens=3, stop=["never"])
        assert short.choices[0].message.content.startswith(alone[0].text)
        assert len(service.engine._running) == 1
    until(lambda: idle(service), AT_ONCE)


def test_a_seed_gives_the_same_sample_and_another_one_another(ask, endless):
    def sample(**more):
        return ask(message("Hello"), max_tokens=12, **more).choices[0].message.content

    hot = {"temperature": 2.0}
    first = sample(seed=1, **hot)
    assert first == sample(seed=1, **hot) != sample(seed=2, **hot)
    assert first != sample()
    assert sample(temperature=2.0, top_p=1e-6) == sample(), "the likeliest alone"


def test_a_stop_text_ends_the_answer_before_it(ask, url, alone):
    whole, cut = alone[1].text, alone[1].text[4:7]
    got = ask(message(QUESTIONS[1], url), stop=["not there", cut])
    assert got.choices[0].message.content == whole[: whole.index(cut)]
    assert got.choices[0].finish_reason == "stop"
    assert got.usage.completion_tokens < alone[1].new_tokens


def test_max_tokens_ends_the_answer_and_says_so(ask, endless):
    got = ask(message("Hello"), max_tokens=5)
    assert (got.choices[0].finish_reason, got.usage.completion_tokens) == ("length", 5)


def test_fused_kernels_in_a_batch_give_the_same_answers(loaded, picture, interpreter):
    """The first tokens."""
    model, processor = loaded
    assert fast.why_not(model) is None
    found = []
    for decoding in ("eager", "fast"):
        cache = RowCache(model, 3, 128)
        steps, rows, state = STEPS[decoding](model, cache), [2, 0], []
        for row, text in zip(rows, QUESTIONS, strict=False):
            asked = [{"role": "user", "image": picture, "content": text}]
            inputs = processor.apply_chat_template(asked, add_generation_prompt=True)
            token = int(prefill(model, inputs, cache, row).argmax())
            ids = inputs["input_ids"].shape[1]
            state.append([token, ids, ids + model.config.vision_config.image_tokens - 3])
        for _ in range(2):
            logits = steps(rows, *map(list, zip(*state, strict=True)))
            found.append(logits.clone())
            best = logits.argmax(-1).tolist()
            state = [[token, at + 1, slot + 1]
                     for token, (_, at, slot) in zip(best, state, strict=True)]  # fmt: skip
    torch.testing.assert_close(found[:2], found[2:], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("card", "rows", "expected"), [("L4", 8, "fast"), ("L4", 9, "eager"), ("T4", 8, "eager")]
)
def test_fused_kernels_are_taken_where_they_can_be(card, rows, expected):
    with Rig.simulated(card, 1, ""):
        model, _ = load(CHECKPOINT, dtype=torch.float16)
        assert best_steps(model, RowCache(model, rows, 64)) == expected


def test_on_a_cpu_steps_are_the_models_own(loaded, interpreter):
    model, _ = loaded
    assert fast.why_not(model) is None  # by the interpreter, which is slow
    assert best_steps(model, RowCache(model, 1, 64)) == "eager"


# --- those who leave, and those who are too many


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_frees_the_memory_in_two_seconds(
    stream, ask, client, endless, service, http, served
):
    asked = {"max_tokens": 1900, "stream": stream}
    if stream:
        with ask(message("Hello"), **asked) as answer:
            next(iter(answer))
            assert figure(http, served, "glm4v_nb_cache_positions_used") > 0
    else:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.5).chat.completions.create(
                model="miniature", messages=[message("Hello")], **asked
            )
    until(lambda: idle(service), AT_ONCE)
    assert figure(http, served, "glm4v_nb_cache_positions_used") == 0


def test_who_hangs_up_in_the_queue_leaves_it(ask, client, endless, service):
    streams = [ask(message("Hello"), stream=True, max_tokens=1900) for _ in range(ROWS)]
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).chat.completions.create(
            model="miniature", messages=[message("Hello")]
        )
    until(lambda: not service.engine._waiting, AT_ONCE)
    assert len(service.engine._running) == ROWS, "it waited"
    for each in streams:
        each.close()
    until(lambda: idle(service), AT_ONCE)


def test_more_than_the_queue_holds_are_told_to_come_back(ask, endless, service, monkeypatch):
    monkeypatch.setattr(service.engine, "most", 1)
    with ask(message("Hello"), stream=True, max_tokens=1900) as running:
        next(iter(running))
        with pytest.raises(openai.RateLimitError, match="Ask again") as refused:
            ask(message("Hello"))
    assert refused.value.code == "queue_full"
    assert int(refused.value.response.headers["retry-after"]) >= 1
    until(lambda: idle(service), AT_ONCE)
    assert ask(message("Hello"), max_tokens=2).choices


# --- what does not fit


def test_what_would_never_fit_is_refused_with_bytes_and_advice_and_the_next_is_answered(ask):
    words = "circle " * 2100  # a token each, more than positions of a request
    with pytest.raises(openai.APIStatusError, match="Shorten the text") as refused:
        ask(message(words))
    assert (refused.value.status_code, refused.value.code) == (413, "does_not_fit")
    assert re.search(r"[\d,]{7,} bytes of cache", str(refused.value))
    with pytest.raises(openai.APIStatusError, match="at most 1,9[0-9]{2} tokens") as refused:
        ask(message("Hello"), max_tokens=POSITIONS)
    room = int(re.search(r"at most 1,(\d+) tokens", str(refused.value))[1]) + 1000
    assert ask(message("Hello"), max_tokens=room).choices, "what is advised is let in"


def test_more_than_the_model_s_context_is_a_wrong_request(ask):
    with pytest.raises(openai.BadRequestError, match="context is 8,192") as refused:
        ask(message("Hello"), max_tokens=8192)
    assert refused.value.code == "context_length_exceeded"


def test_an_endless_prompt_is_refused_before_it_is_tokenised(ask, service, monkeypatch):
    monkeypatch.setattr(service, "processor", None)
    with pytest.raises(openai.BadRequestError, match="300,000 characters") as refused:
        ask(message("a b" * 100_000))
    assert refused.value.code == "context_length_exceeded"


def out_of_memory(*arguments, **more):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_a_prompt_that_runs_out_of_memory_gets_503_and_the_next_one_an_answer(
    ask, service, monkeypatch, alone, url
):
    with monkeypatch.context() as patch:
        patch.setattr(service.engine.model, "forward", out_of_memory)
        with pytest.raises(openai.InternalServerError, match="shorter prompt") as refused:
            ask(message("Hello"))
    assert (refused.value.status_code, refused.value.code) == (503, "out_of_memory")
    assert ask(message(QUESTIONS[0], url)).choices[0].message.content == alone[0].text
    assert idle(service)


def test_a_step_that_runs_out_of_memory_costs_the_youngest_and_the_others_go_on(
    ask, service, monkeypatch, loaded, endless
):
    steps, broken = service.engine._steps, []

    def fail_once(rows, *state):
        if len(rows) == 2 and not broken:
            broken.append(True)
            out_of_memory()
        return steps(rows, *state)

    monkeypatch.setattr(service.engine, "_steps", fail_once)
    alone = ask(message("Hello"), max_tokens=100).choices[0].message.content
    with ask(message("Hello"), stream=True, max_tokens=100) as answer:
        pieces = iter(answer)
        next(pieces)
        with pytest.raises(openai.InternalServerError) as refused:
            ask(message("What is a star?"), max_tokens=50)
        text = "".join(each.choices[0].delta.content or "" for each in pieces)
    assert refused.value.code == "out_of_memory" and broken
    assert text == alone
    until(lambda: idle(service), AT_ONCE)


def test_another_error_of_the_model_is_told_to_who_asked_and_the_log_has_no_prompt(
    ask, service, monkeypatch, caplog
):
    def fail(*arguments, **more):
        raise RuntimeError("a secret question")

    with monkeypatch.context() as patch, caplog.at_level(logging.DEBUG):
        patch.setattr(service.engine.model, "forward", fail)
        with pytest.raises(openai.InternalServerError, match="the log says how"):
            ask(message("a secret question"))
    assert "RuntimeError" in caplog.text and "test_serving.py" in caplog.text
    assert "secret" not in caplog.text
    assert ask(message("Hello")).choices


def test_an_error_before_the_model_is_told_so_and_the_log_has_no_prompt(
    ask, service, monkeypatch, caplog
):
    def fail(*arguments, **more):
        raise KeyError("a secret question")

    with monkeypatch.context() as patch, caplog.at_level(logging.DEBUG):
        patch.setattr(service.processor, "apply_chat_template", fail)
        with pytest.raises(openai.InternalServerError, match="could not be prepared"):
            ask(message("a secret question"))
    assert "KeyError" in caplog.text and "secret" not in caplog.text
    assert idle(service)


def test_an_error_beside_the_model_is_told_to_who_asked_and_the_next_is_answered(ask, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Job, "add", lambda *given: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="the log says how"):
            ask(message("Hello"))
    assert ask(message("Hello")).choices


@pytest.mark.parametrize("broken", ["card", "engine"])
def test_what_only_a_new_process_mends_ends_the_service_and_nobody_waits(
    broken, loaded, monkeypatch
):
    def fail(*arguments, **more):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    model, processor = loaded
    engine = Engine(model, RowCache(model, 1, 64), "eager", 1, Metrics())
    if broken == "card":
        monkeypatch.setattr(engine, "_steps", fail)
    else:
        monkeypatch.setattr(engine, "_step", fail)
    told = queue.Queue()
    inputs = processor.apply_chat_template([message("Hello")], add_generation_prompt=True)
    ids = inputs["input_ids"].shape[1]
    engine.reserve()
    job, late = (
        Job(inputs, ids, Sampling(20), (), processor.tokenizer, told.put) for _ in range(2)
    )
    engine.submit(job)
    engine.start()
    while not isinstance(ended := told.get(timeout=10), Failure):
        pass
    assert ended.status in (500, 503)
    with pytest.raises(Refusal):
        engine.reserve()
    engine.stop()
    with pytest.raises(Refusal):  # whose body was still read when it happened
        engine.submit(late)
    server = Server(Service("x", processor, engine, Metrics(), 1), 1)
    assert asyncio.run(server.on_tick(0)), "and so the process ends, to be started again"


# --- bodies and pictures


def test_a_body_of_50_megabytes_is_refused_in_words_whether_its_size_is_said_or_not(http, served):
    def parts():
        for _ in range(50):
            yield b" " * 2**20

    where = served[1] + "/v1/chat/completions"
    for content in (b" " * (50 * 2**20), parts()):
        got = http.post(where, content=content, headers={"Content-Type": "application/json"})
        assert got.status_code == 413
        assert got.json()["error"]["code"] == "body_too_large"
        assert "8,388,608 bytes" in got.json()["error"]["message"]


def test_a_body_that_is_too_large_is_not_kept():
    class Sent:
        headers = {"content-type": "application/json"}

        async def stream(self):
            for _ in range(50):
                yield bytes(2**20)

    tracemalloc.start()
    with pytest.raises(Refusal, match="larger than 8,388,608 bytes"):
        asyncio.run(read_body(Sent(), 8 * 2**20, set()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 25 * 2**20, "8 MiB, while a larger buffer takes its place, and a chunk"


def test_a_body_that_does_not_end_gives_its_place_back(served, monkeypatch):
    service, address = served
    monkeypatch.setattr("glm4v_nb.serving.app._BODY_SECONDS", 0.3)
    host, port = address.removeprefix("http://").split(":")
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
    for hang_up in (True, False):
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n{{".encode())
            until(lambda: service.engine._inside == 1)
            if not hang_up:
                assert b" 408 " in connection.recv(1000).splitlines()[0]
        until(lambda: idle(service), AT_ONCE)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("https://example.org/cat.png", "no address is fetched"),
        ("http://169.254.169.254/latest/meta-data", "no address is fetched"),
        ("file:///etc/passwd", "no file is opened"),
        (str(CHECKPOINT.parent / "examples" / "two_shapes.png"), "no file is opened"),
        ("data:image/png;base64,%%%%", "no base64"),
        ("data:image/png;base64,aGVsbG8=", "cannot be read as an image"),
    ],
)
def test_a_picture_is_a_data_url_or_nothing(address, says, ask):
    with pytest.raises(openai.BadRequestError, match=says):
        ask(message("What is it?", address))


def test_a_bomb_of_pixels_is_refused_before_it_is_decoded(ask):
    bomb = data_url(Image.new("1", (10_000, 10_000)))
    assert len(bomb) < 100_000, "a small file"
    with pytest.raises(openai.BadRequestError, match="too many pixels"):
        ask(message("What is it?", bomb))


def test_two_pictures_are_refused_in_words(ask, url):
    with pytest.raises(openai.BadRequestError, match="one image in a conversation"):
        ask(message("What is it?", url), message("And this?", url))


# --- what is asked wrongly


@pytest.mark.parametrize(
    ("given", "status", "says"),
    [
        ({"n": 2}, 400, "n is not served here. Expected 1"),
        ({"tools": [{"type": "function"}]}, 400, "tools is not served"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format is not served"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"frobnicate": 1}, 400, "frobnicate"),
        ({"temperature": 3}, 400, "less than or equal to 2"),
        ({"top_p": 0}, 400, "greater than 0"),
        ({"max_tokens": 0}, 400, "greater than or equal to 1"),
        ({"max_tokens": True}, 400, "valid integer"),
        ({"stop": ["a"] * 5}, 400, "at most 4"),
        ({"stop": ""}, 400, "at least 1 character"),
        ({"stream_options": {"include_usage": True}}, 400, "Set stream"),
        ({"messages": []}, 400, "at least 1"),
        ({"messages": [message("a")] * 10_001}, 400, "at most 10000"),
        ({"messages": [{"role": "wizard", "content": "Hello"}]}, 400, "'system', 'developer',"),
        ({"messages": [{"role": "user", "content": ""}]}, 400, "The conversation is empty"),
        ({"messages": [{"role": "user", "image": "/etc/passwd", "content": "a"}]}, 400, "image"),
        ({"model": "gpt-9"}, 404, "Ask for 'miniature'"),
    ],
)
def test_what_is_not_served_is_refused_in_words_in_openai_s_shape(
    given, status, says, http, served
):
    good = {"model": "miniature", "messages": [message("Hello")]}
    got = http.post(served[1] + "/v1/chat/completions", json=good | given)
    assert got.status_code == status, got.text
    error = got.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert says in error["message"]


def test_what_asks_for_nothing_is_let_in(ask):
    got = ask(message("Hello"), n=1, user="me", logprobs=False, response_format={"type": "text"})
    assert got.choices


@pytest.mark.parametrize("body", [b"", b"hello", b"[]", b"[" * 100_000, b'{"model": "\xff"}'])
def test_what_is_no_json_is_a_wrong_request(body, http, served):
    where, headers = served[1] + "/v1/chat/completions", {"Content-Type": "application/json"}
    assert http.post(where, content=body, headers=headers).status_code == 400


def test_a_page_of_another_site_cannot_ask(http, served):
    where, good = served[1] + "/v1/chat/completions", b'{"model": "miniature"}'
    plain = http.post(where, content=good, headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415
    for host in ("evil.example:80", "127.0.0.1.evil.example", "192.0.2.1", ""):
        foreign = http.get(served[1] + "/v1/models", headers={"Host": host})
        assert foreign.status_code in (400, 403), host
    for host in ("localhost:80", "127.0.0.2", "[::1]:80", "[::1]"):
        own = http.get(served[1] + "/v1/models", headers={"Host": host})
        assert own.status_code == 200, host


def test_a_wrong_place_says_what_there_is(http, served):
    got = http.get(served[1] + "/v1/completions")
    assert got.status_code == 404 and "/v1/chat/completions" in got.json()["error"]["message"]


# --- the key, health, metrics


def test_with_a_key_all_but_health_ask_for_it(client, service, http, served, monkeypatch):
    monkeypatch.setattr(service, "key", "k" * 20)
    with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer"):
        client.models.list()
    for path, status in (("/metrics", 401), ("/health", 200)):
        assert http.get(served[1] + path).status_code == status
    right = client.with_options(api_key="k" * 20)
    assert [one.id for one in right.models.list()] == ["miniature"]


@pytest.mark.parametrize(
    ("host", "key", "says"),
    [
        ("0.0.0.0", None, "there is no key"),
        ("::", None, "there is no key"),
        ("127.0.0.1", "short", "expected 16 or more"),
        ("0.0.0.0", "", "expected 16 or more"),
        ("0.0.0.0", "é" * 20, "printable ASCII"),
    ],
)
def test_other_machines_need_a_good_key(host, key, says, monkeypatch):
    monkeypatch.delenv("GLM4V_NB_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("GLM4V_NB_API_KEY", key)
    with pytest.raises(ValueError, match=says):
        read_key(Options("x", host=host))


def test_a_key_comes_from_a_file_or_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("GLM4V_NB_API_KEY", raising=False)
    assert read_key(Options("x")) is None
    (tmp_path / "key").write_text("f" * 16 + "\n")
    assert read_key(Options("x", host="0.0.0.0", key_file=tmp_path / "key")) == "f" * 16
    monkeypatch.setenv("GLM4V_NB_API_KEY", "e" * 16)
    assert read_key(Options("x", host="0.0.0.0")) == "e" * 16


def test_the_metrics_count_tokens_refusals_and_seconds(ask, url, http, served, alone):
    names = [
        "glm4v_nb_generated_tokens_total",
        "glm4v_nb_prompt_tokens_total",
        "glm4v_nb_first_token_seconds_count",
        'glm4v_nb_requests_finished_total{reason="stop"}',
    ]
    before = [figure(http, served, name) for name in names]
    ask(message(QUESTIONS[0], url))
    after = [figure(http, served, name) for name in names]
    grown = [late - early for late, early in zip(after, before, strict=True)]
    assert grown == [alone[0].new_tokens, alone[0].prompt_tokens, 1, 1]
    with pytest.raises(openai.BadRequestError):
        ask(message("Hello"), n=2)
    refused = 'glm4v_nb_requests_refused_total{reason="unsupported_parameter"}'
    assert figure(http, served, refused) >= 1


def test_what_runs_longer_than_the_grace_is_told_that_the_service_ends(ask, service, endless):
    with ask(message("Hello"), stream=True, max_tokens=1900) as running:
        pieces = iter(running)
        next(pieces)
        try:
            service.engine.drain(0.1)
            with pytest.raises(openai.APIError, match="when it is back"):
                list(pieces)
        finally:
            service.engine.draining = False
    assert idle(service)


def test_while_it_ends_it_is_not_healthy_and_lets_nobody_in(ask, service, http, served, endless):
    with ask(message("Hello"), stream=True, max_tokens=100) as running:
        pieces = iter(running)
        next(pieces)
        try:
            service.engine.drain()
            assert http.get(served[1] + "/health").status_code == 503
            with pytest.raises(Refusal, match="shutting down"):
                service.engine.reserve()
            *_, last = pieces
        finally:
            service.engine.draining = False
    assert last.choices[0].finish_reason == "length", "what ran was finished"


# --- room on cards, and the process


def test_the_room_of_cards_is_what_was_run_on_them_and_fitted():
    """Full size, simulated: with many rows less than the context, and then the worst still fits."""
    rig = Rig.simulated("A100-40")
    model = load_without_weights(rig, "auto", torch.bfloat16)
    with rig:
        room = capacity.find_room(model, rows=40)
        cache = room.cache
        assert 1602 < cache.capacity < 8192
        assert "did not fit" in room.why
        larger = cache.capacity * 8 // 7 + capacity.STEP
        del cache, room
        with pytest.raises(torch.OutOfMemoryError):
            capacity._try_worst(model, capacity.RowCache(model, 40, larger))


def test_impossible_options_are_refused_before_anything_is_loaded():
    for given, says in (
        ({"rows": 0}, "--rows is 0"),
        ({"decoding": "warp"}, "eager, fast"),
        ({"rows": 9, "decoding": "fast"}, "1 to 8"),
        ({"dtype": "int3"}, "--dtype"),
        ({"port": 70_000}, "--port is 70000"),
    ):
        with pytest.raises(ValueError, match=says):
            Options("x", **given).check()


@pytest.mark.parametrize(
    ("error", "code"),
    [(torch.OutOfMemoryError("CUDA out of memory."), 3), (KeyboardInterrupt(), 130)],
)
def test_no_room_and_an_interrupt_have_their_exit_codes(error, code, monkeypatch, capfd):
    def fail(*arguments):
        raise error

    monkeypatch.setattr("glm4v_nb.serving.command.serve", fail)
    assert main(["serve", str(CHECKPOINT)]) == code
    captured = capfd.readouterr()
    assert captured.out == "" and ("fewer --rows" in captured.err) == (code == 3)


def test_a_port_that_is_taken_is_known_at_once(served, client):
    taken = int(served[1].rpartition(":")[2])
    for host, port in (("127.0.0.1", taken), ("192.0.2.1", 8000)):
        with pytest.raises(OSError, match="Choose another port"):
            bind(host, port)


def test_without_the_extra_the_command_says_what_to_install(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "glm4v_nb.serving.command")
    monkeypatch.delattr("glm4v_nb.serving.command")
    assert main(["serve", "x"]) == 1
    assert "pip install '.[serve]'" in capfd.readouterr().err


def test_a_service_that_is_killed_starts_again_and_one_that_is_ended_finishes_what_runs(tmp_path):
    """What a supervisor does: start, kill -9, start at the same port; then SIGTERM."""
    listening = bind("127.0.0.1", 0)
    port = listening.getsockname()[1]
    listening.close()
    program = Path(sys.executable).with_name("glm4v-nb")
    words = ["serve", CHECKPOINT, "--port", port, "--dtype", "float32"]
    address = f"http://127.0.0.1:{port}"

    def begin():
        process = subprocess.Popen(
            [program, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        first = process.stdout.readline()
        assert first.startswith(f"checkpoint at {address}/v1"), first
        socket.create_connection(("127.0.0.1", port)).close()  # it listens when it says so
        return process

    process = begin()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process = begin()
    try:
        with openai.OpenAI(base_url=address + "/v1", api_key="none") as client:
            ask = client.chat.completions.create
            asked = {"model": "checkpoint", "messages": [message("Hello")]}
            hot = {"temperature": 2.0, "seed": 1, "max_tokens": 300}
            with ask(**asked, **hot, stream=True) as answer:
                pieces = iter(answer)
                next(pieces)
                process.send_signal(signal.SIGTERM)
                *_, last = pieces
        assert last.choices[0].finish_reason in ("stop", "length")
        assert process.wait(timeout=10) == 0
        curl = [line for line in process.stdout if line.startswith("curl ")]
        assert len(curl) == 1
    finally:
        process.kill()
