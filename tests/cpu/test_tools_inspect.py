"""`flatquant inspect` and `flatquant diff` on small checkpoints."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import make_model

from vllm_flatquant.calibration.errors import UserError
from vllm_flatquant.choice import kernel_name, suitable_scheme
from vllm_flatquant.kernels.pack import pack_codes, unpack_codes
from vllm_flatquant.tools.diff import over_blocks
from vllm_flatquant.tools.inspection import BFLOAT16, FLOAT32, _error_lines, check_logits

ROOT = Path(__file__).parents[2]
BLOCKED = """
import sys
class Block:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("vllm", "triton"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import torch
torch.cuda.is_available = lambda: CUDA
torch.cuda.get_device_capability = lambda *_: (9, 0)
sys.argv = ["flatquant", "inspect", FOLDER, "--json"]
from vllm_flatquant.cli import main
main()
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two checkpoints of one model, that differ in their scheme's clips and seeds."""
    import numpy as np
    from tiny_model import random_tokens

    from vllm_flatquant.calibration.quantize import quantize
    from vllm_flatquant.calibration.recipe import make_recipe

    folder = tmp_path_factory.mktemp("made")
    np.save(folder / "calib.npy", random_tokens(4, 24).numpy())
    model = make_model(folder / "model")
    settings = {"samples": 4, "seq_len": 24, "epochs": 1}
    return [
        quantize(model, folder / name, make_recipe(**settings, **more), str(folder / "calib.npy"), "cpu")
        for name, more in (("a", {}), ("b", {"seed": 1, "scheme": "w4a8"}))
    ]


def test_inspect_tells_that_the_tokenizer_is_missing(run, checkpoints, tmp_path):
    copy = tmp_path / "with a space"
    shutil.copytree(checkpoints[0], copy)
    (copy / "tokenizer.json").write_text("{}")
    shown = run("inspect", copy)[1]
    assert "\ntokenizer " not in shown
    assert f"vllm serve '{copy}'" in shown
    (copy / "tokenizer.json").unlink()
    assert "tokenizer   none here: `vllm serve` needs --tokenizer" in run("inspect", copy)[1]


def test_inspect_tells_sizes_errors_and_the_machine(run, checkpoints):
    folder = checkpoints[0]
    status, out, err = run("inspect", folder, "--json")
    assert status == 0, err
    found = json.loads(out.splitlines()[-1])
    tensors = load_file(folder / "model.safetensors")
    sizes = {"weights": 0, "scales": 0, "transforms": 0, "other": 0}
    for name, tensor in tensors.items():
        kind = next((k for k in ("packed", "_scale", "_transform") if k in name), "other")
        kind = {"packed": "weights", "_scale": "scales", "_transform": "transforms"}.get(kind, kind)
        sizes[kind] += tensor.nbytes
    assert found["bytes"] == sizes
    weights = 2 * sizes["weights"]  # two to a byte
    expected = 8 * (sizes["weights"] + sizes["scales"] + sizes["transforms"]) / weights
    assert found["bits_per_weight"] == pytest.approx(expected)
    log = [json.loads(line) for line in (folder / "calibration_log.jsonl").read_text().splitlines()]
    assert [e["error_after"] for e in found["errors"]] == [e["error_after"] for e in log]
    assert (found["here"]["backend"], found["scheme"]) == ("torch", "w4a4")
    assert f"block 1    {log[1]['error_before']:.2e} before training" in out


def test_where_nothing_was_trained_the_first_error_is_that_at_the_start():
    report = {"block": 0, "error_before": 2.0, "error_after": 1.0, "trained": False}
    assert "2.00e+00 at the start, 1.00e+00 finished  (-50%)" in _error_lines([report])[1]


def test_an_end_to_end_stage_has_a_line(run, checkpoints, tmp_path):
    folder, judged = shutil.copytree(checkpoints[0], tmp_path / "copy"), []
    log = folder / "calibration_log.jsonl"
    assert "end to end" not in run("inspect", folder)[1]
    for before, after, undone in ((0.5, 0.25, False), (0.5, 0.75, True), (None, None, False)):
        stage = {"kl_last_epoch": 1.0, "kl_held_out_before": before, "kl_held_out_after": after}
        log.write_text(json.dumps({**stage, "undone": undone}) + "\n")
        judged += [line for line in run("inspect", folder)[1].splitlines() if "end to end" in line]
    assert "0.5000 before, 0.2500 after" in judged[0] and "undone" not in judged[0]
    assert "0.7500 after; undone" in judged[1] and "not judged" in judged[2]


def test_inspect_without_a_log_or_with_a_damaged_one(run, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints[0], tmp_path / "copy")
    (folder / "calibration_log.jsonl").write_text("{")
    status, _, err = run("inspect", folder)
    assert (status, "calibration_log.jsonl is damaged" in err) == (1, True)
    (folder / "calibration_log.jsonl").unlink()
    status, out, _ = run("inspect", folder)
    assert (status, "no calibration_log.jsonl" in out) == (0, True)


@pytest.mark.parametrize("cuda", [False, True])
def test_inspect_needs_neither_vllm_nor_triton(checkpoints, cuda):
    script = BLOCKED.replace("CUDA", str(cuda)).replace("FOLDER", repr(str(checkpoints[0])))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    here = json.loads(done.stdout.splitlines()[-1])["here"]
    assert here["backend"] == ("triton" if cuda else "torch")
    assert ("Gluon" in here["kernel"]) == cuda


@pytest.mark.parametrize(
    ("capability", "scheme"),
    [(None, "w4a8"), (75, "w4a16"), (80, "w4a8"), (89, "w4a8"), (90, "w4a8"), (103, "w4a16")],
)
def test_suitable_scheme(capability, scheme):
    assert suitable_scheme(capability).name == scheme
    assert suitable_scheme(capability).reason


def test_kernel_names():
    assert "PyTorch" in kernel_name(4, 4, None)
    assert "PyTorch" in kernel_name(4, 4, 75)
    assert "Gluon" in kernel_name(4, 8, 90)
    assert "plain Triton" in kernel_name(4, 4, 89)
    assert "vLLM's own weight-only" in kernel_name(4, 16, 90)
    assert "CUTLASS" in kernel_name(8, 8, 90)


def test_the_same_checkpoint_has_status_0(run, checkpoints, tmp_path):
    copy = shutil.copytree(checkpoints[0], tmp_path / "copy")
    status, out, _ = run("diff", checkpoints[0], copy)
    assert status == 0
    assert "the same checkpoint" in out
    (copy / "README.md").write_text("---\nlicense: mit\n---\n")  # results and prose are no difference
    assert run("diff", checkpoints[0], copy)[0] == 0


def test_different_checkpoints_have_status_1(run, checkpoints):
    status, out, _ = run("diff", *checkpoints, "--json")
    assert status == 1
    found = json.loads(out.splitlines()[-1])
    assert found["config"]["quantization_config.activations.bits"] == [4, 8]
    assert found["recipe"] == {"scheme": ["w4a4", "w4a8"], "seed": [0, 1]}
    first, second = (load_file(folder / "model.safetensors") for folder in checkpoints)
    name = "model.layers.0.mlp.down_proj.weight_packed"
    codes = [unpack_codes(t[name], 4) for t in (first, second)]
    value = found["tensors"]["values"][name]
    assert value["changed"] == pytest.approx((codes[0] != codes[1]).double().mean().item())
    assert value["max_difference"] == (codes[0].int() - codes[1].int()).abs().max().item()
    equal = sum(torch.equal(first[n], second[n]) for n in first)
    assert found["tensors"]["equal"] == equal


def test_what_differs_in_all_blocks_is_said_once(run, checkpoints):
    status, out, _ = run("diff", *checkpoints)
    assert status == 1
    found = json.loads(run("diff", *checkpoints, "--json")[1].splitlines()[-1])["tensors"]["values"]
    tail = "mlp.down_proj.weight_packed"
    changed = sorted(100 * found[f"model.layers.{i}.{tail}"]["changed"] for i in (0, 1))
    assert changed[0] < changed[1]
    assert f"tensor model.layers.0-1.{tail}: {changed[0]:.2f}% to {changed[1]:.2f}% of the codes" in out
    lines = [line for line in out.splitlines() if line.startswith("tensor ")]
    assert len(lines) < 0.7 * len(found)


def test_blocks_are_named_by_ranges():
    names = [f"model.layers.{i}.a" for i in (0, 1, 2, 10, 4)] + [
        "model.layers.3.a",
        "norm",
        "b.layers.x",
    ]
    assert over_blocks([(name, len(name)) for name in names[:5]]) == [
        ("model.layers.0-2,4,10.a", [16, 16, 16, 17, 16])
    ]
    kinds = [(name, "odd" if "3" in name else "even") for name in names]
    assert [name for name, _ in over_blocks(kinds, lambda kind: kind)] == [
        "model.layers.0-2,4,10.a",
        "model.layers.3.a",
        "norm",
        "b.layers.x",
    ]


def test_one_code_a_shape_a_missing_tensor_and_results(run, checkpoints, tmp_path):
    copy = shutil.copytree(checkpoints[0], tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    packed = "model.layers.1.self_attn.o_proj.weight_packed"
    codes = unpack_codes(tensors[packed], 4)
    codes[2, 5] = -8 if codes[2, 5] > 0 else 7
    change = (codes[2, 5] - unpack_codes(tensors[packed], 4)[2, 5]).abs().item()
    tensors[packed] = pack_codes(codes, 4)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    del tensors["lm_head.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    del index["weight_map"]["lm_head.weight"]
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    status, out, _ = run("diff", checkpoints[0], copy, "--json")
    assert status == 1
    found = json.loads(out.splitlines()[-1])["tensors"]
    assert found["only_first"] == ["lm_head.weight"]
    assert found["shape"] == {"model.norm.weight": ["BF16 [48]", "BF16 [47]"]}
    assert list(found["values"]) == [packed]
    assert found["values"][packed] == {
        "max_difference": change,
        "changed": pytest.approx(1 / codes.numel()),
    }


def test_recorded_results_are_shown_side_by_side(run, checkpoints, tmp_path):
    from huggingface_hub import EvalResult

    from vllm_flatquant.calibration.card import add_results

    copy = shutil.copytree(checkpoints[0], tmp_path / "copy")
    question = dict.fromkeys(("task_type", "dataset_type", "dataset_name"), "wikitext2")
    add_results(
        copy, [EvalResult(**question, metric_type="p", metric_name="perplexity", metric_value=7)]
    )
    status, out, _ = run("diff", checkpoints[0], copy)
    assert status == 0
    assert "wikitext2, perplexity: not measured / 7" in out


def test_trouble_has_status_2(run, checkpoints, tmp_path):
    status, _, err = run("diff", checkpoints[0], tmp_path / "none")
    assert status == 2
    assert err.startswith("flatquant: model folder")
    copy = shutil.copytree(checkpoints[0], tmp_path / "copy")
    (copy / "recipe.yaml").write_text("a: [")
    status, _, err = run("diff", checkpoints[0], copy)
    assert (status, "recipe.yaml is no YAML" in err) == (2, True)


def test_an_8_bit_head_counts_with_the_rest_and_compares_by_code(run, tmp_path, model, calib):
    from vllm_flatquant.calibration.quantize import quantize
    from vllm_flatquant.calibration.recipe import make_recipe

    recipe = make_recipe(samples=4, seq_len=24, epochs=0, lm_head=8)
    out = quantize(model, tmp_path / "out", recipe, str(calib), "cpu")
    found = json.loads(run("inspect", out, "--json")[1].splitlines()[-1])
    tensors = load_file(out / "model.safetensors")
    packed = [t.nbytes for n, t in tensors.items() if n.endswith("packed") and "lm_head" not in n]
    assert found["bytes"]["weights"] == sum(packed)
    copy = shutil.copytree(out, tmp_path / "copy")
    tensors["lm_head.weight_packed"][3, 4] ^= 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    status, printed, err = run("diff", out, copy, "--json")
    assert status == 1, err
    values = json.loads(printed.splitlines()[-1])["tensors"]["values"]
    assert list(values) == ["lm_head.weight_packed"]
    assert values["lm_head.weight_packed"]["max_difference"] == 1


def test_a_code_that_moves_early_is_no_damage():
    """Exact first positions and a moderate rest pass where codes may move; damage from the start does not."""
    top = torch.arange(8.0, 0, -1).repeat(16, 1) * 2
    ids = torch.arange(8).repeat(16, 1)
    moved = top.clone()
    moved[5:, 1:] += 0.4
    coarse, strict = BFLOAT16[4], FLOAT32
    assert "ok" in check_logits("vllm", moved, ids, top, True, strict, coarse)
    with pytest.raises(UserError, match="FAILED"):
        check_logits("vllm", moved, ids, top, True, strict)
    moved[0, 1:] += 0.4
    with pytest.raises(UserError, match="FAILED"):
        check_logits("vllm", moved, ids, top, True, strict, coarse)
