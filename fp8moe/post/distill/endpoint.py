"""The teacher behind an OpenAI-compatible endpoint (`post.endpoint`), by /chat/completions or /completions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from fp8moe.errors import ConfigError
from fp8moe.generate.decode import GenerationConfig
from fp8moe.limits import shown
from fp8moe.post.distill.teacher import Failed, Reply, Request
from fp8moe.post.endpoint import Endpoint, EndpointConfig, Failure
from fp8moe.post.http_json import TryAgainError

Api = Literal["chat", "completions"]
ENDED = {"stop": "stop", "eos": "stop", "length": "max_tokens"}  # finish_reason -> ended; others are passed on


class EndpointTeacher:
    """Answers requests by an endpoint; only one `replies` at a time. body: added to each; null takes a key out."""

    def __init__(
        self,
        config: EndpointConfig,
        generation: GenerationConfig,
        stops: Sequence[str] = (),
        *,
        api: Api = "chat",
        body: Mapping[str, Any] | None = None,
    ) -> None:
        if api not in get_args(Api):
            raise ConfigError(f"--api={shown(api)} is none that a teacher has: use chat or completions")
        self._config, self._generation, self._stops = config, generation, stops
        self._api, self._extra = api, dict(body or {})
        self._endpoint = Endpoint(config, "chat/completions" if api == "chat" else "completions")
        self.identity: dict[str, Any] = {"teacher": "endpoint", "model": config.model, "api": api}
        self.identity |= {"body": self._extra} if self._extra else {}

    def replies(self, requests: Sequence[Request]) -> Iterator[Reply | Failed]:
        """As they come. Raises ConfigError where the endpoint refuses all, EndpointError where it answers no more; all
        answers that came are given out before."""
        for request, answer in self._endpoint.answers(requests, self._body, self._reply):
            yield Failed(request, answer.reason, answer.again) if isinstance(answer, Failure) else answer

    def _body(self, request: Request) -> dict[str, Any]:
        sampling = self._generation.sampling
        body: dict[str, Any] = {"model": self._config.model}
        if self._api == "chat":
            body["messages"] = [dict(message) for message in request.messages]
        else:
            body["prompt"] = "\n\n".join(message["content"] for message in request.messages)
        body |= {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": self._generation.max_tokens,
        }
        body |= {"seed": request.draw} | ({"stop": list(self._stops)} if self._stops else {})
        body |= self._extra
        return {key: value for key, value in body.items() if value is not None}

    def _reply(self, request: Request, answer: Any) -> Reply:
        """The sample in an answer. Raises TryAgainError where there is none."""
        try:
            (choice, *_) = answer["choices"]
            message = choice["message"] if self._api == "chat" else {"content": choice["text"]}
            content = message.get("content")
            reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
            if not isinstance(reasoning, str) or (
                not isinstance(content, str) and (content is not None or not reasoning)
            ):
                raise TypeError("content")
            finish = choice.get("finish_reason") or "stop"
            usage = answer.get("usage") or {}
            counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise TryAgainError(f"an answer without a completion: {str(answer)[:80]}") from error
        prompt_tokens, tokens = (count if isinstance(count, int) else None for count in counts)
        return Reply(request, content or "", reasoning, ENDED.get(str(finish), str(finish)), prompt_tokens, tokens)
