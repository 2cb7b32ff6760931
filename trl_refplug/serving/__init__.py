"""
Scoring over a network: the server of `trl-refplug serve`, and clients for it and for OpenAI-compatible servers.

Both ends:

- `wire`: the format of requests and answers
- `served_model`: what a server says about its model
- `api_key`: the key that a server expects from its clients

The server, in the order in which a request passes through it:

- `http_server`: uvicorn, with deadlines for slow clients
- `app`: the ASGI application, with its routes and errors
- `server_limits`: what clients may ask for
- `batcher`: the queue, which merges the rows of all clients
- `engine`: the model, which scores them
- `loading`: loading that model

The client, in the order in which a batch passes through it:

- `background`: sending a request while the trainer goes on working
- `bulk`: many rows, with several requests in flight
- `client`, `vllm`: the clients of the two kinds of servers
- `transport`: HTTP with retries and failover
- `endpoints`: the servers that can be asked, and which of them is next
- `http_errors`: the errors of requests

Names are imported when they are first used, because most of these modules need torch or the extra `serve`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from trl_refplug.serving.api_key import read_api_key
    from trl_refplug.serving.app import make_app
    from trl_refplug.serving.background import in_background
    from trl_refplug.serving.bulk import RemoteBulkScorer
    from trl_refplug.serving.client import RefPlugClient, ScoringClient
    from trl_refplug.serving.engine import Engine
    from trl_refplug.serving.http_server import ScoringServer, listen
    from trl_refplug.serving.loading import load_engine
    from trl_refplug.serving.served_model import ServedModel, tokenizer_digest
    from trl_refplug.serving.server_limits import ServerLimits
    from trl_refplug.serving.transport import Transport
    from trl_refplug.serving.vllm import VllmClient


_MODULE_OF = {
    "Engine": "engine",
    "RefPlugClient": "client",
    "RemoteBulkScorer": "bulk",
    "ScoringClient": "client",
    "ScoringServer": "http_server",
    "ServedModel": "served_model",
    "ServerLimits": "server_limits",
    "Transport": "transport",
    "VllmClient": "vllm",
    "in_background": "background",
    "listen": "http_server",
    "load_engine": "loading",
    "make_app": "app",
    "read_api_key": "api_key",
    "tokenizer_digest": "served_model",
}

__all__ = [
    "Engine",
    "RefPlugClient",
    "RemoteBulkScorer",
    "ScoringClient",
    "ScoringServer",
    "ServedModel",
    "ServerLimits",
    "Transport",
    "VllmClient",
    "in_background",
    "listen",
    "load_engine",
    "make_app",
    "read_api_key",
    "tokenizer_digest",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
