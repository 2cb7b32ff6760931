"""
The client of an OpenAI-compatible server that has `prompt_logprobs`, such as vLLM.

Such a server cannot say which weights it has. Therefore every request also has a probe, a row that is always the same:
if its log-probs differ from those of the first request, the server has another reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import msgspec
import numpy as np

from trl_refplug.errors import InvalidLogProbsError, ReferenceMismatchError, RemoteError, UnsupportedInputError
from trl_refplug.models.tolerances import Tolerance
from trl_refplug.rows import PaddedRows, Row, Values
from trl_refplug.serving.http_errors import DamagedAnswerError
from trl_refplug.serving.transport import Transport


_NOT_A_NUMBER = -9999.0  # vLLM answers this in place of -inf and NaN


class _LogProb(msgspec.Struct):
    logprob: float


class _Choice(msgspec.Struct):
    index: int
    prompt_logprobs: list[dict[str, _LogProb] | None] | None = None
    prompt_token_ids: list[int] | None = None


class _Completion(msgspec.Struct):
    model: str
    choices: list[_Choice]


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


_completions = msgspec.json.Decoder(_Completion)
_models = msgspec.json.Decoder(_Models)


class VllmClient:
    """
    A client of one or several equal OpenAI-compatible servers.

    Args:
        transport ([`Transport`]): The connection to the servers.
        model (`str`, *optional*): The name under which the model is served. By default the only one that is served.
        probe_row (`Row`, *optional*): The row that is added to every request. All of it is scored.
        tolerance ([`Tolerance`]): How far the probe's log-probs may be from those of the first request.
        left_padding (`bool`): Whether rows that are padded on the left can be scored. They are sent without padding,
            which changes the log-probs of models with absolute positions.
        batch_limit (`float`): Length up to which the rows of a batch do not depend on each other.

    Attributes:
        model (`str`): The name under which the model is served.

    Raises:
        RemoteError: No server can be reached, a server does not answer as expected, or the servers have different
            names for the model.
        ReferenceMismatchError: The servers have different references.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        model: str | None,
        probe_row: Row | None,
        tolerance: Tolerance,
        left_padding: bool = True,
        batch_limit: float = float("inf"),
    ) -> None:
        self.transport = transport
        self._left_padding = left_padding
        self._batch_limit = batch_limit
        self._probe_row = probe_row
        self._tolerance = tolerance
        found = transport.send_to_all("GET", "/v1/models", lambda response: _decode_json(_models, response))
        chosen = {url: _choose_model(url, models.data, model) for url, models in found.items()}
        self.model = _common_name({url: entry.id for url, entry in chosen.items()})
        limits = [(entry.max_model_len, url) for url, entry in chosen.items() if entry.max_model_len is not None]
        shortest: tuple[float, str] = min(limits, default=(float("inf"), ""))
        self._limit, self._limited_by = shortest
        self._probe_values: Values | None = None
        first = next(iter(found))
        for url in found if self._probe_row is not None else ():
            self._request([], url, f"{url} has another reference than {first}")

    def score(self, rows: PaddedRows, temperature: float) -> Sequence[Values]:
        assert temperature == 1.0, "the server would ignore it"
        longest = max(map(len, rows.rows), default=0)
        if longest > self._limit - 1:
            raise UnsupportedInputError(
                f"A row of {longest:,} tokens is too long for {self._limited_by}, whose limit is {self._limit:,}, one "
                f"of which it generates. Serve with --max-model-len {longest + 1} or more."
            )
        if rows.width > self._batch_limit or (any(rows.lefts) and not self._left_padding):
            raise UnsupportedInputError(
                "protocol='vllm' scores rows without their padding, and this model's log-probs depend on it: rows "
                f"padded on the left of absolute positions, or more than {self._batch_limit} tokens long. Use a "
                "server of `trl-refplug serve`."
            )
        return self._request(rows.rows, None, "The reference server was restarted with another model or precision")

    def _request(self, rows: Sequence[Row], url: str | None, otherwise: str) -> list[Values]:
        """The log-probs of `rows`. The probe is sent, too; `otherwise` says what it means if its answer changed."""
        asked = len(rows)
        rows = [*rows, *([] if self._probe_row is None else [self._probe_row])]
        body = msgspec.json.encode(
            {
                "model": self.model,
                "prompt": [row.input_ids.tolist() for row in rows],
                "max_tokens": 1,
                "temperature": 0,
                "prompt_logprobs": 0,
                "return_token_ids": True,
            }
        )

        def parse(response: httpx.Response) -> list[Values]:
            choices = sorted(_decode_json(_completions, response).choices, key=lambda choice: choice.index)
            if [choice.index for choice in choices] != list(range(len(rows))):
                raise DamagedAnswerError(f"{len(choices)} choices for {len(rows)} prompts")
            return [_scored_values(choice, row, response) for choice, row in zip(choices, rows, strict=True)]

        send = self.transport.send
        values = send("POST", "/v1/completions", parse, content=body, content_type="application/json", url=url)
        if self._probe_row is not None:
            self._compare(values[-1], otherwise)
        return values[:asked]

    def _compare(self, found: Values, otherwise: str) -> None:
        """Compare the probe's log-probs with those of the first request. Raises if the reference has changed."""
        if self._probe_values is None:
            self._probe_values = found
        differences = np.abs(found.astype(np.float64) - self._probe_values)
        largest, mean = differences.max(), differences.mean()
        if not self._tolerance.allows(largest, mean):
            raise ReferenceMismatchError(
                f"{otherwise}: it gives a known row of text log-probs that differ by up to {largest:.3g} nats per "
                f"token (tolerance {self._tolerance.largest:g}) from those of the start, {mean:.3g} on average "
                f"(tolerance {self._tolerance.mean:g}). Serve the model of before, or start a new run."
            )


