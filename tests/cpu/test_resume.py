"""Interrupted runs: what is kept, who may go on, and that the result is the same to the bit."""

import errno
import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

import vllm_flatquant.calibration.quantize as quantize_module
from vllm_flatquant.calibration import block, quantize_block, shards
from vllm_flatquant.calibration.errors import UserError
from vllm_flatquant.calibration.quantize import Callbacks, quantize
from vllm_flatquant.calibration.recipe import make_recipe
from vllm_flatquant.calibration.reference import read_spec
from vllm_flatquant.calibration.staging import Staging, finished_blocks, read_run, staging_folder

from ..soak.kills import contents, kill_at_random_moments
from .tiny_model import edit_config, edit_weights, make_model, random_tokens

SMALL = {"samples": 4, "seq_len": 24, "epochs": 2, "batch_size": 2}
BLOCKS = 3


class Stop(Exception):
    """What interrupts a run here."""


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "model", num_hidden_layers=BLOCKS)


def stop_after(count):
    def block(report):
        if report.block + 1 == count:
            raise Stop

    return Callbacks(block=block)


@pytest.fixture
def interrupted(model, calib, tmp_path):
    """Quantize to tmp_path/out and stop after ``done`` blocks; the arguments of the run."""

    def start(done=1, **settings):
        arguments = model, tmp_path / "out", make_recipe(**SMALL, **settings), str(calib), "cpu"
        with pytest.raises(Stop):
            quantize(*arguments, callbacks=stop_after(done))
        assert finished_blocks(tmp_path / "out") == done
        return arguments

    return start


@pytest.mark.parametrize(
    "settings", [{"distill_epochs": 1}, {"rounding": "gptq", "kv": 4, "rotation": "hadamard"}]
)
def test_same_bytes_wherever_it_stopped(interrupted, tmp_path, settings):
    for done in range(1, BLOCKS + 1):
        arguments = interrupted(done, **settings)
        reported = []
        quantize(*arguments, resume=True, callbacks=Callbacks(block=lambda r, to=reported: to.append(r)))
        assert [r.block for r in reported] == list(range(done, BLOCKS))
        (tmp_path / "out").rename(tmp_path / f"out{done}")
    model, out, *rest = arguments
    quantize(model, out, *rest)
    expected = contents(out)
    assert {"model.safetensors", "config.json", "golden.safetensors", "log 2"} <= expected.keys()
    for done in range(1, BLOCKS + 1):
        assert contents(tmp_path / f"out{done}") == expected
    assert not staging_folder(out).exists()


def test_the_command_needs_no_other_argument(interrupted, run, tmp_path, monkeypatch):
    arguments = interrupted(2, seed=3)
    monkeypatch.chdir(tmp_path)
    status, said, err = run("quantize", "--out", "out", "--resume")
    assert status == 0, err
    assert "block 3/3" in said
    assert "block 2/3" not in said
    finished = contents(tmp_path / "out")
    assert run("quantize", "--out", "out", "--resume")[0] == 1
    quantize(*arguments, overwrite=True)
    assert contents(tmp_path / "out") == finished


def test_refuses_what_changed(interrupted, run, tmp_path, model, calib):
    interrupted()
    before = read_run(tmp_path / "out")

    def refused(*parts, options=()):
        status, _, err = run("quantize", model, "--out", tmp_path / "out", "--resume", *options)
        assert status == 1
        assert len(err.splitlines()) == 1
        for part in (*parts, "cannot go on", "--overwrite"):
            assert part in err, err
        assert finished_blocks(tmp_path / "out") == 1
        assert read_run(tmp_path / "out") == before

    refused("epochs is 7 and was 2", options=("--epochs", 7))
    refused("scheme is w4a8 and was w4a4", options=("--recipe", "flatquant-w4a8", "--epochs", 2))
    tokens = random_tokens(4, 24).numpy()
    tokens[0, 0] ^= 1
    np.save(tmp_path / "changed.npy", tokens)
    refused("tokens of", "changed.npy", options=("--calib", tmp_path / "changed.npy"))
    config = (model / "config.json").read_text()
    edit_config(model, rope_theta=5.0)
    refused("config.json has changed")
    (model / "config.json").write_text(config)
    edit_weights(model, lambda t: t["model.norm.weight"].view(-1).__setitem__(0, 3.0))
    refused("model.safetensors has changed")


