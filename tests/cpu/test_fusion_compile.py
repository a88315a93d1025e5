"""Fusion in a vLLM model: the pass in vLLM's compiler as on a GPU, on the operators' CPU implementations."""

import gc
import shutil

import pytest
import torch
import torch.nn.functional as F

from vllm_flatquant import _compat, config, fusion, linear
from vllm_flatquant.backend import IntegerTriton, WeightOnlyTorch
from vllm_flatquant.choice import Choice
from vllm_flatquant.errors import UnsupportedError
from vllm_flatquant.kernels.chain import Program
from vllm_flatquant.kernels.kron import kron
from vllm_flatquant.spec import parse_spec

from .tiny_checkpoint import VOCAB, Recipe, write_checkpoint
from .vllm_model import engine_config, load_configured, start_single_process

LAYERS = 3
PASS = "post_grad_custom_post_pass"


def mixed_attention(layer, query, key, value, *arguments, output=None, **options):
    """Stands in for attention, which has no cache here: something that depends on query and value."""
    return output.view(query.shape).copy_(
        query + value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    )


def run_model(vllm_config, token_ids):
    """(model, final hidden states [T, hidden]) of ``vllm_config``, compiled if it says so."""
    from vllm.forward_context import set_forward_context
    from vllm.ir.op import enable_torch_wrap

    model = load_configured(vllm_config)
    for module in model.modules():
        if hasattr(module, "impl"):
            module.impl.forward = mixed_attention
    with (
        enable_torch_wrap(vllm_config.compilation_config.ir_enable_torch_wrap),
        torch.inference_mode(),
        set_forward_context(None, vllm_config, num_tokens=len(token_ids)),
    ):
        return model, model(token_ids, torch.arange(len(token_ids)))


def compiled_config(folder):
    """The engine's options, with what a GPU has by default in place of what vLLM sets on a CPU."""
    from vllm.config import CompilationMode, set_current_vllm_config

    vllm_config = engine_config(folder, enforce_eager=False)
    compilation = vllm_config.compilation_config
    compilation.mode, compilation.ir_enable_torch_wrap = CompilationMode.VLLM_COMPILE, True
    compilation.splitting_ops, compilation.compile_sizes = None, []
    with set_current_vllm_config(vllm_config):
        compilation.set_splitting_ops_for_v1("naive", 1)
    return vllm_config


@pytest.fixture(autouse=True)
def nothing_is_collected_meanwhile():
    """A finalizer of vLLM's CPU linears calls operators. Where the collector runs it while a graph is traced, PyTorch's
    dispatcher stays as it is in there, and later tests of this process compute without gradients."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    gc.collect()


@pytest.fixture
def checkpoint(tmp_path):
    write_checkpoint(tmp_path, Recipe(shards=2, layers=LAYERS))
    return tmp_path


class WeightOnly(WeightOnlyTorch):
    """``WeightOnlyTriton`` with a product of PyTorch's in place of vLLM's."""

    tokens = (1,)

    def apply(self, layer, x, bias):
        return F.linear(kron(x, layer.transform_left, layer.transform_right), layer.weight, bias)


@pytest.fixture
def triton(monkeypatch):
    """The GPU's backend, in float32 so that results can be compared closely."""

    def make_runtime(spec, backend, shape, dtype):
        if spec.activations.bits == 16:
            return WeightOnly(spec.weights.bits, dtype)
        return IntegerTriton(spec.activations.bits, spec.weights.bits, dtype)

    monkeypatch.setattr(config, "choose_backend", lambda _: Choice("triton", "test"))
    monkeypatch.setattr(linear, "make_runtime", make_runtime)


