"""What is served, what is refused, and in which words."""

import json

import pytest
import torch
from torch import nn

from vllm_flatquant import _compat
from vllm_flatquant._compat import Deployment
from vllm_flatquant.config import FlatQuantConfig
from vllm_flatquant.errors import UnsupportedError
from vllm_flatquant.sites import SITES, factor_name, rename_rules, site_of
from vllm_flatquant.spec import SpecError

from .tiny_checkpoint import Recipe, checkpoint_tensors, random_model, write_checkpoint
from .vllm_model import engine_config, load_model

PLAIN = Deployment(1, 1, False, "auto", "auto")


def config(**recipe):
    """A FlatQuantConfig for a tiny checkpoint."""
    return FlatQuantConfig.from_config(Recipe(**recipe).quantization_config())


def options(**changes):
    """The plain deployment with some options changed."""
    return Deployment(**(vars(PLAIN) | changes))


def edit_config(folder, **changes):
    """Change config.json of a checkpoint; None removes a key."""
    path = folder / "config.json"
    edited = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in edited.items() if v is not None}), encoding="utf-8")


@pytest.mark.parametrize(
    "recipe, changes, match",
    [
        ({}, {"lora": True}, "does not serve LoRA adapters; start without --enable-lora"),
        ({}, {"pipeline_parallel": 2}, "does not serve --pipeline-parallel-size 2; use 1"),
        ({}, {"tensor_parallel": 2}, r"--shards 1 .* not 2; quantize it again with .*--shards 2"),
        ({"shards": 4}, {"tensor_parallel": 3}, "3 does not divide the 4 shards .*; use one of 1, 2, 4"),
        ({"shards": 2}, {"tensor_parallel": 4}, "use one of 1, 2, or quantize again with --shards 4"),
        ({"k_bits": 8}, {"kv_cache_dtype": "fp8"}, r"already quantizes \(K 8 bits, V 16 bits\)"),
        ({}, {"kv_cache_dtype": "int8_per_token_head"}, "wrong results on vLLM's CPU backend"),
    ],
)
def test_deployment_is_refused_with_the_fix(recipe, changes, match):
    with pytest.raises(UnsupportedError, match=match):
        config(**recipe).check_deployment(options(**changes))


@pytest.mark.parametrize(
    "recipe, changes",
    [
        ({}, {}),
        ({"shards": 4}, {"tensor_parallel": 2}),
        ({"shards": 4}, {"tensor_parallel": 4}),
        ({"k_bits": 4, "v_bits": 4}, {"kv_cache_dtype": "bfloat16"}),
        ({}, {"kv_cache_dtype": "fp8"}),
    ],
)
def test_deployment_is_accepted(recipe, changes):
    config(**recipe).check_deployment(options(**changes))


def test_other_caches_are_left_to_vllm_off_the_cpu(monkeypatch):
    monkeypatch.setattr(_compat, "is_cpu", lambda: False)
    config().check_deployment(options(kv_cache_dtype="int8_per_token_head"))
    with pytest.raises(UnsupportedError, match="a second time"):
        config(k_bits=4, v_bits=4).check_deployment(options(kv_cache_dtype="int8_per_token_head"))


def test_unquantized_model_with_the_flag_is_explained(tmp_path):
    write_checkpoint(tmp_path, Recipe())
    edit_config(tmp_path, quantization_config=None)
    with pytest.raises(
        UnsupportedError, match="config.json has no quantization_config; quantize it first"
    ):
        engine_config(tmp_path, quantization="flatquant")


@pytest.mark.parametrize(
    "change, match",
    [
        ({"format_version": None}, "has no format_version: another tool wrote it"),
        ({"format_version": 2}, "format_version is 2, .* upgrade vllm-flatquant"),
        ({"colour": "red"}, "quantization_config.colour: unknown key"),
        ({"activations": {"bits": 6}}, "quantization_config.activations.bits"),
        (
            {"weights": {"bits": 8}},
            "weights.bits=8 with activations.bits=4 has no kernel; use one of w4a4,",
        ),
        ({"weights": {"bits": 3, "layout": "int8"}}, "not that of 3-bit weights; it must be 'int3_low"),
    ],
)
@pytest.mark.parametrize("flag", [None, "flatquant"])
def test_bad_spec_is_explained_before_the_engine_starts(tmp_path, change, match, flag):
    write_checkpoint(tmp_path, Recipe())
    spec = {k: v for k, v in (Recipe().quantization_config() | change).items() if v is not None}
    edit_config(tmp_path, quantization_config=spec)
    with pytest.raises(SpecError, match=match):
        engine_config(tmp_path, quantization=flag)


