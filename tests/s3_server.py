"""An S3 server on loopback that may be killed: moto's, with a log that brings it back as it was.

moto keeps everything in memory. Here every request that changes something is first appended to a
file, which is played back when the server starts again: what was answered before a kill is there
after it, and what was cut off in the middle may be there or not, as with any server.

    python s3_server.py PORT LOG

It listens on 127.0.0.1 alone, and ends when its stdin does, or after LIFETIME_S.
"""

from __future__ import annotations

import io
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

LIFETIME_S = 1800
START_PATIENCE_S = 60
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}

_CHANGES = ("PUT", "POST", "DELETE")

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class S3Server:
    """The server as a process of its own.

    Args:
        folder: where its log is kept.

    Attributes:
        environment: what a program needs to find it and be let in.
    """

    def __init__(self, folder: Path) -> None:
        self._log = folder / "s3.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self.environment = {
            **CREDENTIALS,
            "AWS_ENDPOINT_URL": self.url,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            # Not the files of whoever runs the tests.
            "AWS_CONFIG_FILE": str(folder / "none"),
            "AWS_SHARED_CREDENTIALS_FILE": str(folder / "none"),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> None:
        """Start it with all that it ever knew.

        Args:
            wait: until it answers.
        """
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self._port), str(self._log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline_s = time.monotonic() + START_PATIENCE_S
        while wait:
            try:
                urllib.request.urlopen(self.url, timeout=5).close()
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                assert self._process.poll() is None, "the server has ended"
                assert time.monotonic() < deadline_s, "the server does not answer"
                time.sleep(0.05)
            else:
                return

    def requests(self) -> list[str]:
        """Return every request so far, as ``GET /bucket/key signed``."""
        return self._log.with_suffix(".txt").read_text(encoding="utf-8").splitlines()

    def require_credentials(self, *, are_required: bool) -> None:
        """Have it refuse requests without credentials that it knows, of which there are none."""
        request = urllib.request.Request(
            f"{self.url}/moto-api/reset-auth",
            data=b"0" if are_required else b"1000000",
            headers={"Content-Type": "text/plain"},
        )
        urllib.request.urlopen(request, timeout=30).close()

    def kill(self) -> None:
        """Kill it on the spot."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()


@contextmanager
def running_server(folder: Path) -> Iterator[S3Server]:
    """Run a server for the length of the ``with``."""
    server = S3Server(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def _logging(application: Application, log: BinaryIO, requests: TextIO) -> Application:
    """Note every request, and before it is done all of one that changes something."""
    lock = threading.Lock()

    def logged(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        signed = "signed" if "HTTP_AUTHORIZATION" in environ else "unsigned"
        requests.write(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']} {signed}\n")
        requests.flush()
        if environ["REQUEST_METHOD"] in _CHANGES:
            # A connection stays open behind a body: no more may be read than was announced.
            num_bytes = int(environ.get("CONTENT_LENGTH") or 0)
            body = environ["wsgi.input"].read(num_bytes)
            if len(body) != num_bytes:  # A body that is cut off is no request.
                start_response("400 Bad Request", [])
                return [b""]
            environ["wsgi.input"] = io.BytesIO(body)
            with lock:
                told = {name: text for name, text in environ.items() if isinstance(text, str)}
                pickle.dump((told, body), log)
                log.flush()
                return application(environ, start_response)
        return application(environ, start_response)

    return logged


def _play_back(application: Application, path: Path) -> None:
    """Do again what the log tells; what a kill has left of its last entry is cut off."""
    from werkzeug.test import EnvironBuilder, run_wsgi_app

    if not path.exists():
        return
    with path.open("r+b") as log:
        end = 0
        while True:
            try:
                told, body = pickle.load(log)
            except (EOFError, pickle.UnpicklingError):
                break
            end = log.tell()
            environ = EnvironBuilder(input_stream=io.BytesIO(body)).get_environ()
            run_wsgi_app(application, {**environ, **told})
        log.truncate(end)


def _end_with_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> None:
    port, path = int(sys.argv[1]), Path(sys.argv[2])
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    threading.Timer(LIFETIME_S, os._exit, (0,)).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the programs that are tested.

    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, type: str, message: str, *args: Any) -> None:
            """Say nothing."""

    application = DomainDispatcherApplication(create_backend_app)
    _play_back(application, path)
    requests = path.with_suffix(".txt")
    with path.open("ab") as log, requests.open("a", encoding="utf-8") as listed:
        served = _logging(application, log, listed)
        make_server("127.0.0.1", port, served, threaded=True, request_handler=Quiet).serve_forever()


if __name__ == "__main__":
    main()