@pytest.mark.skipif(not shutil.which("g++"), reason="the compiler needs g++")
@pytest.mark.parametrize("bits", [4, 16])
def test_compiled_and_fused_model_equals_the_eager_one(
    tmp_path, triton, monkeypatch, tmp_path_factory, bits
):
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass

    for name in ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR"):  # or the pass would not run again
        monkeypatch.setenv(name, str(tmp_path_factory.mktemp("cache")))
    # It names operators that only a GPU build has.
    monkeypatch.setattr(FixFunctionalizationPass, "__call__", lambda self, graph: None)
    checkpoint = tmp_path
    write_checkpoint(checkpoint, Recipe(bits=bits, shards=2, layers=LAYERS))
    torch.manual_seed(0)
    token_ids = torch.randint(0, VOCAB, (9,))
    _kept, eager = run_model(engine_config(checkpoint), token_ids)
    calls, lines = [], []
    monkeypatch.setattr(_compat.logger, "info", lambda text, *rest: lines.append(text % rest))
    kernels = ("rmsnorm_kron", "rmsnorm_kron_quant", "silu_mul_kron", "silu_mul_kron_quant")
    for name in kernels:
        monkeypatch.setattr(fusion, name, lambda *_, name=name: calls.append(name))  # warm-up only
    runs, interpret = [], Program.interpret
    monkeypatch.setattr(
        Program,
        "interpret",
        lambda self, kind, inputs: (
            runs.append(len(self.steps)) if kind == "cpu" else None,
            interpret(self, kind, inputs),
        )[1],
    )
    _, fused = run_model(compiled_config(checkpoint), token_ids)
    assert set(calls) == {name for name in kernels if name.endswith("_quant") == (bits < 16)}
    (line,) = [line for line in lines if "FlatQuant fusion" in line]
    assert line.endswith(
        f"tokens: {2 * LAYERS} RMSNorm and {LAYERS} SiLU*mul fused with the transform after them, "
        f"{LAYERS} transforms on their own"
    )
    # From attention to attention one call: o, gate_up and down of a layer and the next one's qkv. With 16-bit
    # activations the products are not ours.
    assert runs == ([2, *[8] * (LAYERS - 1), 6] if bits < 16 else [])
    torch.testing.assert_close(fused, eager, rtol=0, atol=2e-4)


def hash_of(folder, monkeypatch, switch):
    """The part of vLLM's compile-cache key that its configuration makes, after a model was built."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model

    monkeypatch.setenv(fusion.SWITCH, switch)
    start_single_process()
    vllm_config = compiled_config(folder)
    with set_current_vllm_config(vllm_config):
        initialize_model(vllm_config)
    return vllm_config.compute_hash(), vllm_config.compilation_config


def test_switch_and_cache_key(checkpoint, triton, monkeypatch):
    on, compilation = hash_of(checkpoint, monkeypatch, "1")
    assert compilation.inductor_compile_config[PASS].uuid().startswith("flatquant-")
    off, compilation = hash_of(checkpoint, monkeypatch, "0")
    assert PASS not in compilation.inductor_compile_config
    assert on != off
    assert hash_of(checkpoint, monkeypatch, "1")[0] == on
    with pytest.raises(UnsupportedError, match=f"{fusion.SWITCH} is 'yes'; set it to 0"):
        hash_of(checkpoint, monkeypatch, "yes")


@pytest.mark.parametrize(
    "eager, backend, recipe, fuses",
    [
        (False, "triton", Recipe(), True),
        (True, "triton", Recipe(), False),
        (False, "torch", Recipe(), False),
        (False, "triton", Recipe(bits=16), True),
        (False, "triton", Recipe(bits=16, no_site=("qkv", "gate_up", "down")), False),
        (False, "triton", Recipe(bits=16, no_site=("qkv", "o", "gate_up")), True),
        (False, "triton", Recipe(no_site=("qkv", "o", "gate_up", "down")), True),
    ],
    ids=["w4a4", "eager", "torch", "w4a16", "a16 without", "a16 with down's", "a4 without transforms"],
)
def test_when_there_is_something_to_fuse(checkpoint, eager, backend, recipe, fuses):
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(engine_config(checkpoint, enforce_eager=eager)):
        assert fusion.active(backend, parse_spec(recipe.quantization_config())) == fuses


def test_users_own_pass_runs_after_ours(checkpoint):
    from vllm.compilation.passes.inductor_pass import CallableInductorPass
    from vllm.config import set_current_vllm_config

    vllm_config, order = compiled_config(checkpoint), []
    options = vllm_config.compilation_config.inductor_compile_config
    options[PASS] = CallableInductorPass(lambda graph: order.append("theirs"), uuid="theirs")
    with set_current_vllm_config(vllm_config):
        for _ in range(2):
            _compat.add_graph_pass(lambda graph: order.append("ours"), "ours")
    options[PASS](torch.fx.Graph())
    assert order == ["ours", "theirs"]
    assert options[PASS].uuid() == "ours, theirs"
