"""The teacher behind an endpoint: what it sends, what it takes, and every way in which an endpoint fails."""

from __future__ import annotations

import email.utils
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from fp8moe.errors import ConfigError
from fp8moe.generate.decode import GenerationConfig
from fp8moe.generate.sampling import SamplingConfig
from fp8moe.post.distill.endpoint import EndpointTeacher
from fp8moe.post.distill.teacher import Failed, Reply, Request
from fp8moe.post.endpoint import EndpointConfig, EndpointError
from tests.post.distill.served import Answer, chat, right, served

GENERATION = GenerationConfig(64, sampling=SamplingConfig(0.7, 0.9, 3))
KEY = "sk-hush-0123456789"


def teacher(url: str, stops: Sequence[str] = (), **options: Any) -> EndpointTeacher:
    own = {name: options.pop(name) for name in ("api", "body") if name in options}
    config = EndpointConfig(url, "r1", **{"wait": 0.01, "tries": 3, "timeout": 5.0} | options)
    return EndpointTeacher(config, GENERATION, stops, **own)


def requests(count: int, system: str = "") -> list[Request]:
    before = ({"role": "system", "content": system},) if system else ()
    return [
        Request(f"p{i}", "long", 0, (*before, {"role": "user", "content": f"{i}+1"}), draw=100 + i)
        for i in range(count)
    ]


def texts(answers: Sequence[Reply | Failed]) -> list[str]:
    assert all(isinstance(one, Reply) for one in answers), answers
    return sorted(one.text for one in answers if isinstance(one, Reply))


def test_a_chat_request_and_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with served(right) as endpoint:
        asked = teacher(endpoint.url, ["\n\n"], key_env="MY_KEY", body={"top_k": 20, "top_p": None})
        (reply,) = asked.replies(requests(1, system="think"))
    (body,) = endpoint.bodies
    assert body == {
        "model": "r1", "temperature": 0.7, "max_tokens": 64, "seed": 100, "stop": ["\n\n"], "top_k": 20,
        "messages": [{"role": "system", "content": "think"}, {"role": "user", "content": "0+1"}],
    }  # fmt: skip
    assert endpoint.paths == ["/v1/chat/completions"] and endpoint.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert reply == Reply(requests(1, system="think")[0], "100\nAnswer: 1", "", "stop", 7, 5)
    assert KEY not in str(asked.identity) and asked.identity["body"] == {"top_k": 20, "top_p": None}


def test_a_plain_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def decide(body: dict[str, Any], number: int) -> Answer:
        return 200, {}, {"choices": [{"text": " two", "finish_reason": "length"}]}

    with served(decide) as endpoint:
        (reply,) = teacher(endpoint.url + "/", api="completions").replies(requests(1, system="think"))
    assert endpoint.paths == ["/v1/completions"] and endpoint.bodies[0]["prompt"] == "think\n\n0+1"
    assert "messages" not in endpoint.bodies[0] and "Authorization" not in endpoint.headers[0]
    assert isinstance(reply, Reply) and (reply.text, reply.ended, reply.tokens) == (" two", "max_tokens", None)


def test_reasoning_that_comes_apart() -> None:
    with served(lambda body, number: chat("4", reasoning_content="2+2")) as endpoint:
        (reply,) = teacher(endpoint.url).replies(requests(1))
    assert isinstance(reply, Reply) and (reply.text, reply.reasoning) == ("4", "2+2")
    with served(lambda body, number: chat(None, "length", reasoning="2+")) as endpoint:
        (reply,) = teacher(endpoint.url).replies(requests(1))
    assert isinstance(reply, Reply) and (reply.text, reply.reasoning, reply.ended) == ("", "2+", "max_tokens")


def test_requests_at_once_are_bounded_and_used() -> None:
    def decide(body: dict[str, Any], number: int) -> Answer:
        time.sleep(0.05)
        return right(body, number)

    with served(decide) as endpoint:
        assert len(texts(list(teacher(endpoint.url, concurrency=3).replies(requests(12))))) == 12
    assert endpoint.most == 3


BROKEN: list[Answer] = [
    (500, {}, {"error": "x"}), (503, {}, b""), (429, {"Retry-After": "0.2"}, {}), (0, {}, b""), (200, {}, b"<html>"),
    (200, {}, {}), (200, {}, {"choices": []}), (200, {}, []), (200, {}, {"choices": [{"message": {"content": 5}}]}),
    (200, {}, {"choices": [{"message": {"content": None}}]}), (200, {"Content-Length": "5000"}, b"{"),
]  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN, ids=lambda one: f"{one[0]}-{one[2]!r:.30}")
def test_what_another_time_may_bring_is_tried_again(broken: Answer) -> None:
    with served(lambda body, number: broken if number == 0 else right(body, number)) as endpoint:
        began = time.monotonic()
        assert texts(list(teacher(endpoint.url, timeout=0.5).replies(requests(1)))) == ["100\nAnswer: 1"]
    assert len(endpoint.bodies) == 2 and endpoint.bodies[0] == endpoint.bodies[1]
    assert time.monotonic() - began >= (0.2 if broken[0] == 429 else 0), "Retry-After is kept"


