"""Downloads are cached and verified. A local server takes the place of the network."""

import hashlib
import http.server
import threading

import pytest

from gptjax.config.errors import DataError
from gptjax.data.download import download

CONTENT = b"It was a bright cold day in April.\n" * 100


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An address whose requests are counted; /short promises more than it sends, /gone is 404."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            if self.path == "/gone":
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT) * (2 if self.path == "/short" else 1)))
            self.end_headers()
            self.wfile.write(CONTENT)

        def log_message(self, *args):
            pass

    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    serving.address, serving.requests = f"http://127.0.0.1:{serving.server_port}", requests
    yield serving
    serving.shutdown()
    serving.server_close()


def kept(tmp_path):
    return [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_file_is_fetched_once(server, tmp_path):
    first, second = (download(f"{server.address}/book.txt") for _ in range(2))
    assert first == second and first.read_bytes() == CONTENT and first.name == "book.txt"
    assert server.requests == ["/book.txt"] and kept(tmp_path) == [first]


def test_checksum_is_verified_for_new_and_cached_files(server, tmp_path):
    good = hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(DataError, match=r"has SHA-256 .* not 00"):
        download(f"{server.address}/book.txt", "00")
    assert kept(tmp_path) == []
    path = download(f"{server.address}/book.txt", good.upper())
    path.write_bytes(b"changed since")
    with pytest.raises(DataError, match="delete it to fetch it again"):
        download(f"{server.address}/book.txt", good)


@pytest.mark.parametrize("path, expected", [("/gone", "Not Found"), ("/short", "is truncated: 3500 of 7000 bytes")])
def test_failed_download_leaves_no_file(server, tmp_path, path, expected):
    with pytest.raises(DataError, match=expected):
        download(server.address + path)
    assert kept(tmp_path) == []


def test_unreachable_url_is_one_line(server):
    address = server.address
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError, match=r"cannot fetch http://127.0.0.1:\d+/x.txt: .*refused"):
        download(f"{address}/x.txt")


@pytest.mark.slow
def test_training_on_a_url(server, tmp_path, call_train):
    result = call_train(tmp_path / "run", data_path=f"{server.address}/book.txt")
    assert result.code == 0 and "bits per byte" in result.out, result.err
