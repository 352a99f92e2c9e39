"""An HTTP server on the loopback interface with checkpoints: as plain files, and at the addresses of the hub."""

import json
import os
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Faults:
    """What a server does wrong: every so many requests for weights it drops the connection, sends half of an answer, or
    says 429; it knows no ranges, lacks files, sends other bytes, or says another size."""

    def __init__(self, drop=0, truncate=0, busy=0, ranges=True, missing=(), retry_after="0", size=0, gated=False):
        self.drop, self.truncate, self.busy, self.ranges = drop, truncate, busy, ranges
        self.missing, self.retry_after, self.size, self.gated = set(missing), retry_after, size, gated


class Server(ThreadingHTTPServer):
    """models: hub name -> folder, also at /files/NAME. sent: bytes of bodies; seen: (method, path, range, token)."""

    daemon_threads = True

    def __init__(self, models: dict[str, Path], faults: Faults):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models, self.faults = models, faults
        self.sent, self.requests, self.seen, self.lock = 0, 0, [], threading.Lock()
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, name: str) -> str:
        return f"{self.address}/files/{name}"


@contextmanager
def serving(models: dict[str, Path], faults: Faults | None = None):
    server = Server(models, faults or Faults())
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.server.lock:
            headers = self.headers
            self.server.seen.append((self.command, self.path, headers.get("Range"), headers.get("Authorization")))
        if found := re.fullmatch(r"/api/models/(.+)/revision/([^/]+)", path):
            self._listing(found[1], found[2])
        elif found := re.fullmatch(r"/(.+)/resolve/([^/]+)/([^/]+)", path):
            if self.server.faults.gated:
                self._plain(403, b"")
            elif found[3].endswith(".safetensors"):
                self._plain(302, b"", Location=f"/signed/{found[1]}/{found[3]}?signature=secret")
            else:
                self._file(found[1], found[3], body)
        elif found := re.fullmatch(r"/(?:files|signed)/(.+)/([^/]+)", path):
            self._file(found[1], found[2], body)
        else:
            self._plain(404, b"")

    def _listing(self, name: str, revision: str) -> None:
        folder = self.server.models.get(name)
        if folder is None or revision not in ("main", COMMIT):
            return self._plain(404, b"")
        files = [{"rfilename": f.name, "size": f.stat().st_size} for f in sorted(folder.iterdir()) if f.is_file()]
        self._plain(200, json.dumps({"sha": COMMIT, "siblings": files}).encode())

    def _plain(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self._send(content)

    def _send(self, content: bytes) -> None:
        with self.server.lock:
            self.server.sent += len(content)
        self.wfile.write(content)

    def _file(self, name: str, file: str, body: bool) -> None:
        faults, folder = self.server.faults, self.server.models.get(name)
        if folder is None or file in faults.missing or not (folder / file).is_file():
            return self._plain(404, b"")
        weights = file.endswith(".safetensors")
        with self.server.lock:
            self.server.requests += weights and body
            number = self.server.requests
        if weights and body and faults.busy and number % faults.busy == 0:
            return self._plain(429, b"", Retry_After=faults.retry_after)
        if weights and body and faults.drop and number % faults.drop == 0:
            self.close_connection = True
            return None
        size = (folder / file).stat().st_size
        start, end, wanted = 0, size, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if wanted and faults.ranges:
            start, end = int(wanted[1]), min(size, int(wanted[2]) + 1)
            if start >= size:
                return self._plain(416, b"")
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size + (faults.size if weights else 0)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(end - start))
        self.send_header("ETag", f'"{size}-{(folder / file).stat().st_mtime_ns}"')
        self.end_headers()
        if not body:
            return None
        if weights and faults.truncate and number % faults.truncate == 0:
            end, self.close_connection = start + (end - start) // 2, True
        descriptor = os.open(folder / file, os.O_RDONLY)
        try:
            while start < end:
                part = os.pread(descriptor, min(end - start, 2**20), start)
                self._send(part)
                start += len(part)
        except OSError:
            self.close_connection = True
        finally:
            os.close(descriptor)
        return None
