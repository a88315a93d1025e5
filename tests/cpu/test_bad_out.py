"""What ``--out`` may be, and that nothing else is touched: not the user's files, not another run's, not an old checkpoint."""

import errno
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from vllm_flatquant.calibration import export
from vllm_flatquant.calibration.errors import UserError
from vllm_flatquant.calibration.quantize import Callbacks, quantize
from vllm_flatquant.calibration.recipe import make_recipe


def test_out_not_empty(run, refuses, tmp_path, model, calib):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    refuses("not empty", "--overwrite")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_out_is_a_file(refuses, tmp_path):
    (tmp_path / "out").write_text("keep")
    refuses("is a file")


@pytest.mark.parametrize("place", ["working directory", "home folder"])
@pytest.mark.parametrize("empty", [True, False])
def test_out_is_where_the_user_is(refuses, tmp_path, monkeypatch, place, empty):
    """As with ``--out "$UNSET" --overwrite``, which is the working directory and all that lies there."""
    inside = tmp_path / "out" / "inside"
    inside.mkdir(parents=True)
    if place == "home folder":
        monkeypatch.setenv("HOME", str(inside))
    else:
        monkeypatch.chdir(inside)
    if not empty:
        (inside / "mine.txt").write_text("keep")
    refuses(f"is or holds the {place}", options=("--overwrite",))
    assert empty or (inside / "mine.txt").read_text() == "keep"


def test_out_is_where_something_is_mounted(refuses, tmp_path, monkeypatch):
    """As a container's volume: a run could not put its folder there, after all its work."""
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "out")
    refuses("is a mount point", str(tmp_path / "out" / "checkpoint"))
    refuses("is a mount point", options=("--overwrite",))


def test_out_never_destroys_the_model(refuses, model, tmp_path):
    (tmp_path / "link").symlink_to(model)
    for out in (model, tmp_path / "link", tmp_path):
        refuses("which is read", options=("--out", out, "--overwrite"))
    assert (model / "model.safetensors").exists()


def test_nothing_of_the_users_is_removed(model, calib, tmp_path):
    recipe = make_recipe(samples=4, seq_len=24, epochs=0)
    for name in ("q.partial", "q.old", "q"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("keep")
    for config in (None, "{", "[]", '{"model_type": "llama"}', '{"quantization_config": "flatquant"}'):
        if config:
            (tmp_path / "q" / "config.json").write_text(config)
        with pytest.raises(UserError, match="something else than a FlatQuant checkpoint"):
            quantize(model, tmp_path / "q", recipe, str(calib), "cpu", overwrite=True)
        assert (tmp_path / "q" / "mine.txt").exists()
    shutil.rmtree(tmp_path / "q")
    quantize(model, tmp_path / "q", recipe, str(calib), "cpu")
    (tmp_path / "q" / "mine.txt").write_text("replaced with the checkpoint in which it lies")
    quantize(model, tmp_path / "q", recipe, str(calib), "cpu", overwrite=True)
    assert (tmp_path / "q.partial" / "mine.txt").exists()
    assert (tmp_path / "q.old" / "mine.txt").exists()
    assert not (tmp_path / "q" / "mine.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "calib.npy",
        "model",
        "q",
        "q.old",
        "q.partial",
    ]


def test_out_may_be_a_link_to_a_folder(run, model, calib, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    quantize(model, tmp_path / "link", make_recipe(samples=4, seq_len=24, epochs=0), str(calib), "cpu")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").exists()


def test_another_run_finished_there_first(model, calib, tmp_path):
    def appear(_):
        (tmp_path / "q").mkdir(exist_ok=True)
        (tmp_path / "q" / "theirs.txt").write_text("keep")

    recipe = make_recipe(samples=4, seq_len=24, epochs=0)
    arguments = (model, tmp_path / "q", recipe, str(calib), "cpu")
    with pytest.raises(UserError, match="not empty.*kept for --resume: 2"):
        quantize(*arguments, callbacks=Callbacks(block=appear))
    assert [p.name for p in (tmp_path / "q").iterdir()] == ["theirs.txt"]
    with pytest.raises(UserError, match="something else than a FlatQuant checkpoint"):
        quantize(*arguments, overwrite=True, resume=True)
    quantize(*arguments[:1], tmp_path / "other", *arguments[2:])
    (tmp_path / "q" / "theirs.txt").unlink()
    (tmp_path / "other").rename(tmp_path / "q")
    (tmp_path / "q" / "theirs.txt").write_text("replaced")
    quantize(*arguments, overwrite=True, resume=True)
    assert (tmp_path / "q" / "config.json").exists()
    assert not (tmp_path / "q" / "theirs.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calib.npy", "model", "q"]


FINALIZED = """
import os, signal, sys, time
from vllm_flatquant import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may ignore it
signal.signal(signal.SIGHUP, signal.SIG_DFL)
class Finalized:
    def __del__(self):
        os.kill(os.getpid(), int(sys.argv[1]))
        time.sleep(0.1)
def app():
    Finalized()
    time.sleep(20)
    print("went on")
cli.app = app
cli.main()
"""


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, -signal.SIGINT)],
)
def test_a_stop_inside_a_finalizer_is_not_lost(number, status):
    """Python drops what is raised there, and the tokenizer's patterns have finalizers."""
    done = subprocess.run(
        [sys.executable, "-c", FINALIZED, str(int(number))],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (status, "")
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_in_the_middle_leaves_nothing(model, calib, tmp_path, number):
    command = [
        sys.executable,
        "-m",
        "vllm_flatquant.cli",
        "quantize",
        str(model),
        "--out",
        str(tmp_path / "q"),
    ]
    options = [
        "--calib",
        str(calib),
        "--samples",
        "4",
        "--seq-len",
        "24",
        "--epochs",
        "100000",
        "--device",
        "cpu",
    ]
    # A background job may ignore SIGINT, and its children with it.
    wrap = (
        "import os, signal, sys; signal.signal(2, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", wrap, *command, *options], stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 90
        while not list(tmp_path.glob(".q.*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calib.npy", "model"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["os", "safetensors"],
)
def test_disk_full_keeps_the_old_checkpoint(refuses, tmp_path, monkeypatch, error):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("keep")
    (tmp_path / "out" / "config.json").write_text(
        '{"quantization_config": {"quant_method": "flatquant"}}'
    )

    def full(*_, **__):
        raise error

    monkeypatch.setattr(export, "save_file", full)
    refuses("No space left on device", "free space", options=("--overwrite",))
    assert (tmp_path / "out" / "old.txt").read_text() == "keep"
