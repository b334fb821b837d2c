"""Serves the page of examples/web, with exports from elsewhere and files that wait."""

import contextlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGE = Path(__file__).parents[1] / "examples" / "web"
_PATIENCE = 120.0  # seconds; no test waits on purpose for so long


class Server(ThreadingHTTPServer):
    """`/exported/` is a directory of exports; files of `waiting` come after a POST."""

    daemon_threads = True

    def __init__(self, exports: Path, waiting: frozenset[str]) -> None:
        self.exports, self.waiting = exports, waiting
        self.released = threading.Event()
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(PAGE)))

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(SimpleHTTPRequestHandler):
    server: Server

    def translate_path(self, path: str) -> str:
        if path.startswith("/exported/"):
            return str(self.server.exports / path.removeprefix("/exported/"))
        return super().translate_path(path)

    def do_GET(self) -> None:
        if Path(self.path).name in self.server.waiting:
            self.server.released.wait(_PATIENCE)
        super().do_GET()

    def do_POST(self) -> None:
        self.server.released.set()
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def serving(exports: Path, waiting: frozenset[str] = frozenset()) -> Iterator[Server]:
    """A server of this machine only, while the context lasts."""
    with Server(exports, waiting) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()
