"""The scripts that measure the calibration: what fails or is cut off costs its own rows alone."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_recipes import script

from vllm_flatquant.calibration.data import evaluation_tokens
from vllm_flatquant.calibration.evaluate import perplexity, windows
from vllm_flatquant.calibration.recipe import make_recipe
from vllm_flatquant.calibration.recipes import RECIPES
from vllm_flatquant.calibration.reference import load_reference

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny-llama"


@pytest.fixture(autouse=True)
def neighbours(monkeypatch):
    """As Python does for a script: its own folder comes first."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def answer(job):
    if job["do"] == "fail":
        raise ValueError("no\nmore")
    if job["do"] == "die":
        os._exit(3)
    if job["do"] == "sleep":
        time.sleep(60)
    if job["do"] == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
        return "alive"
    return os.getpid()


def jobs_of(*what):
    return [{"stage": answer, "do": do} for do in what]


def test_workers_outlive_what_a_job_breaks():
    from workers import run_jobs

    jobs = jobs_of("fail", "die", "work")
    found = [(job["do"], result, error) for job, result, error in run_jobs(jobs, 1, float("inf"))]
    assert [do for do, *_ in found] == ["fail", "die", "work"] and jobs == []
    errors = ["ValueError: no", "the process ended with status 3", None]
    assert [error for *_, error in found] == errors and found[2][1] != os.getpid()


def test_workers_stop_at_the_deadline():
    from workers import run_jobs

    jobs, begin = jobs_of("sleep", "work"), time.monotonic()
    assert list(run_jobs(jobs, 1, begin + 3)) == []
    assert [job["do"] for job in jobs] == ["sleep", "work"] and time.monotonic() - begin < 20


def test_comparison_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    accuracy = script(ROOT / "benchmarks" / "accuracy.py")
    rows = [dict.fromkeys(accuracy.FIELDS, "1")]
    jobs = [{"config": c, "seed": 0} for c in ("good", "bad", "late")]
    monkeypatch.setattr(accuracy, "run_jobs", lambda *_: ((j, rows, None) for j in (jobs.pop(0),)))
    out = tmp_path / "rows.csv"
    assert accuracy.measure(jobs, 1, 0.0, out) == 0
    monkeypatch.setattr(accuracy, "run_jobs", lambda *_: ((j, None, "broke") for j in (jobs.pop(0),)))
    assert accuracy.measure(jobs, 1, 0.0, out) == 1
    with out.open(newline="") as file:
        assert list(csv.DictReader(file)) == rows
    text = capsys.readouterr().out
    assert "FAILED bad 0 broke" in text and "not done: late 0" in text

    def stopped(*_):
        yield jobs[0], rows, None
        raise KeyboardInterrupt

    monkeypatch.setattr(accuracy, "run_jobs", stopped)
    assert accuracy.measure(jobs, 1, 0.0, out) == 130
    assert "rows.csv keeps the rows so far" in capsys.readouterr().out
    with out.open(newline="") as file:
        assert list(csv.DictReader(file)) == rows * 2


def test_ctrl_c_reaches_the_script_and_not_its_workers():
    from workers import run_jobs

    handler = signal.getsignal(signal.SIGINT)
    ((_, result, error),) = run_jobs(jobs_of("interrupt"), 1, float("inf"))
    assert (result, error) == ("alive", None) and signal.getsignal(signal.SIGINT) is handler


