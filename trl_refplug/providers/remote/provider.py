"""The `remote` provider: a reference that a server has."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from torch import Tensor

from trl_refplug.errors import ConfigurationError, UnsupportedInputError, require_extra
from trl_refplug.provider import BulkScorer, ReferenceBatch, ReferenceContext, ReferenceIdentity, ReferenceProvider
from trl_refplug.providers.options import REMOTE_CAPABILITIES, RemoteOptions
from trl_refplug.rows import PaddedRows
from trl_refplug.serving import in_background, read_api_key


if TYPE_CHECKING:  # what talks to servers needs an extra, and is imported when it is there for certain
    from trl_refplug.serving import ScoringClient, Transport


class RemoteProvider(ReferenceProvider):
    """
    Asks a server for the reference's log-probs, so that there is no reference in the trainer's process, or on its
    machine.

    Every answer is checked: it must have as many values as were asked for, be undamaged and finite, and come from the
    reference that the run was started with. Each rank asks independently of the others.
    """

    Options = RemoteOptions
    capabilities = REMOTE_CAPABILITIES
    options: RemoteOptions

    def __init__(self, options: RemoteOptions) -> None:
        super().__init__(options)
        require_extra("ref_provider='remote'", "serve", "httpx", "msgspec", "tenacity", "zstandard")
        self._urls = _checked_urls(options.url)
        option = "ref_provider='remote': option 'api_key_env'"
        self._key = None if options.api_key_env is None else read_api_key(options.api_key_env, option)
        if options.model is not None and options.protocol != "vllm":
            raise ConfigurationError(
                "ref_provider='remote': option 'model' is for protocol='vllm'. A server of `trl-refplug serve` has "
                "one model only."
            )
        for name in ("connect_timeout", "read_timeout", "deadline"):
            if not 0 < getattr(options, name) < 1e9:
                raise ConfigurationError(
                    f"ref_provider='remote': option {name!r} is a number of seconds above 0, and finite, found "
                    f"{getattr(options, name)}."
                )
        if options.protocol == "vllm":  # vLLM ignores the temperature when it scores a prompt
            self.capabilities = replace(type(self).capabilities, temperature=False)
        self._transport: Transport | None = None
        self._client: ScoringClient | None = None
        self._identity: ReferenceIdentity | None = None
        self._temperature = 1.0
        self._dtype: str | None = None
        self._lock = threading.Lock()
        self._tokens = 0
        self._seconds = 0.0

    @property
    def starts_as_policy(self) -> bool:
        return self.options.starts_as_policy

    @property
    def computes_in(self) -> str | None:
        return self._dtype

    def pin(self, context: ReferenceContext) -> None:
        from trl_refplug.providers.remote import checks
        from trl_refplug.serving import Transport

        options = self.options
        self._transport = Transport(
            self._urls,
            key=self._key,
            connect_timeout=options.connect_timeout,
            read_timeout=options.read_timeout,
            deadline=options.deadline,
        )
        self._temperature = context.temperature
        connect = checks.connect_vllm if options.protocol == "vllm" else checks.connect
        self._client, self._identity = connect(self._transport, context, options)
        self._dtype = checks.dtype_of(self._client, options)

    def setup(self, context: ReferenceContext) -> None:
        from trl_refplug.providers.remote import checks

        checks.check_tokenizer(self._asked, context.processing_class)

    def identity(self) -> ReferenceIdentity:
        assert self._identity is not None, "identity() before pin()"
        return self._identity

    def log_probs(self, batch: ReferenceBatch) -> Tensor:
        return self._score(self._rows(batch), batch.input_ids.device)

    def submit(self, batch: ReferenceBatch) -> Future[Tensor]:
        rows, device = self._rows(batch), batch.input_ids.device
        return in_background(lambda: self._score(rows, device))

    @contextmanager
    def bulk_scorer(self) -> Iterator[BulkScorer]:
        """Scores streams of rows with several requests in flight."""
        from trl_refplug.serving import RemoteBulkScorer

        yield RemoteBulkScorer(self._asked, self._temperature)

    def counters(self) -> dict[str, float]:
        stats = self._asked.transport.stats
        with self._lock:
            tokens, seconds = self._tokens, self._seconds
        return {
            "bytes_per_token": (stats.bytes_sent + stats.bytes_received) / max(tokens, 1),
            "request_seconds": seconds,
            "retries": stats.retries,
        }

    def metadata(self) -> dict[str, Any]:
        return {"url": self._urls, "protocol": self.options.protocol}

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    @property
    def _asked(self) -> ScoringClient:
        assert self._client is not None, "pin() comes first"
        return self._client

    def _rows(self, batch: ReferenceBatch) -> PaddedRows:
        try:
            return PaddedRows.from_batch(batch)
        except ValueError as error:
            raise UnsupportedInputError(
                f"ref_provider='remote' sends rows that are plain token sequences; this batch has {error}. Use "
                "ref_provider='frozen' or 'adapter'."
            ) from None

    def _score(self, rows: PaddedRows, device: Any) -> Tensor:
        started = time.perf_counter()
        values = self._asked.score(rows, self._temperature)
        with self._lock:
            self._tokens += rows.tokens
            self._seconds += time.perf_counter() - started
        return rows.to_log_probs(values).to(device)


def _checked_urls(given: str | list[str]) -> list[str]:
    urls = [given] if isinstance(given, str) else list(given)
    if not urls:
        raise ConfigurationError("ref_provider='remote': option 'url' is empty; expected 'http://host:port'.")
    for url in urls:
        parts = urlsplit(url)
        try:
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # the port is not a number
            sound = False
        if not sound or parts.query or parts.fragment:
            raise ConfigurationError(
                f"ref_provider='remote': option 'url' has {url!r}; expected an address such as 'http://host:8321'."
            )
        if parts.username or parts.password:
            raise ConfigurationError(
                f"ref_provider='remote': option 'url' has credentials for {parts.hostname}, which would end in logs "
                "and checkpoints. Put the key into an environment variable and name that in option 'api_key_env'."
            )
    if len({url.rstrip("/") for url in urls}) < len(urls):
        raise ConfigurationError("ref_provider='remote': option 'url' has the same address twice.")
    return urls
