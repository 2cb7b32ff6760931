"""
Scoring over a network: the server of `trl-refplug serve`, and clients for it and for OpenAI-compatible servers.

The two ends share the rows (`rows`) and how they travel (`wire`). The server is an application (`app`) in front of a
queue (`batcher`) in front of a model (`engine`); a client is a protocol (`client`, `vllm`) over HTTP with retries and
failover (`transport`).
"""
