"""Two processes of torchrun calibrate as one does: the same codes and factors within rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vllm_flatquant import cli
from vllm_flatquant.calibration import parallel
from vllm_flatquant.calibration.errors import UserError
from vllm_flatquant.calibration.quantize import Callbacks, quantize
from vllm_flatquant.calibration.recipe import make_recipe
from vllm_flatquant.calibration.staging import finished_blocks, staging_folder
from vllm_flatquant.kernels.pack import unpack_codes

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"samples": 4, "seq_len": 24, "epochs": 2, "batch_size": 4}


class Stop(Exception):
    """What interrupts a run here."""


def torchrun(*words, processes=2):
    """Run a module in processes of torchrun on the CPU; (status, stdout, stderr)."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        processes,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(word) for word in (*command, *words)],
        env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def checkpoint(folder):
    """Its tensors."""
    return {
        n: t for file in sorted(folder.glob("model*.safetensors")) for n, t in load_file(file).items()
    }


def log(folder):
    """Its lines."""
    lines = (folder / "calibration_log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_close(several, one):
    """99% of the codes are equal, all other tensors within 1% of their size, and the logged losses within 0.1%."""
    found, expected = checkpoint(several), checkpoint(one)
    assert found.keys() == expected.keys() and any(n.endswith("weight_packed") for n in found)
    for name, tensor in expected.items():
        if name.endswith("weight_packed"):
            same = unpack_codes(found[name], 4) == unpack_codes(tensor, 4)
            assert same.float().mean() > 0.99, name
        else:
            error = (found[name].float() - tensor.float()).norm() / tensor.float().norm()
            assert error < 0.01, name
    for line, other in zip(log(several), log(one), strict=True):
        assert (line["processes"], other["processes"]) == (2, 1)
        assert line["epoch_losses"] == pytest.approx(other["epoch_losses"], rel=1e-3)
        assert line["error_before"] == pytest.approx(other["error_before"], rel=1e-3)


def test_gptq_from_the_command_line(model, calib, tmp_path, run):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("batch_size: 2\nsamples: 4\nseq_len: 24\nepochs: 2\n")
    words = ["quantize", model, "--recipe", recipe, "--rounding", "gptq", "--kv", "4"]
    words += ["--calib", calib, "--device", "cpu", "--out"]
    status, out, err = torchrun("-m", "vllm_flatquant.cli", *words, tmp_path / "several")
    assert status == 0, err
    assert out.count("2 processes") == 1 and out.count("block 1/2") == 1 and out.count("wrote") == 1
    assert not staging_folder(tmp_path / "several").exists()
    assert run(*words, tmp_path / "one")[0] == 0
    assert_close(tmp_path / "several", tmp_path / "one")
    assert run("inspect", tmp_path / "several", "--verify", "--backend", "reference")[0] == 0


def test_rtn_interrupted_and_gone_on_with(model, calib, tmp_path, run):
    """Interrupted after a block, refused to one process, and finished by two: as one process that was not."""
    out = tmp_path / "several"
    status, _, err = torchrun(Path(__file__), model, out, calib)
    assert status == 0, err
    assert finished_blocks(out) == 1
    status, _, err = run("quantize", "--out", out, "--resume")
    assert status == 1 and "it had 2 processes (torchrun --nproc-per-node) and now has 1" in err
    status, text, err = torchrun("-m", "vllm_flatquant.cli", "quantize", "--out", out, "--resume")
    assert status == 0, err
    assert "block 2/2" in text and "block 1/2" not in text
    quantize(model, tmp_path / "one", make_recipe(**SETTINGS), str(calib), "cpu")
    assert_close(out, tmp_path / "one")


def stop_after_a_block(model, out, calib):
    """What each process of the test above runs; torchrun sees no failure."""

    def stop(_):
        raise Stop

    expected = Stop if parallel.is_writer() else parallel.Stopped
    with pytest.raises(expected):
        quantize(model, out, make_recipe(**SETTINGS), calib, "cpu", callbacks=Callbacks(block=stop))


@pytest.fixture
def launched(monkeypatch):
    """As torchrun's environment is in one of ``count`` processes."""

    def environment(count, rank=0, local=None):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", count)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local or count))

    return environment


@pytest.mark.parametrize(
    ("count", "settings", "message"),
    [
        (3, {"batch_size": 4}, "batch_size=4 cannot be divided among 3 processes.*recipe file"),
        (2, {"samples": 7}, "samples=7 cannot be divided among 2 processes.*--samples"),
        (2, {"distill_epochs": 1}, "end to end .*in one process; start it without torchrun"),
        (2, {"rotation": "learned"}, "learning rotations runs in one process"),
    ],
)
def test_what_cannot_be_divided_is_refused(launched, model, calib, tmp_path, count, settings, message):
    launched(count)
    with pytest.raises(UserError, match=message):
        quantize(model, tmp_path / "out", make_recipe(**settings), str(calib), "cpu")
    assert not (tmp_path / "out").exists() and not staging_folder(tmp_path / "out").exists()


def test_several_machines_and_missing_gpus_are_refused(launched, monkeypatch):
    launched(4, local=2)
    with pytest.raises(UserError, match="several machines"):
        parallel.share(make_recipe())
    launched(4, rank=3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="4 processes and this machine has 2 usable GPUs"):
        parallel.own_device(torch.device("cuda"))


def test_dry_run_is_refused(launched, run, model, tmp_path):
    launched(2)
    status, _, err = run("quantize", model, "--out", tmp_path / "out", "--dry-run")
    assert status == 1 and "without torchrun" in err


def test_the_first_process_speaks_for_all(launched, run, monkeypatch, tmp_path):
    """What all find wrong is said by the first; who only saw another stop waits longest."""
    naps: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", naps.append)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # the command sends it nowhere in other processes
    words = ("quantize", tmp_path / "nowhere", "--out", tmp_path / "out", "--device", "cpu")
    launched(2)
    status, _, err = run(*words)
    assert (status, naps) == (1, []) and "does not exist" in err
    cli.leave_to_others(parallel.Stopped("another"))
    assert naps == [2 * cli.QUIET]
    launched(2, rank=1)
    status, said, _ = run(*words, "--preset", "quick")
    assert (status, said, naps) == (1, "", [2 * cli.QUIET, cli.QUIET])


def test_every_batch_is_divided(launched):
    rows = torch.arange(10)
    parts = []
    for rank in range(2):
        launched(2, rank)
        parts.append(parallel.own_rows(rows, 4).tolist())
    assert parts == [[0, 1, 4, 5, 8], [2, 3, 6, 7, 9]]
    launched(1)
    assert parallel.own_rows(rows, 4) is rows


if __name__ == "__main__":
    stop_after_a_block(*sys.argv[1:])
