"""`flatquant plot`: what is measured, what is drawn, and that the files are pictures with readable labels."""

import json
import shutil
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_model import make_model, random_tokens
from transformers import AutoModelForCausalLM

from vllm_flatquant.calibration.quantize import quantize
from vllm_flatquant.calibration.recipe import make_recipe
from vllm_flatquant.calibration.reference import load_reference
from vllm_flatquant.tools.flatness import measure_flatness
from vllm_flatquant.tools.plot import (
    AFTER,
    BEFORE,
    channel_figure,
    error_figure,
    loss_figure,
    peak_figure,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(checkpoint, original, token file)."""
    folder = tmp_path_factory.mktemp("made")
    np.save(folder / "calib.npy", random_tokens(4, 24).numpy())
    model = make_model(folder / "model")
    recipe = make_recipe(samples=4, seq_len=24, epochs=3)
    return (
        quantize(model, folder / "out", recipe, str(folder / "calib.npy"), "cpu"),
        model,
        folder / "calib.npy",
    )


def test_the_original_is_measured_as_the_library_runs_it(made):
    rows = random_tokens(3, 20)
    found = measure_flatness(load_reference(made[1]), rows)
    assert len(found) == 2 * 4
    model = AutoModelForCausalLM.from_pretrained(made[1], dtype=torch.float32)
    inputs = {}
    places = {
        "qkv": "self_attn.k_proj",
        "o": "self_attn.o_proj",
        "gate_up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
    for site, place in places.items():
        module = model.model.layers[1].get_submodule(place)
        module.register_forward_pre_hook(
            lambda _, x, site=site: inputs.update({site: x[0].flatten(0, 1)})
        )
    with torch.no_grad():
        model(rows)
    for site, x in inputs.items():
        torch.testing.assert_close(
            found[1, site].activation.float(), x.norm(dim=0), rtol=1e-3, atol=1e-4
        )
        peak = (x.abs().amax(1) / x.square().mean(1).sqrt()).mean().item()
        assert found[1, site].peak == pytest.approx(peak, rel=1e-3)
    weights = [model.model.layers[1].get_submodule(f"mlp.{n}_proj").weight for n in ("gate", "up")]
    torch.testing.assert_close(found[1, "gate_up"].weight.float(), torch.cat(weights).norm(dim=0))


def test_a_checkpoint_is_measured_behind_its_transforms(made):
    rows = random_tokens(3, 20)
    model = load_reference(made[0])
    found = measure_flatness(model, rows)
    inputs = []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda _, x: inputs.append(x[0].flatten(0, 1))
    )
    with torch.no_grad():
        model(rows)
    tensors = load_file(made[0] / "model.safetensors")
    left, right = (
        tensors[f"model.layers.0.mlp.down_transform.{s}"][0].double() for s in ("left", "right")
    )
    z = inputs[0].double() @ torch.kron(left, right)
    torch.testing.assert_close(found[0, "down"].activation, z.norm(dim=0), rtol=1e-3, atol=1e-4)
    scale = tensors["model.layers.0.mlp.down_proj.weight_scale"]
    packed = tensors["model.layers.0.mlp.down_proj.weight_packed"].int()
    codes = torch.stack([packed % 16, packed // 16], -1).flatten(1)
    weight = torch.where(codes > 7, codes - 16, codes) * scale
    torch.testing.assert_close(found[0, "down"].weight.float(), weight.norm(dim=0))


def test_lines_show_what_was_measured(made):
    rows = random_tokens(2, 20)
    before, after = (measure_flatness(load_reference(folder), rows) for folder in (made[1], made[0]))
    lines = channel_figure(before, after, 1, "x").axes[3].lines  # inputs of down
    for line, measured, colour in zip(lines, (before, after), (BEFORE, AFTER), strict=False):
        values = measured[1, "down"].activation
        wanted = values.sort(descending=True).values / values.square().mean().sqrt()
        assert line.get_ydata() == pytest.approx(wanted.numpy())
        assert line.get_color() == colour
    peaks = peak_figure(before, after, "x").axes[0].lines
    assert list(peaks[1].get_ydata()) == [after[i, "qkv"].peak for i in (0, 1)]
    log = [json.loads(line) for line in (made[0] / "calibration_log.jsonl").read_text().splitlines()]
    errors = error_figure(log, "x").axes[0].lines
    assert list(errors[0].get_ydata()) == [report["error_before"] for report in log]
    assert list(errors[1].get_ydata()) == [report["error_after"] for report in log]
    losses = loss_figure(log, "x").axes[0].lines
    first = log[0]["epoch_losses"]
    assert list(losses[0].get_ydata()) == [loss / first[0] for loss in first]
    many = [{**log[0], "block": i} for i in range(20)]
    assert len(loss_figure(many, "x").axes) == 2  # a colour bar instead of names


@pytest.mark.parametrize(("losses", "start"), [([], "at the start"), ([1.0], "before training")])
def test_where_nothing_was_trained_the_first_error_is_that_at_the_start(losses, start):
    log = [{"block": 0, "error_before": 2.0, "error_after": 1.0, "epoch_losses": losses}]
    legend = error_figure(log, "x").axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [start, "finished"]


def test_every_figure_is_a_png_and_an_svg_with_text(run, made, tmp_path):
    out = tmp_path / "plots"
    status, printed, err = run(
        *("plot", made[0], "--out", out, "--original", made[1], "--text", made[2], "--seq-len", 24)
    )
    assert status == 0, err
    names = {"errors", "flatness", "losses", "peaks"}
    assert {p.name for p in out.iterdir()} == {f"{n}.{kind}" for n in names for kind in ("png", "svg")}
    assert printed.count("wrote ") == 8
    for name in names:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    words = {n: " ".join(ET.parse(out / f"{n}.svg").getroot().itertext()) for n in names}
    assert "mean squared error" in words["errors"]
    assert "before training" in words["errors"]
    assert "epoch" in words["losses"]
    assert "block 1" in words["losses"]
    for label in ("original", "transformed", "channels, largest first", "W4A4, block 1"):
        assert label in words["flatness"]
    assert "max / RMS" in words["peaks"]


def test_what_cannot_be_drawn_is_said(run, made, tmp_path):
    copy = shutil.copytree(made[0], tmp_path / "copy")
    status, printed, _ = run("plot", copy)
    assert status == 0
    assert "flatness is not drawn" in printed
    assert "--original" in printed
    assert {p.name for p in (copy / "plots").iterdir()} == {
        f"{n}.{kind}" for n in ("errors", "losses") for kind in ("png", "svg")
    }
    (copy / "calibration_log.jsonl").unlink()
    options = ("--original", made[1], "--text", made[2], "--seq-len", 24, "--out", tmp_path / "new")
    status, printed, _ = run("plot", copy, *options)
    assert status == 0
    assert "no calibration_log.jsonl" in printed
    assert {p.stem for p in (tmp_path / "new").iterdir()} == {"flatness", "peaks"}


def test_bad_requests(run, made, tmp_path, monkeypatch):
    options = ("--original", made[1], "--text", made[2], "--seq-len", 24, "--out", tmp_path / "x")
    for change, part in (
        (("--block", 2), "blocks 0 to 1"),
        (("--original", tmp_path / "none"), "does not exist"),
        (("--original", made[0]), "is a FlatQuant checkpoint; give the unquantized model"),
    ):
        status, _, err = run("plot", made[0], *options, *change)
        assert (status, part in err) == (1, True), err
    status, _, err = run("plot", made[1])
    assert (status, "not quantized" in err) == (1, True)
    (tmp_path / "file").write_text("")
    status, _, err = run("plot", made[0], "--out", tmp_path / "file")
    assert (status, "choose another --out" in err) == (1, True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = run("plot", made[0])
    assert (status, "pip install 'vllm-flatquant[plot]'" in err) == (1, True)
