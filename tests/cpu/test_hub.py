"""A hub that does not answer is found out at once, and one that does, with whatever status, is left to its library.
Of a model's repository what is read is downloaded, and nothing else."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects

from vllm_flatquant.calibration import source
from vllm_flatquant.calibration.errors import UserError
from vllm_flatquant.calibration.hub import check_hub


class Forbidden(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.server.asked += 1
        self.send_error(403)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Forbidden)
    server.asked = 0
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def test_a_hub_that_answers(hub, caplog):
    check_hub()
    assert (hub.asked, constants.HF_HUB_OFFLINE, caplog.text) == (1, False, "")


def test_a_hub_that_is_not_there(hub, caplog):
    from huggingface_hub import get_session

    hub.shutdown()
    hub.server_close()  # nobody listens there any more
    check_hub()
    assert constants.HF_HUB_OFFLINE
    assert f"{constants.ENDPOINT} does not answer (ConnectError)" in caplog.text
    with pytest.raises(OfflineModeIsEnabled):  # from here on nothing is tried, let alone again
        get_session().head(constants.ENDPOINT)
    caplog.clear()
    check_hub()
    assert (hub.asked, caplog.text) == (0, "")


WANTED = [
    "LICENSE",
    "README.md",
    "calibration_log.jsonl",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "golden.safetensors",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
]
UNREAD = [
    "consolidated-00001-of-00002.safetensors",
    "consolidated.safetensors",
    "consolidated.safetensors.index.json",
    "onnx/config.json",
    "original/consolidated.00.pth",
    "original/tokenizer.model",
    "pytorch_model.bin",
    "unet/model.safetensors",
]


def test_what_is_downloaded(monkeypatch, tmp_path):
    asked = []

    def download(name, **patterns):
        asked.append((name, list(filter_repo_objects(sorted(WANTED + UNREAD), **patterns))))
        return str(tmp_path)

    monkeypatch.setattr(source, "snapshot_download", download)
    assert source.resolve_folder("org/name") == tmp_path
    assert asked == [("org/name", WANTED)]


@pytest.mark.parametrize(
    ("kind", "offline", "why"),
    [
        (GatedRepoError, False, "its authors ask for consent; "),
        (RepositoryNotFoundError, False, "the hub shows you none of this name; "),
        (
            LocalEntryNotFoundError,
            True,
            "HF_HUB_OFFLINE is set, and the cache has no copy; check the name",
        ),
        (LocalEntryNotFoundError, False, "Got: nothing; check the name and the network"),
    ],
)
def test_why_a_model_does_not_come(monkeypatch, kind, offline, why):
    error = kind.__new__(kind)  # the constructors differ between versions of the library
    error.args = ("Got: nothing\n(Request ID: 1)",)

    def download(*_, **__):
        raise error

    monkeypatch.setattr(source, "snapshot_download", download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(UserError) as caught:
        source.resolve_folder("org/name")
    assert str(caught.value).startswith(f"org/name is no folder and was not downloaded: {why}")
