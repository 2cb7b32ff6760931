"""`trl-refplug serve`: a reference model for trainers on other machines."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from trl_refplug.errors import ConfigurationError, require_extra
from trl_refplug.serving import read_api_key


_LOCAL = ("127.0.0.1", "::1", "localhost")


class Dtype(StrEnum):
    """Precisions of the weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Scoring(StrEnum):
    """Ways to lay rows out."""

    packed = "packed"
    exact = "exact"


def serve(
    model: Annotated[str, typer.Argument(help="Hub id or path of a model, or of a PEFT adapter that names its base.")],
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter to put on MODEL.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights; TRL's own default is float32.")] = Dtype.float32,
    device: Annotated[str | None, typer.Option(help="cpu, cuda:1, ... By default an accelerator.")] = None,
    scoring: Annotated[
        Scoring, typer.Option(help="packed: rows of all clients merged. exact: every request as sent, bit for bit.")
    ] = Scoring.packed,
    token_budget: Annotated[int | None, typer.Option(min=1, help="Most tokens of a packed forward pass.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 is any free one.")] = 8321,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the key that clients have to present.")
    ] = None,
    ssl_certfile: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Certificate chain (PEM), for https.")
    ] = None,
    ssl_keyfile: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Its private key (PEM).")
    ] = None,
) -> None:
    """
    Serve a reference model to any number of trainers (`ref_provider="remote"`).

    Ctrl-C or SIGTERM ends it when the requests it has taken are answered.
    """
    _check_directory(model)
    key = read_api_key(api_key_env, "--api-key-env") if api_key_env is not None else None
    if ssl_keyfile and not ssl_certfile:
        raise ConfigurationError("--ssl-keyfile needs --ssl-certfile.")
    if ssl_certfile:
        _check_certificate(ssl_certfile, ssl_keyfile)
    require_extra("`trl-refplug serve`", "serve", "msgspec", "starlette", "uvicorn", "zstandard")

    from trl_refplug.serving import ScoringServer, ServerLimits, listen

    try:
        listener = listen(host, port)  # before the model is loaded, so that a wrong address shows at once
    except OSError as error:
        raise ConfigurationError(f"Cannot listen on {host} port {port}: {error.strerror or error}.") from None
    with listener:
        import logging

        from trl_refplug.serving import load_engine, make_app

        logging.basicConfig(format="%(levelname)s: %(message)s")
        engine = load_engine(
            model,
            adapter=adapter,
            dtype=dtype.value,
            device=device,
            scoring=scoring.value,
            token_budget=token_budget,
        )
        facts, limits = engine.served_model, ServerLimits()
        url = f"{'https' if ssl_certfile else 'http'}://{_shown(host)}:{listener.getsockname()[1]}"

        def ready() -> None:
            what = f"{facts.model} with {facts.adapter}" if facts.adapter else facts.model
            typer.echo(
                f"serving {what} ({facts.dtype} on {device or engine.device}, {facts.scoring}) at {url} "
                f"identity {facts.digest}"
            )
            if key is None and host not in _LOCAL:
                typer.echo(f"Warning: whoever reaches {url} can use it. Set a key with --api-key-env.", err=True)

        ssl: dict[str, Any] = {"ssl_certfile": ssl_certfile, "ssl_keyfile": ssl_keyfile} if ssl_certfile else {}

        class Ended(ScoringServer):
            """The second Ctrl-C ends it at once, also where asyncio (Python 3.12) would wait for its connections."""

            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                super().handle_exit(sig, frame)
                if self.force_exit:
                    os._exit(130)  # an interpreter that ends while a thread of it is in a forward pass is aborted

        app = make_app(engine, key=key, limits=limits)
        Ended(app, limits=limits, ready=ready, device_lost=app.state.device_lost, **ssl).run(sockets=[listener])
        if app.state.device_lost():
            raise typer.Exit(1)  # what was logged says why; whatever started it starts it anew


def _check_directory(model: str) -> None:
    """Refuse a path that does not exist at once, not after torch is imported."""
    if model.startswith((".", "/", "~")) and not Path(model).is_dir():
        raise ConfigurationError(f"Cannot serve {model!r}: there is no such directory.")


def _check_certificate(certfile: Path, keyfile: Path | None) -> None:
    """Refuse files that are no certificate and its key at once, not after the model is loaded."""
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile, password="")
    except OSError as error:  # ssl's own errors, too
        raise ConfigurationError(
            f"--ssl-certfile {certfile} and --ssl-keyfile {keyfile or certfile} are not a certificate chain and its "
            f"private key, as PEM and without a passphrase: {error.strerror or error}."
        ) from None


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
