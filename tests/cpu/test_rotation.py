"""Hadamard matrices, rotated models, and the optimizer that learns rotations."""

import json

import pytest
import torch
from tiny_model import ARCHITECTURES, SIZES, edit_config, make_model, random_tokens

from vllm_flatquant.calibration import learned_rotation
from vllm_flatquant.calibration.errors import UserError
from vllm_flatquant.calibration.hadamard import hadamard, orthonormal_hadamard, random_hadamard, rest_of
from vllm_flatquant.calibration.learned_rotation import CayleySGD, learn_rotation, nearest_orthogonal
from vllm_flatquant.calibration.matrices import random_orthogonal
from vllm_flatquant.calibration.recipe import make_recipe
from vllm_flatquant.calibration.reference import load_reference
from vllm_flatquant.calibration.rotation import Rotation, hadamard_rotation, rotated
from vllm_flatquant.calibration.source import ModelSource

CPU = torch.device("cpu")
ORDERS = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 56, 60, 64, 68, 76, 384, 1024)


@pytest.mark.parametrize("n", ORDERS)
def test_hadamard(n):
    h = hadamard(n)
    assert h.shape == (n, n)
    assert torch.equal(h.abs(), torch.ones_like(h))
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=h.dtype))


@pytest.mark.parametrize(("n", "rest"), [(6, 3), (7, 7), (52, 13), (80, 1), (86, 43), (172, 43)])
def test_other_sizes_are_orthogonal_and_as_even_as_can_be(n, rest):
    assert rest_of(n) == rest
    assert (hadamard(n) is None) == (rest > 1)
    generator = torch.Generator().manual_seed(0)
    for matrix in (orthonormal_hadamard(n, generator), random_hadamard(n, generator)):
        assert (matrix @ matrix.T - torch.eye(n, dtype=torch.float64)).abs().max() < 1e-12
        assert matrix.abs().max() <= (rest / n) ** 0.5 + 1e-6


def logits(source, tokens):
    """Of a source's tensors in a model that computes in float64 (norms, RoPE and softmax in float32)."""
    network = source.model.to_empty(device=CPU).double()
    base = type(network.model.rotary_emb)(config=source.config)
    network.model.rotary_emb = base
    state = {n: source.files.tensor(n) for n in source.files.names}
    network.load_state_dict(state, strict=False)
    if source.config.tie_word_embeddings:
        network.tie_weights()
    with torch.no_grad():
        return network(tokens).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_rotated_model_is_the_same_function(tmp_path, model_type, tied):
    extra = {"attention_bias": True, "mlp_bias": True} if model_type == "llama" else {}
    folder = make_model(tmp_path / "m", model_type, torch.float32, **extra, tie_word_embeddings=tied)
    source = ModelSource(folder)
    generator = torch.Generator().manual_seed(0)
    r2 = [random_orthogonal(1, source.head_dim, generator)[0].double() for _ in range(2)]
    r2 = [nearest_orthogonal(r) for r in r2]
    rotation = Rotation(hadamard_rotation(source, 0).r1, r2)
    new = rotated(source, rotation, CPU)
    tokens = random_tokens(2, 24)
    expected, found = logits(source, tokens), logits(new, tokens)
    assert (found - expected).norm() / expected.norm() < 1e-6
    assert source.config.tie_word_embeddings == tied and "lm_head.weight" in new.other_names()
    name = "model.layers.1.self_attn.v_proj.weight"
    assert (new.files.tensor(name) - source.files.tensor(name)).norm() > 0.5
    assert torch.equal(new.files.tensor("model.norm.weight"), torch.ones(48))


def test_stored_dtypes_and_shapes(tmp_path):
    source = ModelSource(make_model(tmp_path / "m", "qwen2"))
    new = rotated(source, hadamard_rotation(source, 3), CPU)
    for name in new.files.names:
        assert new.files.tensor(name).shape == new.files.shape(name)
        linear = "_proj.weight" in name
        assert new.files.tensor(name).dtype == (torch.float32 if linear else torch.bfloat16)


def test_cayley_sgd_stays_orthogonal_and_descends():
    target = nearest_orthogonal(random_orthogonal(1, 12, torch.Generator().manual_seed(1))[0])
    target = target * torch.linalg.det(target).sign()  # reachable: rotations connect to the identity
    target[0] *= torch.linalg.det(target).sign()
    x = torch.nn.Parameter(torch.eye(12, dtype=torch.float64))
    optimizer = CayleySGD([x], lr=0.2)
    losses = []
    for _ in range(200):
        loss = (x - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert (x @ x.T - torch.eye(12)).abs().max() < 1e-12
    assert losses[-1] < 1e-3 * losses[0]


def test_learning_moves_the_rotation(tmp_path):
    source = ModelSource(make_model(tmp_path / "m", attention_bias=True))
    recipe = make_recipe(
        samples=4, seq_len=24, rotation="learned", rotation_steps=3, matrix="hadamard",
        transforms=["down", "k"], diag=False, kv=4, rounding="gptq",
    )  # fmt: skip
    rotation = learn_rotation(source, recipe, random_tokens(4, 24), CPU)
    start = hadamard_rotation(source, recipe.seed)
    assert len(rotation.r2) == SIZES["num_hidden_layers"]
    for matrix in (rotation.r1, *rotation.r2):
        assert (matrix @ matrix.T - torch.eye(len(matrix))).abs().max() < 1e-12
    assert (rotation.r1 - start.r1).norm() > 1e-2


def test_learning_network_is_the_original_function_without_quantization(tmp_path):
    folder = make_model(tmp_path / "m", "qwen2", torch.float32)
    source = ModelSource(folder)
    recipe = make_recipe(transforms=["down"], matrix="hadamard", scheme="w4a16", rounding="gptq")
    start = hadamard_rotation(source, 0)
    start.r2 = [random_hadamard(source.head_dim, torch.Generator().manual_seed(i)) for i in range(2)]
    network = learned_rotation.SpinNetwork(source, recipe, start, CPU)
    tokens = random_tokens(2, 24)
    with torch.no_grad():
        expected, found = load_reference(folder)(tokens).logits, network(tokens)
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_a_model_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    source = ModelSource(make_model(tmp_path / "m"))
    monkeypatch.setattr(learned_rotation, "free_memory", lambda device: 1000)
    with pytest.raises(UserError, match="takes the whole model in memory.*quarot-w4a4"):
        learn_rotation(source, make_recipe(rotation="learned"), random_tokens(4, 24), CPU)


def test_config_of_the_checkpoint_is_untied(tmp_path, calib):
    from vllm_flatquant.calibration.quantize import quantize

    model = make_model(tmp_path / "tied", tie_word_embeddings=True)
    edit_config(model, tie_word_embeddings=True)
    recipe = make_recipe(
        samples=4, seq_len=24, epochs=0, rotation="hadamard", matrix="hadamard", diag=False
    )
    out = quantize(model, tmp_path / "q", recipe, str(calib), "cpu")
    first = json.loads((out / "calibration_log.jsonl").read_text().splitlines()[0])
    assert first["rotation"] == "hadamard" and first["seconds"] > 0 and first["peak_memory_gb"] > 0
    network = load_reference(out)
    assert not network.config.tie_word_embeddings
    assert network.lm_head.weight is not network.model.embed_tokens.weight
