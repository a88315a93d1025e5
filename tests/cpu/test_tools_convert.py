"""`flatquant convert`: what another tool's folder defines, computed here from its tensors with dense matrices
in float64, is what the converted checkpoint computes. And the plugin tells whose folder it met."""

import json
import pickle

import foreign_folders as foreign
import pytest
import torch
from foreign_folders import GROUPS, HEADS, OFFICIAL
from safetensors.torch import load_file, save_file
from tiny_model import random_tokens

from vllm_flatquant.calibration.reference import ReferenceLinear, load_reference
from vllm_flatquant.spec import SpecError, parse_spec
from vllm_flatquant.tools.foreign_vllm import unpack_int32

from .vllm_model import engine_config

SITE_OF = {linear: site for site, linears in GROUPS.items() for linear in linears}


def converted(run, source, out, *options):
    """Convert; returns the folder, the command's output and every linear's (input, output) in a run."""
    status, printed, err = run("convert", source, "--out", out, *options)
    assert status == 0, err
    assert "ok" in run("inspect", out, "--verify", "--backend", "reference")[1]
    model = load_reference(out)
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, (ReferenceLinear, torch.nn.Linear)):
            module.register_forward_hook(lambda m, x, y, name=name: seen.update({name: (x[0], y)}))
    with torch.no_grad():
        model(random_tokens(2, 16))
    return out, printed, seen


def in_blocks(seen):
    """Name, site, prefix of the block, input and output of each linear but the head."""
    for name, (x, y) in seen.items():
        if name != "lm_head":
            block, linear = name.split(".", 3)[2:]
            yield name, SITE_OF[linear], f"model.layers.{block}.", x, y


def expected(x, matrix, weight, bias, clip):
    """``quantize(x @ matrix) @ weight.T + bias`` in float64; clip None: activations stay."""
    z = x.double().flatten(0, -2) @ matrix.double()
    if clip is not None:
        scale = z.abs().amax(-1, keepdim=True) * clip / 7
        z = (z / scale).round().clamp(-8, 7) * scale
    y = z @ weight.double().T
    return (y if bias is None else y + bias.double()).view(*x.shape[:-1], -1)


def agree(found, wanted):
    """Equal but for the few codes that float32 rounds to the other side."""
    off = (found.double() - wanted).abs().amax(-1) / wanted.abs().amax()
    assert (off > 1e-4).double().mean() < 0.02, off.max()


def codes_of(packed):
    low, high = (packed & 15).int(), (packed >> 4).int()
    both = torch.stack([low, high], -1).flatten(1)
    return torch.where(both > 7, both - 16, both)


