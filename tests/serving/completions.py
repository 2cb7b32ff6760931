"""An OpenAI-compatible server with a tiny model. It answers like vLLM, or wrongly in the way of other servers."""

from __future__ import annotations

from typing import Any

import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


class Completions:
    """
    The application. `wrong` says what is wrong with its answers.

    - `ignores`: there are no log-probs
    - `shifted`: log-probs are one position off
    - `truncates`: prompts are cut
    - `not finite`: the log-prob of one token is -9999.0
    - `other tokens`: log-probs are those of the most likely tokens
    - `reordered`: choices are in another order
    """

    def __init__(
        self, model: Any, *, names: tuple[str, ...] = ("ref",), max_length: int = 128, wrong: str = ""
    ) -> None:
        self.model, self.names, self.max_length, self.wrong = model, names, max_length, wrong
        self.requests: list[dict[str, Any]] = []
        self.app = Starlette(
            routes=[Route("/v1/models", self.list), Route("/v1/completions", self.complete, methods=["POST"])]
        )

    async def list(self, request: Request) -> Response:
        data = [{"id": name, "object": "model", "max_model_len": self.max_length} for name in self.names]
        return JSONResponse({"object": "list", "data": data})

    async def complete(self, request: Request) -> Response:
        asked = await request.json()
        self.requests.append(asked)
        too_long = [ids for ids in asked["prompt"] if len(ids) > self.max_length - 1]
        if asked["model"] not in self.names:
            return JSONResponse({"error": {"message": "no such model", "code": 404}}, 404)
        if too_long or asked["max_tokens"] != 1:
            return JSONResponse({"error": {"message": "This model's maximum context length", "code": 400}}, 400)
        choices = [self.choice(index, ids) for index, ids in enumerate(asked["prompt"])]
        if self.wrong == "reordered":
            choices.reverse()
        return JSONResponse({"id": "cmpl-1", "object": "text_completion", "model": asked["model"], "choices": choices})

    def choice(self, index: int, ids: list[int]) -> dict[str, Any]:
        scored = ids[:-1] if self.wrong == "truncates" else ids
        with torch.no_grad():
            table = self.model(torch.tensor([scored])).logits[0].float().log_softmax(-1)
        entries: list[Any] = [None]
        for position, token in enumerate(scored[1:]):
            if self.wrong == "other tokens":
                token = int(table[position].argmax())
            value = -9999.0 if self.wrong == "not finite" and position == 2 else float(table[position, token])
            entries.append({str(token): {"logprob": value, "rank": 1, "decoded_token": "x"}})
        if self.wrong == "shifted":
            entries = [*entries[1:], None]
        return {
            "index": index,
            "text": "x",
            "logprobs": None,
            "finish_reason": "length",
            "prompt_logprobs": None if self.wrong == "ignores" else entries,
            "prompt_token_ids": scored,
        }
