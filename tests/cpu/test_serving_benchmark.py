"""benchmarks/serving.py: rows are written as they come and carry the kernels that ran."""

import re
import sys
import time
from pathlib import Path

import pytest
from processes import ended, soon

ROOT = Path(__file__).resolve().parents[2]

COLD = """
(EngineCore pid=7) INFO FlatQuant w4a4: triton backend (CUDA device of compute capability 90)
(EngineCore pid=7) INFO FlatQuant fusion, 1 to 8192 tokens: 64 RMSNorm and 32 SiLU*mul fused with the transform \
after them, 32 transforms on their own
"""
NO_NORMS = COLD.replace("64 RMSNorm", "0 RMSNorm")
UNFUSED = "".join(COLD.splitlines(keepends=True)[:2])
WARM = UNFUSED + "INFO Directly load AOT compilation from path /cache/model\n"


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import serving

    return serving


@pytest.mark.parametrize(
    "name, log, right",
    [
        ("flatquant-w4a4", COLD, True),
        ("flatquant-w4a4", UNFUSED, False),
        ("flatquant-w4a4", NO_NORMS, False),
        ("flatquant-w4a4", COLD + NO_NORMS, False),
        ("flatquant-w4a8", COLD, False),
        ("flatquant-w4a8", COLD.replace("w4a4", "w4a8"), True),
        ("flatquant-w4a4-unfused", UNFUSED, True),
        ("flatquant-w4a4-unfused", COLD, False),
        ("flatquant-w4a16", COLD.replace("w4a4", "w4a16"), True),
        ("flatquant-w4a16", UNFUSED.replace("w4a4", "w4a16"), False),
        ("bf16", "", True),
        ("bf16", UNFUSED, False),
    ],
)
def test_format_is_recorded_as_what_ran(benchmarks, name, log, right):
    label, kernels = benchmarks.ran_as(name, log)
    assert label == (name if right else f"{name} (ran as {kernels})")
    if name.startswith("flatquant-w4a4") and log == UNFUSED:
        assert ("nothing fused" in kernels) == (name == "flatquant-w4a4")


@pytest.fixture
def run(benchmarks, tmp_path, monkeypatch):
    """Makes a run of the tiny model, with a folder of its own."""

    def make(*arguments):
        folders = [f"--{name}={tmp_path / name}" for name in ("work", "cache", "profile-results")]
        results = f"--results={tmp_path / 'rows.csv'}"
        monkeypatch.setattr(sys, "argv", ["serving.py", results, *folders, *arguments])
        return benchmarks.Run(benchmarks.arguments())

    return make


def test_a_start_is_warm_if_its_graphs_came_from_the_cache(run, capsys):
    """And they do only where the model's path, which is in vLLM's key, stays from run to run."""

    def measure(log):
        work = now.folder("tiny", "bf16")
        work.mkdir(parents=True, exist_ok=True)
        (work / "log").write_text(log)
        now.take("tiny", "bf16", iter([{"measure": "start_warm", "value": 1.0, "unit": "s"}]))
        return capsys.readouterr().out.split()[2]

    now = run()
    assert measure("INFO torch.compile took 17.5 s in total\n") == "start"
    later = run()
    later.common["run"] += "-later"
    now = later
    assert measure(WARM.splitlines()[-1] + "\nINFO torch.compile took 1.5 s in total\n") == "start_warm"
    assert measure("") == "start_warm"  # nothing is compiled at all
    assert run().model("tiny", "bf16") == later.model("tiny", "bf16")


def test_warm_start_is_judged_by_the_start_that_compiled(benchmarks, run):
    def label(log):
        work = now.folder("tiny", "flatquant-w4a4")
        work.mkdir(parents=True, exist_ok=True)
        (work / "log").write_text(log)
        return benchmarks.ran_as("flatquant-w4a4", now.log("tiny", "flatquant-w4a4"))[0]

    now = run()
    assert "nothing fused" in label(WARM)  # nobody knows what is in that cache
    assert label(COLD) == label(WARM) == "flatquant-w4a4"
    assert "nothing fused" in label(UNFUSED)  # compiled again, without the pass
    assert "0 RMSNorm" in label(NO_NORMS) and "0 RMSNorm" in label(WARM)


