"""The 8-bit lm_head: made, measured, stored, and served as it was made."""

import json
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import SIZES, make_model, random_tokens

from vllm_flatquant import config, lm_head
from vllm_flatquant.calibration.head import PACKED, SCALE, head_cost, quantize_head
from vllm_flatquant.calibration.quantize import quantize
from vllm_flatquant.calibration.recipe import make_recipe
from vllm_flatquant.calibration.reference import load_reference
from vllm_flatquant.choice import Choice
from vllm_flatquant.errors import CheckpointError
from vllm_flatquant.kernels.w8_linear import TOKEN_BLOCKS, _dequantized, w8_linear_ref
from vllm_flatquant.spec import SpecError, parse_spec
from vllm_flatquant.startup import StartUp
from vllm_flatquant.tools.inspection import verify_folder

from .vllm_model import load_model, start_single_process

QUICK = ("--samples", 4, "--seq-len", 24, "--epochs", 1, "--device", "cpu")


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(params=[False, True], ids=["own head", "tied"])
def checkpoint(request, tmp_path, calib, run):
    """(the source, the checkpoint, what the command printed)."""
    model = make_model(tmp_path / "model", vocab_size=100, tie_word_embeddings=request.param)
    out = tmp_path / "out"
    code, printed, said = run(
        "quantize", model, "--out", out, "--calib", calib, "--lm-head-bits", 8, *QUICK
    )
    assert code == 0, said
    return model, out, printed