def test_a_version_that_chose_other_factors(interrupted, run, tmp_path, monkeypatch):
    """Blocks of two kinds would make a checkpoint that nothing can load."""
    arguments = interrupted()
    before = read_run(tmp_path / "out")
    for module in (quantize_module, block):
        monkeypatch.setattr(module, "factor_pair", lambda width, *_: (2, width // 2))
    status, said, err = run("quantize", "--out", tmp_path / "out", "--resume")
    assert (status, said, len(err.splitlines())) == (1, "", 1)
    assert "cannot go on: vllm-flatquant has changed, and model.layers.0.mlp.down_transform.left" in err
    assert "is (1, 2, 2) and was (1, 8, 8)" in err
    assert (finished_blocks(tmp_path / "out"), read_run(tmp_path / "out")) == (1, before)
    monkeypatch.undo()
    quantize(*arguments, resume=True)


@pytest.mark.parametrize(("given", "status"), [(1, 0), (None, 1)])
def test_finished_blocks_keep_their_shards(interrupted, run, tmp_path, monkeypatch, given, status):
    """Recipes of older versions always have a number."""
    interrupted(shards=given)
    monkeypatch.setattr(shards, "quick_shards", lambda *_: 2)
    found, _, err = run("quantize", "--out", tmp_path / "out", "--resume")
    assert (found, "vllm-flatquant has changed" in err) == (status, bool(status))
    assert status or read_spec(tmp_path / "out").shards == 1


def test_the_same_data_and_weights_elsewhere_are_the_same(interrupted, run, tmp_path, model, calib):
    interrupted()
    np.save(tmp_path / "other.npy", random_tokens(4, 24).numpy())
    edit_weights(model, lambda t: None)  # written again with the same content
    options = ("--calib", tmp_path / "other.npy", "--samples", 4)
    assert run("quantize", model, "--out", tmp_path / "out", "--resume", *options)[0] == 0


def test_another_thread_count_is_told(interrupted):
    arguments, notes = interrupted(), []
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        quantize(*arguments, resume=True, callbacks=Callbacks(note=notes.append))
    finally:
        torch.set_num_threads(before)
    assert len(notes) == 1
    assert f"threads {before + 1} (was {before})" in notes[0]


def test_a_left_over_run_is_never_lost_by_accident(interrupted, run, tmp_path, model, calib):
    arguments = interrupted(2)
    options = ("--calib", calib, "--device", "cpu", "--samples", 4, "--seq-len", 24)
    status, _, err = run("quantize", model, "--out", tmp_path / "out", *options)
    assert (status, finished_blocks(tmp_path / "out")) == (1, 2)
    assert "2 finished blocks" in err
    assert "--resume" in err
    read = []
    with pytest.raises(UserError):  # before the weights are read, which can take minutes
        quantize(*arguments, callbacks=Callbacks(progress=lambda stage, _: read.append(stage)))
    assert not read
    assert "--overwrite" in err
    with pytest.raises(Stop):
        quantize(*arguments, overwrite=True, callbacks=stop_after(1))
    assert finished_blocks(tmp_path / "out") == 1


def test_nothing_to_resume(run, tmp_path, model):
    status, _, err = run("quantize", model, "--out", tmp_path / "out", "--resume")
    assert status == 1
    assert "no interrupted run" in err
    assert not staging_folder(tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    _, _, err = run("quantize", model, "--out", tmp_path / "out", "--resume")
    assert "no interrupted run" in err and "what it holds is finished" in err


def test_two_runs_to_the_same_place(interrupted, tmp_path):
    arguments = interrupted()
    with Staging(tmp_path / "out"), pytest.raises(UserError, match="another run is writing"):
        quantize(*arguments, resume=True)
    quantize(*arguments, resume=True)


def test_a_folder_of_the_users_in_the_way(tmp_path, model, calib):
    folder = staging_folder(tmp_path / "out")
    folder.mkdir()
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="in the way"):
        quantize(model, tmp_path / "out", make_recipe(**SMALL), str(calib), "cpu")
    assert (folder / "mine.txt").exists()


def test_where_nothing_can_be_made(run, model, calib):
    """/proc and automounts answer "no such file" to whoever makes a folder in them, however often."""
    status, _, err = run(
        "quantize", model, "--out", "/proc/out", "--calib", calib, "--samples", 4, "--seq-len", 24
    )
    assert status == 1
    assert "/proc/out cannot be made (No such file or directory); choose another --out" in err


def test_damaged_memory_of_a_run(interrupted, run, tmp_path):
    interrupted()
    file = staging_folder(tmp_path / "out") / "run.json"
    for text in ("{", json.dumps({**json.loads(file.read_text()), "more": 1})):
        file.write_text(text)
        status, _, err = run("quantize", "--out", tmp_path / "out", "--resume")
        assert status == 1
        assert "run.json cannot be used" in err


def test_only_the_current_streams_are_kept(interrupted, tmp_path):
    interrupted(2, rounding="gptq")
    streams = sorted(
        str(f.relative_to(f.parents[1])) for f in staging_folder(tmp_path / "out").rglob("*.npy")
    )
    assert streams == ["block-00001/full.npy", "block-00001/quantized.npy"]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_stopped_while_the_checkpoint_takes_its_place(model, calib, tmp_path, monkeypatch, renames):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("keep")
    (out / "config.json").write_text('{"quantization_config": {"quant_method": "flatquant"}}')
    arguments = (model, out, make_recipe(**SMALL), str(calib), "cpu")
    left, rename = [renames], Path.rename

    def stop(path, target):
        if out in (path, target):
            if not left[0]:
                raise Stop
            left[0] -= 1
        return rename(path, target)

    def stop_cleaning(*_, **__):
        raise Stop

    monkeypatch.setattr(Path, "rename", stop)
    if renames == 2:
        monkeypatch.setattr(Staging, "remove", stop_cleaning)
    with pytest.raises(Stop):
        quantize(*arguments, overwrite=True)
    monkeypatch.undo()
    assert (out / "old.txt").exists() == (renames == 0)
    quantize(*arguments, resume=True)
    assert (out / "config.json").exists()
    assert not (out / "old.txt").exists()
    assert not staging_folder(out).exists()


def test_a_full_disk_loses_the_block_in_hand(interrupted, monkeypatch, tmp_path, model, calib):
    save, calls = quantize_block.save_tensors, []

    def full(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(*arguments)

    monkeypatch.setattr(quantize_block, "save_tensors", full)
    arguments = (model, tmp_path / "out", make_recipe(**SMALL), str(calib), "cpu")
    with pytest.raises(UserError, match="No space left on device.*kept for --resume: 1"):
        quantize(*arguments)
    assert finished_blocks(tmp_path / "out") == 1
    monkeypatch.undo()
    quantize(*arguments, resume=True)
    finished = contents(tmp_path / "out")
    quantize(*arguments, overwrite=True)
    assert contents(tmp_path / "out") == finished


@pytest.mark.parametrize(("samples", "room", "kept"), [(4, 8, 0), (1, 12, 0), (4, 40, BLOCKS)])
def test_files_that_may_not_grow(tmp_path, model, calib, samples, room, kept):
    """A real limit of the system (in KB): at the inputs, at a block's tensors, at the packed checkpoint."""
    recipe = make_recipe(**{**SMALL, "samples": samples})
    arguments = (model, tmp_path / "out", recipe, str(calib), "cpu")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room * 1024, before[1]))
    try:
        with pytest.raises(UserError, match="File too large.*limit on a file"):
            quantize(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert finished_blocks(tmp_path / "out") == kept
    assert staging_folder(tmp_path / "out").exists() == bool(kept)
    assert not (tmp_path / "out").exists()
    quantize(*arguments, resume=bool(kept))


def test_kills_at_random_moments(tmp_path):
    counts = kill_at_random_moments(tmp_path, kills=5, seed=1)
    assert counts["kills"] == 5
    assert counts["kills_after_a_block"] >= 1