def test_a_start_is_taken_apart(benchmarks):
    """The lines are those of startup.py and vLLM."""
    from serving_process import log_figures

    log = """Model loading took 5.23 GiB and 3.1 seconds
    FlatQuant: 27 kernels ready in 0.91 s (26 from cache)
    FlatQuant: weights of 128 layers ready in 0.42 s
    load: peak 5756889600 bytes, 3.2 s
    torch.compile took 4.72 s in total"""
    found = {row["measure"]: row["value"] for row in log_figures(log, alone=True)}
    parts = {"load": 3.2, "load_kernels": 0.91, "load_kernels_from_cache": 26, "load_process": 0.42}
    assert found.items() >= (parts | {"compile": 4.72}).items()
    assert not parts.keys() & {row["measure"] for row in log_figures(log, alone=False)}


ENGINE = """
import json, sys, time
from pathlib import Path

job, results = json.loads(sys.argv[1]), Path({results!r})

def write(**row):
    with open(job["out"], "a") as file:
        file.write(json.dumps(row) + chr(10))

print("Model loading took 1.50 GiB", flush=True)
write(measure="start", value=2.0, unit="s")
while not Path(job["go"]).exists():
    time.sleep(0.05)
for number, name in enumerate(job["wanted"]):
    write(measure=name, value=1.0, unit="ms", spread=0, repeats=1)
    for _ in range(400):  # goes on when the row has arrived
        if results.exists() and name in results.read_text():
            break
        time.sleep(0.05)
    else:
        sys.exit("the row did not come while the engine ran")
    if {cut} and number == 1:
        sys.exit("cut off")
write(measure="finished", value=1, unit="")
"""


def test_cut_off_format_keeps_its_rows_and_goes_on(benchmarks, run, tmp_path, monkeypatch, capsys):
    script = tmp_path / "serving_engine.py"
    monkeypatch.setattr(benchmarks, "HERE", tmp_path)

    def measure(cut):
        script.write_text(ENGINE.format(results=str(tmp_path / "rows.csv"), cut=cut))
        now = run("--formats=bf16", "--models=tiny")
        wanted = now.todo("tiny").get("bf16", [])
        missing = now.missing("tiny", "bf16")
        if wanted:
            benchmarks.measure_group("tiny", [(now, "bf16", missing)])
        return missing, [row["measure"] for row in benchmarks.read_rows(tmp_path / "rows.csv")]

    every = ["prefill_1x128", "prefill_2x64", "decode_b1", "decode_b4"]
    missing, rows = measure(cut=True)
    assert missing == every and rows == ["start_cold", "weights", *every[:2]]
    assert "cut off" in capsys.readouterr().out
    missing, rows = measure(cut=False)
    assert missing == every[2:] and rows[4:] == ["start_warm", "weights", *every[2:]]
    assert "failed" not in capsys.readouterr().out
    assert measure(cut=False)[0] == []


TURNS = """
import json, sys, time
from pathlib import Path

job = json.loads(sys.argv[1])
name, folder = Path(job["out"]).parent.name, Path({folder!r})
if name == "w8a8-int8":
    sys.exit("no such kernel here")
with open(job["out"], "a") as file:
    print(json.dumps(dict(measure="start", value=2.0, unit="s")), file=file, flush=True)
    while not Path(job["go"]).exists():
        time.sleep(0.05)
    with (folder / "turns").open("a") as turns:
        print("begin", name, len(list(folder.glob("work/*/*/*/*/rows.jsonl"))), file=turns, flush=True)
        for measure in job["wanted"]:
            print(json.dumps(dict(measure=measure, value=1.0, unit="ms", spread=0, repeats=1)), file=file, flush=True)
        time.sleep(0.5)
        print("end", name, file=turns, flush=True)
    print(json.dumps(dict(measure="finished", value=1, unit="")), file=file, flush=True)
"""


