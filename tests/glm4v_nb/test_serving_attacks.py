"""The service, asked by clients that are odd, careless or hostile; sockets where a client library
would not send it. One server for all tests, in a thread, with the miniature in float32."""

import base64
import json
import logging
import os
import queue
import re
import socket
import subprocess
import time

import openai
import pytest
import torch
from pydantic import ValidationError

from glm4v_nb.inference import Sampling, load
from glm4v_nb.miniature import CHECKPOINT
from glm4v_nb.serving import command, options, protocol
from glm4v_nb.serving.cache import RowCache
from glm4v_nb.serving.command import running, welcome
from glm4v_nb.serving.engine import Engine
from glm4v_nb.serving.job import Done, Failure, Job, Piece
from glm4v_nb.serving.metrics import Metrics
from glm4v_nb.serving.options import Options, bind, listen, read_key
from glm4v_nb.serving.protocol import ChatRequest, Refusal, conversation, parse

HELLO = {"role": "user", "content": "Hello"}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def loaded():
    return load(CHECKPOINT, dtype=torch.float32, device_map="cpu")


@pytest.fixture(scope="module")
def served(loaded):
    """(service, http://…); answers end at max_tokens alone."""
    given = Options(str(CHECKPOINT), name="mini/ature", port=0, rows=2, queue=4, grace_seconds=0)
    with running(given, *loaded) as (service, address):
        service.engine._end_ids = set()
        yield service, address.removesuffix("/v1")


@pytest.fixture
def ask(client):
    def call(*messages, **more):
        given = {"model": "mini/ature", "messages": list(messages or [HELLO]), "max_tokens": 4}
        return client.chat.completions.create(**given | more)

    return call


def body(**more) -> bytes:
    return json.dumps({"model": "mini/ature", "messages": [HELLO], **more}).encode()


def connect(address: str, sent: bytes = b"") -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.sendall(sent)
    return connection


def head(length: int) -> bytes:
    lines = [f"POST {CHAT} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def within(seconds: float, condition) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.02)
    return False


def idle(service) -> bool:
    return service.engine._inside == 0 and not service.engine._running


# --- what official clients send


def test_an_answer_can_be_sent_back_as_it_came(ask):
    answer = ask().choices[0].message
    assert ask(HELLO, answer, HELLO).choices
    assert ask(HELLO, answer.model_dump() | {"annotations": []}, HELLO).choices


def test_a_developer_is_the_system():
    texts = [{"role": role, "content": "Be brief."} for role in ("developer", "system")]
    first, second = conversation(parse(body(messages=texts), "mini/ature"))
    assert first == second


def test_a_model_can_be_asked_for_by_name(client, http, served):
    assert client.models.retrieve("mini/ature").id == "mini/ature"
    with pytest.raises(openai.NotFoundError, match="Ask for 'mini/ature'"):
        client.models.retrieve("gpt-9")
    assert http.get(served[1] + "/v1/models/").json()["data"][0]["id"] == "mini/ature"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"name": "me"}, "messages.0.name is not served here"),
        ({"content": [{"type": "input_audio"}]}, "'text', 'image_url'"),
        ({"content": [{"type": "text", "text": "a", "x": 1}]}, "content.0.x is not served"),
    ],
)
def test_what_is_wrong_further_in_is_named(wrong, says, ask):
    with pytest.raises(openai.BadRequestError, match=re.escape(says)):
        ask(HELLO | wrong)


def test_methods_schemes_and_types_are_read_as_http_says(http, served, service, monkeypatch):
    for path in ("/health", "/metrics", "/v1/models"):
        assert http.head(served[1] + path).status_code == 200
    wrong = http.get(served[1] + CHAT)
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    large = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert http.post(served[1] + CHAT, content=body(max_tokens=1), headers=large).is_success
    packed = http.post(served[1] + CHAT, content=b"x", headers=large | {"Content-Encoding": "gzip"})
    assert packed.status_code == 415 and "gzip" in packed.json()["error"]["message"]
    monkeypatch.setattr(service, "key", "k" * 20)
    for given, status in (("bearer ", 200), ("Bearer  ", 200), ("Basic ", 401), ("", 401)):
        headers = {"Authorization": given + "k" * 20}
        assert http.get(served[1] + "/v1/models", headers=headers).status_code == status


