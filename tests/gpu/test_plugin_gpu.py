"""The plugin on a CUDA GPU: layers of real vLLM models, and the engine, against the references."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

import vllm_flatquant
from vllm_flatquant.calibration.reference import load_reference
from vllm_flatquant.sites import SITES

from ..cpu.tiny_checkpoint import VOCAB, Recipe, write_checkpoint
from ..cpu.vllm_model import load_model

vllm_flatquant.register()
SCHEMES = {"w4a4": (4, None), "w4a8": (8, None), "w4a16": (16, None), "w4a16-g32": (16, 32)}
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_layers_follow_the_references(tmp_path, scheme, shards, dtype):
    bits, group_size = SCHEMES[scheme]
    recipe = Recipe("Qwen2", bits=bits, group_size=group_size, shards=shards, dtype=dtype)
    write_checkpoint(tmp_path, recipe)
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


@pytest.mark.parametrize("kv_bits", [16, 8, 4])
@pytest.mark.parametrize("bits", [8, 16])
def test_engine_follows_the_reference(tmp_path, bits, kv_bits):
    """Compiled and with CUDA graphs. W4A4 of a random model is too sensitive to bf16 for any bound."""
    recipe = Recipe(bits=bits, k_bits=kv_bits, v_bits=kv_bits, shards=2, dtype=torch.bfloat16)
    write_checkpoint(tmp_path, recipe)
    torch.manual_seed(1)
    prompts = [torch.randint(2, VOCAB, (n,)).tolist() for n in (24, 7, 40)]
    out = tmp_path / "out.json"
    command = [sys.executable, str(ROOT / "tests/cpu/engine_script.py"), str(tmp_path), str(out)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(
        [*command, "--dtype=bfloat16", "--gpu-memory-utilization=0.2"],
        input=json.dumps(prompts),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "triton backend (CUDA device" in done.stdout + done.stderr
    reference = load_reference(tmp_path, dtype=torch.bfloat16)
    answers = json.loads(out.read_text(encoding="utf-8"))
    for ids, answer in zip(prompts, answers, strict=True):
        whole = torch.tensor([ids + answer["tokens"]])
        with torch.inference_mode():
            logprobs = reference(whole, use_cache=False).logits[0].float().log_softmax(-1)
        expected = logprobs[: len(ids) - 1].gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
        assert (torch.tensor(answer["logprobs"][1:]) - expected).abs().mean() < 0.15
        top = logprobs[len(ids) - 1 : -1].topk(2)
        clear = top.values[:, 0] - top.values[:, 1] > 0.5
        assert torch.equal(torch.tensor(answer["tokens"])[clear], top.indices[:, 0][clear])