@pytest.mark.parametrize("flag", [None, "flatquant"])
def test_checkpoint_is_detected_with_and_without_the_flag(tmp_path, flag):
    write_checkpoint(tmp_path, Recipe(bits=8, shards=2))
    found = engine_config(tmp_path, quantization=flag).quant_config
    assert isinstance(found, FlatQuantConfig)
    assert found.spec.scheme == "w4a8" and found.spec.shards == 2


def test_plain_model_takes_a_spec_by_override_for_dummy_weights(tmp_path):
    # How a benchmark selects the method without a checkpoint.
    write_checkpoint(tmp_path, Recipe())
    edit_config(tmp_path, quantization_config=None)
    overrides = {"quantization_config": Recipe(bits=8).quantization_config()}
    model = load_model(tmp_path, load_format="dummy", hf_overrides=overrides)
    assert model.model.layers[0].mlp.down_proj.weight_codes.dtype == torch.int8


def test_options_are_checked_before_the_engine_starts(tmp_path):
    write_checkpoint(tmp_path, Recipe())
    with pytest.raises(UnsupportedError, match="--tensor-parallel-size 1 only, not 2"):
        engine_config(tmp_path, tensor_parallel_size=2)
    with pytest.raises(UnsupportedError, match="LoRA"):
        engine_config(tmp_path, enable_lora=True)


def test_a_model_that_vllm_has_only_in_part_is_refused(tmp_path):
    """vLLM's Qwen3 would load everything but the bias of o_proj, and answer without it."""
    write_checkpoint(tmp_path, Recipe("Qwen3", config={"attention_bias": True}))
    with pytest.raises(UnsupportedError, match="leaves out o_proj's bias"):
        engine_config(tmp_path)


def test_command_line_gets_one_sentence(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, Recipe())
    monkeypatch.setattr("sys.argv", ["/usr/bin/vllm", "serve", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_info:
        engine_config(tmp_path, pipeline_parallel_size=2)
    assert str(exit_info.value).startswith(
        "vllm: error: FlatQuant does not serve --pipeline-parallel-size 2"
    )


def test_other_models_keep_vllms_errors(tmp_path):
    with pytest.raises(Exception, match="nowhere") as error:
        engine_config_of_nothing(tmp_path / "nowhere")
    assert not isinstance(error.value, (UnsupportedError, SpecError))


def engine_config_of_nothing(folder):
    """An engine configuration for a folder that does not exist."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(folder)).create_engine_config()


def test_mixture_of_experts_is_refused():
    RoutedExperts = type("RoutedExperts", (nn.Module,), {})
    method = config()
    method._announced = True
    with pytest.raises(UnsupportedError, match="mlp.experts is a mixture-of-experts layer"):
        method.get_quant_method(RoutedExperts(), "model.layers.0.mlp.experts")


def test_unknown_linear_layer_is_refused_unless_ignored():
    with pytest.raises(UnsupportedError, match="fc1 is a linear layer that FlatQuant does not quantize"):
        config()._linear_method("model.layers.0.mlp.fc1")
    ignoring = config(ignore=("lm_head", "model.layers.0.mlp.fc1"))
    with pytest.raises(UnsupportedError, match="fc2"):
        ignoring._linear_method("model.layers.0.mlp.fc2")
    assert type(ignoring._linear_method("model.layers.0.mlp.fc1")).__name__ == "UnquantizedLinearMethod"


def test_ignore_matches_whole_names_only():
    ignoring = config(ignore=("lm_head", "model.layers.1"))
    assert (
        type(ignoring._linear_method("model.layers.11.mlp.down_proj")).__name__
        == "FlatQuantLinearMethod"
    )
    assert (
        type(ignoring._linear_method("model.layers.1.mlp.down_proj")).__name__
        == "UnquantizedLinearMethod"
    )


def test_every_checkpoint_name_reaches_a_parameter_and_rules_are_idempotent():
    recipe = Recipe("Qwen2", k_bits=4, v_bits=4)
    names = [n for n in checkpoint_tensors(recipe, random_model(recipe)) if "_transform." in n]
    assert len(names) == 2 * 15
    rules = rename_rules()
    for name in names:
        for full in (name, name.removeprefix("model.")):
            once = rename(full, rules)
            assert "_transform." not in once and once != full
            assert rename(once, rules) == once


def rename(name, rules):
    """``name`` after every rule, as vLLM applies them."""
    for pattern, new in rules.items():
        name = pattern.sub(new, name)
    return name


def test_site_names():
    assert [site_of(f"model.layers.3.{site.module}") for site in SITES] == list(SITES)
    assert site_of("model.layers.3.mlp.shared_expert.down_proj") is None
    assert site_of("model.layers.3.cross_self_attn.o_proj") is None
    assert factor_name(SITES[1], "transform_left") == "o_transform.head"


def test_supported_dtypes():
    assert set(config().get_supported_act_dtypes()) == {torch.bfloat16, torch.float16, torch.float32}