def test_an_answer_that_ends_within_a_character_is_that_of_generate(loaded):
    """Some tokens are a character and a part of the next one."""
    tokenizer = loaded[1].tokenizer
    inputs = {"input_ids": torch.zeros(1, 1)}
    cut = 0
    for token in sorted(set(tokenizer.get_vocab().values())):
        pieces = []
        Job(inputs, 1, Sampling(1), (), tokenizer, pieces.append).add(token, set())
        text = "".join(each.text for each in pieces if isinstance(each, Piece))
        expected = tokenizer.decode([token], skip_special_tokens=True).lstrip()
        assert text == expected
        cut += len(expected) > 1 and expected.endswith("\ufffd")
    assert cut


# --- what would take the service's time or memory


def test_a_temperature_next_to_nothing_takes_the_likeliest_token(ask):
    greedy = ask().choices[0].message.content
    for temperature in (1e-320, 1e-40, 1e-6):
        assert ask(temperature=temperature).choices[0].message.content == greedy


def test_logits_that_are_no_numbers_cost_one_request_and_no_other(loaded):
    """A draw fails on them, in a step that others share."""
    model, processor = loaded
    engine = Engine(model, RowCache(model, 2, 64), "eager", 0, Metrics())
    steps = engine._steps

    def broken(rows, *state):
        logits = steps(rows, *state)
        logits[-1] = float("nan")
        return logits

    engine._steps = broken
    inputs = processor.apply_chat_template([HELLO], add_generation_prompt=True)
    ids, ends = inputs["input_ids"].shape[1], [queue.Queue(), queue.Queue()]
    for temperature, told in zip((0.0, 1.0), ends, strict=True):
        engine.reserve()
        sampling = Sampling(3, temperature)
        engine.submit(Job(dict(inputs), ids, sampling, (), processor.tokenizer, told.put))
    # Both join before the first step.
    engine._join(), engine._join()
    engine.start()
    last = []
    for told in ends:
        while not isinstance(event := told.get(timeout=10), (Done, Failure)):
            pass
        last.append(event)
    engine.stop()
    assert isinstance(last[0], Done) and last[1].code == "internal_error"


def test_a_body_of_very_many_values_is_not_taken_apart():
    many = b"[]," * (protocol.MOST_VALUES // 2)
    with pytest.raises(Refusal, match="commas and brackets") as refused:
        parse(body()[:-1] + b', "metadata": [' + many + b"1]}", "mini/ature")
    assert refused.value.status == 413


def test_the_first_wrong_part_ends_the_reading():
    wrong = body(messages=[{"role": "user", "content": [1] * 5000}] * 2)
    with pytest.raises(ValidationError) as error:
        ChatRequest.model_validate_json(wrong)
    assert error.value.error_count() == 1


def test_a_request_that_is_prepared_holds_no_picture_a_second_time(service):
    picture = (CHECKPOINT.parent / "examples" / "two_shapes.png").read_bytes()
    url = "data:image/png;base64," + base64.b64encode(picture).decode()
    part = {"type": "image_url", "image_url": {"url": url}}
    sent = body(messages=[{"role": "user", "content": [part]}], max_tokens=1)
    request, job = service.prepare(sent, print)
    assert "pixel_values" in job.inputs and "base64" not in repr(request)


# --- connections


def test_who_has_sent_more_than_a_request_and_hangs_up_frees_the_row_in_two_seconds(
    served, service
):
    sent = body(max_tokens=8000)
    connection = connect(served[1], head(len(sent)) + sent)
    assert within(5, lambda: service.engine._running)
    connection.sendall(b"x" * 1000)
    time.sleep(0.2)  # no more is read then
    connection.close()
    assert within(2, lambda: idle(service))


def test_a_connection_that_does_not_ask_is_cut_and_one_that_waits_is_not(
    served, service, monkeypatch
):
    monkeypatch.setattr(command, "_IDLE_SECONDS", 0.1)
    sent = body(max_tokens=8000)
    with (
        connect(served[1], b"GET /hea") as slow,
        connect(served[1], head(len(sent)) + sent) as waiting,
    ):
        assert within(2, lambda: service.engine._running)
        assert slow.recv(1) == b""
        waiting.settimeout(1.5)
        with pytest.raises(TimeoutError):
            waiting.recv(1)
    assert within(2, lambda: idle(service))


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux can")
def test_who_reads_nothing_of_an_answer_is_cut_off(monkeypatch):
    monkeypatch.setattr(options, "STUCK_SECONDS", 1)
    with bind("127.0.0.1", 0) as listening:
        listen(listening)
        with socket.create_connection(listening.getsockname()):
            answering, _ = listening.accept()
            with answering, pytest.raises(OSError, match="Connection timed out"):
                answering.settimeout(10)  # which would say less
                while True:
                    answering.sendall(bytes(2**20))


def test_of_two_that_start_at_one_address_the_slower_is_told_so():
    with bind("127.0.0.1", 0) as first:
        with bind("127.0.0.1", first.getsockname()[1]) as second:  # neither listens yet
            listen(first)
            with pytest.raises(OSError, match="Choose another port"):
                listen(second)


# --- keys, counts, lines of the log


def test_the_line_to_copy_shows_the_key_to_no_list_of_processes(service, tmp_path, monkeypatch):
    """Run by a shell, with a curl that says what it was given."""
    monkeypatch.setattr(service, "key", "k" * 20)
    (tmp_path / "curl").write_text('#!/bin/sh\necho "$@"\necho "stdin: $(cat)"\n')
    (tmp_path / "curl").chmod(0o700)
    (tmp_path / "a key").write_text("k" * 20 + "\n")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    for file in (None, tmp_path / "a key"):
        text = welcome(service, Options("x", key_file=file), "http://127.0.0.1:80/v1")
        [line] = [each for each in text.splitlines() if "curl" in each]
        environment = {**os.environ, "PATH": path, options.KEY_VARIABLE: "k" * 20}
        said = subprocess.run(
            ["sh", "-c", line], capture_output=True, text=True, env=environment, check=True
        ).stdout
        arguments, _, stdin = said.partition("stdin: ")
        assert "kkk" not in line + arguments and "http://127.0.0.1:80/v1/chat" in arguments
        assert stdin.strip() == "Authorization: Bearer " + "k" * 20


def test_a_key_is_taken_without_the_space_around_it_as_a_header_is(monkeypatch, tmp_path):
    monkeypatch.setenv(options.KEY_VARIABLE, " " + "e" * 16 + "\n")
    assert read_key(Options("x")) == "e" * 16
    (tmp_path / "key").write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match="printable ASCII"):
        read_key(Options("x", key_file=tmp_path / "key"))


