"""The attention hook: causality, padding and sliding windows as in stock eager attention."""

import pytest
import torch
from tiny_model import make_model, random_tokens
from transformers import AutoModelForCausalLM

from vllm_flatquant.calibration.attention import ATTENTION


def both(folder, **inputs):
    """Logits of stock eager attention and of ours."""
    out = []
    for attention in ("eager", ATTENTION):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention
        )
        with torch.no_grad():
            out.append(model.eval()(**inputs).logits)
    return out


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 5}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        ("qwen3", {}),
    ],
)
def test_equals_eager(tmp_path, model_type, sizes):
    folder = make_model(tmp_path / "m", model_type, **sizes)
    tokens = random_tokens(3, 20)
    expected, found = both(folder, input_ids=tokens)
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_equals_eager_with_padding(tmp_path, model_type):
    sizes = {"sliding_window": 5} if model_type == "mistral" else {}
    folder = make_model(tmp_path / "m", model_type, **sizes)
    tokens, mask = random_tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    expected, found = both(folder, input_ids=tokens, attention_mask=mask)
    real = mask.bool()
    assert torch.isfinite(found[real]).all()
    assert torch.allclose(found[real], expected[real], atol=1e-4)


def test_is_causal(tmp_path):
    folder = make_model(tmp_path / "m")
    tokens = random_tokens(1, 20)
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 90
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=ATTENTION
    )
    with torch.no_grad():
        before, after = model(tokens).logits, model(changed).logits
    assert torch.equal(before[0, :-1], after[0, :-1])
    assert not torch.equal(before[0, -1], after[0, -1])
