"""The plugin on a CUDA GPU: layers of real vLLM models, and the engine, against the references."""

import re
from importlib.util import find_spec

import pytest
import torch

if find_spec("vllm") is None or not torch.cuda.is_available():
    pytest.skip("needs vLLM and a CUDA GPU", allow_module_level=True)

import vllm_flatquant
from vllm_flatquant.calibration.reference import load_reference
from vllm_flatquant.errors import UnsupportedError
from vllm_flatquant.sites import SITES

from ..cpu.tiny_checkpoint import VOCAB, Recipe, write_checkpoint
from ..cpu.vllm_model import load_model
from . import engines

SCHEMES: dict[str, dict] = {
    "w4a4": {"bits": 4},
    "w4a8": {"bits": 8},
    "w4a16": {"bits": 16},
    "w4a16-g32": {"bits": 16, "group_size": 32},
    "w2a8": {"bits": 8, "weight_bits": 2},
    "w3a16": {"bits": 16, "weight_bits": 3},
    "w8a8": {"bits": 8, "weight_bits": 8},
    "w8a16": {"bits": 16, "weight_bits": 8},
}
# Two layers: two norms and one activation in each, and o_proj, which follows attention.
FUSED_LINE = "4 RMSNorm and 2 SiLU*mul fused with the transform after them, 2 transforms on their own"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_layers_follow_the_references(tmp_path, scheme, shards, dtype):
    vllm_flatquant.register()
    recipe = Recipe("Qwen2", **SCHEMES[scheme], shards=shards, dtype=dtype)
    write_checkpoint(tmp_path, recipe)
    if scheme == "w8a8" and shards > 1:
        with pytest.raises(UnsupportedError, match="one scale for each token"):
            load_model(tmp_path, device="cuda")
        return
    model, reference = load_model(tmp_path, device="cuda"), load_reference(tmp_path, dtype=dtype)
    for block, expected_block in zip(model.model.layers, reference.model.layers, strict=True):
        for site in SITES:
            layer = block.get_submodule(site.module)
            parent = expected_block.get_submodule(site.module.partition(".")[0])
            x = torch.randn(33, layer.input_size).to(dtype)
            with torch.inference_mode():
                expected = torch.cat(
                    [parent.get_submodule(part)(x) for part in site.parts], dim=-1
                ).float()
                actual = layer(x.cuda())[0].float().cpu()
            # A code that rounds the other way moves one output by a step; almost none may.
            error = (actual - expected).norm() / expected.norm()
            assert error < 0.01, f"{site.name}: {error:.4f}"


def run_engine(folder, prompts, **environment):
    """Results and log of an engine in one process, compiled and with CUDA graphs, from empty caches."""
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **environment}
    results, log = engines.answers(folder, prompts, folder, env=env)
    assert "triton backend (CUDA device" in log
    return results, log


def random_prompts():
    torch.manual_seed(1)
    return [torch.randint(2, VOCAB, (n,)).tolist() for n in (24, 7, 40)]


@pytest.mark.parametrize("kv_bits", [16, 8, 4])
@pytest.mark.parametrize("bits, head_bits", [(8, 16), (16, 16), (8, 8)])
def test_engine_follows_the_reference(tmp_path, bits, head_bits, kv_bits):
    """W4A4 of a random model is too sensitive to bf16 for any bound."""
    recipe = Recipe(
        bits=bits,
        k_bits=kv_bits,
        v_bits=kv_bits,
        shards=2,
        lm_head_bits=head_bits,
        dtype=torch.bfloat16,
    )
    write_checkpoint(tmp_path, recipe)
    prompts = random_prompts()
    answers, log = run_engine(tmp_path, prompts)
    assert FUSED_LINE in log
    reference = load_reference(tmp_path, dtype=torch.bfloat16)
    for ids, answer in zip(prompts, answers, strict=True):
        whole = torch.tensor([ids + answer["tokens"]])
        with torch.inference_mode():
            logprobs = reference(whole, use_cache=False).logits[0].float().log_softmax(-1)
        expected = logprobs[: len(ids) - 1].gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
        assert (torch.tensor(answer["logprobs"][1:]) - expected).abs().mean() < 0.15
        top = logprobs[len(ids) - 1 : -1].topk(2)
        clear = top.values[:, 0] - top.values[:, 1] > 0.5
        assert torch.equal(torch.tensor(answer["tokens"])[clear], top.indices[:, 0][clear])


@pytest.mark.parametrize("architecture, bits", [("Llama", 8), ("Qwen3", 16)])
def test_fusion_changes_speed_only(tmp_path, architecture, bits):
    """Prompt log-probabilities with and without fused kernels, which round at other places, are close."""
    recipe = Recipe(architecture, bits=bits, shards=2, dtype=torch.bfloat16)
    prompts, results = random_prompts(), []
    for switch in ("1", "0"):
        folder = tmp_path / switch
        write_checkpoint(folder, recipe)
        answers, log = run_engine(folder, prompts, VLLM_FLATQUANT_FUSION=switch)
        assert ("FlatQuant fusion" in log) == (FUSED_LINE in log) == (switch == "1")
        results.append(torch.cat([torch.tensor(answer["logprobs"][1:]) for answer in answers]))
    assert (results[0] - results[1]).abs().mean() < 0.15


def test_kernels_are_compiled_ahead_and_then_come_from_the_cache(tmp_path):
    """By workers, from an empty Triton cache, and by nobody at the second start."""
    write_checkpoint(tmp_path, Recipe(shards=1, lm_head_bits=8, dtype=torch.bfloat16))
    for warm in (False, True):
        folder = str(tmp_path / "triton")
        _, log = run_engine(tmp_path, random_prompts()[:1], TRITON_CACHE_DIR=folder)
        said = re.search(r"FlatQuant: (\d+) kernels ready in [\d.]+ s \((.*)\)", log)
        assert said and int(said[1]) > 0
        assert said[2] == f"{said[1] if warm else 0} from cache"
        assert "compiled where it is needed" not in log
