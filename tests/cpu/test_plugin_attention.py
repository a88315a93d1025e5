"""FlatQuantAttention: what reaches vLLM's attention, and what a transform does to the scores."""

from unittest import mock

import pytest
import torch

from vllm_flatquant._compat import Attention
from vllm_flatquant.attention import FlatQuantAttention
from vllm_flatquant.kernels.quantize import fake_quant_kv_ref

from .tiny_checkpoint import HEAD_DIM, HEADS, KV_HEADS, Recipe, write_checkpoint
from .vllm_model import load_model, tensor_parallel

BITS = [(8, 8), (4, 4), (8, 16), (16, 8), (4, 16), (16, 4)]


def attention_input(layer, query, key, value):
    """The q, k and v that the base class gets for the layer's input."""
    with mock.patch.object(Attention, "forward", autospec=True) as forward:
        layer(query, key, value)
    return forward.call_args.args[1:]


def random_qkv(dtype, tokens=6):
    """Strided q, k and v, as vLLM splits them from the fused projection's output."""
    sizes = [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]
    return torch.randn(tokens, sum(sizes)).to(dtype).split(sizes, dim=-1)


def reference(tensors, query, key, value, k_bits, v_bits):
    """Transform and quantization per head, from the checkpoint's tensors."""
    get = "model.layers.0.self_attn.{}_transform.{}".format
    heads = [x.reshape(x.shape[0], -1, HEAD_DIM) for x in (query, key, value)]
    if k_bits < 16:
        heads[0] = (heads[0].float() @ tensors[get("k", "inverse_t")]).to(query.dtype)
        heads[1] = (heads[1].float() @ tensors[get("k", "matrix")]).to(key.dtype)
        heads[1] = fake_quant_kv_ref(heads[1], k_bits, tensors[get("k", "clip")])
    if v_bits < 16:
        heads[2] = fake_quant_kv_ref(heads[2], v_bits, tensors[get("v", "clip")])
    return [x.flatten(1) for x in heads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k_bits, v_bits", BITS)
def test_attention_gets_transformed_and_quantized_heads(tmp_path, k_bits, v_bits, dtype):
    tensors = write_checkpoint(tmp_path, Recipe(k_bits=k_bits, v_bits=v_bits, dtype=dtype))
    layer = load_model(tmp_path).model.layers[0].self_attn.attn
    assert type(layer) is FlatQuantAttention
    qkv = random_qkv(dtype)
    for actual, expected in zip(
        attention_input(layer, *qkv), reference(tensors, *qkv, k_bits, v_bits), strict=True
    ):
        assert actual.dtype == dtype
        assert torch.equal(actual, expected)


def test_scores_survive_the_transform(tmp_path):
    write_checkpoint(tmp_path, Recipe(k_bits=8, v_bits=8))
    layer = load_model(tmp_path).model.layers[0].self_attn.attn
    query, key, value = random_qkv(torch.float32)
    new_query, new_key, _ = attention_input(layer, query, key, value)
    group = HEADS // KV_HEADS
    scores = []
    for q, k in ((query, key), (new_query, new_key)):
        q, k = q.reshape(-1, KV_HEADS, group, HEAD_DIM), k.reshape(-1, KV_HEADS, HEAD_DIM)
        scores.append(torch.einsum("qngd,knd->ngqk", q, k))
    error = (scores[1] - scores[0]).norm() / scores[0].norm()
    assert error < 0.03  # 8-bit rounding of the transformed keys


def test_every_rank_has_the_same_transform(tmp_path):
    write_checkpoint(tmp_path, Recipe(k_bits=4, v_bits=4, shards=2))
    whole = load_model(tmp_path).model.layers[1].self_attn.attn
    with tensor_parallel(1, 2):
        rank = load_model(tmp_path).model.layers[1].self_attn.attn
    for name in ("k_transform_matrix", "k_transform_inverse_t", "k_transform_clip", "v_transform_clip"):
        assert torch.equal(getattr(whole, name), getattr(rank, name))


def test_unquantized_cache_leaves_attention_alone(tmp_path):
    write_checkpoint(tmp_path, Recipe())
    layer = load_model(tmp_path).model.layers[0].self_attn.attn
    assert type(layer) is Attention
    assert not hasattr(layer, "k_transform_matrix")