def dense(site, left, right=None):
    """The transform of a site as one matrix."""
    right = torch.eye(96 // HEADS) if right is None else right
    return torch.kron(left.double(), right.double())


def test_realquant(run, model, tmp_path):
    source = foreign.realquant(model, tmp_path / "source")
    out, printed, seen = converted(
        run, tmp_path / "source", tmp_path / "out", "--scheme", "w4a4", "--kv", 4
    )
    ratios = {}
    for name, site, p, x, y in in_blocks(seen):
        trans = p + OFFICIAL[site]
        if site == "o":
            matrix = dense(site, source[f"{trans}.matrix"])
        else:
            matrix = dense(site, source[f"{trans}.matrix_left"], source[f"{trans}.matrix_right"])
        clips = [
            source[f"{p}{other}.act_quantizer.clip_factor_a_{end}"].double().sigmoid().item()
            for other in GROUPS[site]
            for end in ("max", "min")
        ]
        ratios[p + site] = clips
        weight = codes_of(source[f"{name}.linear.weight"]) * source[f"quantizer.{name}.linear.scale"]
        agree(y, expected(x, matrix, weight, None, max(clips)))
    assert len(seen) == 2 * 7 + 1
    spread = max(max(c) - min(c) for c in ratios.values())
    assert "8 of 8 sites had different activation clips" in printed
    assert f"by up to {spread:.3f}" in printed
    assert "RealQuant's own runtime stores but ignores them" in printed
    card = (out / "README.md").read_text()
    assert "8 of 8 sites" in card
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert config["quantization_config"]["transform_dtype"] == "float16"
    made = load_file(out / "model.safetensors")
    k = "model.layers.1.self_attn.k"
    assert torch.equal(made[f"{k}_transform.matrix"], source[f"{k}cache_trans.matrix"].float())
    assert torch.equal(made[f"{k}_transform.inverse_t"], source[f"{k}cache_trans.matrix_inv_t"].float())
    clip = [source[f"{k}_cache_quantizer.clip_factor_a_{e}"].sigmoid().item() for e in ("max", "min")]
    assert made[f"{k}_transform.clip"].tolist() == pytest.approx(clip, abs=1e-3)
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(made[norm], source[norm])  # the diagonal is in it already


def test_realquant_as_it_is_saved_has_no_config(run, model, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    foreign.realquant(model, source)
    options = ("--scheme", "w4a4", "--kv", 16)
    assert run("convert", source, "--out", tmp_path / "whole", *options)[0] == 0
    for file in source.iterdir():
        if file.name not in ("model.safetensors", "quantization_config.json"):
            file.unlink()
    refuse(run, source, out, "no config.json", "--model ORIGINAL", options=options)
    assert run("convert", source, "--out", out, "--model", model, *options)[0] == 0
    assert (out / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    assert "base_model: model\n" in (out / "README.md").read_text()


@pytest.mark.parametrize("repeated", [True, False])
def test_squeezebits(run, model, tmp_path, repeated):
    source = foreign.squeezebits(model, tmp_path / "source", repeated)
    out, printed, seen = converted(run, tmp_path / "source", tmp_path / "out")
    weights = {}
    for name, site, p, x, y in in_blocks(seen):
        module = p + ("self_attn." if site in ("qkv", "o") else "mlp.") + f"{site}_proj"
        right = source.get(f"{module}.flatquant_right")
        matrix = dense(site, source[f"{module}.flatquant_left"], right)
        packed = source[f"{name}.weight_packed"]
        codes = torch.stack([(packed.long() >> (4 * j)) % 16 for j in range(8)], -1).flatten(1) - 8
        scale = source[f"{name}.weight_scale"].double().repeat_interleave(8, 1)
        weights[name] = codes * scale
        agree(y, expected(x, matrix, weights[name], None, None))
    assert len(weights) == 2 * 7
    assert "approximated" not in printed
    spec = parse_spec(json.loads((out / "config.json").read_text())["quantization_config"])
    assert spec.scheme == "w4a16"
    assert spec.weights.group_size == (None if repeated else 8)


@pytest.mark.parametrize("o_right", ["identity", "matrix", "w8a8"])
def test_ascend(run, model, tmp_path, o_right):
    wide = ("o", "down") if o_right == "w8a8" else ("down",)
    source = foreign.ascend(model, tmp_path / "source", wide)
    if o_right == "identity":
        for i in range(2):
            source[f"model.layers.{i}.self_attn.o_proj.right_trans"] = torch.eye(16).bfloat16()
        save_file(source, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    out, printed, seen = converted(run, tmp_path / "source", tmp_path / "out")
    for name, _, _, x, y in in_blocks(seen):
        if f"{name}.left_trans" in source:
            matrix = dense("", source[f"{name}.left_trans"], source[f"{name}.right_trans"])
            kept = o_right == "identity" or "o_proj" not in name
            clip = source[f"{name}.clip_ratio"].item() if kept else None
            weight = source[f"{name}.weight"] * source[f"{name}.weight_scale"]
        else:
            matrix, clip, kept = torch.eye(x.shape[-1]), None, False
            weight = source[f"{name}.weight"].float() - source[f"{name}.weight_offset"]
            weight = weight * source[f"{name}.weight_scale"]
        wanted = expected(x, matrix, weight, None, clip)
        if kept:
            agree(y, wanted)
        else:  # a bf16 weight now
            assert (y - wanted).norm() < 5e-3 * wanted.norm()
    count = 2 if o_right == "identity" else 4
    assert f"{count} linear layers" in printed
    spec = parse_spec(json.loads((out / "config.json").read_text())["quantization_config"])
    assert len(spec.ignore) == 1 + count
    assert (spec.sites.o, spec.sites.down) == (6 if o_right == "identity" else None, None)


def test_finer_transforms_are_rounded_and_told(run, model, tmp_path):
    source = foreign.ascend(model, tmp_path / "source")
    name = "model.layers.0.self_attn.q_proj.left_trans"
    finer = source[name].float() * (1 + 2**-12)
    for part in ("q", "k", "v"):
        source[name.replace("q_proj", f"{part}_proj")] = finer.clone()
    save_file(source, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    out, printed, _ = converted(run, tmp_path / "source", tmp_path / "out")
    assert "transforms were finer than bfloat16 and rounded to it" in printed
    left = load_file(out / "model.safetensors")["model.layers.0.self_attn.qkv_transform.left"]
    assert torch.equal(left, left.bfloat16().float())
    assert "finer than bfloat16" in (out / "README.md").read_text()


def folded(source, block, i, linear):
    """The official reparameterization with dense float64 matrices: weight before rounding, and the input's
    transform with its diagonal. On-line factors are rounded to bf16, as ours are, and inverted after that."""
    site = SITE_OF[linear]
    trans = OFFICIAL[site]
    if site == "o":
        left, right = block[f"{trans}.matrix"].bfloat16(), block["self_attn.vcache_trans.matrix"]
    else:
        left, right = (block[f"{trans}.matrix_{s}"].bfloat16() for s in ("left", "right"))
    matrix = torch.kron(left.double(), right.double())
    weight = source[f"model.layers.{i}.{linear}.weight"].double()
    diag = block.get(f"{trans}.diag_scale")
    if diag is not None:
        diag = diag.double()
        norm = {"qkv": "input_layernorm", "gate_up": "post_attention_layernorm"}.get(site)
        if norm:  # the diagonal that the stored norm weight implies
            old = source[f"model.layers.{i}.{norm}.weight"].double()
            diag = (old * diag).bfloat16().double() / old
        weight = weight / diag
    weight = weight @ torch.linalg.inv(matrix).T
    if f"{linear}.clip_factor_w_max" in block:
        top, bottom = (block[f"{linear}.clip_factor_w_{e}"].double().sigmoid() for e in ("max", "min"))
        low, high = weight.amin(1, True) * bottom, weight.amax(1, True) * top
        weight = weight.clamp(low, high)
    if linear == "self_attn.v_proj":
        value = block["self_attn.vcache_trans.matrix"].double()
        weight = torch.block_diag(value, value).T @ weight
    if linear == "mlp.up_proj":
        weight = weight * block["mlp.down_trans.diag_scale"].double()[:, None]
    return weight


def test_flat_matrices(run, model, tmp_path):
    file = tmp_path / "flat_matrices.pth"
    blocks = foreign.flat_matrices(file)
    foreign.add_weight_clips(blocks, model, file)
    out, printed, _ = converted(
        run, file, tmp_path / "out", "--model", model, "--scheme", "w4a4", "--kv", 4
    )
    source, made = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    for i, block in blocks.items():
        for linear in SITE_OF:
            weight = folded(source, block, i, linear)
            scale = weight.abs().amax(1, keepdim=True) / 7
            name = f"model.layers.{i}.{linear}"
            torch.testing.assert_close(made[f"{name}.weight_scale"].double(), scale, rtol=1e-6, atol=0)
            wanted = (weight / scale).round().clamp(-8, 7)
            assert (codes_of(made[f"{name}.weight_packed"]) != wanted).double().mean() < 1e-3
        for site, trans in OFFICIAL.items():
            clips = [
                block[f"{linear}.act_quantizer.clip_factor_a_{end}"].sigmoid().item()
                for linear in GROUPS[site]
                for end in ("max", "min")
            ]
            owner = trans.partition(".")[0]
            found = made[f"model.layers.{i}.{owner}.{site}_transform.clip"]
            assert found.tolist() == pytest.approx([max(clips)])
    assert "8 of 8 sites" in printed


def test_flat_matrices_keep_the_function(run, model, tmp_path):
    """With 8-bit weights and 16-bit activations little is lost, if every fold and its inverse fit."""
    file = tmp_path / "flat_matrices.pth"
    foreign.flat_matrices(file, kv=False, equal_clips=True)
    out, printed, _ = converted(
        run, tmp_path, tmp_path / "out", "--model", model, "--scheme", "w8a16", "--kv", 16
    )
    assert "approximated" not in printed
    tokens = random_tokens(2, 16)
    with torch.no_grad():
        wanted, found = (load_reference(folder)(tokens).logits for folder in (model, out))
    assert (found - wanted).norm() < 0.05 * wanted.norm()  # a wrong fold gives 0.5 and more


def test_a_pickle_with_more_than_tensors_is_refused(run, model, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    file = tmp_path / "flat_matrices.pth"
    file.write_bytes(pickle.dumps({0: Evil()}, protocol=2))
    torch.save({0: Evil()}, tmp_path / "zip.pth")
    for source in (file, tmp_path / "zip.pth"):
        status, _, err = run(
            *("convert", source, "--out", tmp_path / "out", "--model", model, "--scheme", "w4a4"),
            *("--kv", 16),
        )
        assert (status, "pickle can run code" in err) == (1, True), err
        assert err.count("\n") == 1
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def refuse(run, source, out, *parts, options=()):
    status, _, err = run("convert", source, "--out", out, *options)
    assert status == 1
    assert err.startswith("flatquant: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err, err
    assert not out.exists()
    assert not [p for p in out.parent.iterdir() if p.name.startswith(".")]


def test_what_is_not_recorded_must_be_said(run, model, tmp_path):
    foreign.flat_matrices(tmp_path / "flat_matrices.pth")
    foreign.realquant(model, tmp_path / "real")
    out = tmp_path / "out"
    refuse(run, tmp_path / "flat_matrices.pth", out, "--model ORIGINAL --scheme w4a4")
    refuse(run, tmp_path / "real", out, "does not record", "--scheme")
    options = ("--scheme", "w5a5", "--kv", 4)
    refuse(run, tmp_path / "real", out, "'w5a5'", options=options)
    refuse(run, tmp_path / "real", out, "4 or 16", options=("--scheme", "w4a4", "--kv", 8))


def test_what_cannot_be_represented_is_refused(run, model, tmp_path):
    out, source = tmp_path / "out", tmp_path / "ascend"
    tensors = foreign.ascend(model, source)
    q = "model.layers.0.self_attn.q_proj"

    def change(name, value):
        save_file({**tensors, name: value}, source / "model.safetensors", metadata={"format": "pt"})

    change(f"{q}.left_trans", torch.eye(6).bfloat16())
    refuse(run, source, out, "different left_trans", "share their input")
    change(f"{q}.weight_offset", torch.ones(96, 1))
    refuse(run, source, out, f"{q} is asymmetric")
    change(f"{q}.weight", tensors[f"{q}.weight"] * 2)
    refuse(run, source, out, "no 4-bit integers")
    change("model.layers.0.input_layernorm.bias", torch.ones(48))
    refuse(run, source, out, "unknown tensor model.layers.0.input_layernorm.bias")
    file = source / "quant_model_description.json"
    types = json.loads(file.read_text())
    file.write_text(json.dumps({**types, f"{q}.weight": "W4A4_MXFP4_FLATQUANT"}))
    refuse(run, source, out, "W4A4_MXFP4_FLATQUANT", "can be converted")


@pytest.mark.parametrize(
    "where, key, value",
    [
        ("weights", "num_bits", 8),
        ("weights", "type", "float"),
        ("weights", "symmetric", False),
        ("weights", "actorder", "group"),
        ("group", "input_activations", {"num_bits": 8}),
        ("whole", "kv_cache_scheme", {"num_bits": 8}),
    ],
)
def test_squeezebits_with_other_weights_is_refused(run, model, tmp_path, where, key, value):
    """Codes of 8 bits would be read as twice as many of 4."""
    source = tmp_path / "source"
    foreign.squeezebits(model, source)
    file = source / "config.json"
    config = json.loads(file.read_text())
    whole = config["quantization_config"]
    group = whole["config_groups"]["group_0"]
    {"whole": whole, "group": group, "weights": group["weights"]}[where][key] = value
    file.write_text(json.dumps(config))
    refuse(run, source, tmp_path / "out", key, "quantize the original model")


@pytest.mark.parametrize("out", ["model", "."])
def test_the_original_is_never_overwritten(run, model, tmp_path, out):
    (tmp_path / "matrices").mkdir()
    foreign.flat_matrices(tmp_path / "matrices" / "flat_matrices.pth")
    before = (model / "model.safetensors").read_bytes()
    folder = model if out == "model" else model.parent
    status, _, err = run(
        *("convert", tmp_path / "matrices", "--out", folder, "--model", model, "--scheme", "w4a4"),
        *("--kv", 4, "--overwrite"),
    )
    assert status == 1 and "which is read" in err, err
    assert (model / "model.safetensors").read_bytes() == before


def test_damaged_and_unknown_sources(run, model, tmp_path, calib):
    out, real = tmp_path / "out", tmp_path / "real"
    options = ("--scheme", "w4a4", "--kv", 4)
    tensors = foreign.realquant(model, real)
    name = "model.layers.1.mlp.down_trans.matrix_left"
    save_file({n: t for n, t in tensors.items() if n != name}, real / "model.safetensors")
    refuse(run, real, out, f"lacks tensor {name}", options=options)
    scale = "quantizer.model.layers.0.mlp.up_proj.linear.scale"
    save_file({**tensors, scale: torch.ones(88, 6)}, real / "model.safetensors")
    refuse(run, real, out, "scales of groups", options=options)
    refuse(run, model, out, "not recognised", "RealQuant")
    refuse(run, tmp_path / "none", out, "none does not exist")
    (tmp_path / "notes.txt").write_text("no matrices")
    refuse(run, tmp_path / "notes.txt", out, "not recognised")
    blocks = foreign.flat_matrices(tmp_path / "flat_matrices.pth")
    torch.save({0: blocks[0]}, tmp_path / "flat_matrices.pth")
    refuse(run, tmp_path, out, "does not hold 2 blocks", options=(*options, "--model", model))


def test_the_plugin_says_whose_folder_it_met(model, tmp_path):
    foreign.squeezebits(model, tmp_path / "squeezebits")
    foreign.realquant(model, tmp_path / "real")
    for folder, name in (("squeezebits", "SqueezeBits"), ("real", "RealQuant")):
        config = json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]
        with pytest.raises(SpecError, match=rf"{name}.*flatquant convert FOLDER --out NEW"):
            parse_spec({"quant_method": "flatquant", **config})


def test_vllm_says_it_before_it_loads_anything(model, tmp_path):
    import vllm_flatquant

    vllm_flatquant.register()
    makers = {
        "SqueezeBits": foreign.squeezebits,
        "RealQuant": foreign.realquant,
        "ascend": foreign.ascend,
    }
    for name, make in makers.items():
        make(model, tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name}.*flatquant convert FOLDER --out NEW"):
            engine_config(tmp_path / name, max_model_len=64)
    assert engine_config(model, max_model_len=64).quant_config is None


def test_a_checkpoint_of_ours_is_not_converted(run, model, tmp_path):
    foreign.squeezebits(model, tmp_path / "source")
    out, _, _ = converted(run, tmp_path / "source", tmp_path / "out")
    refuse(run, out, tmp_path / "again", "already")


def test_int32_packing_is_that_of_compressed_tensors():
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(-8, 8, (5, 44), dtype=torch.int8)
    assert torch.equal(unpack_int32(helpers.pack_to_int32(codes, 4, packed_dim=1), 44), codes)