def test_command_of_the_comparison(tmp_path):
    """`make compare` for one recipe, twice: nothing is measured again."""
    out = tmp_path / "compare"
    options = "--preset quick --samples 4 --limit 2 --seeds 1 --config quarot-w4a4-rtn"
    make = ["make", "-n", "-o", ".venv/.stamp-dev-cpu", "compare", "DEVICE=cpu", f"OUT={out}"]
    outside = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    said = subprocess.run(
        [*make, f"COMPARE_ARGS={options}"],
        cwd=ROOT,
        env=outside,
        capture_output=True,
        text=True,
        check=True,
    )
    words = shlex.split(said.stdout.replace("\\\n", " "))
    assert words[1] == "benchmarks/accuracy.py"

    def compare():
        (out / "table.md").unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, *words[1:], "--device=cpu"], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout

    measured = "tiny-llama heldout quarot-w4a4-rtn 0"
    assert measured in compare() and measured not in compare()
    with (out / "accuracy.csv").open(newline="") as file:
        rows = {row["config"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["unquantized", "quarot-w4a4-rtn"]
    perplexities = [float(row["perplexity"]) for row in rows.values()]
    assert perplexities[0] < perplexities[1] < 2 * perplexities[0]
    settings = json.loads(rows["quarot-w4a4-rtn"]["settings"])
    assert (settings["samples"], settings["seq_len"], settings["epochs"]) == (4, 256, 0)
    table = (out / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:4]] == ["| unquantized", "| quarot-w4a4-rtn"]
    assert (out / "perplexity.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--model", "nowhere"), "model folder nowhere does not exist"),
        (("--seq-len", "2048"), "use --seq-len 1024"),
        (("--calib", "ids.npy"), "outside the model's vocabulary of 2048"),
        (("--config", "quarot-w4a4:kv"), "'kv' changes nothing; write SETTING=VALUE"),
        (("--config", "quarot-w4a4:kv=x"), "kv='x': Input should be 4, 8 or 16"),
    ],
)
def test_the_comparison_says_what_is_wrong_before_it_measures(
    tmp_path, monkeypatch, capsys, options, said
):
    accuracy = script(ROOT / "benchmarks" / "accuracy.py")
    monkeypatch.chdir(tmp_path)
    np.save("ids.npy", np.full((4, 256), 5000))
    given = {"--model": TINY, "--calib": "stdlib", "--out": "rows.csv"}
    given |= {"--text": f"held={ROOT / 'examples' / 'heldout.txt'}", "--samples": 4}
    given |= {"--seq-len": 256, options[0]: options[1]}
    words = [str(word) for pair in given.items() for word in pair]
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *words])
    with pytest.raises(SystemExit) as end:
        accuracy.main()
    assert (end.value.code, said in capsys.readouterr().err) == (2, True)
    assert not (tmp_path / "rows.csv").exists()


def test_rows_of_another_size_are_other_rows():
    accuracy = script(ROOT / "benchmarks" / "accuracy.py")
    row = {"text": "t", "windows": "8", "config": "quarot-w4a4", "seed": "0"}
    few, many = (accuracy.recipe_of("quarot-w4a4", {"samples": n, "seq_len": 8})[0] for n in (4, 8))
    keys = [accuracy.key_of({**row, "settings": json.dumps(s)}) for s in (few, few, many)]
    assert keys[0] == keys[1] != keys[2]
    settings, recipe = accuracy.recipe_of("flatquant-e2e-w4a4", {}, "quick")
    assert recipe.distill_generated == settings["distill_generated"] == 48 and recipe.epochs == 3


def test_a_line_of_the_table_is_not_the_mean_of_two_lengths_of_training():
    shown = script(ROOT / "benchmarks" / "accuracy.py").shown
    row = {"text": "t", "windows": "1", "seed": "0", "config": "flatquant-w4a4"}

    def of(epochs, config="flatquant-w4a4", samples=4):
        settings = {"samples": samples, "seq_len": 8, "epochs": epochs}
        return {**row, "config": config, "settings": json.dumps(settings)}

    sizes = {"flatquant-w4a4": (4, 8, 15), "quarot-w4a4": (4, 8, 0)}
    assert shown(of(15), sizes) and not shown(of(5), sizes)
    assert shown(of(20, "omniquant-w4a4"), sizes) and not shown(of(20, "omniquant-w4a4", 8), sizes)
    assert shown({**row, "config": "unquantized", "settings": "null"}, sizes)


