"""The teacher that runs here: a checkpoint or a Hugging Face directory in the built-in generator.

Requests go on in batches, and a batch is given out when all of its completions have ended: a kill loses at most that.
The samples of a prompt follow each other, so those of a batch share the prompt's forward (`generate.decode`); what each
draws is decided by the seed, the prompt and its number alone. Refused: `generate.groups`, which draws other tokens from
the same numbers, has no top_p and stops at ids alone; a file begun before would hold samples of both ways.
Collective over the ranks of the mesh: every rank asks the same requests, in the same order, and gets the same replies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fp8moe.generate.captured import DecodingGraphs
from fp8moe.generate.decode import Completion, GenerationConfig, generate
from fp8moe.generate.text import TextStream, Vocabulary
from fp8moe.model.transformer import Transformer
from fp8moe.parallel.mesh import Mesh
from fp8moe.post.distill.teacher import Failed, Messages, Reply, Request


@dataclass(frozen=True)
class OwnTeacher:
    """A loaded model that answers. encode: messages to token ids. ends, stops: tokens and texts that end an answer.
    graphs: of forwards behind the prompts."""

    model: Transformer
    mesh: Mesh
    vocabulary: Vocabulary
    config: GenerationConfig
    encode: Callable[[Messages], list[int]]
    identity: Mapping[str, Any]
    ends: frozenset[int]
    stops: Sequence[str] = ()
    graphs: DecodingGraphs | None = None

    def replies(self, requests: Sequence[Request]) -> Iterator[Reply | Failed]:
        """Batch by batch. A prompt that is empty or leaves no room in the context has no sample."""
        fitting: list[tuple[Request, list[int]]] = []
        context = self.model.config.max_seq_len
        for request in requests:
            ids = self.encode(request.messages)
            if not 0 < len(ids) < context:
                yield Failed(request, f"its prompt has {len(ids)} tokens and the model takes 1 to {context - 1}")
                continue
            fitting.append((request, ids))
            if len(fitting) == self.config.batch:
                yield from self._batch(fitting)
                fitting = []
        if fitting:
            yield from self._batch(fitting)

    def _batch(self, batch: Sequence[tuple[Request, list[int]]]) -> list[Reply]:
        streams = [TextStream(self.vocabulary, self.ends, self.stops) for _ in batch]

        def accept(completion: Completion, token: int) -> bool:
            return streams[completion.number].add(token)[1]

        completions, _ = generate(
            self.model,
            [ids for _, ids in batch],
            self.config,
            self.mesh,
            num_ids=self.vocabulary.num_ids,
            accept=accept,
            draws=[request.draw for request, _ in batch],
            graphs=self.graphs,
        )
        replies = []
        for (request, ids), completion, stream in zip(batch, completions, streams, strict=True):
            ended = completion.ended or "max_tokens"
            if ended != "stop":
                stream.close()
            replies.append(Reply(request, stream.text, "", ended, len(ids), len(completion.ids)))
        return replies
