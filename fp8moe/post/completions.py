"""One completion as token ids by /v1/completions of vLLM or SGLang: what is sent, and what of the answer is read.

    sent                          why
    prompt: [ids]                 both take a list of ids; no text is encoded on the server
    n: 1, seed                    a request a sample: what a seed does to n samples of one request is not said
    temperature, max_tokens
    top_p 1, top_k -1, min_p 0,   the whole distribution, whatever the model's generation_config.json says
      repetition_penalty 1
    stop_token_ids                the ends of an answer
    logprobs: 0                   of the sampled tokens alone
    return_token_ids              both: choice.token_ids
    return_tokens_as_token_ids    vLLM before it had return_token_ids: logprobs.tokens are "token_id:N"
    no_stop_trim                  SGLang: the id that ended the answer stays, as it does in vLLM
    add_special_tokens: false,    nothing is put before the ids or taken from the answer
      skip_special_tokens: false

    read                          from
    ids                           choices[0].token_ids, else choices[0].logprobs.tokens
    log-probabilities             choices[0].logprobs.token_logprobs
    the end                       the last id; choices[0].finish_reason is stop or length, which SGLang also says of
                                  an end at max_tokens; after abort (SGLang) it is asked for again

vLLM's log-probabilities are of the distribution before the temperature unless it runs with --logprobs-mode
processed_logprobs: needed where grpo.temperature is not 1. The fields are those of the two servers' public request and
response classes (CompletionRequest, CompletionResponseChoice); none of it was run against either server here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence
from typing import Any

from fp8moe.generate.groups import Sampled
from fp8moe.post.http_json import BadAnswerError, TryAgainError

_AS_ID = "token_id:"


def request_body(
    model: str, prompt: Sequence[int], *, max_tokens: int, temperature: float, ends: Collection[int], seed: int
) -> dict[str, Any]:
    """The JSON of one request."""
    return {
        "model": model,
        "prompt": list(prompt),
        "n": 1,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": sorted(ends),
        "seed": seed,
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "no_stop_trim": True,
        "add_special_tokens": False,
        "skip_special_tokens": False,
    }


def seed_of(name: str, sample: int) -> int:
    """31 bits, which every server takes as a seed, that the name of a prompt and the number of a sample decide."""
    digest = hashlib.blake2b(f"{name}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 33


def read_completion(answer: Any, *, max_tokens: int, vocab_size: int, ends: Collection[int]) -> Sampled:
    """The sample in an answer. Raises BadAnswerError where the server leaves out what is needed, TryAgainError where
    it gives no completion."""
    try:
        choice = answer["choices"][0]
        finish, logprobs, ids = choice["finish_reason"], choice.get("logprobs"), choice.get("token_ids")
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise TryAgainError(f"an answer without a completion: {str(answer)[:80]}") from error
    if finish not in ("stop", "length"):
        raise TryAgainError(f"a completion that ended by {finish!r}")
    values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    if not isinstance(values, list) or not all(isinstance(one, float | int) and math.isfinite(one) for one in values):
        raise BadAnswerError(
            "gives no log-probabilities of sampled tokens (logprobs.token_logprobs): use vLLM or SGLang"
        )
    if ids is None:
        ids = _ids_of(logprobs.get("tokens"))
    if not isinstance(ids, list) or not all(isinstance(one, int) for one in ids):
        raise BadAnswerError("gives no ids of sampled tokens (token_ids, or logprobs.tokens): use vLLM or SGLang")
    if len(ids) != len(values):
        raise BadAnswerError(f"gives {len(values)} log-probabilities for {len(ids)} tokens, and as many are needed")
    if not 1 <= len(ids) <= max_tokens:
        raise BadAnswerError(f"gives {len(ids)} tokens where 1 to {max_tokens} were asked for (max_tokens)")
    if wrong := [one for one in ids if not 0 <= one < vocab_size]:
        raise BadAnswerError(f"gives the token {wrong[0]} and the model has {vocab_size}: serve this run's model")
    if early := [one for one in ids[:-1] if one in ends]:
        raise BadAnswerError(f"goes on behind the token {early[0]}, which ends an answer (stop_token_ids)")
    has_ended = ids[-1] in ends
    if finish == "stop" and not has_ended:
        raise BadAnswerError(
            f"stops behind the token {ids[-1]}, which ends no answer, the ends are {sorted(ends)}: serve this run's "
            "tokenizer and generation_config.json"
        )
    return Sampled(tuple(ids), tuple(map(float, values)), has_ended)


def _ids_of(tokens: Any) -> list[int] | None:
    """The ids of tokens written as "token_id:N"; None where one is not."""
    if not isinstance(tokens, list) or not all(isinstance(one, str) and one.startswith(_AS_ID) for one in tokens):
        return None
    numbers = [one.removeprefix(_AS_ID) for one in tokens]
    return [int(one) for one in numbers] if all(one.isdecimal() for one in numbers) else None