def test_retry_after_may_be_a_date() -> None:
    at = email.utils.formatdate(time.time() + 2, usegmt=True)  # of whole seconds
    busy: Answer = (429, {"Retry-After": at}, {})
    with served(lambda body, number: busy if number == 0 else right(body, number)) as endpoint:
        began = time.monotonic()
        assert len(texts(list(teacher(endpoint.url).replies(requests(1))))) == 1
    assert 0.5 < time.monotonic() - began < 5


def test_a_request_that_never_succeeds_fails_alone() -> None:
    def decide(body: dict[str, Any], number: int) -> Answer:
        if body["messages"][-1]["content"] == "2+1":
            return 500, {}, {"error": "this one"}
        time.sleep(0.02)
        return right(body, number)

    with served(decide) as endpoint:
        answers = list(teacher(endpoint.url, concurrency=2).replies(requests(30)))
    (failed,) = [one for one in answers if isinstance(one, Failed)]
    assert (
        failed.request.prompt == "p2" and failed.again and "HTTP 500" in failed.reason and "this one" in failed.reason
    )
    assert len(answers) == 30 and len(endpoint.bodies) == 29 + 3


def test_a_refused_request_fails_alone_and_at_once() -> None:
    def decide(body: dict[str, Any], number: int) -> Answer:
        is_long = body["messages"][-1]["content"] == "2+1"
        return (400, {}, {"error": "too long"}) if is_long else right(body, number)

    with served(decide) as endpoint:
        answers = list(teacher(endpoint.url, concurrency=2).replies(requests(6)))
    (failed,) = [one for one in answers if isinstance(one, Failed)]
    assert failed.request.prompt == "p2" and not failed.again and "too long" in failed.reason
    assert len(answers) == 6 and len(endpoint.bodies) == 6


def test_an_endpoint_that_dies_in_the_middle_is_named_and_nothing_is_lost() -> None:
    dead = threading.Event()

    def decide(body: dict[str, Any], number: int) -> Answer:
        if number >= 10:
            dead.set()
        return (0, {}, b"") if dead.is_set() else right(body, number)

    with served(decide) as endpoint:
        answers = []
        with pytest.raises(EndpointError) as raised:
            for one in teacher(endpoint.url, concurrency=4).replies(requests(40)):
                answers.append(one)
    assert sum(isinstance(one, Reply) for one in answers) == 10
    assert endpoint.url in str(raised.value) and "no answer in 3 tries" in str(raised.value)
    assert raised.value.exit_code == 75 and len(endpoint.bodies) <= 10 + 4 * 3, "no more is asked of a dead endpoint"


def test_no_endpoint_at_all() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(EndpointError, match="Connection refused"):
            list(teacher(f"http://127.0.0.1:{closed.getsockname()[1]}/v1").replies(requests(3)))


def test_a_reader_that_stops_leaves_no_thread() -> None:
    with served(right) as endpoint:
        replies = teacher(endpoint.url, concurrency=2).replies(requests(50))
        next(replies)
        replies.close()  # type: ignore[attr-defined]
        deadline = time.monotonic() + 5
        while any(one.name.startswith("request-") for one in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert len(endpoint.bodies) < 15


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((401, {}, {"error": f"wrong key {KEY}"}), "refuses access"),
        ((404, {}, {"error": "no such model"}), "refuses model r1 (HTTP 404"),
        ((307, {"Location": "http://127.0.0.1:1/"}, b""), "leads elsewhere"),
        ((302, {"Location": "http://127.0.0.1:1/"}, b""), "leads elsewhere"),
    ],
)
def test_what_would_refuse_every_request_ends_the_command(
    answer: Answer, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with served(lambda body, number: answer) as endpoint, pytest.raises(ConfigError) as raised:
        list(teacher(endpoint.url, concurrency=1).replies(requests(20)))
    assert said in str(raised.value) and KEY not in str(raised.value) and len(endpoint.bodies) == 1


@pytest.mark.parametrize(
    ("url", "options", "said"),
    [
        ("localhost:8000", {}, "is no URL"),
        ("ftp://x/v1", {}, "is no URL"),
        ("http://me:hush@x/v1", {}, "must have no user, password or query"),
        ("http://x/v1?key=hush", {}, "must have no user, password or query"),
        ("http://x/v1", {"concurrency": 0}, "endpoint.concurrency=0"),
        ("http://x/v1", {"timeout": float("nan")}, "endpoint.timeout=nan"),
        ("http://x/v1", {"api": "responses"}, "use chat or completions"),
    ],
)
def test_bad_endpoints_are_refused(url: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as raised:
        teacher(url, **options)
    assert said in str(raised.value) and "hush" not in str(raised.value)


def test_a_key_with_a_line_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    with pytest.raises(ConfigError) as raised:
        teacher("http://x/v1")
    assert KEY not in str(raised.value)
