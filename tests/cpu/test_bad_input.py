"""Bad input ends in one sentence that names the thing and the fix, status 1, and leaves nothing behind."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_model import edit_config, edit_weights, make_model

from vllm_flatquant.calibration.errors import UserError
from vllm_flatquant.calibration.quantize import quantize
from vllm_flatquant.calibration.recipe import make_recipe
from vllm_flatquant.calibration.source import load_config
from vllm_flatquant.files import check_servable, first_line

Q = "model.layers.0.self_attn.q_proj.weight"


def test_missing_folder(refuses, tmp_path):
    refuses("does not exist", str(tmp_path / "nope"), source=tmp_path / "nope")


def test_hub_name_that_cannot_be_downloaded(refuses, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refuses("no-one/no-such-model", "check the name", source="no-one/no-such-model")


def test_folder_is_a_file(refuses, calib):
    refuses("is a file; give a model's folder", source=calib)


def test_no_config(refuses, model):
    (model / "config.json").unlink()
    refuses("no config.json")


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_damaged_config(refuses, model, content):
    (model / "config.json").write_text(content)
    refuses("config.json", "download it again")


@pytest.mark.parametrize("model_type", ["mixtral", "gemma3", "gpt2", None, 3])
def test_unsupported_architecture(refuses, model, model_type):
    edit_config(model, model_type=model_type)
    refuses(f"'{model_type}'", "llama, mistral, qwen2, qwen3")


def test_nothing_is_announced_that_is_refused(run, model, calib, tmp_path):
    words = ("quantize", model, "--out", tmp_path / "out", "--calib", calib, "--device", "cpu")
    words = (*words, "--samples", 4, "--seq-len", 24, "--epochs", 0)
    status, out, err = run(*words)
    assert (status, out.count(f"quantizing {model} to w4a4, FlatQuant, RTN, on cpu; ")) == (0, 1), err
    edit_config(model, model_type="mixtral")
    status, out, err = run(*words, "--overwrite")
    assert (status, out) == (1, "") and "mixtral" in err


WITHOUT_TORCH = """
import sys
sys.modules.update(torch=None, transformers=None)  # importing them fails
from vllm_flatquant import cli
sys.argv = ["flatquant", "quantize", "M", "--out", "no/o", *sys.argv[1:]]
cli.main()
"""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--scheme", "w4a5"), "scheme='w4a5': unknown"),
        (("--recipe", "quaro-w4a4"), "did you mean quarot-w4a4"),
        (("--recipe", "bad.yaml", "--preset", "quick"), "epoch=5: a recipe has no such setting"),
        (("--preset", "slow"), "preset 'slow' is unknown"),
        (("--recipe", "flatquant-w4a8", "--rounding", "gptw", "--resume"), "rounding='gptw'"),
    ],
)
def test_names_are_checked_before_torch_is_imported(tmp_path, options, said):
    (tmp_path / "bad.yaml").write_text("epoch: 5\n")
    command = [sys.executable, "-c", WITHOUT_TORCH, *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("flatquant: ") and said in done.stderr
    assert done.stderr.count("\n") == 1


def test_already_quantized_model(refuses, model):
    edit_config(model, quantization_config={"quant_method": "gptq"})
    refuses("already quantized", "gptq", "original model")


def test_our_own_checkpoint_as_input(refuses, model, calib, tmp_path):
    recipe = make_recipe(samples=4, seq_len=24, epochs=0)
    refuses("already quantized", source=quantize(model, tmp_path / "q", recipe, str(calib), "cpu"))


def test_pickle_only_weights(refuses, model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refuses("pickle", "safetensors")


def test_no_weights(refuses, model):
    (model / "model.safetensors").unlink()
    refuses("no .safetensors weights")


@pytest.mark.parametrize("keep", [0, 5, 200, -10])
def test_truncated_weights(refuses, model, keep):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refuses("model.safetensors", "download it again")


def test_corrupt_header(refuses, model):
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:40] = b"x" * 32
    file.write_bytes(bytes(data))
    refuses("model.safetensors", "download it again")


def test_index_names_a_missing_shard(refuses, model):
    index = {"weight_map": {Q: "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses("lacks model-00001-of-00002.safetensors")


def test_index_points_outside(refuses, model):
    index = {"weight_map": {Q: "../elsewhere.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses("outside its folder")


@pytest.mark.parametrize("content", ["[]", "{", "{}"])
def test_damaged_index(refuses, model, content):
    (model / "model.safetensors.index.json").write_text(content)
    refuses("index.json", "download it again")


def test_missing_tensor(refuses, model):
    edit_weights(model, lambda t: t.pop(Q))
    refuses("lacks tensor", Q)


def test_extra_tensor(refuses, model):
    edit_weights(model, lambda t: t.update({"model.layers.0.adapter": torch.ones(2)}))
    refuses("unknown tensor model.layers.0.adapter")


def test_wrong_shape(refuses, model):
    edit_weights(model, lambda t: t.update({Q: torch.ones(3, 3, dtype=torch.bfloat16)}))
    refuses(Q, "[3, 3]", "[96, 48]")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", [Q, "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"]
)
def test_nan_in_weights(refuses, model, name, value):
    edit_weights(model, lambda t: t[name].view(-1).__setitem__(1, value))
    refuses(name, "NaN or inf")


def test_nan_in_activations(refuses, model):
    def overflow(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"] *= 1e30
        tensors["model.layers.1.mlp.down_proj.weight"] *= 1e30

    edit_weights(model, overflow)
    refuses("block 1", "NaN or inf", "kept for --resume: 1", leaves=[".out.partial"])


def test_token_ids_outside_the_vocabulary(refuses, calib):
    np.save(calib, np.full((4, 24), 96))
    refuses("96", "vocabulary")


@pytest.mark.parametrize("shape", [(3, 24), (4, 23), (95,), (0,)])
def test_too_few_calibration_tokens(refuses, calib, shape):
    np.save(calib, np.zeros(shape, dtype=np.int64))
    refuses("calib.npy", "lower --samples or --seq-len")


@pytest.mark.parametrize("array", [np.zeros((4, 24)), np.zeros((2, 2, 2), dtype=int), np.array(["a"])])
def test_calibration_file_of_something_else(refuses, calib, array):
    np.save(calib, array)
    refuses("token ids are integers")


def test_pickled_calibration_file(refuses, calib):
    np.save(calib, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    refuses("no .npy file of numbers")


def test_calibration_file_missing(refuses, tmp_path):
    refuses("does not exist", tokens=tmp_path / "nope.npy")


@pytest.mark.parametrize("name", ["data.csv", "data.parquet"])
def test_calibration_source_not_understood(refuses, tmp_path, model, name):
    give_tokenizer(model)
    refuses("not understood", tokens=tmp_path / name)


def give_tokenizer(model):
    """A byte-per-token tokenizer for the tiny model."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())[:96])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


