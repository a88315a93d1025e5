"""The pipeline on tiny models: every scheme gives a complete checkpoint that computes what it recorded."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_model import ARCHITECTURES, make_model, random_tokens

from vllm_flatquant.calibration import export
from vllm_flatquant.calibration.quantize import quantize
from vllm_flatquant.calibration.recipe import make_recipe
from vllm_flatquant.calibration.recipes import choose_recipe
from vllm_flatquant.calibration.reference import load_reference
from vllm_flatquant.spec import parse_spec
from vllm_flatquant.tools.inspection import inspect_folder, verify_folder
from vllm_flatquant.tools.progress import block_line, calibration, described

SMALL = {"samples": 4, "seq_len": 24, "epochs": 2, "batch_size": 2}


@pytest.fixture
def calib(tmp_path):
    file = tmp_path / "calib.npy"
    np.save(file, random_tokens(4, 24).numpy())
    return str(file)


def make(tmp_path, calib, model_type="llama", name="out", dtype=torch.bfloat16, sizes=None, **settings):
    model = make_model(tmp_path / f"m-{model_type}", model_type, dtype, **(sizes or {}))
    return model, quantize(model, tmp_path / name, make_recipe(**SMALL, **settings), calib, "cpu")


def error(model, out):
    """Relative error of the logits against the unquantized model; an unrelated function would give 1.4."""
    tokens = random_tokens(4, 24)
    with torch.no_grad():
        expected = load_reference(model)(tokens).logits
        return ((load_reference(out)(tokens).logits - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kv", [16, 8, 4])
@pytest.mark.parametrize("scheme", ["w4a4", "w4a8", "w4a16"])
def test_every_scheme(tmp_path, calib, scheme, kv):
    model, out = make(tmp_path, calib, scheme=scheme, kv=kv)
    spec = parse_spec(json.loads((out / "config.json").read_text())["quantization_config"])
    assert (spec.scheme, spec.kv.k_bits, spec.kv.v_bits) == (scheme, kv, kv)
    assert scheme in inspect_folder(str(out))
    assert "ok" in next(verify_folder(str(out), "reference"))
    assert error(model, out) < 0.7


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("rounding", ["rtn", "gptq", "qronos"])
def test_every_architecture(tmp_path, calib, model_type, rounding):
    model, out = make(tmp_path, calib, model_type, rounding=rounding, shards=2, kv=4)
    assert "ok" in next(verify_folder(str(out), "reference"))
    assert error(model, out) < 0.7
    log = [json.loads(line) for line in (out / "calibration_log.jsonl").read_text().splitlines()]
    assert [r["block"] for r in log] == [0, 1]
    assert all(len(r["epoch_losses"]) == SMALL["epochs"] and min(r["epoch_losses"]) > 0 for r in log)
    for report in log:
        sites = {"rtn": set()}.get(rounding, {"qkv", "o", "gate_up", "down"})
        assert set(report["rounding"]) == sites
        fraction = {"gptq": 0.01, "qronos": 1e-3}.get(rounding)
        assert all(r["damping"][0] == fraction and r["bound"] > 0 for r in report["rounding"].values())


@pytest.mark.parametrize("scheme", ["w4a4", "w4a8", "w4a16"])
def test_sites_without_a_transform(tmp_path, calib, scheme):
    settings = {"transforms": (), "diag": ("qkv", "gate_up"), "activation_clip": 0.9, "kv_clip": 0.95}
    model, out = make(tmp_path, calib, scheme=scheme, kv=4, shards=2, **settings)
    spec = parse_spec(json.loads((out / "config.json").read_text())["quantization_config"])
    assert (spec.sites.qkv, spec.sites.o, spec.sites.gate_up, spec.sites.down) == (None,) * 4
    tensors = load_file(out / "model.safetensors")
    clips = {} if scheme == "w4a16" else {"qkv": 1, "o": 2}
    for site in ("qkv", "o"):
        named = {n.rpartition(".")[2]: t for n, t in tensors.items() if f"0.self_attn.{site}_tr" in n}
        assert {n: t.tolist() for n, t in named.items()} == (
            {"clip": pytest.approx([0.9] * clips[site])} if clips else {}
        )
    assert tensors["model.layers.1.self_attn.v_transform.clip"].tolist() == pytest.approx([0.95] * 2)
    assert "k 16" in inspect_folder(str(out))
    assert "ok" in next(verify_folder(str(out), "reference"))
    assert error(model, out) < 0.7


def test_fp16_and_fp32_models_keep_their_dtype(tmp_path, calib):
    for dtype in (torch.float16, torch.float32):
        _, out = make(tmp_path, calib, name=str(dtype), dtype=dtype)
        tensors = load_file(out / "model.safetensors")
        assert tensors["model.norm.weight"].dtype == dtype
        assert tensors["model.layers.0.input_layernorm.weight"].dtype == dtype
        assert "ok" in next(verify_folder(str(out), "reference"))


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_weights_of_another_dtype_than_the_config_says(tmp_path, calib, stored):
    model = make_model(tmp_path / "m", dtype=stored)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    out = quantize(model, tmp_path / "out", make_recipe(**SMALL), calib, "cpu")
    assert "difference 0.0000" in next(verify_folder(str(out), "reference"))
    out = quantize(model, tmp_path / "16", make_recipe(**SMALL, scheme="w4a16"), calib, "cpu")
    scales = [t for n, t in load_file(out / "model.safetensors").items() if n.endswith("weight_scale")]
    assert all(torch.equal(s, s.bfloat16().float()) for s in scales)  # the dtype that will be served


def test_tied_embeddings_with_a_stored_lm_head(tmp_path, calib):
    model = make_model(tmp_path / "m", tie_word_embeddings=True)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    out = quantize(model, tmp_path / "out", make_recipe(**SMALL), calib, "cpu")
    inspect_folder(str(out))
    assert "ok" in next(verify_folder(str(out), "reference"))


def test_the_card_and_recipe_name_no_path(tmp_path, calib):
    model = make_model(tmp_path / "secret" / "m")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "_name_or_path": "/home/me/model"}))
    out = quantize(model, tmp_path / "out", make_recipe(**SMALL), calib, "cpu")
    for name in ("README.md", "config.json", "recipe.yaml"):
        text = (out / name).read_text()
        assert "/home/me" not in text
        assert "secret" not in text
    assert yaml.safe_load((out / "recipe.yaml").read_text())["calib"] == "calib.npy"
    assert "base_model: m\n" in (out / "README.md").read_text()


def test_files_may_be_read_by_whom_the_umask_allows(tmp_path, calib):
    before = os.umask(0o022)
    try:
        _, out = make(tmp_path, calib)
    finally:
        os.umask(before)
    assert {file.name: file.stat().st_mode & 0o777 for file in out.iterdir()} == {
        file.name: 0o644 for file in out.iterdir()
    }


def test_factors_are_bf16_values_and_w4a16_scales_too(tmp_path, calib):
    _, out = make(tmp_path, calib, scheme="w4a16", sizes={"intermediate_size": 96}, group_size=16)
    tensors = load_file(out / "model.safetensors")
    checked = 0
    for name, tensor in tensors.items():
        if "transform" in name or name.endswith("weight_scale"):
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, tensor.bfloat16().float()), name
            checked += 1
    assert checked == 2 * (7 + 7)
    assert tensors["model.layers.0.mlp.down_proj.weight_scale"].shape == (48, 6)


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path, calib):
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        _, out = make(tmp_path, calib, name=name, seed=seed, rounding="gptq")
        files.append(
            [(out / f).read_bytes() for f in ("model.safetensors", "config.json", "golden.safetensors")]
        )
    assert files[0] == files[1]
    assert files[0][0] != files[2][0]


def test_shards_split_into_files(tmp_path, calib, monkeypatch):
    monkeypatch.setattr(export, "SHARD_BYTES", 20_000)
    _, out = make(tmp_path, calib)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert all((out / f).exists() for f in index["weight_map"].values())
    assert "ok" in next(verify_folder(str(out), "reference"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_zero_rows_duplicated_channels_and_outliers(tmp_path, calib, dtype):
    model = make_model(tmp_path / "m", dtype=dtype)
    tensors = load_file(model / "model.safetensors")
    with torch.no_grad():
        layer = "model.layers.0."
        tensors[layer + "self_attn.q_proj.weight"][3] = 0
        tensors[layer + "mlp.down_proj.weight"].zero_()
        tensors[layer + "mlp.up_proj.weight"][5] = tensors[layer + "mlp.up_proj.weight"][4]
        tensors["model.layers.1.mlp.up_proj.weight"][7] *= (
            2**13
        )  # an outlier channel: exact but for subnormals
        tensors["model.layers.1.mlp.down_proj.weight"][:, 7] /= 2**13
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    methods = {
        "rtn": {},
        "gptq": {"rounding": "gptq", "column_order": "norm"},
        "column": {"rounding": "gptq", "damping_rule": "column"},
        "qronos": {"rounding": "qronos", "column_order": "norm"},
        "magr": {"rounding": "gptq", "magr_alpha": 1e-3, "scheme": "w4a16", "weight_scale": "search"},
    }
    for name, settings in methods.items():
        out = quantize(model, tmp_path / name, make_recipe(**SMALL, **settings), calib, "cpu")
        found = load_file(out / "model.safetensors")
        assert all(torch.isfinite(t.float()).all() for t in found.values())
        assert error(model, out) < 1


@pytest.mark.parametrize(("losses", "words"), [([1.0], "untrained"), ([], "at the start")])
@pytest.mark.parametrize(("after", "said"), [(0.9, False), (2.0, True), (float("nan"), True)])
def test_a_block_that_got_worse_is_said(after, said, losses, words):
    report = SimpleNamespace(
        block=0,
        blocks=2,
        error_before=1.0,
        error_after=after,
        epoch_losses=losses,
        seconds=1.0,
        peak_memory_gb=1.0,
        skipped_steps=0,
    )
    assert (f"worse than {words}" in block_line(report)) == said
    assert f"mean squared error of its output 1.00e+00 -> {after:.2e}" in block_line(report)


def test_the_first_line_says_what_is_made():
    plain = make_recipe(epochs=0, rounding="gptq", samples=2, seq_len=8)
    assert described(plain) == "w4a4, FlatQuant, GPTQ"
    assert calibration(plain, "x.txt") == "calibrating on 2 x 8 tokens of x.txt"
    all_of_it = make_recipe(scheme="w4a16", kv=8, lm_head=8, group_size=128, distill_epochs=3)
    assert described(all_of_it) == (
        "w4a16 with a scale for every 128 weights, an 8-bit KV cache, an 8-bit output head, FlatQuant, RTN"
    )
    assert calibration(all_of_it, "y").endswith(
        "2048 tokens of y, 15 epochs for each block, 3 epochs end to end"
    )
    assert described(choose_recipe("gptq-w4a16").recipe) == "w4a16, GPTQ"
    one = make_recipe(epochs=1, distill_epochs=1)
    assert calibration(one, "y").endswith("of y, 1 epoch for each block, 1 epoch end to end")


def test_what_a_log_file_gets(run, model, tmp_path, calib):
    """Without a progress bar: what the lines are, in their order."""
    recipe = make_recipe(**SMALL | {"epochs": 1}, distill_epochs=3, distill_generated=0)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(calib))
    words = ("--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "out", "--device", "cpu")
    said = run("quantize", model, *words)[1].splitlines()
    first, check, *blocks, distill, judged, last = said
    assert "1 epoch for each block, 3 epochs end to end" in first
    assert check == "checking weights" and distill.startswith("note: end-to-end stage: 3 epochs;")
    assert [line.split("  ")[0] for line in blocks] == ["block 1/2", "block 2/2"]
    assert judged.startswith(
        "note: end-to-end stage: KL divergence from the unquantized model on held-out"
    )
    assert last.startswith("wrote ")
