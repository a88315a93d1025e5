"""The last stage: what is trained is what is written, the loss falls, and the checkpoint serves as usual."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_model import make_model, random_tokens

from vllm_flatquant.calibration import endtoend
from vllm_flatquant.calibration.endtoend import (
    LATENT,
    distill,
    finished_hidden,
    generated_tokens,
    held_out,
    kl_divergence,
    make_students,
    run_students,
)
from vllm_flatquant.calibration.errors import UserError
from vllm_flatquant.calibration.quantize import Callbacks, make_spec, quantize
from vllm_flatquant.calibration.quantize_block import quantize_block
from vllm_flatquant.calibration.recipe import make_recipe
from vllm_flatquant.calibration.reference import load_reference
from vllm_flatquant.calibration.source import ModelSource
from vllm_flatquant.calibration.streams import record_inputs
from vllm_flatquant.tools.inspection import verify_folder

CPU = torch.device("cpu")
SMALL = {
    "samples": 4,
    "seq_len": 24,
    "epochs": 2,
    "batch_size": 2,
    "distill_epochs": 8,
    "distill_lr": 1e-3,
    "distill_weight_lr": 1e-2,
}


def finished_blocks(folder, model_type="llama", tied=False, **settings):
    """Source, recipe, spec, tokens and the blocks' tensors before the last stage."""
    recipe = make_recipe(**SMALL | settings)
    source = ModelSource(make_model(folder / "model", model_type, tie_word_embeddings=tied))
    spec, tokens = make_spec(source, recipe), random_tokens(4, 24)
    x, kwargs = record_inputs(source, tokens, CPU)
    x_q, blocks = x.clone(), []
    for i in range(source.num_blocks):
        x, x_q, tensors, _ = quantize_block(source, i, recipe, spec, x, x_q, kwargs[i], CPU)
        blocks.append(tensors)
    return source, recipe, spec, tokens, blocks


@pytest.fixture
def no_judge(monkeypatch):
    """All rows are trained on, and whatever comes out stays: random text teaches nothing about other text."""
    monkeypatch.setattr(endtoend, "HELD_OUT", 0)


def without_latents(blocks):
    return [{n: t for n, t in b.items() if not n.endswith(LATENT)} for b in blocks]


CASES = [
    {"scheme": "w4a4", "kv": 4, "shards": 2},
    {"scheme": "w4a8", "kv": 8, "rounding": "gptq"},
    {"scheme": "w4a16", "group_size": 8},
]