def test_table_and_plot_of_rows_without_seconds(tmp_path):
    rows = [
        {
            "model": "m", "text": "t", "config": config, "perplexity": figure, "windows": windows, "seq_len": "8",
            "seconds": "", "peak_memory_gb": "1", "settings": "null", "device": device, "torch": "2", "commit": "c",
            "jobs": "",
        }
        for config, figure, windows, device in (
            ("quarot-w4a4", "7", "4", "NVIDIA H200"), ("quarot-w4a4", "9", "4", "NVIDIA H100 80GB HBM3"),
            ("w4a4kv4-rtn", "5", "4", "cpu"), ("flatquant-w4a4", "6", "4", "cpu"), ("w4a16-rtn", "9", "4", "cpu"),
            ("unquantized", "4", "4", "cpu"), ("magr-w3a16", "3", "4", "cpu"), ("flatquant-w4a4", "99", "2", "cpu"),
        )
    ]  # fmt: skip
    tables = script(ROOT / "benchmarks" / "accuracy_tables.py")
    lines = tables.table(rows).splitlines()
    order = ["unquantized", "w4a16-rtn", "magr-w3a16", "flatquant-w4a4", "quarot-w4a4", "w4a4kv4-rtn"]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:8]] == order
    assert lines[5:7] == [
        "| flatquant-w4a4 | 6.000 | 1 |  | 1.0 | cpu c |",
        "| quarot-w4a4 | 8.000 | 2 |  | 1.0 | H100 c, H200 c |",
    ]
    tables.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_seconds_are_of_the_runs_with_the_fewest_beside_them():
    seconds_of = script(ROOT / "benchmarks" / "accuracy_tables.py").seconds_of
    runs = [
        {"seconds": s, "jobs": j}
        for s, j in (("90", ""), ("60", "6"), ("40", "6"), ("9", "1"), ("", "1"))
    ]
    assert [seconds_of(runs[:n]) for n in (1, 2, 3, 4, 5)] == ["90 (?)", "60 (6)", "50 (6)", "9", "9"]
    assert seconds_of([{"seconds": "0", "jobs": ""}]) == seconds_of([]) == ""


def test_bits_of_a_row_are_its_recipe_s_not_its_name_s():
    bits_of = script(ROOT / "benchmarks" / "accuracy_tables.py").bits_of
    named = {"config": 'gptq-w4a16:scheme="w3a16"', "settings": '{"scheme": "w3a16"}'}
    assert bits_of(named) == (3, 16, 16) and bits_of({**named, "settings": "null"}) == (4, 16, 16)
    assert bits_of({"config": "mine.yaml", "settings": '{"scheme": "w4a4", "kv": 4}'}) == (4, 4, 4)
    assert bits_of({"config": "quarot-w4a4kv4", "settings": '{"epochs": 0}'}) == (4, 4, 4)
    assert bits_of({"config": "unquantized", "settings": "null"}) is None


def test_pages_have_the_tables_of_the_results():
    readme, shown = script(ROOT / ".ci" / "readme_table.py"), []
    for file in readme.PAGES:
        page = file.read_text(encoding="utf-8")
        shown += [m[2] for m in readme.BLOCK.finditer(page)]
        assert page == readme.with_tables(page), (
            f"{file.name} is older than benchmarks/results: run make readme"
        )
    assert sorted(shown) == sorted(readme.tables())


def test_short_tables_are_of_recipes_and_leave_nothing_measured_out():
    readme = script(ROOT / ".ci" / "readme_table.py")
    assert {*readme.SHORT, *readme.DECIDING} <= RECIPES.keys()
    rows, named = readme.comparison_rows()["llama-12m"], sum(readme.CHOSEN.values(), ())
    measured = {row["config"] for row in rows} & {*named}
    table = readme.chosen(rows)
    assert {name for name in named if f"| `{name}` |" in table} == measured
    assert len(table.splitlines()) == 3 + len(measured) and len(measured) >= 10
    assert all(f"`{name}`" in readme.tables()["deciding"] for name in readme.DECIDING)


