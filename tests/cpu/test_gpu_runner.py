"""The script behind `make test-gpu`: what it counts, prints and writes, with and without parallel workers.

The tests that it runs here are small ones, made on the spot; no GPU and no PyTorch is needed.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("gpu_tests", ROOT / ".ci/gpu_tests.py")
gpu_tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_tests)

TESTS = """
import pytest

@pytest.fixture
def broken_end():
    yield
    raise RuntimeError("the end is broken")

@pytest.fixture
def broken_start():
    raise RuntimeError("the start is broken")

@pytest.mark.parametrize("n", range(6))
def test_good(n, record_property):
    record_property("measured", f"value-{n}")

def test_bad():
    print("printed by the test")
    assert 1 == 2, "this is why"

def test_skipped():
    pytest.skip("not here")

def test_bad_end(broken_end):
    pass

def test_bad_start(broken_start):
    pass
"""
CRASH = "\nimport os\ndef test_crash():\n    os._exit(3)\n"
SLOW = """
import pathlib, subprocess, sys
def test_quick():
    pathlib.Path(__file__).with_name("quick").touch()
def test_slow():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)", "started by test_slow"])
    pathlib.Path(__file__).with_name("slow").touch()
    process.wait()
"""
SCRIPT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("gpu_tests", {script!r})
gpu_tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_tests)
gpu_tests.stop_at(None)
results, status = gpu_tests.run_tests([{folder!r}], ["0", "1"], {workers})
print("ROW", gpu_tests.row_of(results, status, ["tests"], 7.4), "status", status, sorted(results.running))
"""


def start(folder, tests, workers):
    """The runner on ``tests`` in a process of its own."""
    (folder / "test_them.py").write_text(tests)
    (folder / "conftest.py").write_text((ROOT / "tests/gpu/conftest.py").read_text())
    script = SCRIPT.format(script=str(ROOT / ".ci/gpu_tests.py"), folder=str(folder), workers=workers)
    environment = {key: value for key, value in os.environ.items() if "XDIST" not in key}
    plugins = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "xdist.plugin"}
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env=environment | plugins,
    )


def counts(passed, failed, skipped):
    return f"'passed': {passed}, 'failed': {failed}, 'skipped': {skipped}, 'seconds': 7}}"


@pytest.mark.parametrize("workers", [0, 3])
def test_counts_and_texts(tmp_path, workers):
    """A failure while setting up or tearing down is one failure, and its text is there."""
    out, _ = start(tmp_path, TESTS, workers).communicate(timeout=120)
    assert "ROW {'tests': 'tests', " + counts(6, 3, 1) + " status 1 []" in out, out
    for text in ("this is why", "printed by the test", "the end is broken", "the start is broken"):
        assert text in out
    assert all(f"measured: value-{n}" in out for n in range(6))


def test_a_worker_that_dies_is_a_failure(tmp_path):
    out, _ = start(tmp_path, TESTS + CRASH, 2).communicate(timeout=120)
    assert counts(6, 4, 1) in out, out
    assert "crashed" in out


@pytest.mark.parametrize("workers, number", [(0, signal.SIGTERM), (2, signal.SIGALRM)])
def test_cut_off(tmp_path, workers, number):
    """What has not finished has not passed, nothing that it started lives on, and the row says so."""
    run = start(tmp_path, SLOW, workers)
    while not all((tmp_path / name).exists() for name in ("quick", "slow")):
        assert run.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    run.send_signal(number)
    out, _ = run.communicate(timeout=60)
    assert "(cut off after 7 s, 1 of 2 without a result)', " + counts(1, 0, 0) in out, out
    assert "status 2" in out and "test_slow']" in out
    time.sleep(0.5)
    living = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "started by test_slow" not in living


def test_a_deadline_is_an_alarm():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)}
    try:
        gpu_tests.stop_at(1000)
        assert 900 < signal.setitimer(signal.ITIMER_REAL, 0)[0] <= 1000
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_file_that_cannot_be_collected_is_one_failure(tmp_path):
    out, _ = start(tmp_path, "import nothing_of_this_name", 2).communicate(timeout=60)
    assert counts(0, 1, 0) in out, out
    assert "nothing_of_this_name" in out


def test_workers_take_the_gpus_in_turn(tmp_path):
    tests = """
import os, time
import pytest
@pytest.mark.parametrize("n", range(8))
def test_gpu(n, record_property):
    time.sleep(0.5)
    names = ("PYTEST_XDIST_WORKER", "CUDA_VISIBLE_DEVICES", "FLATQUANT_TEST_GPUS")
    record_property("seen", " ".join(os.environ[name] for name in names))
"""
    out, _ = start(tmp_path, tests, 4).communicate(timeout=120)
    seen = {line.removeprefix("seen: ") for line in out.splitlines() if line.startswith("seen: ")}
    assert seen == {"gw0 0 0,1", "gw1 1 1,0", "gw2 0 0,1", "gw3 1 1,0"}, out


def test_long_tests_start_first_and_none_waits_behind_another(tmp_path, monkeypatch):
    """Three workers, five long tests among many short ones, all simulated."""
    loads = pytest.importorskip("xdist.scheduler.load")
    monkeypatch.setattr(loads, "parse_tx_spec_config", lambda config: [1, 2, 3])
    long = [f"tests/gpu/test_serving_gpu.py::test_verify_passes[{n}]" for n in range(5)]
    short = [f"tests/gpu/test_kernels.py::test_kron[{n}]" for n in range(20)]

    class Config:
        def getoption(self, name):
            return 1

    class Node:
        shutting_down = False
        gateway = type("Gateway", (), {"id": "gw"})

        def send_runtest_some(self, indices):
            pass

        def shutdown(self):
            self.shutting_down = True

    class Log:
        def __call__(self, *_):
            pass

        loadsched = property(lambda self: self)

    scheduling, nodes = gpu_tests.scheduler(Config(), Log()), [Node() for _ in range(3)]
    tests = short[:10] + long + short[10:]
    for node in nodes:
        scheduling.add_node(node)
    for node in nodes:
        scheduling.add_node_collection(node, tests)
    scheduling.schedule()
    clock, running, started = 0.0, {}, []
    while scheduling.has_pending:
        for node in nodes:
            waiting = scheduling.node2pending[node]
            if node not in running and waiting and (len(waiting) > 1 or node.shutting_down):
                running[node] = (clock + gpu_tests.expected_seconds(tests[waiting[0]]), waiting[0])
                started.append((clock, tests[waiting[0]]))
        node = min(running, key=lambda n: running[n][0])
        clock, index = running.pop(node)
        scheduling.mark_test_complete(node, index, 1.0)
    assert sorted(test for _, test in started) == sorted(tests)
    assert {test for when, test in started if when == 0} <= set(long)
    assert all(when <= 95 for when, test in started if test in long)
    assert clock <= 180  # 5 x 80 s and 20 x 5 s by three workers: at least 167 s
