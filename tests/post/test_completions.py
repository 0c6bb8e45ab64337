"""What an answer of /v1/completions must hold, and what is said of one that does not."""

from __future__ import annotations

from typing import Any

import pytest

from fp8moe.generate.groups import Sampled
from fp8moe.post.completions import read_completion, request_body, seed_of
from fp8moe.post.http_json import BadAnswerError, TryAgainError

LIMITS: dict[str, Any] = {"max_tokens": 3, "vocab_size": 50, "ends": {7}}


def answer(finish: str = "stop", **choice: Any) -> dict[str, Any]:
    logprobs = choice.pop("logprobs", {"token_logprobs": [-0.5, 0], "tokens": ["a", "b"]})
    return {"choices": [{"finish_reason": finish, "logprobs": logprobs, **choice}]}


def test_ids_of_both_servers() -> None:
    expected = Sampled((4, 7), (-0.5, 0.0), True)
    assert read_completion(answer(token_ids=[4, 7]), **LIMITS) == expected
    as_tokens = {"token_logprobs": [-0.5, 0], "tokens": ["token_id:4", "token_id:7"]}
    assert read_completion(answer(logprobs=as_tokens), **LIMITS) == expected
    assert read_completion(answer("length", token_ids=[4, 9]), **LIMITS) == Sampled((4, 9), (-0.5, 0.0), False)
    assert read_completion(answer("length", token_ids=[4, 7]), **LIMITS).has_ended, "SGLang says so at max_tokens"


BAD = [
    (answer(token_ids=[4, 7], logprobs=None), "no log-probabilities of sampled tokens"),
    (answer(token_ids=[4, 7], logprobs={"token_logprobs": [None, -1.0]}), "no log-probabilities of sampled tokens"),
    (answer(token_ids=[4, 7], logprobs={"token_logprobs": [float("nan"), -1.0]}), "no log-probabilities"),
    (answer(), "no ids of sampled tokens"),
    (answer(logprobs={"token_logprobs": [-1.0], "tokens": ["token_id:x"]}), "no ids of sampled tokens"),
    (answer(token_ids=[4, 5, 7]), "gives 2 log-probabilities for 3 tokens"),
    (answer(token_ids=[], logprobs={"token_logprobs": []}), "gives 0 tokens where 1 to 3"),
    (answer(token_ids=[1] * 4, logprobs={"token_logprobs": [0] * 4}), "gives 4 tokens where 1 to 3"),
    (answer(token_ids=[50, 7]), "gives the token 50 and the model has 50"),
    (answer(token_ids=[7, 7]), "goes on behind the token 7, which ends an answer"),
    (answer(token_ids=[4, 6]), r"stops behind the token 6, which ends no answer, the ends are \[7\]"),
]


@pytest.mark.parametrize(("found", "says"), BAD)
def test_bad_answers(found: Any, says: str) -> None:
    with pytest.raises(BadAnswerError, match=says):
        read_completion(found, **LIMITS)


@pytest.mark.parametrize("found", [{}, [], {"choices": []}, {"choices": [5]}, answer("abort", token_ids=[4, 7])])
def test_what_is_asked_for_again(found: Any) -> None:
    with pytest.raises(TryAgainError):
        read_completion(found, **LIMITS)


def test_a_request_asks_for_the_whole_distribution() -> None:
    body = request_body("m", (1, 2), max_tokens=3, temperature=0.7, ends={9, 7}, seed=5)
    assert body["prompt"] == [1, 2] and body["stop_token_ids"] == [7, 9] and body["logprobs"] == 0
    assert (body["n"], body["seed"], body["temperature"], body["top_p"], body["top_k"]) == (1, 5, 0.7, 1.0, -1)
    assert seed_of("a", 0) == seed_of("a", 0) != seed_of("a", 1) and 0 <= seed_of("a", 0) < 2**31
