"""
The errors of requests, with messages that name what to change.
"""

from __future__ import annotations

from collections.abc import Sequence

import httpx

from trl_refplug.errors import ReferenceMismatchError, RemoteError


class DamagedAnswerError(Exception):
    """An answer is cut short, damaged, or not the one to the request. Another attempt may succeed."""


class UnreachableError(RemoteError):
    """No server has answered in time."""

    last_failure = ""
    """Why the last attempt failed."""


def unreachable_error(what: str, seconds: float, urls: Sequence[str], attempts: str, last: str) -> UnreachableError:
    """The error for a request that no server has answered before the deadline."""
    error = UnreachableError(
        f"No reference server answered {what} within {seconds:g} s (option 'deadline'); tried {attempts}at "
        f"{', '.join(urls)}. The last attempt, at {last}."
    )
    error.last_failure = last
    return error


def refusal_error(url: str, path: str, response: httpx.Response) -> Exception:
    """The error for an answer that would be the same in another attempt."""
    status, reason = response.status_code, reason_in(response)
    if status in (401, 403):
        return RemoteError(
            f"{url} refused the key ({status}). Option 'api_key_env' names the environment variable with the key "
            "that the server expects; it has to be set for every rank."
        )
    if status == 409:
        return ReferenceMismatchError(
            f"{url} does not have the reference that this run started with{reason}. It was restarted with other "
            "weights, or another server has taken its place. Serve the model of before, or start a new run."
        )
    if 300 <= status < 400:
        return RemoteError(
            f"{url} redirects to {response.headers.get('location', 'nowhere')!r}, which is not followed. Use that "
            "server's own address as option 'url'."
        )
    hint = {
        404: " It may be another kind of server: see options 'url' and 'protocol'.",
        405: " It may be another kind of server: see options 'url' and 'protocol'.",
        413: " Ask for less at a time: lower `per_device_train_batch_size`, or that of the evaluation.",
    }.get(status, "")
    return RemoteError(f"{url} refused {path} ({status}){reason}.{hint}")


def certificate_error(url: str, error: Exception) -> RemoteError:
    """The error for a certificate that cannot be verified."""
    return RemoteError(
        f"The certificate of {url} cannot be verified ({error}). For one of your own, let the environment variable "
        "SSL_CERT_FILE name the certificate of the authority that issued it."
    )


def reason_in(response: httpx.Response) -> str:
    """The reason that a server gives in an error, after a colon. Empty if it gives none."""
    try:
        content = response.json()
        error = content.get("error") or content.get("message") or ""
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        text = ""
    return f": {text[:500]}" if text else ""


def describe_error(error: Exception) -> str:
    """Say in words what an error of httpx, or a damaged answer, means."""
    kind = {
        "ConnectError": "it cannot be reached",
        "ConnectTimeout": "it cannot be reached in time, option 'connect_timeout'",
        "ReadTimeout": "it did not answer in time, option 'read_timeout'",
        "WriteTimeout": "it did not take the request in time, option 'read_timeout'",
        "ReadError": "the connection broke",
        "WriteError": "the connection broke",
        "RemoteProtocolError": "the answer was cut short",
        "DamagedAnswerError": "the answer is damaged",
    }.get(type(error).__name__, type(error).__name__)
    return f"{kind} ({error})" if str(error) else kind
