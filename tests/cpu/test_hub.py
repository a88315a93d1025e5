"""A hub that does not answer is found out at once, and one that does, with whatever status, is left to its library."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled

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
