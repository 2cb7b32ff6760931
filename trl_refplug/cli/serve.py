"""`trl-refplug serve`: serves a reference model to trainers on other machines."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import typer

from trl_refplug.cli.common import Dtype
from trl_refplug.errors import ConfigurationError, require_extra
from trl_refplug.runtime.names import check_name
from trl_refplug.serving import read_api_key


_LOCAL = ("127.0.0.1", "::1", "localhost")


def serve(
    model: Annotated[str, typer.Argument(help="Hub id or path of a model, or of a PEFT adapter that names its base.")],
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter to put on MODEL.")] = None,
    dtype: Annotated[
        Literal["auto", Dtype],
        typer.Option(help="Precision of the weights. auto: as they are stored. TRL's own default is float32."),
    ] = "float32",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda:1, ... Default: an accelerator, if there is one.")
    ] = None,
    scoring: Annotated[
        Literal["packed", "exact"],
        typer.Option(
            help="packed: score the rows of all clients together. exact: score each request as it was sent, "
            "bit for bit."
        ),
    ] = "packed",
    token_budget: Annotated[
        int | None, typer.Option(min=1, help="Largest number of tokens in a packed forward pass.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on. 0.0.0.0 listens on all addresses.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on. 0 takes any free port.")] = 8321,
    api_key_env: Annotated[
        str | None, typer.Option(help="Name of the environment variable with the key that clients have to send.")
    ] = None,
    ssl_certfile: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Certificate chain (PEM), for https.")
    ] = None,
    ssl_keyfile: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Private key of the certificate (PEM).")
    ] = None,
) -> None:
    """
    Serve a reference model to any number of trainers (`ref_provider="remote"`).

    After Ctrl-C or SIGTERM, it answers the requests it has accepted and then ends.
    """
    key = read_api_key(api_key_env, "--api-key-env") if api_key_env is not None else None
    if ssl_keyfile and not ssl_certfile:
        raise ConfigurationError("--ssl-keyfile needs --ssl-certfile.")
    if ssl_certfile:
        _check_certificate(ssl_certfile, ssl_keyfile)
    require_extra("`trl-refplug serve`", "serve", "msgspec", "starlette", "uvicorn", "zstandard")

    from trl_refplug.serving import ScoringServer, ServerLimits, listen

    try:
        listener = listen(host, port)  # a wrong address shows at once, before the model is loaded
    except OSError as error:
        raise ConfigurationError(f"Cannot listen on {host} port {port}: {error.strerror or error}.") from None
    with listener:
        check_name("MODEL", model)
        if adapter is not None:
            check_name("--adapter", adapter)

        from trl_refplug.serving import load_engine, make_app

        logging.basicConfig(format="%(levelname)s: %(message)s")
        engine = load_engine(
            model,
            adapter=adapter,
            dtype=dtype,
            device=device,
            scoring=scoring,
            token_budget=token_budget,
        )
        served, limits = engine.served_model, ServerLimits()
        url = f"{'https' if ssl_certfile else 'http'}://{_in_url(host)}:{listener.getsockname()[1]}"

        def ready() -> None:
            what = f"{served.model} with {served.adapter}" if served.adapter else served.model
            typer.echo(
                f"serving {what} ({served.dtype} on {device or engine.device}, {served.scoring}) at {url} "
                f"identity {served.digest}"
            )
            if key is None and host not in _LOCAL:
                typer.echo(f"Warning: whoever reaches {url} can use it. Set a key with --api-key-env.", err=True)

        ssl: dict[str, Any] = {"ssl_certfile": ssl_certfile, "ssl_keyfile": ssl_keyfile} if ssl_certfile else {}

        class ImmediateExitServer(ScoringServer):
            """A server that the second Ctrl-C ends at once. In Python 3.12 asyncio would wait for its connections."""

            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                super().handle_exit(sig, frame)
                if self.force_exit:
                    os._exit(130)  # an ordinary exit is aborted if a thread is in a forward pass

        app = make_app(engine, key=key, limits=limits)
        server = ImmediateExitServer(app, limits=limits, ready=ready, device_lost=app.state.device_lost, **ssl)
        server.run(sockets=[listener])
        if app.state.device_lost():
            raise typer.Exit(1)  # the log says why; what started this process can restart it


def _check_certificate(certfile: Path, keyfile: Path | None) -> None:
    """Refuse files that are not a certificate and its key, before the model is loaded."""
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile, password="")
    except OSError as error:  # the errors of ssl are OSErrors, too
        raise ConfigurationError(
            f"--ssl-certfile {certfile} and --ssl-keyfile {keyfile or certfile} are not a certificate chain and its "
            f"private key, as PEM and without a passphrase: {error.strerror or error}."
        ) from None


def _in_url(host: str) -> str:
    """Write an address as a URL needs it: IPv6 addresses are in brackets there."""
    return f"[{host}]" if ":" in host else host