@pytest.mark.parametrize("name", ["rows", "queue", "body_mib", "grace_seconds", "port"])
def test_numbers_beyond_reason_are_refused(name):
    for number in (-1, 10**30):
        with pytest.raises(ValueError, match=rf"--{name.replace('_', '-')} is {number}; expected"):
            Options("x", **{name: number}).check()


def test_a_request_is_counted_once_and_is_one_line_of_the_log(
    ask, http, served, service, monkeypatch, caplog
):
    def counted() -> dict[str, float]:
        text = http.get(served[1] + "/metrics").text
        found = re.findall(r'requests_(finished|refused)_total\{reason="(\w+)"\} (\S+)', text)
        return {f"{kind} {reason}": float(number) for kind, reason, number in found}

    def fail(*given, **more):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    before = counted()
    caplog.set_level(logging.INFO, "glm4v_nb.serving")
    ask(max_tokens=3)
    with pytest.raises(openai.BadRequestError):
        ask(n=2)
    with monkeypatch.context() as patch, pytest.raises(openai.InternalServerError):
        patch.setattr(service.engine.model, "forward", fail)
        ask()
    after = counted()
    grown = {name: each - before.get(name, 0) for name, each in after.items()}
    assert {name: each for name, each in grown.items() if each} == {
        "finished length": 1, "refused unsupported_parameter": 1, "finished out_of_memory": 1,
    }  # fmt: skip
    lines = [each.getMessage() for each in caplog.records if each.levelno == logging.INFO
             and each.name.startswith("glm4v_nb.serving")]  # fmt: skip
    assert [line.split()[0] for line in lines] == ["length", "refused:", "out_of_memory"]
    assert lines[0].endswith("8 positions asked, 3 tokens answered")


def test_when_the_service_ends_who_still_sends_is_told_so(loaded):
    given = Options(str(CHECKPOINT), name="m", port=0, rows=1, positions=64, grace_seconds=60)
    with running(given, *loaded) as (service, address):
        sending = connect(address.removesuffix("/v1"), head(100) + b"{")
        assert within(5, lambda: service.engine._inside)
    with sending:
        answer = sending.recv(5000)
    assert answer.startswith(b"HTTP/1.1 503") and b"shutting_down" in answer