def _choose_model(url: str, served: Sequence[_Model], model: str | None) -> _Model:
    names = ", ".join(entry.id for entry in served) or "nothing"
    if model is None and len(served) != 1:
        raise RemoteError(f"{url} serves {names}. Name one of them in option 'model'.")
    for entry in served:
        if model in (None, entry.id):
            return entry
    raise RemoteError(f"{url} serves {names}, and option 'model' names {model!r}.")


def _common_name(names: Mapping[str, str]) -> str:
    if len(set(names.values())) > 1:
        shown = ", ".join(f"{url} serves {name!r}" for url, name in names.items())
        raise RemoteError(
            f"The servers of option 'url' call their models differently: {shown}. Start all of them with the same "
            "model and the same --served-model-name."
        )
    return next(iter(names.values()))


def _decode_json(decoder: Any, response: httpx.Response) -> Any:
    try:
        return decoder.decode(response.content)
    except msgspec.ValidationError as error:
        raise RemoteError(f"{response.url} is no OpenAI-compatible server: {error}.") from None
    except msgspec.DecodeError as error:
        raise DamagedAnswerError(str(error)) from None


def _scored_values(choice: _Choice, row: Row, response: httpx.Response) -> Values:
    log_probs, ids = choice.prompt_logprobs, row.input_ids.tolist()
    if log_probs is None:
        raise RemoteError(
            f"{response.url} ignores `prompt_logprobs`, so it cannot serve a reference. vLLM can; llama.cpp's servers "
            "cannot."
        )
    if choice.prompt_token_ids is not None and choice.prompt_token_ids != ids:
        raise RemoteError(
            f"{response.url} has scored other tokens than it was sent ({len(choice.prompt_token_ids)} for {len(ids)}):"
            " it truncates or adds to prompts."
        )
    if len(log_probs) != len(ids) or (log_probs and log_probs[0] is not None):
        raise RemoteError(
            f"{response.url} answered with {len(log_probs)} log-probs for {len(ids)} tokens, the first "
            f"{log_probs[0] if log_probs else None}; expected as many as tokens, the first null."
        )
    values = np.empty(len(row.scored), np.float32)
    for number, position in enumerate(row.scored):
        entry = (log_probs[position] or {}).get(str(ids[position]))
        if entry is None:
            raise RemoteError(f"{response.url} has no log-prob of token {ids[position]} at position {position}.")
        if entry.logprob <= _NOT_A_NUMBER or not np.isfinite(entry.logprob):
            raise InvalidLogProbsError(
                f"{response.url} answered {entry.logprob} for token {ids[position]} at position {position}, which "
                "stands for a log-prob that is not finite. The reference's weights or its precision are broken."
            )
        values[number] = entry.logprob
    return values
