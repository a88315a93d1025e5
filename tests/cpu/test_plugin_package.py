"""The package's shape: light to import, and harmless to Transformers."""

import importlib.metadata
import logging
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import vllm_flatquant

ROOT = Path(__file__).parents[2]


def run_python(code: str) -> str:
    """Standard output of ``code`` run by this interpreter in the repository root."""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_the_package_imports_neither_torch_nor_vllm():
    code = (
        "import sys, vllm_flatquant; print([m for m in ('torch', 'vllm', 'triton') if m in sys.modules])"
    )
    assert run_python(code) == "[]"


@pytest.mark.parametrize("folder", ["kernels", "calibration"])
def test_no_init_file_in_top_level_folders(folder):
    # With one, Transformers takes the folder `kernels` for the package of that name and breaks.
    assert list((ROOT / folder).glob("*.py"))
    assert not (ROOT / folder / "__init__.py").exists()
    link = ROOT / "vllm_flatquant" / folder
    assert link.is_symlink() and link.resolve() == ROOT / folder


def test_transformers_models_import_from_the_repository_root():
    assert (
        run_python("from transformers import LlamaForCausalLM as m; print(m.__name__)")
        == "LlamaForCausalLM"
    )


def test_only_compat_imports_vllm():
    plugin = [
        "attention",
        "backend",
        "config",
        "errors",
        "files",
        "linear",
        "loading",
        "ops",
        "sites",
        "spec",
    ]
    for name in plugin:
        text = (ROOT / "vllm_flatquant" / f"{name}.py").read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) (vllm\b|\.calibration)", text, re.MULTILINE), name


def test_register_is_idempotent_and_leaves_cuda_alone():
    code = """
import torch, vllm_flatquant
vllm_flatquant.register(); vllm_flatquant.register()
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import linear, quantization
print(quantization.get_quantization_config("flatquant").__name__,
      quantization.QUANTIZATION_METHODS.count("flatquant"),
      linear.WEIGHT_LOADER_V2_SUPPORTED.count("FlatQuantLinearMethod"),
      hasattr(EngineArgs.create_engine_config.__wrapped__, "__wrapped__"),
      torch.cuda.is_initialized())
"""
    assert run_python(code).splitlines()[-1] == "FlatQuantConfig 1 1 False False"


def test_unknown_vllm_is_a_warning_and_not_an_error(monkeypatch, caplog):
    # As if a vLLM from the future had moved something that _compat imports.
    monkeypatch.setitem(sys.modules, "vllm_flatquant._compat", None)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    vllm_flatquant.register()
    assert f"works with vLLM {vllm_flatquant.VLLM_VERSIONS}; not registered" in caplog.text


def test_stub_gives_the_cpu_build_the_name_that_the_command_wants(tmp_path):
    stub = runpy.run_path(str(ROOT / ".ci" / "cpu_vllm_stub.py"))
    folder = stub["write_stub"](tmp_path, "0.32.0+cpu")
    assert {file.name for file in folder.iterdir()} == {"METADATA", "INSTALLER", "RECORD"}
    (found,) = importlib.metadata.distributions(name="vllm", path=[str(tmp_path)])
    assert found.version == "0.32.0+cpu"
    assert all((tmp_path / file).is_file() for file in found.files)


def test_version(run):
    assert run("--version") == (0, f"vllm-flatquant {vllm_flatquant.__version__}\n", "")
