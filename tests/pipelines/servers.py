"""Servers on loopback for the tests: a web server whose pages are functions, and an S3 server that can fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Page(BaseHTTPRequestHandler):
    """A request as a page sees it; `answer` writes the head, `wfile` takes the body."""

    def answer(self, status: int = 200, kind: str = "video/mp4", **headers: object) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def send(self, body: bytes, *, kind: str = "video/mp4") -> None:
        self.answer(kind=kind, Content_Length=len(body))
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@dataclass
class Web:
    """A web server: pages by path, and the paths that were asked for, in order."""

    pages: dict[str, Callable[[Page], None]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    port: int = 0

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"


@contextmanager
def web_server() -> Iterator[Web]:
    web = Web()

    class Handler(Page):
        def do_GET(self) -> None:
            web.asked.append(self.path)
            try:
                web.pages.get(self.path, lambda page: page.send_error(404))(self)
            except (BrokenPipeError, ConnectionResetError):  # the client has heard enough
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    web.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def never(_: dict[str, Any]) -> bool:
    return False


@dataclass
class ObjectStore:
    """An S3 server with one bucket; requests for which `fails` holds are answered 500."""

    port: int
    fails: Callable[[dict[str, Any]], bool] = never
    num_failures: int = 0
    bucket: str = "bucket"

    def url(self, path: str = "") -> str:
        return f"s3://{self.bucket}{path}?endpoint_override=127.0.0.1:{self.port}&scheme=http"


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """moto's S3 server. The caller sets AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to anything."""
    import boto3
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log_request(self, *args: Any) -> None:
            pass

    moto = DomainDispatcherApplication(create_backend_app)

    def application(request: dict[str, Any], start: Any) -> Any:
        if not store.fails(request):
            return moto(request, start)
        store.num_failures += 1
        request["wsgi.input"].read(int(request.get("CONTENT_LENGTH") or 0))
        start("500 Internal Server Error", [("Content-Type", "application/xml")])
        return [b"<Error><Code>InternalError</Code><Message>on purpose</Message></Error>"]

    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    store = ObjectStore(port=server.server_port)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{store.port}", region_name="us-east-1")
        client.create_bucket(Bucket=store.bucket)
        yield store
        client.close()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