def test_engines_that_start_together_measure_in_turn(benchmarks, run, tmp_path, monkeypatch, capsys):
    """All have started before the first measures; one that fails does not stop the rest; no start is timed."""
    (tmp_path / "serving_engine.py").write_text(TURNS.format(folder=str(tmp_path)))
    monkeypatch.setattr(benchmarks, "HERE", tmp_path)
    now = run("--formats=w8a8-int8,fp8", "--models=tiny", "--together=3")
    benchmarks.measure_group("tiny", [(now, *item) for item in now.todo("tiny").items()])
    turns = (tmp_path / "turns").read_text().splitlines()
    assert turns == ["begin bf16 2", "end bf16", "begin fp8 2", "end fp8"]
    rows = benchmarks.read_rows(tmp_path / "rows.csv")
    assert [row["format"].split()[0] for row in rows] == ["bf16"] * 4 + ["fp8"] * 4
    assert {row["measure"] for row in rows} == set(now.measures("tiny"))
    assert "w8a8-int8: failed (ended with 1 before it was done)" in capsys.readouterr().out


MODEL = """
import json, sys
from pathlib import Path

job = json.loads(sys.argv[1])
layers = json.loads((Path(job["model"]) / "config.json").read_text())["num_hidden_layers"]
rows = [dict(measure=measure, value=layers, unit="ms") for measure in ("start", *job["wanted"], "finished")]
with open(job["out"], "a") as file:
    file.writelines(json.dumps(row) + chr(10) for row in rows)
"""


def test_every_model_of_a_run_is_measured(benchmarks, run, tmp_path, monkeypatch):
    """Not the rows of the model before it taken for its own."""
    (tmp_path / "serving_engine.py").write_text(MODEL)
    monkeypatch.setattr(benchmarks, "HERE", tmp_path)
    now = run("--formats=bf16")
    layers = {name: benchmarks.MODELS[name]["num_hidden_layers"] for name in ("tiny", "llama-3-8b")}
    for model in layers:
        benchmarks.measure_group(model, [(now, *item) for item in now.todo(model).items()])
    rows = benchmarks.read_rows(tmp_path / "rows.csv")
    assert {(row["model"], float(row["value"])) for row in rows} == set(layers.items())
    for model in layers:
        found = {row["measure"] for row in rows if row["model"] == model}
        assert found == {"start_cold", *now.measures(model)}


def test_engines_are_ended_where_another_cannot_start(benchmarks, run, tmp_path, monkeypatch):
    (tmp_path / "serving_engine.py").write_text("import time; time.sleep(30)")
    monkeypatch.setattr(benchmarks, "HERE", tmp_path)
    now, started = run("--formats=bf16,fp8", "--together=2"), []
    start = now.engine

    def engine(*arguments):
        if started:
            raise OSError("the disk is full")
        started.append(start(*arguments))
        started[0].problem = "no need to wait for it"
        return started[0]

    monkeypatch.setattr(now, "engine", engine)
    with pytest.raises(OSError, match="the disk is full"):
        benchmarks.measure_group("tiny", [(now, name, []) for name in ("bf16", "fp8")])
    assert started[0].process.poll() is not None


@pytest.mark.parametrize("option", ["--serve", "--starts"])
def test_together_is_refused_where_it_would_change_the_figures(run, option, capsys):
    with pytest.raises(SystemExit):
        run("--together=2", option)
    assert "not with --serve or --starts" in capsys.readouterr().err


CHILD = """
import subprocess, sys, time
from pathlib import Path

Path({pid!r}).write_text(str(subprocess.Popen(["sleep", "60"]).pid))
time.sleep(60)
"""


def test_closing_an_engine_ends_its_children(benchmarks, run, tmp_path, monkeypatch):
    """The engine core holds the GPU's memory, and is a child of the process that measures."""
    pid = tmp_path / "pid"
    (tmp_path / "serving_engine.py").write_text(CHILD.format(pid=str(pid)))
    monkeypatch.setattr(benchmarks, "HERE", tmp_path)
    engine = run().engine("tiny", "bf16", [], tmp_path / "go")
    assert soon(lambda: pid.exists() and pid.read_text(), 20)
    child = int(pid.read_text())
    assert not ended(child)
    begin = time.monotonic()
    engine.close()
    engine.close()  # does nothing
    assert ended(child) and ended(engine.process.pid) and time.monotonic() - begin < 10


