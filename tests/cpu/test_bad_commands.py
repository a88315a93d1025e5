"""Bad input to the commands beside quantize and eval: one sentence, a status that is not 0, nothing written."""

import json
import shutil

import foreign_folders
import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tiny_model import edit_config, make_model, random_tokens

from vllm_flatquant.calibration.quantize import quantize
from vllm_flatquant.calibration.recipe import make_recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, a checkpoint made from it, and files that are neither."""
    folder = tmp_path_factory.mktemp("place")
    make_model(folder / "model")
    np.save(folder / "calib.npy", random_tokens(4, 24).numpy())
    np.save(folder / "outside.npy", np.full((4, 24), 999))
    recipe = make_recipe(samples=4, seq_len=24, epochs=0)
    quantize(folder / "model", folder / "q", recipe, str(folder / "calib.npy"), "cpu")
    make_model(folder / "awq")
    edit_config(folder / "awq", quantization_config={"quant_method": "awq"})
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("keep")
    (folder / "file").write_text("no folder")
    (folder / "matrices.pth").write_bytes(b"no pickle")
    for name, text in {
        "broken": "[1, 2",
        "list": "- a\n- b\n",
        "key": "colour: red\n",
        "value": "scheme: w3a3\n",
        "type": "epochs: many\n",
        "empty": "",
        "binary": "\x00\x01",
    }.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture
def refused(run, place, monkeypatch):
    """Run a command inside ``place``; its one sentence, after checking that nothing was written."""
    monkeypatch.chdir(place)

    def call(*words, status=1):
        before = sorted(p.relative_to(place) for p in place.rglob("*"))
        found, out, err = run(*words)
        assert found == status, out + err
        lines = [line for line in err.splitlines() if line.startswith("flatquant: ")]
        assert len(lines) == 1, err
        assert "Traceback" not in err
        assert sorted(p.relative_to(place) for p in place.rglob("*")) == before
        return lines[0]

    return call


def check(message, parts):
    for part in parts:
        assert part in message, message


NOT_OURS = [
    ("nope", ("nope", "does not exist")),
    ("file", ("file is a file; give a model's folder",)),
    ("model/config.json", ("is a file; give its folder", "/model")),
    ("empty", ("no config.json",)),
    ("model", ("is not quantized",)),
    ("awq", ("another method ('awq')",)),
]


@pytest.mark.parametrize(("folder", "parts"), NOT_OURS)
@pytest.mark.parametrize("command", ["inspect", "plot"])
def test_folder_that_is_no_checkpoint(refused, command, folder, parts):
    check(refused(command, folder), parts)


@pytest.mark.parametrize(("folder", "parts"), [case for case in NOT_OURS if case[0] != "model"])
@pytest.mark.parametrize("first", [True, False])
def test_diff_of_what_is_no_checkpoint(refused, folder, parts, first):
    words = (folder, "q") if first else ("q", folder)
    check(refused("diff", *words, status=2), parts)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("nope",), ("nope does not exist",)),
        (("file",), ("file",)),
        (("empty",), ("not recognised", "RealQuant")),
        (("model",), ("not recognised",)),
        (("q",), ("checkpoint of flatquant already",)),
        (("matrices.pth",), ("--model ORIGINAL", "--scheme")),
        (
            ("matrices.pth", "--model", "model", "--scheme", "w4a4", "--kv", "16"),
            ("pickle", "not loaded"),
        ),
        (("matrices.pth", "--model", "nope", "--scheme", "w4a4", "--kv", "16"), ("pickle",)),
    ],
)
def test_convert(refused, words, parts):
    check(refused("convert", *words, "--out", "new"), parts)


@pytest.mark.parametrize(
    "cut", [lambda t: t[:, :1], lambda t: t[0], lambda t: t[:, :0], lambda t: t.float()]
)
def test_convert_weights_of_another_shape(refused, place, cut):
    if not (place / "ascend").exists():
        foreign_folders.ascend(place / "model", place / "ascend", ("down",))
    name = "model.layers.0.self_attn.q_proj.weight"
    file = place / "ascend" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, name: cut(tensors[name]).contiguous()}, file)
    check(refused("convert", "ascend", "--out", "new"), (name, "no 4-bit integers"))
    save_file(tensors, file)


@pytest.mark.parametrize("command", ["convert", "quantize"])
@pytest.mark.parametrize(
    ("out", "parts"),
    [
        ("full", ("not empty", "--overwrite")),
        ("file", ("is a file",)),
        ("model", ("model",)),
        (".", ("is or holds", "choose another folder")),
    ],
)
def test_out_that_is_taken(refused, command, out, parts):
    options = ("--overwrite",) if out == "." else ()
    check(refused(command, "model", "--out", out, *options), parts)


@pytest.mark.parametrize(
    ("recipe", "parts"),
    [
        ("no-such-recipe", ("no-such-recipe",)),
        ("nope.yaml", ("nope.yaml",)),
        ("broken.yaml", ("broken.yaml",)),
        ("list.yaml", ("list.yaml",)),
        ("key.yaml", ("key.yaml", "colour")),
        ("value.yaml", ("value.yaml", "w3a3")),
        ("type.yaml", ("type.yaml", "epochs")),
        ("binary.yaml", ("binary.yaml",)),
        ("empty", ("empty",)),
    ],
)
def test_recipe(refused, recipe, parts):
    check(refused("recipes", recipe), parts)
    check(refused("quantize", "model", "--out", "new", "--recipe", recipe), parts)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--block", "7"), ("block=7", "blocks 0 to 1")),
        (("--block", "-1"), ("block=-1",)),
        (("--text", "nope.npy"), ("nope.npy",)),
        (("--text", "outside.npy", "--samples", "4", "--seq-len", "24"), ("vocabulary",)),
        (("--text", "calib.npy", "--samples", "400"), ("calib.npy",)),
        (("--samples", "0"), ("samples",)),
        (("--seq-len", "0"), ("seq",)),
        (("--device", "tpu"), ("device 'tpu'",)),
        (("--original", "nope"), ("nope",)),
        (("--out", "file"), ("file",)),
    ],
)
def test_plot(refused, options, parts):
    pytest.importorskip("matplotlib")
    given = {"--text": "calib.npy", "--original": "model", "--samples": "4", "--seq-len": "24"}
    given |= dict(zip(options[::2], options[1::2], strict=True))
    check(refused("plot", "q", *[word for pair in given.items() for word in pair]), parts)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--dry-run", "--scheme", "w9a9"), ("scheme='w9a9'",)),
        (("--dry-run", "--calib", "nope.npy", "--seq-len", "24"), ("nope.npy", "does not exist")),
        (("--dry-run",), ("beyond the model's context of 128", "--seq-len 128")),
        (("--dry-run", "--calib", "outside.npy", "--samples", "4", "--seq-len", "24"), ("vocabulary",)),
        (("--dry-run", "--shards", "5"), ("shards=5",)),
        (("--dry-run", "--device", "tpu"), ("device 'tpu'",)),
        (("--resume",), ("there is no interrupted run to", "leave out --resume")),
    ],
)
def test_dry_run_and_resume(refused, options, parts):
    check(refused("quantize", "model", "--out", "new", *options), parts)


def test_dry_run_of_what_cannot_be_quantized(refused):
    check(refused("quantize", "awq", "--out", "new", "--dry-run"), ("already quantized", "awq"))
    check(refused("quantize", "nope", "--out", "new", "--dry-run"), ("does not exist",))


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("paint", "q"), "No such command"),
        (("inspect",), "Missing argument"),
        (("quantize", "model"), "--out"),
        (("quantize", "model", "--out", "new", "--samples", "many"), "--samples"),
        (("inspect", "q", "--colour", "red"), "No such option"),
        (("convert", "q"), "--out"),
        (("diff", "q"), "Missing argument"),
    ],
)
def test_command_line_itself(run, place, monkeypatch, words, part):
    monkeypatch.chdir(place)
    status, _, err = run(*words)
    assert status == 2
    assert part in err
    assert "Traceback" not in err


@pytest.mark.parametrize("card", ["---\n: [\n---\n", "\x00", ""])
def test_a_card_that_is_damaged_does_not_stop_diff(run, place, tmp_path, card):
    shutil.copytree(place / "q", tmp_path / "q")
    (tmp_path / "q" / "README.md").write_text(card)
    status, out, _ = run("diff", place / "q", tmp_path / "q", "--json")
    assert (status, json.loads(out.splitlines()[-1])["same"]) == (0, True)
