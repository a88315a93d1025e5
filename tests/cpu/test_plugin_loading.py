"""The strict loader: each damaged checkpoint is refused with a sentence that names the tensor."""

import dataclasses
import gc
import json

import pytest
import torch
from safetensors.torch import save_file

from vllm_flatquant.config import FlatQuantConfig
from vllm_flatquant.errors import CheckpointError, UnsupportedError

from .tiny_checkpoint import _MADE, Recipe, write_checkpoint
from .vllm_model import engine_config, load_model

QUANTIZED = Recipe("Qwen2", k_bits=4, v_bits=4, shards=2)
ATTENTION, MLP = "model.layers.1.self_attn", "model.layers.1.mlp"
NAMES = [
    f"{ATTENTION}.q_proj.weight_packed",
    f"{ATTENTION}.v_proj.weight_scale",
    f"{ATTENTION}.k_proj.bias",
    f"{ATTENTION}.o_proj.weight_packed",
    f"{ATTENTION}.qkv_transform.left",
    f"{ATTENTION}.qkv_transform.clip",
    f"{ATTENTION}.o_transform.head",
    f"{ATTENTION}.o_transform.clip",
    f"{ATTENTION}.k_transform.matrix",
    f"{ATTENTION}.k_transform.inverse_t",
    f"{ATTENTION}.k_transform.clip",
    f"{ATTENTION}.v_transform.clip",
    f"{MLP}.up_proj.weight_packed",
    f"{MLP}.gate_proj.weight_scale",
    f"{MLP}.gate_up_transform.right",
    f"{MLP}.down_transform.left",
    f"{MLP}.down_transform.right",
    f"{MLP}.down_proj.weight_scale",
]


@pytest.fixture
def no_check_of_files(monkeypatch):
    """Leave everything to the loader, as for a model that is not a local folder."""
    monkeypatch.setattr(FlatQuantConfig, "check_files", lambda *_: None)


@pytest.mark.parametrize("name", NAMES)
def test_loader_names_missing_tensor(tmp_path, name, no_check_of_files):
    write_checkpoint(tmp_path, QUANTIZED, **{name: None})
    with pytest.raises(CheckpointError, match=f"the checkpoint lacks {name};"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_missing_tensor_is_named_before_the_engine_starts(tmp_path, name):
    write_checkpoint(tmp_path, QUANTIZED, **{name: None})
    with pytest.raises(CheckpointError, match=f"{tmp_path} lacks tensor {name}; download it again"):
        engine_config(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in NAMES if not name.endswith("packed")),
        "model.layers.1.post_attention_layernorm.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
    ],
)
def test_damaged_tensor_is_named_before_the_engine_starts(tmp_path, name):
    tensor = write_checkpoint(tmp_path, QUANTIZED)[name]
    write_checkpoint(tmp_path, QUANTIZED, **{name: torch.cat([tensor, tensor])})
    with pytest.raises(CheckpointError, match=f"{name} has shape .* but config.json says"):
        engine_config(tmp_path)
    write_checkpoint(tmp_path, QUANTIZED, **{name: tensor / 0})
    with pytest.raises(CheckpointError, match=f"{name} contains NaN or inf; download it again"):
        engine_config(tmp_path)


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith(("weight_scale", ".clip"))])
def test_scale_that_is_not_positive_is_named_before_the_engine_starts(tmp_path, name):
    tensor = write_checkpoint(tmp_path, QUANTIZED)[name]
    tensor.view(-1)[0] = 0
    write_checkpoint(tmp_path, QUANTIZED, **{name: tensor})
    with pytest.raises(CheckpointError, match=f"{name} contains a value that is not positive"):
        engine_config(tmp_path)


@pytest.mark.parametrize("listed", [[], 3, {"a": "../elsewhere.safetensors"}])
def test_damaged_index_is_named_before_the_engine_starts(tmp_path, listed):
    write_checkpoint(tmp_path, QUANTIZED)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(CheckpointError, match=r"index.json (is damaged|.* points outside its folder)"):
        engine_config(tmp_path)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("packed")])
