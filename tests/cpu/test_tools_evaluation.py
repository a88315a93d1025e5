"""`flatquant eval`: the named protocols, lm-eval's tasks, the original beside, and the card that keeps them."""

import gzip
import json
import math
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from eval_process import ROOT, evaluate
from huggingface_hub import ModelCard
from tiny_model import edit_config, edit_weights, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_flatquant.calibration.errors import UserError
from vllm_flatquant.calibration.quantize import quantize
from vllm_flatquant.calibration.recipe import make_recipe
from vllm_flatquant.tools.evaluation import default_dtype
from vllm_flatquant.tools.protocols import evaluation_windows
from vllm_flatquant.tools.served import small_cache

TINY = ROOT / "examples" / "tiny-llama"
LINES = ["", " = Title = ", "", "def one():", "    return 1", "", "The second part is prose."] * 120


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    recipe = make_recipe(samples=2, seq_len=64, epochs=0)
    return quantize(TINY, tmp_path_factory.mktemp("made") / "out", recipe, "stdlib", "cpu")


@pytest.fixture
def wiki(tmp_path):
    file = tmp_path / "wiki.test.raw.txt"
    file.write_text("\n".join(LINES) + "\n")
    return file


def documents(count):
    return [{"text": f"Document {i} says that {i} + 1 = {i + 1}.\n", "url": "x"} for i in range(count)]


def test_wikitext2_is_rows_joined_by_blank_lines(wiki):
    # The dataset's rows: each line with its end, empty ones empty.
    rows = [line + "\n" if line.strip() else "" for line in LINES]
    ids = AutoTokenizer.from_pretrained(TINY)("\n\n".join(rows))["input_ids"]
    found = evaluation_windows(TINY, "wikitext2", str(wiki), None, None, None, None)
    assert found.name == "wikitext2"
    assert found.rows.shape[1] == 2048
    assert found.rows.flatten().tolist() == ids[: len(ids) // 2048 * 2048]
    shorter = evaluation_windows(TINY, "wikitext2", str(wiki), None, None, 100, 3)
    assert shorter.name == "wikitext2 (windows of 100, the first 3 windows)"
    assert shorter.rows.flatten().tolist() == ids[:300]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.jsonl", "holds documents.* give --protocol"),
        ("a.npy", "holds token ids; give it to --tokens"),
    ],
)
def test_plain_text_is_no_container(tmp_path, name, message):
    (tmp_path / name).write_text('{"text": "x"}\n')
    with pytest.raises(UserError, match=message):
        evaluation_windows(TINY, "plain", str(tmp_path / name), None, None, None, None)


@pytest.mark.parametrize("options", [(), ("--update-card",)])
def test_a_checkpoint_is_no_original(run, checkpoint, wiki, options):
    card = (checkpoint / "README.md").read_text()
    status, _, err = run("eval", checkpoint, "--text", wiki, "--original", checkpoint, *options)
    assert (status, "is a FlatQuant checkpoint; give the unquantized model" in err) == (1, True), err
    assert (checkpoint / "README.md").read_text() == card


def test_another_model_is_no_original(run, checkpoint, wiki, tmp_path):
    """Token ids of one mean nothing to another: the comparison would be of noise."""
    make_model(tmp_path / "other")
    status, _, err = run("eval", checkpoint, "--text", wiki, "--original", tmp_path / "other")
    assert (status, "give the model that it was made from" in err) == (1, True), err


def test_no_card_of_a_model_that_is_not_quantized(run, wiki):
    status, _, err = run("eval", TINY, "--text", wiki, "--seq-len", 128, "--update-card")
    assert (status, "is not quantized, and --update-card writes" in err) == (1, True), err


@pytest.mark.parametrize("protocol", ["plain", "wikitext2"])
def test_an_empty_text_is_called_empty(tmp_path, protocol):
    file = tmp_path / "text.txt"
    file.write_text(" \n\n")
    with pytest.raises(UserError, match=r"text\.txt is empty; give a text"):
        evaluation_windows(TINY, protocol, str(file), None, None, None, None)


def test_c4_new_is_1100_documents_joined_by_spaces_and_256_windows(tmp_path):
    made = documents(1200)
    ids = AutoTokenizer.from_pretrained(TINY)(" ".join(d["text"] for d in made[:1100]))["input_ids"]
    lines = "\n".join(map(json.dumps, made)) + "\n"
    (tmp_path / "c4.jsonl").write_text(lines)
    with gzip.open(tmp_path / "c4.json.gz", "wt") as file:
        file.write(lines)
    for name in ("c4.jsonl", "c4.json.gz"):
        found = evaluation_windows(TINY, "c4-new", str(tmp_path / name), None, None, 20, None)
        assert found.rows.shape == (256, 20)
        assert found.rows.flatten().tolist() == ids[: 256 * 20]
        assert found.name == "c4-new (windows of 20)"