def test_engines_of_a_group_fit_on_the_card(benchmarks, run):
    """70B in bf16 fits on no card of 140 GiB; the others are put together as far as they fit, in their order."""
    now = run("--together=3")
    now.memory, formats = 140 * 2**30, list(benchmarks.FORMATS)
    sizes = {}
    for model in ("llama-3-8b", "qwen3-32b", "llama-3-70b"):
        parts = list(benchmarks.groups(model, [(now, name, []) for name in formats], 3))
        assert [name for part in parts for _, name, _ in part] == formats
        needed = [[now.together(model, name) for _, name, _ in part] for part in parts]
        assert all(len(part) <= 3 and sum(part) < now.memory for part in needed)
        sizes[model] = [len(part) for part in parts]
    assert sizes["llama-3-8b"] == [3, 3, 3, 2] and now.together("llama-3-70b", "bf16") == 0
    assert sizes["qwen3-32b"] == [2, 3, 3, 3] and max(sizes["llama-3-70b"][1:]) == 2


def test_ratios_are_taken_and_shown_for_one_kind_of_engine(benchmarks, run, tmp_path, capsys):
    """Rows of an engine in the measuring process, as of old, have a table of their own."""
    now = run()
    for engine, values in (("in-process", (8, 4)), ("own process", (6, 2))):
        for name, value in zip(("bf16", "fp8"), values, strict=True):
            row = now.row("tiny", name, measure="decode_b1", value=value, unit="ms", engine=engine)
            now.table.append(row | {"run": engine})
    benchmarks.print_tables(now.args.results)
    shown = capsys.readouterr().out
    old, new = shown.split("engine own process")
    assert "engine in-process" in old and "| fp8 | 2.00 |" in old and "| 8.00 |" in old
    assert "| fp8 | 3.00 |" in new and "| 6.00 |" in new


def test_a_figure_without_bf16_of_its_run_is_no_ratio(benchmarks, run, capsys):
    now = run()
    for name, number, measure, value in [
        ("bf16", 1, "decode_b1", 8), ("flatquant-w4a4", 1, "decode_b1", 2), ("flatquant-w4a4", 2, "decode_b8", 5),
        ("fp8", 2, "decode_b1", 7),
    ]:  # fmt: skip
        row = now.row("tiny", name, measure=measure, value=value, unit="ms", engine="own process")
        now.table.append(row | {"run": number})
    benchmarks.print_tables(now.args.results)
    lines = capsys.readouterr().out.splitlines()
    assert "| bf16 (its own unit) | 8.00 |  |" in lines
    assert "| flatquant-w4a4 | 4.00 | - |" in lines
    assert "| fp8 | - |  |" in lines
    assert "| best other than FlatQuant |  |  |" in lines


def test_todays_code_is_shown_and_every_run_of_vllms(benchmarks, run, capsys):
    """The newest run has no bf16, the oldest comes last in the file: neither is the ratio that is shown."""
    now = run()
    for number, commit, bf16, w4a4, fp8 in [
        (2, "old", 8, 8, 4), (3, "new", 8, 2, 8), (4, "new", 6, 2, 3), (5, "newer", 0, 1, 0), (1, "older", 8, 16, 8),
    ]:  # fmt: skip
        for name, value in {"bf16": bf16, "flatquant-w4a4": w4a4, "fp8": fp8}.items():
            row = now.row(
                "tiny", name, measure="decode_b1", value=value, unit="ms", engine="own process"
            )
            if value:
                now.table.append(row | {"run": f"1122-{number}", "commit": commit})
    benchmarks.print_tables(now.args.results)
    shown = capsys.readouterr().out
    assert "| bf16 (its own unit) | 8.00 |" in shown  # of 8, 8, 6 and 8
    assert "| flatquant-w4a4 | 3.50 |" in shown  # of 4 and 3
    assert "| fp8 | 1.50 |" in shown  # of 2, 1, 2 and 1
    assert shown.endswith("newest commit that has the figure. A ratio is taken within a run.\n")


def test_quick_measures_are_taken_more_often(benchmarks):
    from serving_engine import repeated

    taken = iter(range(1000))
    assert repeated(lambda: next(taken), 3, 0) == [0, 1, 2]
    assert len(repeated(lambda: time.sleep(0.02) or next(taken), 1, 0.1)) > 2