def test_misshapen_weight_is_named_before_the_engine_starts(tmp_path, name):
    tensor = write_checkpoint(tmp_path, QUANTIZED)[name]
    write_checkpoint(tmp_path, QUANTIZED, **{name: tensor[:-1].contiguous()})
    with pytest.raises(CheckpointError, match=f"{name} has shape .* but config.json says"):
        engine_config(tmp_path)


def test_damaged_files_are_named_before_the_engine_starts(tmp_path):
    write_checkpoint(tmp_path, QUANTIZED)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:100], b""):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="model.safetensors cannot be read"):
            engine_config(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match="has no safetensors files"):
        engine_config(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"model.norm.weight": "model-1.safetensors"}}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="lacks model-1.safetensors, which its index lists"):
        engine_config(tmp_path)
    index.write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="index.json is damaged"):
        engine_config(tmp_path)


def test_files_outside_the_index_are_not_weights(tmp_path):
    # golden.safetensors, for one; vLLM would load it as well if there were no index.
    tensors = write_checkpoint(tmp_path, QUANTIZED)
    save_file({"input_ids": torch.arange(4)}, tmp_path / "golden.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    layer = load_model(tmp_path).model.layers[0].mlp.down_proj
    assert torch.equal(layer.transform_clip, tensors["model.layers.0.mlp.down_transform.clip"])


def test_all_missing_tensors_of_a_layer_are_named(tmp_path, no_check_of_files):
    names = [f"{MLP}.down_transform.left", f"{MLP}.down_transform.clip"]
    write_checkpoint(tmp_path, QUANTIZED, **dict.fromkeys(names))
    with pytest.raises(CheckpointError, match=f"{names[0]}, {names[1]}"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["model.layers.0.input_layernorm.weight", "model.norm.weight"])
def test_missing_norm_weight_is_named(tmp_path, name):
    write_checkpoint(tmp_path, QUANTIZED, **{name: None})
    with pytest.raises(ValueError, match=name):
        load_model(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_shape_mismatch_is_named(tmp_path, name, no_check_of_files):
    tensor = write_checkpoint(tmp_path, QUANTIZED)[name]
    write_checkpoint(tmp_path, QUANTIZED, **{name: torch.cat([tensor, tensor])})
    with pytest.raises(CheckpointError, match=f"{name} has shape .* but the model needs"):
        load_model(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("packed")])
def test_values_that_are_not_finite_are_named(tmp_path, name, value, no_check_of_files):
    tensor = write_checkpoint(tmp_path, QUANTIZED)[name]
    tensor.view(-1)[-1] = value
    write_checkpoint(tmp_path, QUANTIZED, **{name: tensor})
    with pytest.raises(CheckpointError, match=f"{name} contains NaN or inf"):
        load_model(tmp_path)


def test_wrong_dtype_is_named(tmp_path, no_check_of_files):
    name = f"{MLP}.up_proj.weight_packed"
    tensor = write_checkpoint(tmp_path, QUANTIZED)[name]
    write_checkpoint(tmp_path, QUANTIZED, **{name: tensor.to(torch.int32)})
    with pytest.raises(CheckpointError, match=rf"{name} is torch.int32 but must be torch.uint8"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "name, dtype, message",
    [
        (f"{MLP}.up_proj.weight_packed", torch.int32, "is I32 but must be U8"),
        (f"{MLP}.up_proj.weight_scale", torch.bfloat16, "is BF16 but must be F32"),
        (f"{MLP}.down_transform.clip", torch.float64, "is F64 but must be F32"),
        (f"{ATTENTION}.q_proj.bias", torch.int8, "is I8 but must be F16 or BF16 or F32"),
        ("model.norm.weight", torch.float8_e4m3fn, "is F8_E4M3 but must be F16 or BF16 or F32"),
    ],
)
def test_wrong_dtype_is_named_before_the_engine_starts(tmp_path, name, dtype, message):
    tensor = write_checkpoint(tmp_path, QUANTIZED)[name]
    write_checkpoint(tmp_path, QUANTIZED, **{name: tensor.to(dtype)})
    with pytest.raises(CheckpointError, match=f"{name} {message}"):
        engine_config(tmp_path)


UNKNOWN = [f"{ATTENTION}.qkv_transform.middle", f"{ATTENTION}.k_scale", f"{MLP}.up_proj.bias", "a"]


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_tensor_is_named_before_the_engine_starts(tmp_path, name):
    write_checkpoint(tmp_path, QUANTIZED, **{name: torch.zeros(1)})
    with pytest.raises(CheckpointError, match=f"{tmp_path} has unknown tensor {name};"):
        engine_config(tmp_path)


@pytest.mark.parametrize("name", [n for n in UNKNOWN if not n.endswith("bias")])  # vLLM drops those
def test_unknown_tensor_is_refused_by_the_loader(tmp_path, name, no_check_of_files):
    write_checkpoint(tmp_path, QUANTIZED, **{name: torch.zeros(1)})
    with pytest.raises(ValueError, match="There is no module or parameter named"):
        load_model(tmp_path)


def test_harmless_tensors_are_accepted(tmp_path):
    tables = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    write_checkpoint(tmp_path, QUANTIZED, **tables)
    engine_config(tmp_path)


def test_transform_of_an_unquantized_cache_is_refused(tmp_path, no_check_of_files):
    write_checkpoint(tmp_path, Recipe(), **{f"{ATTENTION}.v_transform.clip": torch.ones(1)})
    with pytest.raises(ValueError, match="There is no module or parameter named"):
        load_model(tmp_path)


def test_partly_ignored_fused_layer_is_refused(tmp_path):
    write_checkpoint(tmp_path, Recipe(ignore=("lm_head", "model.layers.0.self_attn.k_proj")))
    with pytest.raises(
        UnsupportedError, match="ignore lists k_proj but not all of q_proj, k_proj, v_proj"
    ):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "changes, match",
    [
        (
            {"intermediate_size": 160},
            "down_proj has 160 inputs, which quantization_config .* does not fit",
        ),
        ({"hidden_size": 64}, "qkv_proj has 64 inputs, which quantization_config .* does not fit"),
        ({"head_dim": 64}, "head_dim 64 but quantization_config.sites.k is 32"),
        ({"num_attention_heads": 2}, "o_proj.weight_packed has shape .* but the model needs"),
    ],
)
def test_config_that_does_not_fit_its_spec_is_refused(tmp_path, changes, match, no_check_of_files):
    write_checkpoint(tmp_path, Recipe(k_bits=8, v_bits=8))
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    with pytest.raises((CheckpointError, UnsupportedError), match=match):
        load_model(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dummy_weights_are_random_codes_and_orthogonal_transforms(tmp_path, dtype):
    write_checkpoint(tmp_path, dataclasses.replace(QUANTIZED, dtype=dtype))
    (tmp_path / "model.safetensors").unlink()
    block = load_model(tmp_path, load_format="dummy").model.layers[0]
    down, attention = block.mlp.down_proj, block.self_attn.attn
    assert down.weight_codes.unique().tolist() == list(range(-8, 8))
    assert (down.weight_scale > 0).all() and (down.transform_clip == 1).all()
    assert (attention.v_transform_clip == 1).all()
    for matrices in (down.transform_left, down.transform_right, attention.k_transform_matrix[None]):
        product = matrices @ matrices.mT
        torch.testing.assert_close(
            product, torch.eye(product.shape[-1]).expand_as(product), rtol=0, atol=0.02
        )
    torch.testing.assert_close(attention.k_transform_inverse_t, attention.k_transform_matrix)
    out = down(torch.randn(4, 192, dtype=dtype))[0]
    assert torch.isfinite(out).all() and out.abs().max() > 0


@pytest.mark.parametrize("bits", [8, 16])
def test_nothing_holds_on_to_the_checkpoints_layout(tmp_path, bits):
    write_checkpoint(tmp_path, Recipe(bits=bits))
    _MADE.clear()  # the checkpoint's own tensors
    before = live_tensors()  # of other tests
    model = load_model(tmp_path)
    tensors = [tensor for tensor in live_tensors() if all(tensor is not old for old in before)]
    assert any(tensor is model.model.norm.weight for tensor in tensors)
    assert [list(tensor.shape) for tensor in tensors if tensor.dtype == torch.uint8] == []


def live_tensors():
    """Every tensor that something in this process still holds."""
    gc.collect()
    return [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