@pytest.mark.parametrize("settings", CASES, ids=lambda s: s["scheme"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_untrained_students_are_the_finished_blocks(tmp_path, model_type, settings):
    source, _, spec, tokens, blocks = finished_blocks(tmp_path, model_type, **settings)
    students = make_students(source, blocks, spec, CPU)
    for student, tensors in zip(students, without_latents(blocks), strict=True):
        out = student.export()
        assert out.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert out[name].dtype == tensor.dtype, name
            tolerance = 1e-6 if name.endswith(".clip") else 0  # the logit and back
            torch.testing.assert_close(out[name], tensor, rtol=tolerance, atol=0, msg=name)
    x, kwargs = record_inputs(source, tokens, CPU)
    with torch.no_grad():
        got = run_students(torch.nn.ModuleList(students), x, kwargs)
    expected = finished_hidden(source, without_latents(blocks), tokens, spec, CPU)
    # Sums in another order flip a few roundings; the quantization error itself is above 0.1.
    assert (got - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize("settings", CASES, ids=lambda s: s["scheme"])
def test_every_tensor_is_trained_and_written_as_trained(tmp_path, no_judge, settings):
    source, recipe, spec, tokens, blocks = finished_blocks(tmp_path, distill_epochs=30, **settings)
    kept = without_latents(blocks)
    after, others, report = distill(source, blocks, tokens, recipe, spec, CPU)
    assert report.skipped_steps == 0
    assert report.kl_last_epoch < 0.8 * report.kl_first_epoch
    for old, new in zip(kept, after, strict=True):
        assert new.keys() == old.keys()
        unchanged = {n for n in old if torch.equal(old[n], new[n])}
        assert not unchanged
    assert list(others) == ["model.norm.weight"]

    # The written numbers, run by the references, have the loss that training reached.
    head = source.files.tensor("lm_head.weight").float()
    norm = source.model.model.norm

    def logits(hidden, gain):
        module = type(norm)(source.config.hidden_size, source.config.rms_norm_eps)
        module.weight.data = gain.float()
        return module(hidden) @ head.T

    with torch.no_grad():
        target = load_reference(source.path)(tokens).logits

    def loss(tensors, gain):
        return kl_divergence(logits(finished_hidden(source, tensors, tokens, spec, CPU), gain), target)

    with torch.no_grad():
        before = loss(kept, source.files.tensor("model.norm.weight"))
        written = loss(after, others["model.norm.weight"])
    assert written < 0.8 * before
    assert written < 1.1 * report.kl_last_epoch  # the mean over an epoch in which it still fell


@pytest.mark.parametrize(("rate", "undone"), [(1e-3, False), (1.0, True)])
def test_training_that_makes_held_out_rows_worse_is_undone(tmp_path, calib, rate, undone):
    model, notes, bars = make_model(tmp_path / "m"), [], {}
    recipe = make_recipe(**SMALL | {"distill_lr": rate, "distill_generated": 40})
    tell = Callbacks(note=notes.append, progress=lambda bar, part: bars.setdefault(bar, []).append(part))
    out = quantize(model, tmp_path / "out", recipe, str(calib), "cpu", callbacks=tell)
    assert [*bars][-2:] == ["write", "distill"]
    assert all(
        (parts[0], parts[-1]) == (0, 1) for parts in bars.values() if parts is not bars["quantize"]
    )
    plain = quantize(
        model, tmp_path / "plain", recipe.model_copy(update={"distill_epochs": 0}), str(calib), "cpu"
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (plain, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before) == undone
    report = json.loads((out / "calibration_log.jsonl").read_text().splitlines()[-1])
    assert report["undone"] == undone
    assert (report["kl_held_out_after"] < report["kl_held_out_before"]) != undone
    assert "40 rows" in notes[0] and "--resume starts this stage again" in notes[0]
    assert [("was undone" in note) for note in notes[1:]] == [undone]
    assert f", then {recipe.distill_epochs} epochs end to end" in (out / "README.md").read_text()
    assert "ok" in next(verify_folder(str(out), "reference"))


def test_held_out_rows_are_not_trained_on(tmp_path):
    source, recipe, spec, tokens, blocks = finished_blocks(tmp_path)
    assert [*held_out(4)] == [3] and [*held_out(128)] == [*range(120, 128)] and not held_out(3)
    other = torch.cat([tokens[:3], tokens[3:].flip(1)])
    reports = [distill(source, blocks, rows, recipe, spec, CPU)[2] for rows in (tokens, other)]
    assert reports[0].kl_held_out_before != reports[1].kl_held_out_before
    few = distill(source, blocks, tokens[:3], recipe, spec, CPU)[2]
    assert not few.worse and "nan" not in str(few) and "use more --samples" in str(few)
    larger = recipe.model_copy(update={"distill_batch_size": 3})
    _, _, whole = distill(source, blocks, tokens, larger, spec, CPU)
    assert recipe.distill_rows == 2 and whole.kl_last_epoch != reports[0].kl_last_epoch
    assert reports[0].kl_last_epoch == reports[1].kl_last_epoch


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_are_trained_and_written_as_trained(tmp_path, calib, no_judge, tied):
    settings = {"distill_table_lr": 1e-3, "distill_epochs": 2}
    source, recipe, spec, tokens, blocks = finished_blocks(tmp_path, tied=tied, **settings)
    _, others, report = distill(source, blocks, tokens, recipe, spec, CPU)
    assert report.kl_last_epoch < report.kl_first_epoch
    tables = {n for n in source.other_names() if n.endswith(("embed_tokens.weight", "lm_head.weight"))}
    assert others.keys() == {"model.norm.weight", *tables}
    for name in tables:
        before, after = source.files.tensor(name), others[name]
        assert after.dtype == before.dtype and not torch.equal(before, after)
        assert (after.float() - before.float()).norm() < 0.05 * before.float().norm()
    assert len(tables) == 2 - tied
    out = quantize(source.path, tmp_path / "out", recipe, str(calib), "cpu")
    written = load_file(out / "model.safetensors")
    assert tables < written.keys() and not any(
        torch.equal(written[n], source.files.tensor(n)) for n in tables
    )
    assert "ok" in next(verify_folder(str(out), "reference"))


def test_frozen_codes_stay(tmp_path, no_judge):
    source, recipe, spec, tokens, blocks = finished_blocks(tmp_path, distill_weight_lr=0.0)
    after, _, report = distill(source, blocks, tokens, recipe, spec, CPU)
    assert report.kl_last_epoch < report.kl_first_epoch
    for old, new in zip(blocks, after, strict=True):
        for name in new:
            if name.endswith("weight_packed"):
                assert torch.equal(old[name], new[name])


def test_pipeline_with_a_last_stage(tmp_path):
    model = make_model(tmp_path / "m")
    recipes = {"plain": 0, "distilled": 4}
    tokens, divergence = random_tokens(16, 24), {}  # four rows judge; one of 24 random tokens is noise
    np.save(tmp_path / "calib.npy", tokens.numpy())
    with torch.no_grad():
        teacher = load_reference(model)(tokens).logits
    for name, epochs in recipes.items():
        recipe = make_recipe(
            **SMALL | {"samples": 16, "distill_epochs": epochs, "distill_generated": 40 if epochs else 0}
        )
        out = quantize(model, tmp_path / name, recipe, str(tmp_path / "calib.npy"), "cpu")
        assert "ok" in next(verify_folder(str(out), "reference"))
        with torch.no_grad():
            divergence[name] = float(kl_divergence(load_reference(out)(tokens).logits, teacher))
    assert divergence["distilled"] < 0.8 * divergence["plain"]
    assert not [n for n in load_file(out / "model.safetensors") if n.endswith(LATENT)]
    log = [json.loads(line) for line in (out / "calibration_log.jsonl").read_text().splitlines()]
    assert log[-1]["kl_last_epoch"] < log[-1]["kl_first_epoch"]
    assert log[-1]["undone"] is False
    assert log[-1]["seconds"] > 0 and log[-1]["peak_memory_gb"] > 0


def test_generated_rows_repeat_by_seed_and_follow_the_model(tmp_path):
    source = ModelSource(make_model(tmp_path / "model"))
    tokens = random_tokens(4, 24)
    rows = generated_tokens(source, tokens, 6, 0, CPU)
    assert rows.shape == (6, 24)
    assert torch.equal(rows, generated_tokens(source, tokens, 6, 0, CPU))
    assert not torch.equal(rows, generated_tokens(source, tokens, 6, 1, CPU))
    with torch.no_grad():
        own = load_reference(source.path)(rows).logits[:, 11:-1].log_softmax(-1)
    mean = own.gather(-1, rows[:, 12:, None]).mean()
    assert mean > own.mean() + 0.5  # likelier under the model than a random token


@pytest.mark.parametrize(("count", "used"), [(3, 3), (9, 7)])
def test_rows_that_judge_the_last_stage_prompt_nothing(tmp_path, count, used):
    source = ModelSource(make_model(tmp_path / "model"))
    tokens = torch.arange(count)[:, None].expand(count, 4)  # a row's number is its text
    rows = generated_tokens(source, tokens, 60, 0, CPU)
    assert rows[:, 0].unique().tolist() == [*range(used)] and len(held_out(count)) == count - used
    assert torch.equal(rows[:, 0], rows[:, 1])  # the prompt is half the row


def test_the_model_reads_token_0_of_a_prompt(tmp_path):
    source = ModelSource(make_model(tmp_path / "model"))
    tokens = random_tokens(4, 24)
    tokens[:, ::2] = 0
    rows = generated_tokens(source, tokens, 6, 0, CPU)
    network, expected = load_reference(source.path), rows[:, :12]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(12):
            following = network(expected).logits[:, -1].softmax(-1)
            expected = torch.cat([expected, torch.multinomial(following, 1)], 1)
    assert (rows[:, :12] == 0).any() and torch.equal(rows, expected)


def test_memory_is_known_before_it_is_needed(tmp_path):
    source, recipe, spec, tokens, blocks = finished_blocks(tmp_path, kv=4, epochs=0)
    kwargs, rows = record_inputs(source, tokens[:1], CPU)[1], tokens[: recipe.batch_size]
    students = torch.nn.ModuleList(make_students(source, blocks, spec, CPU))
    ends, kept = endtoend.Ends(source, CPU), {}
    teacher = endtoend.Teacher(source, ends, CPU)

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        target = teacher(rows, kwargs)
        loss = kl_divergence(ends(run_students(students, ends.embed(rows), kwargs)), target)
    loss.backward()
    steps = [p for n, p in students.named_parameters() if n.endswith(".steps")]
    optimizer = 4 * 4 * sum(p.numel() for p in steps)  # value, gradient, two moments
    for p in students.parameters():
        kept.pop(p.untyped_storage().data_ptr(), None)
    fixed = [p for p in [*teacher.parameters(), *ends.parameters()] if not p.grad_fn and p.grad is None]
    for t in [*fixed, *ends.buffers()]:
        kept[t.untyped_storage().data_ptr()] = t
    used = optimizer + sum(t.untyped_storage().nbytes() for t in kept.values())
    assert 1.0 < sum(endtoend.memory_needed(source, recipe)) / used < 1.6


def test_a_model_that_does_not_fit_is_refused_before_its_blocks(tmp_path, calib, monkeypatch):
    monkeypatch.setattr(endtoend, "free_memory", lambda device: 1000)
    model = make_model(tmp_path / "m")
    with pytest.raises(UserError, match="takes about .* GB .* are free; use a recipe without e2e"):
        quantize(model, tmp_path / "out", make_recipe(**SMALL), str(calib), "cpu")
    assert {p.name for p in tmp_path.iterdir()} == {"m", "calib.npy"}