@pytest.mark.skipif(not find_spec("datasets"), reason="the datasets extra is not installed")
def test_parquet_of_the_hub(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [line + "\n" if line.strip() else "" for line in LINES]
    file = tmp_path / "test-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), file)
    found = evaluation_windows(TINY, "wikitext2", str(file), None, None, 128, None)
    ids = AutoTokenizer.from_pretrained(TINY)("\n\n".join(rows))["input_ids"]
    assert found.rows.flatten().tolist() == ids[: len(ids) // 128 * 128]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--protocol", "ptb"), ("'ptb'", "wikitext2 or c4-new")),
        (("--protocol", "c4-new", "--text", "FEW"), ("1100 documents", "has 5")),
        (("--protocol", "c4-new", "--text", "TXT"), ("tell apart", ".json")),
        (("--protocol", "wikitext2", "--text", "none.txt"), ("none.txt", "check the path")),
        (("--protocol", "wikitext2", "--tokens", "a.npy"), ("--text or --dataset",)),
        (("--protocol", "wikitext2", "--text", "TXT", "--dataset", "a/b"), ("not both",)),
        (("--text", "TXT", "--backend", "tpu"), ("'tpu'", "reference, vllm, both")),
        (("--text", "TXT", "--limit", 0), ("limit=0",)),
        (("--text", "TXT", "--seq-len", 128, "--update-card"), ("tiny-llama", "--original")),
        (("--text", "TXT", "--seq-len", 128, "--original", "/nowhere"), ("/nowhere", "does not exist")),
    ],
)
def test_bad_options(run, checkpoint, tmp_path, wiki, options, parts):
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(map(json.dumps, documents(5))))
    files = {"FEW": few, "TXT": wiki}
    status, _, err = run("eval", checkpoint, *(files.get(o, o) for o in options))
    assert status == 1
    assert err.startswith("flatquant: ")
    assert err.count("\n") == 1
    assert all(part in err for part in parts), err


def test_vllm_on_a_gpu_gets_16_bits(run, checkpoint, wiki, monkeypatch):
    assert [default_dtype(b) for b in ("reference", "vllm", "both")] == ["float32"] * 3
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert [default_dtype(b) for b in ("reference", "vllm", "both")] == [
        "float32",
        "bfloat16",
        "bfloat16",
    ]
    ask = ("eval", checkpoint, "--text", wiki, "--seq-len", 128, "--limit", 1)
    status, _, err = run(*ask, "--backend", "vllm", "--dtype", "float32")
    assert (status, "use --dtype bfloat16" in err) == (1, True), err


def test_the_card_gets_both_perplexities_and_stays_a_card(run, checkpoint, wiki):
    ask = ("eval", checkpoint, "--protocol", "wikitext2", "--text", wiki, "--seq-len", 128)
    status, out, err = run(*ask, "--original", TINY, "--update-card", "--json")
    assert status == 0, err
    result = json.loads(out.splitlines()[-1])
    assert "original" in out
    # The original, by the library alone.
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    rows = evaluation_windows(TINY, "wikitext2", str(wiki), None, None, 128, None).rows
    with torch.no_grad():
        logits = model(rows).logits[:, :-1]
    expected = math.exp(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))
    assert result["original_perplexity"] == pytest.approx(expected, rel=1e-4)
    assert result["perplexity"] != pytest.approx(expected, rel=1e-4)

    def results():
        card = ModelCard.load(checkpoint / "README.md")
        again = ModelCard(str(card))
        assert again.data.to_dict() == card.data.to_dict()
        return card, card.data.eval_results

    card, found = results()
    assert len(found) == 1
    assert found[0].dataset_type == "Salesforce/wikitext"
    assert found[0].dataset_config == "wikitext-2-raw-v1"
    assert found[0].dataset_split == "test"
    assert found[0].metric_value == round(result["perplexity"], 4)
    assert found[0].metric_args["unquantized"] == round(result["original_perplexity"], 4)
    row = f"| wikitext2 | perplexity (windows of 128) | {result['perplexity']:.4f} | {expected:.4f} |"
    assert row in card.text
    # The same question again replaces the answer; another one is added.
    assert run(*ask, "--original", TINY, "--update-card")[0] == 0
    assert len(results()[1]) == 1
    assert run(*ask, "--original", TINY, "--update-card", "--limit", 2)[0] == 0
    card, found = results()
    assert [r.metric_name for r in found] == [
        "perplexity (windows of 128)",
        "perplexity (windows of 128, the first 2 windows)",
    ]
    assert card.text.count("<!-- results -->") == 1
    assert "## How it was made" in card.text


