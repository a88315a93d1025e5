"""Files of a model cannot run code: no pickle, no unsafe YAML, no remote code, in any source file of ours."""

import ast
import json
from pathlib import Path

import pytest
from tiny_model import edit_config

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    file
    for folder in ("vllm_flatquant", "kernels", "calibration", "benchmarks", "examples", ".ci")
    for file in (ROOT / folder).rglob("*.py")
)
PICKLES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
ERRORS_ONLY = {"vllm_flatquant/tools/foreign_official.py"}
"""Imports pickle for the name of its error alone."""


def offences(source: str) -> list[str]:
    """What a source file does that it must not, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [(node.module or "").partition(".")[0]]
        found += [f"{node.lineno}: import {name}" for name in names if name in PICKLES]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        bad = (
            called in ("eval", "exec", "os.system")
            or called in ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all")
            or called in ("yaml.full_load", "yaml.full_load_all")
            or called == "torch.load" and given.get("weights_only") != "True"
            or called.startswith("pickle.")
            or given.get("allow_pickle", "False") != "False"
            or given.get("trust_remote_code", "False") != "False"
            or called.startswith("subprocess.") and given.get("shell", "False") != "False"
        )  # fmt: skip
        if bad:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("file", SOURCES, ids=[str(f.relative_to(ROOT)) for f in SOURCES])
def test_no_source_reads_what_can_run_code(file):
    found = offences(file.read_text(encoding="utf-8"))
    if str(file.relative_to(ROOT)) in ERRORS_ONLY:
        found = [what for what in found if not what.endswith("import pickle")]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from pickle import loads", "import torch\ntorch.load(f)"),
        *("torch.load(f, weights_only=False)", "yaml.load(f)", "yaml.unsafe_load(f)", "yaml.full_load_all(f)"),
        *("np.load(f, allow_pickle=True)", "AutoConfig.from_pretrained(f, trust_remote_code=True)"),
        *("from_pretrained(f, trust_remote_code=flag)", "eval(x)", "subprocess.run(x, shell=True)"),
    ],
)  # fmt: skip
def test_the_search_finds_them(source):
    assert offences(source)


def test_the_search_accepts_the_safe_forms():
    safe = "yaml.safe_load(f)\ntorch.load(f, weights_only=True)\nnp.load(f, allow_pickle=False)\nmodel.eval()"
    assert offences(safe) == []


CODE = "open({marker!r}, 'w').write('ran')\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n"


@pytest.mark.parametrize("model_type", ["llama", "unheard-of"])
@pytest.mark.parametrize("command", ["quantize", "eval", "inspect"])
def test_code_beside_a_model_never_runs(run, model, calib, tmp_path, model_type, command):
    marker = tmp_path / "ran"
    (model / "code.py").write_text(CODE.format(marker=str(marker)))
    classes = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M", "AutoTokenizer": "code.C"}
    edit_config(model, auto_map=classes, model_type=model_type)
    (model / "tokenizer_config.json").write_text(json.dumps({"auto_map": classes}))
    options = {
        "quantize": ("--out", tmp_path / "out", "--calib", calib, "--samples", 4, "--seq-len", 24, "--epochs", 0),
        "eval": ("--tokens", calib, "--seq-len", 8),
        "inspect": (),
    }[command]  # fmt: skip
    status, _, err = run(command, model, *options)
    assert not marker.exists()
    assert "Traceback" not in err
    if model_type != "llama" or command == "inspect":
        assert status == 1
        assert len(err.strip().splitlines()) == 1


def test_yaml_tags_do_not_run(run, model, calib, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"scheme: !!python/object/apply:os.system ['touch {tmp_path / 'ran'}']\n")
    status, _, err = run(
        "quantize", model, "--out", tmp_path / "out", "--recipe", recipe, "--calib", calib
    )
    assert not (tmp_path / "ran").exists()
    assert status == 1
    assert len(err.strip().splitlines()) == 1
    assert "recipe.yaml" in err
