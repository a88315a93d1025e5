"""examples/client.py against a server that answers as vLLM does; `make soak` runs it against vLLM."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from test_recipes import script

CLIENT = Path(__file__).resolve().parents[2] / "examples" / "client.py"


def test_quickstart_ends_with_commands_for_a_shell_of_one_s_own(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(CLIENT.parent))
    quickstart = script(CLIENT.parent / "quickstart.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "BIN", tmp_path / ".venv" / "bin")
    serve = quickstart.again(Path("my out"))
    assert len(serve) == 1 and serve[0].startswith("vllm serve 'my out' --quantization flatquant")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    assert quickstart.again(Path("my out")) == ["source .venv/bin/activate", *serve]


class Handler(BaseHTTPRequestHandler):
    """Canned answers; ``server.template`` says whether the model has a chat template."""

    def log_message(self, *_):
        pass

    def reply(self, status, body, kind="application/json"):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if not self.path.startswith("/v1/"):
            self.reply(404, {"detail": "Not Found"})
            return
        self.reply(200, {"object": "list", "data": [{"id": "tiny", "object": "model"}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (asked["model"], asked["temperature"], asked["max_tokens"]) == ("tiny", 0, 5)
        base = {"id": "1", "created": 0, "model": "tiny"}
        if self.path.endswith("/v1/completions"):
            choice = {"index": 0, "text": " completed", "finish_reason": "length"}
            self.reply(200, {**base, "object": "text_completion", "choices": [choice]})
        elif not self.server.template:
            message = "default chat template is no longer allowed, so you must provide a chat template"
            self.reply(400, {"error": {"message": message, "type": "BadRequestError", "code": 400}})
        elif asked.get("stream"):
            lines = ""
            for piece in ("stre", "amed"):
                delta = {"index": 0, "delta": {"content": piece}, "finish_reason": None}
                lines += (
                    "data: "
                    + json.dumps({**base, "object": "chat.completion.chunk", "choices": [delta]})
                    + "\n\n"
                )
            self.reply(200, (lines + "data: [DONE]\n\n").encode(), "text/event-stream")
        else:
            message = {"role": "assistant", "content": "chatted"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self.reply(200, {**base, "object": "chat.completion", "choices": [choice]})


@pytest.fixture
def server():
    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.template = True
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()


def ask(url):
    words = [sys.executable, str(CLIENT), "--url", url, "--max-tokens", "5", "--prompt", "begin"]
    environment = {"NO_PROXY": "127.0.0.1", "PATH": ""}
    return subprocess.run(words, capture_output=True, text=True, env=environment, check=False)


def test_completion_chat_and_stream(server):
    done = ask(f"http://127.0.0.1:{server.server_port}/v1")
    assert done.returncode == 0, done.stderr
    for part in ("model: tiny", "begin completed", "chatted", "streamed"):
        assert part in done.stdout


def test_a_model_without_a_chat_template_completes(server):
    server.template = False
    done = ask(f"http://127.0.0.1:{server.server_port}/v1")
    assert done.returncode == 0, done.stderr
    assert "begin completed" in done.stdout
    assert "tiny has no chat template, so it answers completions only" in done.stdout


def test_an_address_without_its_end(server):
    done = ask(f"http://127.0.0.1:{server.server_port}")
    assert done.returncode == 1
    assert "the server refused" in done.stderr and done.stderr.endswith("; --url ends in /v1\n")


def test_no_server_is_one_sentence():
    done = ask("http://127.0.0.1:9/v1")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        "client: nothing answers at http://127.0.0.1:9/v1; start `vllm serve` or correct --url"
    ]


def test_the_quick_start_asks_in_the_same_way():
    words = [sys.executable, str(CLIENT.with_name("quickstart.py")), "--help"]
    assert subprocess.run(words, capture_output=True, check=False).returncode == 0