def test_rows_of_the_end_to_end_table_are_the_recipes():
    readme, ablation = (
        script(ROOT / ".ci" / "readme_table.py"),
        script(ROOT / "benchmarks" / "ablation.py"),
    )
    assert readme.BLOCKS.keys() == {name for name in RECIPES if "e2e" in name}
    for name, blocks in readme.BLOCKS.items():
        settings = ablation.parse(blocks) | ablation.parse(readme.LAST_STAGE)
        assert make_recipe(**settings) == RECIPES[name].recipe()
        assert make_recipe(**ablation.parse(blocks)) == RECIPES[name.replace("e2e", "wide")].recipe()
    found = {row["config"] for row in readme.as_recipes(readme.read("ablation"))}
    assert readme.AIMS.keys() <= found <= RECIPES.keys()


def test_the_last_of_two_equal_measurements_counts():
    readme = script(ROOT / ".ci" / "readme_table.py")
    row = dict.fromkeys(("model", "variant", "seed", "calib", "samples", "text", "windows"), "1")
    first, other, again = (
        {**row, "perplexity": p, "seed": s} for p, s in (("5", "1"), ("6", "2"), ("7", "1"))
    )
    assert readme.latest([first, other, again]) == [again, other]


def test_tables_leave_out_changed_recipes_and_other_calibration_texts():
    readme = script(ROOT / ".ci" / "readme_table.py")
    rows = [{"config": c, "calib": t} for c, t in (("a", "x"), ("b", "x"), ("a", "y"), ("a:lr=1", "x"))]
    assert readme.usual(rows) == rows[:2]


def test_best_stands_for_the_settings_that_did_best(tmp_path):
    ablation = script(ROOT / "benchmarks" / "ablation.py")
    out = tmp_path / "rows.csv"
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["variant", "text", "perplexity", "windows", "kl_held_after"])
        writer.writeheader()
        for variant, text, figure, windows, kl in (
            ("a,x=1;distill_epochs=1", "valid", 3.0, 8, 0.2), ("a,x=1;distill_epochs=1", "test", 9.0, 8, 0.2),
            ("a,x=1;distill_epochs=2", "valid", 4.0, 8, 0.1), ("a,x=1;distill_epochs=2", "test", 1.0, 8, 0.1),
            ("a,x=1;", "valid", 2.0, 8, ""), ("b;distill_epochs=3", "valid", 1.0, 8, 0.01),
            ("a,x=1;distill_epochs=2", "valid", 0.1, 2, 0.1),
        ):  # fmt: skip
            row = {
                "variant": variant,
                "text": text,
                "perplexity": figure,
                "windows": windows,
                "kl_held_after": kl,
            }
            writer.writerow(row)
    assert ablation.best_for("c;best", "a,x=1;best", out, ["valid"]) == "c;distill_epochs=1"
    assert ablation.best_for("c;best", "a,x=1;best", out, ["test"]) == "c;distill_epochs=2"
    assert ablation.best_for("c;best", "a,x=1;best", out, ["kl"]) == "c;distill_epochs=2"
    changed = ablation.best_for("c;best,distill_epochs=9,y=2", "a,x=1;best", out, ["kl"])
    assert changed == "c;distill_epochs=9,y=2"
    assert ablation.best_for("c;", "a,x=1;best", out, ["valid"]) == "c;"
    with pytest.raises(SystemExit, match="no variant z;distill_epochs"):
        ablation.best_for("c;best", "z;best", out, ["valid"])