@pytest.mark.parametrize("text", ["", "too short"])
def test_empty_or_short_text(refuses, model, tmp_path, text):
    give_tokenizer(model)
    file = tmp_path / "text.txt"
    file.write_text(text)
    refuses("text.txt", "tokens", "give more text", tokens=file)


def test_text_is_not_utf8(refuses, model, tmp_path):
    give_tokenizer(model)
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xff\xfe\x00")
    refuses("UTF-8", tokens=file)


@pytest.mark.parametrize("line", ["{", '{"body": "x"}', "[1]"])
def test_bad_jsonl_line(refuses, model, tmp_path, line):
    give_tokenizer(model)
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")
    refuses("line 2", "'text' field", tokens=file)


def test_no_tokenizer(refuses, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("def f(): pass\n" * 100)
    refuses("no usable tokenizer", "from one of: (1) a", "add its tokenizer files", tokens=file)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("", "ValueError"),
        ("damaged\nat line 3", "damaged"),
        ("one of: \n(1) this \n(2) that", "one of: (1) this (2) that"),
        ("x:\n" + "y" * 300, "x: " + "y" * 197 + "..."),
    ],
)
def test_what_an_error_says_in_a_sentence(message, said):
    assert first_line(ValueError(message)) == said


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--scheme", "w3a3"), "scheme='w3a3'"),
        (("--kv", 2), "kv=2"),
        (("--rounding", "up"), "rounding='up'"),
        (("--preset", "best"), "preset 'best'"),
        (("--device", "tpu"), "device 'tpu'"),
        (("--group-size", 16), "only with 16-bit activations"),
        (("--scheme", "w4a16", "--group-size", 32), "does not divide the input width 48"),
        (("--shards", 4), "use one of 1, 2"),
        (("--shards", 3), "shards=3"),
        (("--seq-len", 129), "beyond the model's context of 128"),
        (("--epochs", -1), "epochs=-1"),
    ],
)
def test_bad_option(refuses, options, part):
    refuses(part, options=options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu(refuses):
    refuses("no usable CUDA GPU", options=("--device", "cuda"))


@pytest.mark.parametrize("given", [None, [], "x"])
def test_quantization_config_of_a_strange_kind(model, calib, given):
    edit_config(model, quantization_config=given)
    recipe = make_recipe(samples=4, seq_len=24, epochs=0)
    if given is None:
        quantize(model, model.parent / "q", recipe, str(calib), "cpu")
    else:
        with pytest.raises(UserError, match="already quantized"):
            quantize(model, model.parent / "q", recipe, str(calib), "cpu")


def test_integer_weights(refuses, model):
    edit_weights(model, lambda t: t.update({Q: t[Q].to(torch.int8)}))
    refuses(Q, "is I8 but must be F16 or BF16 or F32")


@pytest.mark.parametrize(
    ("family", "changes", "part"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("qwen3", {"attention_bias": True}, "o_proj's bias"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
            "sliding windows in some layers",
        ),
    ],
)
def test_what_vllm_would_refuse_or_leave_out(refuses, tmp_path, family, changes, part):
    source = make_model(tmp_path / "other", family, **changes)
    refuses(part, "FlatQuant cannot serve it", source=source)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": 5}),
        ("qwen2", {}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    ],
)
def test_what_vllm_has(tmp_path, family, changes):
    check_servable(load_config(make_model(tmp_path / "other", family, **changes)))


def test_unusable_config_values(refuses, model):
    edit_config(model, hidden_act="foo")
    refuses("no usable model", "foo")