def test_engine_is_measured_in_a_process_of_its_own(benchmarks, run, tmp_path, capsys):
    """The whole of a format: each step's time and kernels, and nothing left running."""
    now = run("--formats=bf16", "--models=tiny", "--profile")
    group = [(now, *item) for item in now.todo("tiny").items()]
    benchmarks.measure_group("tiny", group)
    shown = capsys.readouterr().out
    assert "failed" not in shown and "was split" not in shown, shown
    rows = benchmarks.read_rows(tmp_path / "rows.csv")
    steps = {row["measure"]: row for row in rows if row["measure"].startswith(("prefill", "decode"))}
    assert list(steps) == now.measures("tiny") and {row["engine"] for row in rows} == {"own process"}
    for measure, row in steps.items():
        assert 0 < float(row["fastest"]) <= float(row["value"])
        assert int(row["repeats"]) == 2, measure
    assert ended(re.search(r"\(EngineCore pid=(\d+)\)", now.log("tiny", "bf16"))[1])
    kernels = benchmarks.read_rows(tmp_path / "profile-results")
    attention = [row for row in kernels if row["kernel"] == "vllm::unified_attention_with_output"]
    assert [row["phase"] for row in attention] == ["decode_b2", "prefill_1x128", "prefill_2x64"]
    assert all(float(row["count"]) == 2 for row in attention)  # layers: the steps of a trace are counted
    for phase in ("decode_b2", "prefill_1x128"):
        spent = {row["kernel"]: float(row["us"]) for row in kernels if row["phase"] == phase}
        parts = sum(us for name, us in spent.items() if name.startswith(("(idle", "(busy")))
        assert parts == pytest.approx(spent["(wall time)"], rel=0.01) and spent["(busy)"] < parts


def test_idle_time_is_told_by_the_kernel_that_ends_it(benchmarks):
    from serving_worker import idle

    # The second waits for the first while it runs; the fourth lies within the third.
    spans = [(35, 60, "c"), (15, 30, "b"), (10, 20, "a"), (40, 50, "d"), (62, 64, "c"), (65, 66, "e")]
    assert idle(spans, 7, 70) == {
        "(idle before the first)": (1, 3),
        "(idle before) c": (2, 7),
        "(idle before) e": (1, 1),
        "(idle after the last)": (1, 4),
        "(busy)": (1, 48),
    }
    assert idle([(0, 5, "a")], 0, 5) == {"(idle after the last)": (1, 0), "(busy)": (1, 5)}


VLLM = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

def option(name):
    return sys.argv[sys.argv.index(name) + 1]

class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

if sys.argv[1] == "serve":
    HTTPServer(("127.0.0.1", int(option("--port"))), Healthy).serve_forever()
if sys.argv[2] == "throughput":
    Path(option("--output-json")).write_text(json.dumps({"tokens_per_second": 7.0}))
    sys.exit()
rate, count = option("--request-rate"), int(option("--num-prompts"))
keys = ["median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms", "request_throughput", "output_throughput"]
figures = dict.fromkeys([*keys, "total_token_throughput"], {"inf": 9, "4": 4, "24": 24}[rate])
file = Path(option("--result-dir")) / option("--result-filename")
file.write_text(json.dumps(figures | {"completed": count - (rate == os.environ["SHORT_AT"])}))
"""


@pytest.mark.parametrize("short_at", ["24", "never"])
def test_one_server_gives_throughput_and_latencies(
    benchmarks, run, tmp_path, monkeypatch, capsys, short_at
):
    """What is short of answers is an error, and what was measured before it stays."""
    monkeypatch.setenv("SHORT_AT", short_at)
    script = tmp_path / "vllm.py"
    script.write_text(VLLM)
    monkeypatch.setattr(benchmarks.serving_live, "VLLM", [sys.executable, str(script)])
    now = run("--serve", "--formats=bf16", "--models=tiny")
    short = short_at == "24"
    assert benchmarks.measure_group("tiny", [(now, "bf16", [])]) == (["bf16"] if short else [])
    assert ("7 of 8 requests were completed at 24/s" in capsys.readouterr().out) == short
    rows = benchmarks.read_rows(tmp_path / "rows.csv")
    figures = benchmarks.serving_live.FIGURES
    expected = {"rateinf_total": 9.0} | {f"rate4_{name}": 4.0 for name in figures}
    if not short:
        expected |= {"throughput": 7.0} | {f"rate24_{name}": 24.0 for name in figures}
    assert {row["measure"]: float(row["value"]) for row in rows} == expected
    assert (
        list((tmp_path / "work").rglob("bench-serve.log")) and bool(now.missing("tiny", "bf16")) == short
    )