def test_unknown_tensors_of_an_unquantized_model_are_named(run, model, calib):
    edit_weights(model, lambda t: t.update({"model.layers.0.adapter.weight": torch.ones(2)}))
    status, _, err = run("eval", model, "--tokens", calib, "--seq-len", 24)
    assert status == 1
    assert "unknown tensor model.layers.0.adapter.weight" in err


def test_code_in_a_model_folder_is_neither_run_nor_asked_about(run, model, wiki, monkeypatch):
    def ask(*_):
        raise AssertionError("asked the user")

    monkeypatch.setattr("builtins.input", ask)
    code = model / "evil.py"
    code.write_text(f"open({str(model / 'ran')!r}, 'w')\nclass Evil: pass\n")
    (model / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}})
    )
    status, _, err = run("eval", model, "--text", wiki, "--seq-len", 24)
    assert (status, "no usable tokenizer" in err) == (1, True), err
    edit_config(model, model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    status, _, err = run("eval", model, "--text", wiki, "--seq-len", 24)
    assert status == 1
    assert err.startswith("flatquant: ")
    assert not (model / "ran").exists()


@pytest.fixture
def task_folder(tmp_path):
    """Two tasks on local data: continuations that the model finds likely or unlikely, and a bare text."""
    data = tmp_path / "data.json"
    rows = [
        {"start": start, "choices": [" " + good, " zqxj vkwq"], "label": 0, "text": f"{start} {good}"}
        for start, good in [
            ("import", "os"),
            ("def main", "():"),
            ("for i in", "range"),
            ("the", "file"),
        ]
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    folder = tmp_path / "tasks"
    folder.mkdir()
    common = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
    (folder / "tiny.yaml").write_text(
        f"task: tiny_choice\n{common}output_type: multiple_choice\ndoc_to_text: '{{{{start}}}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: label\ntarget_delimiter: ''\n"
        "metric_list:\n  - metric: acc\n"
    )
    (folder / "ppl.yaml").write_text(
        f"task: tiny_text\n{common}output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        "doc_to_target: '{{text}}'\nmetric_list:\n  - metric: byte_perplexity\n"
    )
    return folder


def test_tasks_without_lm_eval_say_how_to_install_it(run, checkpoint, monkeypatch):
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    status, _, err = run("eval", checkpoint, "--tasks", "piqa")
    assert status == 1
    assert "pip install 'vllm-flatquant[eval]'" in err


@pytest.mark.skipif(not find_spec("lm_eval"), reason="lm-eval is not installed")
def test_tasks_of_lm_eval_on_both_backends(checkpoint, task_folder):
    scores, printed = evaluate(
        checkpoint,
        *("--tasks", "tiny_choice,tiny_text", "--include-path", task_folder),
        *("--backend", "both", "--original", TINY, "--update-card"),
        environment={"HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(task_folder / "cache")},
    )
    assert set(scores) == {"reference", "vllm", "original"}
    for found in scores.values():
        assert found["tiny_choice"]["acc"] == 1.0
    reference = scores["reference"]["tiny_text"]["byte_perplexity"]
    assert scores["vllm"]["tiny_text"]["byte_perplexity"] == pytest.approx(reference, rel=1e-2)
    assert scores["original"]["tiny_text"]["byte_perplexity"] != pytest.approx(reference, rel=1e-6)
    assert "vllm - ref" in printed
    card = ModelCard.load(checkpoint / "README.md")
    named = {(r.dataset_name, r.metric_name) for r in card.data.eval_results}
    assert {("tiny_choice", "acc"), ("tiny_text", "byte_perplexity")} <= named


def test_an_engine_takes_little_of_a_gpu(monkeypatch):
    """Two values for each of 5 layers, 4 heads of 32, of 4 bytes, for each token; on a CPU nothing is asked for."""
    assert small_cache(TINY, 1000) == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = small_cache(TINY, 1000)
    assert options.pop("kv_cache_memory_bytes") == 2 * 5 * 4 * 32 * 4 * 1000
    assert options == {"gpu_memory_utilization": 0.02}
