"""Damaged checkpoints and bad requests to inspect and eval: one sentence, status 1."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import edit_config, edit_weights

from vllm_flatquant.calibration.quantize import quantize
from vllm_flatquant.calibration.recipe import make_recipe


@pytest.fixture
def checkpoint(model, calib, tmp_path):
    recipe = make_recipe(samples=4, seq_len=24, epochs=0, kv=4)
    return quantize(model, tmp_path / "q", recipe, str(calib), "cpu")


@pytest.fixture
def inspect_refuses(run, checkpoint):
    """Check that `flatquant inspect --verify` refuses the damaged checkpoint."""

    def check(*parts):
        status, _, err = run("inspect", checkpoint, "--verify", "--backend", "reference")
        assert status == 1
        assert len(err.strip().splitlines()) == 1
        assert err.startswith("flatquant: ")
        for part in parts:
            assert part in err

    return check


def edit_spec(checkpoint, change):
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda c: c.update(format_version=2), ("format_version is 2", "upgrade")),
        (lambda c: c.pop("format_version"), ("no format_version", "flatquant quantize")),
        (lambda c: c.update(surprise=1), ("surprise", "unknown key")),
        (lambda c: c["weights"].update(bits=5), ("weights.bits",)),
        (lambda c: c["weights"].update(bits=3), ("layout", "3-bit")),
        (lambda c: c["activations"].update(bits=5), ("activations.bits",)),
        (lambda c: c.pop("sites"), ("sites",)),
        (lambda c: c["kv"].update(symmetric=True), ("symmetric",)),
        (lambda c: c["sites"].update(k=None), ("sites.k",)),
        (lambda c: c.update(shards=0), ("shards",)),
    ],
)
def test_bad_spec(inspect_refuses, checkpoint, change, parts):
    edit_spec(checkpoint, change)
    inspect_refuses("config.json", *parts)


@pytest.mark.parametrize(
    "name",
    [
        "mlp.down_transform.left",
        "self_attn.qkv_transform.clip",
        "self_attn.o_transform.head",
        "self_attn.k_transform.inverse_t",
        "self_attn.v_transform.clip",
        "mlp.gate_proj.weight_scale",
        "self_attn.k_proj.weight_packed",
        "input_layernorm.weight",
    ],
)
def test_checkpoint_lacks_a_tensor(inspect_refuses, checkpoint, name):
    edit_weights(checkpoint, lambda t: t.pop(f"model.layers.1.{name}"))
    inspect_refuses("lacks tensor", f"model.layers.1.{name}")


def test_checkpoint_has_a_changed_weight(inspect_refuses, checkpoint):
    edit_weights(checkpoint, lambda t: t["model.layers.0.mlp.up_proj.weight_packed"].zero_())
    inspect_refuses("verify reference: FAILED")


def test_checkpoint_has_a_wrong_shape(inspect_refuses, checkpoint):
    edit_weights(
        checkpoint, lambda t: t.update({"model.layers.0.mlp.down_transform.left": torch.eye(3)[None]})
    )
    inspect_refuses("model.layers.0.mlp.down_transform.left", "[1, 3, 3]", "[1, 8, 8]")


def test_golden_missing_or_damaged(inspect_refuses, checkpoint):
    (checkpoint / "golden.safetensors").write_bytes(b"1234")
    inspect_refuses("golden.safetensors", "copy it again")
    (checkpoint / "golden.safetensors").unlink()
    inspect_refuses("no golden.safetensors")


def test_golden_of_nan_or_of_another_checkpoint(inspect_refuses, checkpoint):
    file = checkpoint / "golden.safetensors"
    golden = load_file(file)
    save_file({**golden, "top_logits": golden["top_logits"] * torch.nan}, file)
    inspect_refuses("verify reference: FAILED")
    save_file({**golden, "input_ids": golden["input_ids"] + 1000}, file)
    inspect_refuses("does not belong to this checkpoint")


def test_inspect_an_unquantized_model(run, model):
    status, _, err = run("inspect", model)
    assert status == 1
    assert "is not quantized" in err


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ((), "exactly one of"),
        (("--text", "nope.txt"), "does not exist"),
        (("--tokens", "nope.npy"), "does not exist"),
        (("--tokens", "CALIB", "--seq-len", 1000), "fewer than one window"),
        (("--tokens", "LONG", "--seq-len", 129), "beyond the model's context of 128"),
        (("--tokens", "CALIB", "--seq-len", 1), "seq_len=1"),
        (("--tokens", "CALIB", "--limit", 0), "limit=0"),
        (("--tokens", "CALIB", "--backend", "onnx"), "backend 'onnx'"),
        (("--tokens", "CALIB", "--dtype", "int8"), "dtype 'int8'"),
        (("--tokens", "OUTSIDE", "--seq-len", 8), "outside the model's vocabulary"),
    ],
)
def test_eval_refuses(run, model, calib, tmp_path, options, part):
    np.save(tmp_path / "outside.npy", np.full(16, 999))
    np.save(tmp_path / "long.npy", np.zeros(200, dtype=np.int64))
    paths = {"LONG": tmp_path / "long.npy", "CALIB": calib, "OUTSIDE": tmp_path / "outside.npy"}
    status, _, err = run("eval", model, *(paths.get(o, o) for o in options))
    assert status == 1
    assert part in err
    assert "Traceback" not in err


def test_eval_refuses_another_method(run, model, calib):
    edit_config(model, quantization_config={"quant_method": "awq"})
    status, _, err = run("eval", model, "--tokens", calib, "--seq-len", 8)
    assert status == 1
    assert "another method ('awq')" in err
