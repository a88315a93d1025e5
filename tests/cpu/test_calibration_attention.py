"""The attention hook: causality, padding and sliding windows as in stock eager attention."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from tiny_model import make_model, random_tokens
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from vllm_flatquant.calibration import attention
from vllm_flatquant.calibration.attention import ATTENTION


def both(folder, **inputs):
    """Logits of stock eager attention and of ours."""
    out = []
    for name in ("eager", ATTENTION):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=name
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


class OnGPU(torch.Tensor):
    """Says that it is on a GPU, for there are the kernels whose operators ``kernels`` stands in for."""

    is_cuda = True


@pytest.fixture
def kernels(monkeypatch):
    """PyTorch's fused attention and its backward, on the CPU. Gives whether algorithms had to be deterministic in each
    call, with the shapes of its inputs."""
    calls = []

    def forward(query, key, value, bias, sums, dropout=0.0, causal=False, *, scale=None):
        assert bias is None and sums and not dropout
        calls.append((torch.are_deterministic_algorithms_enabled(), query.shape, key.shape))
        out = scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale)
        seed = torch.zeros((), dtype=torch.long)
        return out, query.new_zeros(query.shape[:3]), seed, seed.clone()

    def backward(
        gradient, query, key, value, bias, out, sums, seed, offset, dropout, wanted, causal=False, *, scale=None
    ):  # fmt: skip
        assert bias is None and not dropout and wanted == [True, True, True, False]
        assert sums.shape == query.shape[:3] and seed.shape == offset.shape == ()
        calls.append((torch.are_deterministic_algorithms_enabled(), query.shape, key.shape))
        scores = scale * query @ key.mT
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
        p = scores.softmax(dim=-1)
        ds = scale * p * (gradient @ value.mT - (gradient * out).sum(dim=-1, keepdim=True))
        return ds @ key, ds.mT @ query, p.mT @ gradient, None

    monkeypatch.setattr(attention, "can_use_efficient_attention", lambda kind: True)
    monkeypatch.setattr(attention, "multiprocessors", lambda device: 4)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_scaled_dot_product_efficient_attention", forward, "CPU")
        library.impl("_scaled_dot_product_efficient_attention_backward", backward, "CPU")
        yield calls


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [2, 6])
def test_gradients_on_a_gpu_are_the_same_each_time(kernels, heads, causal):
    """The kernel that takes another order of sums each time is told not to, and nothing else is."""
    module = SimpleNamespace(is_causal=causal, num_key_value_groups=heads // 2)
    torch.manual_seed(0)
    inputs = [torch.randn(3, n, 7, 8, requires_grad=True) for n in (heads, 2, 2)]
    results = []
    for kind in (torch.Tensor, OnGPU):
        x = [x.detach().clone().as_subclass(kind).requires_grad_() for x in inputs]
        out, _ = attention.attention_forward(module, *x, None, scaling=0.3, dropout=0.0)
        (out * torch.arange(8.0)).square().sum().backward()
        results.append([out.detach(), *(each.grad for each in x)])
    every = 3, heads, 7, 8
    assert kernels == [(False, every, every), (True, every, every)]
    assert not torch.are_deterministic_algorithms_enabled()
    for other, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours.as_subclass(torch.Tensor), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("processors", "squares", "fused"),
    [(36, 2**29, True), (37, 2**29, False), (37, 4 * 18 * 49, False), (37, 4 * 18 * 49 - 1, True)],
)
def test_few_heads_of_few_tokens_train_in_the_plain_form(
    kernels, monkeypatch, processors, squares, fused
):
    """The fused one would leave the GPU idle. Without gradients it does not, and PyTorch chooses."""
    monkeypatch.setattr(attention, "multiprocessors", lambda device: processors)
    monkeypatch.setattr(attention, "SQUARES", squares)
    chosen = []
    monkeypatch.setattr(attention, "sdpa_kernel", lambda kind: chosen.append(kind) or nullcontext())
    module = SimpleNamespace(is_causal=True, num_key_value_groups=3)
    torch.manual_seed(0)
    inputs = [torch.randn(3, n, 7, 8).as_subclass(OnGPU).requires_grad_() for n in (6, 2, 2)]
    out, _ = attention.attention_forward(module, *inputs, None)
    plain = [] if fused else [attention.SDPBackend.MATH]
    assert len(kernels) == fused and chosen == plain
    with torch.no_grad():
        again, _ = attention.attention_forward(module, *inputs, None)
    assert len(kernels) == fused and chosen == plain
    torch.testing.assert_close(again, out.detach())


@pytest.mark.parametrize("case", ["no gradient", "fewer queries", "mask", "dropout", "given causality"])
def test_what_the_fused_form_does_not_take_goes_to_transformers(kernels, case):
    """With the keys of all heads, or a mask, PyTorch chooses; the numbers are those of the CPU."""
    module = SimpleNamespace(is_causal=True, num_key_value_groups=3)
    torch.manual_seed(0)
    tokens = 1 if case == "fewer queries" else 7
    inputs = torch.randn(3, 6, tokens, 8), torch.randn(3, 2, 7, 8), torch.randn(3, 2, 7, 8)
    mask = torch.ones(7, 7, dtype=torch.bool).triu(-2).tril() if case == "mask" else None
    options = {"given causality": {"is_causal": False}, "dropout": {"dropout": 0.5}}.get(case, {})
    results = []
    for kind in (torch.Tensor, OnGPU):
        x = [x.clone().as_subclass(kind).requires_grad_(case != "no gradient") for x in inputs]
        torch.manual_seed(1)
        with torch.set_grad_enabled(case != "no gradient"):
            results.append(attention.attention_forward(module, *x, mask, **options)[0].detach())
    assert not kernels
    torch.testing.assert_close(results[1].as_subclass(torch.Tensor), results[0])


def test_a_failed_backward_leaves_the_setting_as_it_was(kernels, monkeypatch):
    x = torch.randn(1, 2, 4, 8, requires_grad=True)
    out = attention.FusedAttention.apply(x, x, x, True, None)

    def fails(*args, **kwargs):
        assert torch.are_deterministic_algorithms_enabled()
        raise MemoryError

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention_backward", fails)
    with pytest.raises(MemoryError):
        out.sum().backward()
    assert not torch.are_deterministic_algorithms_enabled()