def test_checkpoint_has_the_rounded_head_and_the_whole_embedding(checkpoint):
    model, out, printed = checkpoint
    before, after = tensors_of(model), tensors_of(out)
    weight = before.get("lm_head.weight", before["model.embed_tokens.weight"])
    assert "lm_head.weight" not in after
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert after[PACKED].dtype == torch.int8 and after[PACKED].shape == weight.shape
    restored = after[PACKED] * after[SCALE]
    assert ((restored - weight.float()).abs() <= 0.5001 * after[SCALE]).all()
    stored = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert stored["tie_word_embeddings"] is False
    assert parse_spec(stored["quantization_config"]).lm_head_bits == 8
    assert "ok" in next(verify_folder(str(out), "reference"))
    # The command prints the cost, the log keeps it.
    report = json.loads((out / "calibration_log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert f"loss {report['loss_16']:.5f} -> {report['loss_8']:.5f}" in printed
    assert ("the head was tied to the embedding" in printed) == ("lm_head.weight" not in before)
    assert 0 < report["divergence"] < 1e-3


def test_cost_is_that_of_the_two_heads():
    weight, hidden = torch.randn(50, 16), torch.randn(3, 40, 16)
    tokens = torch.randint(50, (3, 40))
    head = quantize_head(weight)
    report = head_cost(weight, head, hidden, tokens)
    wide = (hidden[:, :-1] @ weight.T).log_softmax(-1)
    narrow = (hidden[:, :-1] @ (head[PACKED] * head[SCALE]).T).log_softmax(-1)
    targets = tokens[:, 1:].unsqueeze(-1)
    assert report.tokens == 3 * 39
    assert report.loss_16 == pytest.approx(-wide.gather(-1, targets).mean().item(), rel=1e-5)
    assert report.loss_8 == pytest.approx(-narrow.gather(-1, targets).mean().item(), rel=1e-5)
    divergence = (wide.exp() * (wide - narrow)).sum(-1).mean().item()
    assert report.divergence == pytest.approx(divergence, rel=1e-2)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_vllm_serves_the_reference_logits(checkpoint, monkeypatch, backend):
    _, out, _ = checkpoint
    monkeypatch.setattr(config, "choose_backend", lambda _: Choice(backend, "test"))
    monkeypatch.setattr(lm_head, "startup", StartUp())
    calls = []
    original = lm_head.FlatQuantHeadMethod.apply
    monkeypatch.setattr(
        lm_head.FlatQuantHeadMethod,
        "apply",
        lambda self, layer, x, bias=None: calls.append(len(x)) or original(self, layer, x, bias),
    )
    model = load_model(out)
    assert calls == (list(TOKEN_BLOCKS) if backend == "triton" else [])
    head = model.lm_head
    assert (head.weight_packed.dtype, head.weight_scale.dtype) == (torch.int8, torch.float32)
    assert not hasattr(head, "weight")
    hidden = torch.randn(5, SIZES["hidden_size"]).bfloat16()
    with torch.inference_mode():
        logits = model.compute_logits(hidden)
        expected = load_reference(out, dtype=torch.bfloat16).lm_head(hidden)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_the_vocabulary(ranks):
    """Padded to vLLM's multiple of 64, so that the last rank has fewer real rows, or none."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    start_single_process()
    torch.manual_seed(0)
    weight = torch.randn(150, 16)
    # Whole numbers: sums are exact, in whatever order a CPU adds.
    x = torch.randint(-8, 9, (3, 16)).float()
    head = quantize_head(weight)
    spec = mock.Mock(get_quant_method=lambda *_, **__: lm_head.FlatQuantHeadMethod("torch", "lm_head"))
    where = "vllm.model_executor.layers.vocab_parallel_embedding."
    parts = []
    for rank in range(ranks):
        with (
            mock.patch(f"{where}get_tensor_model_parallel_rank", return_value=rank),
            mock.patch(f"{where}get_tensor_model_parallel_world_size", return_value=ranks),
            set_current_vllm_config(VllmConfig()),
        ):
            layer = ParallelLMHead(150, 16, quant_config=spec, prefix="lm_head")
            for name, tensor in head.items():
                parameter = getattr(layer, name.partition(".")[2])
                parameter.weight_loader(parameter, tensor)
            layer.quant_method.process_weights_after_loading(layer)
            parts.append(layer.quant_method.apply(layer, x))
    logits = torch.cat(parts, dim=-1)
    assert logits.shape[-1] == 192
    assert torch.equal(logits[:, :150], w8_linear_ref(x, head[PACKED], head[SCALE]))
    assert not logits[:, 150:].any()


@pytest.mark.parametrize("missing", [PACKED, SCALE])
def test_missing_tensor_is_named(checkpoint, missing):
    _, out, _ = checkpoint
    tensors = tensors_of(out)
    del tensors[missing]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    index = json.loads((out / "model.safetensors.index.json").read_text(encoding="utf-8"))
    del index["weight_map"][missing]
    (out / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(CheckpointError, match=missing):
        load_model(out)


def test_many_tokens_in_fp16_stay_finite():
    """A logit of 40 is a sum of codes beyond 65504."""
    torch.manual_seed(0)
    x, weight = torch.randn(3, 2048), 0.02 * torch.randn(8, 2048)
    weight[0] = 0.9 * x[0] / x[0].norm()
    head = quantize_head(weight)
    codes, scale = head[PACKED], head[SCALE]
    assert (x[0] @ codes[0].float()) > 65504
    for dtype in (torch.float16, torch.bfloat16):
        wanted = w8_linear_ref(x.to(dtype), codes, scale)
        bound = {torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(
            _dequantized(x.to(dtype), codes, scale, None), wanted, rtol=bound, atol=bound
        )


def test_head_that_config_ties_is_refused(checkpoint):
    _, out, _ = checkpoint
    stored = json.loads((out / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(
        json.dumps(stored | {"tie_word_embeddings": True}), encoding="utf-8"
    )
    with pytest.raises(CheckpointError, match="lm_head_bits=8 but config.json ties lm_head"):
        load_model(out)


def test_ignored_head_cannot_have_8_bits(checkpoint):
    _, out, _ = checkpoint
    stored = json.loads((out / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    with pytest.raises(SpecError, match="lm_head_bits=8, but ignore lists lm_head"):
        parse_spec(stored | {"ignore": ["lm_head"]})


@pytest.mark.parametrize(
    "settings", [{"rotation": "hadamard"}, {"distill_epochs": 1}, {"rounding": "gptq"}], ids=str
)
def test_head_beside_the_other_stages(model, calib, tmp_path, settings):
    recipe = make_recipe(samples=4, seq_len=24, epochs=1, lm_head=8, **settings)
    out = quantize(model, tmp_path / "out", recipe, str(calib), "cpu")
    assert PACKED in tensors_of(out)
    assert "ok" in next(verify_folder(str(out), "reference"))


def test_head_keeps_16_bits_by_default(calib, model, tmp_path, run):
    out = tmp_path / "out"
    code, printed, said = run("quantize", model, "--out", out, "--calib", calib, *QUICK)
    assert code == 0, said
    assert "lm_head" not in printed
    assert PACKED not in tensors_of(out)
    tokens = random_tokens(1, 8)
    with torch.no_grad():
        assert load_reference(out)(tokens).logits.shape == (1, 8, SIZES["vocab_size"])
