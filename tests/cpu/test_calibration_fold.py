"""Folding keeps the function: without rounding, a transformed model computes what the original does."""

import pytest
import torch
from tiny_model import ARCHITECTURES, make_model, random_tokens

from vllm_flatquant.calibration.block import TrainableBlock
from vllm_flatquant.calibration.fold import fold_block, fold_norm
from vllm_flatquant.calibration.quantize import make_spec
from vllm_flatquant.calibration.recipe import make_recipe
from vllm_flatquant.calibration.reference import install_block, load_reference
from vllm_flatquant.calibration.round_block import round_block
from vllm_flatquant.calibration.source import ModelSource
from vllm_flatquant.calibration.streams import record_inputs, run_block
from vllm_flatquant.calibration.train import collect_stats
from vllm_flatquant.kernels.kron import kron_wide_ref

CPU = torch.device("cpu")


def perturb(block: TrainableBlock) -> None:
    """Move every parameter well away from its start, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name.endswith("_logit"):
                parameter.fill_(40.0)  # sigmoid is 1: clipping would change the function
            else:
                parameter += 0.2 * torch.randn(
                    parameter.shape, generator=generator, dtype=parameter.dtype
                )


def folded_model(folder, **settings):
    """Last hidden states of the original and of the folded, unrounded model, in float64."""
    source = ModelSource(folder)
    recipe = make_recipe(scheme="w4a16", samples=2, seq_len=24, **settings)
    spec = make_spec(source, recipe)
    tokens = random_tokens(2, 24)
    x, kwargs = record_inputs(source, tokens, CPU)
    original = x = x.double()
    for i in range(source.num_blocks):
        layer = source.load_block(i, CPU, torch.float64)
        original, stats = collect_stats(layer, source.arch, original, kwargs[i], 2, CPU)
        block = TrainableBlock(layer, source.arch, recipe, stats, seed=i)
        perturb(block)
        folded = fold_block(block, source.block_tensors(i))
        finished = source.load_block(i, CPU, torch.float64)
        install_block(finished, folded.tensors, spec, source.arch, weights=folded.weights)
        x = run_block(finished, x, kwargs[i], 2, CPU)
    return original, x


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("matrix", ["svd", "direct", "orthogonal"])
def test_model_identity(tmp_path, model_type, matrix):
    folder = make_model(tmp_path / "m", model_type, torch.float32)
    original, transformed = folded_model(folder, matrix=matrix, shards=2)
    assert (original - transformed).norm() / original.norm() < 1e-6


PARTIAL = {
    "nothing": {"transforms": (), "diag": False},
    "diagonals": {"transforms": (), "diag": ("qkv", "o", "gate_up")},
    "v-each-head": {"transforms": ("v",), "v_each_head": True, "diag": ("o",)},
    "v-affine": {"transforms": ("v",), "v_each_head": True, "v_matrix": "affine"},
    "hadamard": {"matrix": "hadamard", "diag": False},
    "v-shared": {"transforms": ("down", "v"), "diag": ("o", "down"), "v_matrix": "orthogonal"},
    "wide": {"widest_factor": 24},
    "o-without-v": {"transforms": ("o", "k", "gate_up"), "diag": ("o",), "shards": 2},
}


@pytest.mark.parametrize("settings", PARTIAL.values(), ids=PARTIAL)
def test_model_identity_with_some_transforms(tmp_path, settings):
    sizes = {"attention_bias": True, "mlp_bias": True}
    folder = make_model(tmp_path / "m", "llama", torch.float32, **sizes)
    original, transformed = folded_model(folder, **settings)
    assert (original - transformed).norm() / original.norm() < 1e-6


@pytest.mark.parametrize(
    ("sizes", "shards"),
    [
        ({"num_attention_heads": 10, "num_key_value_heads": 5, "hidden_size": 80, "head_dim": 8}, 1),
        ({"hidden_size": 384, "intermediate_size": 1408, "head_dim": 64}, 2),
        ({"num_attention_heads": 8, "intermediate_size": 96}, 8),
    ],
    ids=["10-heads", "384-1408", "8-shards"],
)
def test_odd_sizes(tmp_path, sizes, shards):
    folder = make_model(tmp_path / "m", "llama", torch.float32, **sizes)
    original, transformed = folded_model(folder, shards=shards)
    assert (original - transformed).norm() / original.norm() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_model_identity_with_16_bit_norms(tmp_path, dtype):
    # The merged norm weight is rounded; dividing W by the diagonal that it implies keeps the function.
    folder = make_model(tmp_path / "m", "llama", dtype)
    original, transformed = folded_model(folder)
    assert (original - transformed).norm() / original.norm() < 2e-6


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("right", [7, None])
def test_linear_identity_in_float64(shards, right):
    torch.manual_seed(0)
    a, b = 5, right or 4
    left = torch.randn(shards, a, a, dtype=torch.float64) + 3 * torch.eye(a)
    factor = torch.randn(shards, b, b, dtype=torch.float64) + 3 * torch.eye(b) if right else None
    x = torch.randn(9, shards * a * b, dtype=torch.float64)
    w = torch.randn(6, shards * a * b, dtype=torch.float64)
    inverse = [torch.linalg.inv(f).mT if f is not None else None for f in (left, factor)]
    y = kron_wide_ref(x, left, factor) @ kron_wide_ref(w, *inverse).T
    assert ((y - x @ w.T).norm() / (x @ w.T).norm()) < 1e-12


def test_biases_everywhere(tmp_path):
    folder = make_model(tmp_path / "m", "llama", torch.float32, attention_bias=True, mlp_bias=True)
    original, transformed = folded_model(folder, shards=2)
    assert (original - transformed).norm() / original.norm() < 1e-6


@pytest.mark.parametrize("settings", [{}, *PARTIAL.values()], ids=["all", *PARTIAL])
@pytest.mark.parametrize("kv", [16, 8, 4])
def test_trained_block_computes_what_the_finished_one_does(tmp_path, kv, settings):
    # Same numbers but for factors rounded to bf16 and the merged norm: a missing piece costs far more.
    folder = make_model(tmp_path / "m", "llama", torch.float32, attention_bias=True, mlp_bias=True)
    source = ModelSource(folder)
    recipe = make_recipe(
        **{"scheme": "w4a8", "samples": 2, "seq_len": 24, "shards": 2, "kv": kv, **settings}
    )
    spec = make_spec(source, recipe)
    x, kwargs = record_inputs(source, random_tokens(2, 24), CPU)
    layer = source.load_block(0, CPU)
    exact, stats = collect_stats(layer, source.arch, x, kwargs[0], 2, CPU)
    block = TrainableBlock(layer, source.arch, recipe, stats, seed=0)
    trained = run_block(layer, x, kwargs[0], 2, CPU)
    folded = fold_block(block, source.block_tensors(0))
    finished = source.load_block(0, CPU)
    round_block(finished, folded, recipe, spec, source, x, x, kwargs[0], CPU)
    served = run_block(finished, x, kwargs[0], 2, CPU)
    assert (trained - served).norm() < 0.5 * (exact - served).norm()


def test_fold_norm_implies_its_own_rounding():
    weight = torch.tensor([1.0, -0.3, 0.0, 3e38], dtype=torch.bfloat16)
    diag = torch.tensor([0.123456, 1.7, 2.0, 1e3])
    merged, implied = fold_norm(weight, diag)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(weight.double() * implied, merged.double())
    assert implied[2] == 1  # a channel whose norm weight is 0
    assert implied[3] == 1  # a product that overflows


def test_unquantized_reference_equals_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = make_model(tmp_path / "m", "qwen3")
    tokens = random_tokens(2, 16)
    stock = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        expected = stock(tokens).logits
        found = load_reference(folder)(tokens).logits
    assert torch.allclose(found, expected, atol=1e-4)