def test_ablation_keeps_what_is_done(tmp_path):
    ablation = script(ROOT / "benchmarks" / "ablation.py")
    args = SimpleNamespace(
        model=str(TINY), calib="stdlib", text=[f"heldout={ROOT / 'examples' / 'heldout.txt'}"],
        choose=["heldout"], variant=["w4a4;distill_epochs=1,distill_generated=4", "w4a4;"], once=["w4a16;"],
        seeds=[0, 1], samples=2, seq_len=16, epochs=1, limit=2, first=1, device="cpu", jobs=1, out=tmp_path / "rows.csv",
    )  # fmt: skip
    stages = [job["stage"].__name__ for job in ablation.plan(args, tmp_path / "keep")]
    blocks, last = "run_blocks", "run_last"
    assert stages == [blocks, "run_generation", last, last, blocks, last, last, blocks, last]
    done = tmp_path / "keep" / "tiny-llama-16-generated-9"  # more rows than are wanted
    done.mkdir(parents=True)
    (done / "seconds").write_text("1")
    again = ablation.plan(args, tmp_path / "keep")
    assert [job["stage"].__name__ for job in again].count("run_generation") == 0
    assert again[1]["needs"][1] == done


def test_rows_of_the_first_windows_and_how_flat_predictions_are(tmp_path):
    from judging import FLATNESS, appended, judge, left_of, window_counts

    text = str(ROOT / "examples" / "heldout.txt")
    counts = window_counts(str(TINY), [("a", text)], 64, 3, 2)
    assert counts == {"a": [3, 2]} and window_counts(str(TINY), [("a", text)], 64, 2, 2) == {"a": [2]}
    assert left_of([("a", text)], counts, {("a", "3", "x")}, "x") == [("a", text, [2])]
    assert left_of([("a", text)], counts, {("a", "3", "x"), ("a", "2", "x")}, "x") == []
    network = load_reference(TINY)
    all_rows = judge(network, str(TINY), [("a", text, [3, 2])], 64)
    assert [row["windows"] for row in all_rows] == ["3", "2"]
    cut = windows(evaluation_tokens(TINY, text, None, None), 64, 3)
    for row in all_rows:
        rows = cut[: int(row["windows"])]
        assert float(row["perplexity"]) == pytest.approx(perplexity(network, rows), abs=1e-4)
        with torch.no_grad():
            logits = network(rows).logits[:, :-1]
        entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
        assert float(row["entropy"]) == pytest.approx(float(entropy), abs=1e-3)
        warm = torch.nn.functional.cross_entropy(logits.mT / 1.1, rows[:, 1:]).exp()
        assert float(row["at_1.1"]) == pytest.approx(float(warm), abs=1e-3)

    file = tmp_path / "new" / "rows.csv"
    with appended(file, ["a", "b"]) as append:
        append([{"a": "1", "b": "2"}])
    with appended(file, ["a", "b", *FLATNESS]) as append:
        append([{"a": "3", "b": "4", "entropy": "5"}])
    with file.open(newline="") as f:
        found = [(row["a"], row["b"], row["entropy"]) for row in csv.DictReader(f)]
    assert found == [("1", "2", ""), ("3", "4", "5")]


def test_speed_of_a_block(tmp_path, monkeypatch):
    speed = script(ROOT / "benchmarks" / "calibration_speed.py")
    out = tmp_path / "speed.csv"
    options = ["--shape", "tiny", "--device", "cpu", "--out", str(out)]
    options += [f"--set={s}" for s in ("samples=4", "seq_len=32", "epochs=10")]
    monkeypatch.setattr(sys, "argv", ["calibration_speed.py", *options])
    speed.main()
    with out.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["last_loss"]) < float(row["first_loss"]) and float(row["peak_memory_gb"]) > 0.05
    assert float(row["block_seconds"]) > 0 and "train" in row["phases"] and row["tokens"] == "128"


def test_forms_of_a_part_compute_the_same():
    from training_parts import attention_forms, fake_quantize_forms, sizes

    assert len({size for _, size, _ in sizes()}) == 5
    torch.manual_seed(0)
    attention = attention_forms(2, 4, 2, 8, 16, device="cpu")
    del attention["undivided"]  # PyTorch has its kernel on GPUs alone
    for forms in (attention, fake_quantize_forms(8, 64, device="cpu")):
        expected = [call() for call in forms.pop("plain")]
        for forward, both in forms.values():
            torch.testing.assert_close([forward(), both()], expected)
