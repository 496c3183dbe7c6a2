"""Names on the hub: downloaded from a local server with the hub's API; a one-line error without it."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

from gptjax.interop import convert_run

sys.path.append(str(ROOT / "tests" / "interop"))
from test_convert_run import FAMILIES, random_run

COMMIT = "0123456789012345678901234567890123456789"


def serve(folder):
    """A server with one model, named tiny, and the requests that it received."""
    asked = []
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | {"pytorch_model.bin": b"pickle"}

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(body=True)

        def do_HEAD(self):
            self.answer(body=False)

        def answer(self, body):
            path = self.path.split("?")[0]
            asked.append(path)
            name = path.rsplit("/", 1)[-1]
            if path.startswith("/api/models/broken"):
                self.send_error(418)
            elif path.startswith("/api/models/tiny/tree"):
                entries = [
                    {"type": "file", "path": name, "size": len(raw), "oid": hashlib.sha1(raw).hexdigest()}
                    for name, raw in files.items()
                ]
                self.reply(json.dumps(entries).encode(), body, {"Content-Type": "application/json"})
            elif path.startswith("/api/models/tiny"):
                told = {"id": "tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
                self.reply(json.dumps(told).encode(), body, {"Content-Type": "application/json"})
            elif path.startswith("/tiny/resolve/") and name in files:
                etag = hashlib.sha1(files[name]).hexdigest()
                self.reply(files[name], body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.end_headers()

        def reply(self, content, body, headers):
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, asked


def converted(name, workdir, endpoint, home):
    """Runs the command in a separate process, since the hub's library reads its address once."""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "gptjax.convert", f"--from=hf:{name}", f"--to={workdir}", "--json"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "hf"
    convert_run.export_run(random_run(folder.parent, **FAMILIES["llama"]), folder)
    server, asked = serve(folder)
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def test_a_name_is_fetched_once_and_without_pickles(hub, tmp_path):
    endpoint, asked = hub
    first = converted("tiny", tmp_path / "run", endpoint, tmp_path / "home")
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["family"] == "llama"
    assert any(path.endswith("model.safetensors") for path in asked)
    assert not any(path.endswith(".bin") for path in asked)
    # What was fetched serves when the hub cannot be reached.
    again = converted("tiny", tmp_path / "again", "http://127.0.0.1:9", tmp_path / "home")
    assert again.returncode == 0, again.stderr


def test_a_name_that_cannot_be_fetched_is_one_line(hub, tmp_path):
    absent = converted("nowhere", tmp_path / "run", hub[0], tmp_path / "home")
    assert absent.returncode == 2 and "the Hugging Face hub has no model of that name" in absent.stderr
    offline = converted("tiny", tmp_path / "run", "http://127.0.0.1:9", tmp_path / "empty")
    assert offline.returncode == 2 and "the Hugging Face hub cannot be reached" in offline.stderr
    broken = converted("broken", tmp_path / "run", hub[0], tmp_path / "home")
    assert broken.returncode == 2 and "418" in broken.stderr
    for result in (absent, offline, broken):
        assert result.stderr.startswith("gptjax: ") and result.stderr.count("\n") == 1, result.stderr
    assert not (tmp_path / "run").exists()
