"""What does one get for serving FlatQuant instead of bf16, fp8 or 4-bit weights? The whole engine, on made-up weights.

    python benchmarks/serving.py                                # every format of Llama-3-8B's shape
    python benchmarks/serving.py --formats bf16,fp8,flatquant-w4a4 --models qwen3-32b
    python benchmarks/serving.py --serve --formats flatquant-w4a4   # a live server: `vllm bench serve`; `vllm bench throughput`
    python benchmarks/serving.py --profile --formats flatquant-w4a4 # also the kernels of a step, to serving_profile.csv
    python benchmarks/serving.py --together 4                   # four engines start at once: 3 times quicker
    python benchmarks/serving.py --starts                       # again, for the time of a start with warm caches
    python benchmarks/serving.py --print                        # the README's tables; --plot FILE.png

Same vLLM, same settings for every format, each in processes of its own; bf16 is measured again in every run and
ratios are only taken within a run. Rows are appended as they are measured, and what is there for this GPU, vLLM,
commit and model is not measured again. The log of each engine tells which kernel ran, and a format that
ran as something else is recorded as that. With --together engines wait idle on the same card until it is their
turn to measure, as many as fit: their starts are not timed and their KV cache is as small as the plan allows. Speed on random weights; accuracy is another benchmark's.
"""

import argparse
import datetime
import importlib.metadata
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import serving_live
from serving_formats import (
    FORMATS,
    MODELS,
    compiled_anew,
    from_cache,
    fusion_lines,
    kv_bytes,
    ran_as,
    weight_bytes,
    write_model,
)
from serving_process import CACHES, Engine
from serving_tables import KEY, OWN, plot, print_profile, print_tables, read_rows
from timing import RESULTS, Table, commit

HERE = Path(__file__).resolve().parent
COLUMNS = [
    "run", "date", "gpu", "vllm", "torch", "commit", "model", "format", "kernels", "measure", "value", "unit",
    "spread", "repeats", "fastest", "engine",
]  # fmt: skip
PROFILE_COLUMNS = [
    "run", "date", "gpu", "vllm", "torch", "commit", "model", "format", "phase", "kernel", "count", "us",
]  # fmt: skip
PLAN: dict[str, Any] = {
    "prefill": [[1, 2048], [8, 1024]],
    "decode": [1, 8, 32, 128, 256],
    "decode_prompt": 32,
    "decode_tokens": 48,
    "decode_ends": 8,
    "repeats": 5,
    "seconds": 3,
    "profile_decode": [1, 32, 128],
}
TINY_PLAN = PLAN | {"prefill": [[1, 128], [2, 64]], "decode": [1, 4], "decode_tokens": 8}
TINY_PLAN |= {"repeats": 2, "seconds": 0, "profile_decode": [2]}
"""What is measured: each figure so many times at least, and for so many seconds, since a busy host disturbs single ones."""
BESIDE = 4 * 2**30
"""Bytes that an engine needs on a card beside weights and KV cache: 8192 tokens' activations, graphs, the context."""
ENGINE: dict[str, Any] = {
    "dtype": "bfloat16",
    "load_format": "dummy",
    "max_model_len": 4096,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 8192,
    "gpu_memory_utilization": 0.92,
    "enable_prefix_caching": False,
    # The batches that are measured and their neighbours, as the default list would round them.
    "compilation_config": {
        "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24, 32, 40, 120, 128, 136, 248, 256]
    },
}


def graphics_card() -> tuple[str, float]:
    """Name and memory in bytes of the first GPU, without a CUDA context here; ("cpu", inf) without one."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (FileNotFoundError, IndexError, subprocess.CalledProcessError):
        return "cpu", float("inf")
    name, mebibytes = line.rsplit(", ", 1)
    return name, float(mebibytes) * 2**20


class Run:
    """One call of this script on ``size`` GPUs: where its rows go and what they have in common."""

    def __init__(self, args: argparse.Namespace, size: int = 1) -> None:
        self.args, self.size = args, size
        self.gpu, self.memory = graphics_card()
        self.cpu = self.gpu == "cpu"
        now = args.begin
        self.common = {
            "run": now.strftime("%m%d-%H%M%S"),
            "date": now.date().isoformat(),
            "gpu": self.gpu,
            "vllm": importlib.metadata.version("vllm"),
            "torch": importlib.metadata.version("torch"),
            "commit": commit(),
        }
        self.table = Table(args.results, COLUMNS, KEY)
        self.profiles = Table(args.profile_results, PROFILE_COLUMNS, [*KEY[:-1], "phase", "kernel"])
        self.work = args.work / self.common["run"] / f"tp{size}"

    def label(self, model: str) -> str:
        """The model's name in the results."""
        return model if self.size == 1 else f"{model} tp{self.size}"

    def folder(self, model: str, name: str) -> Path:
        """Where a format of a model is written and logged."""
        return self.work / model / name

    def row(self, model: str, name: str, **values: Any) -> dict[str, Any]:
        """A row of the results."""
        return self.common | {"model": self.label(model), "format": name} | values

    def fits(self, model: str, name: str) -> bool:
        """Whether the weights and what must be beside them fit in the card's memory."""
        return self.alone(model, name) < ENGINE["gpu_memory_utilization"] * self.memory

    def alone(self, model: str, name: str) -> float:
        """Bytes that a format needs on each card, but for its KV cache."""
        return weight_bytes(model, FORMATS[name].bits) / self.size + BESIDE

    def together(self, model: str, name: str) -> float:
        """Bytes that a format needs on each card with the KV cache that the plan needs; 0 if it is not started."""
        cache = kv_bytes(model, self.kv_tokens(model)) / self.size
        return self.alone(model, name) + cache if self.fits(model, name) else 0

    def plan(self, model: str) -> dict[str, Any]:
        """What is measured of a model."""
        return TINY_PLAN if model == "tiny" else PLAN

    def kv_tokens(self, model: str) -> int:
        """Tokens in the KV cache that the plan needs, blocks that are not full included."""
        plan = self.plan(model)
        length = plan["decode_prompt"] + plan["decode_tokens"] + 2 * plan["decode_ends"]
        prefill = max(batch * (prompt + 64) for batch, prompt in plan["prefill"])
        return max(prefill, max(plan["decode"]) * (length + 32), ENGINE["max_model_len"])

    def options(self, model: str, name: str) -> dict[str, Any]:
        """The engine's options for a format."""
        options = ENGINE | FORMATS[name].options | {"tensor_parallel_size": self.size}
        if self.args.together > 1:  # vLLM would take all that is free
            size = kv_bytes(model, self.kv_tokens(model)) // self.size
            options |= {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": size}
        if self.cpu:
            options |= {"enforce_eager": True, "max_model_len": 512}
        return options

    def cache(self, model: str, name: str) -> Path:
        """The folder of a format's compile caches."""
        return self.args.cache / self.label(model).replace(" ", "-") / name

    def environment(self, model: str, name: str) -> dict[str, str]:
        """What the processes of a format get."""
        cache = self.cache(model, name)
        # Formats of one kind share kernels, and what one compiled the next need not.
        kernels = cache.parent / ("flatquant-triton" if FORMATS[name].flatquant else "triton")
        paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        return {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "VLLM_CACHE_ROOT": str(cache / "vllm"),
            "TRITON_CACHE_DIR": str(kernels),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "fork",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            **FORMATS[name].env,
        }

    def model(self, model: str, name: str) -> Path:
        """The folder that vLLM gets. It stays from run to run: vLLM finds compiled graphs by the model's path too."""
        return write_model(self.cache(model, name) / "model", model, FORMATS[name], self.size)

    def engine(self, model: str, name: str, wanted: list[str], go: Path) -> Engine:
        """Start one format's engine, which measures once there is a file ``go``."""
        work, folder = self.folder(model, name), self.model(model, name)
        job = {
            "model": str(folder),
            "options": self.options(model, name) | {"skip_tokenizer_init": True},
            "out": str(work / "rows.jsonl"),
            "go": str(go),
            "plan": self.plan(model),
            "profile": self.args.profile,
            "wanted": wanted,
        }
        environment = self.environment(model, name) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        return Engine(HERE / "serving_engine.py", job, work / "log", environment, self.args.limit)

    def start_measure(self, model: str, name: str) -> str:
        """What the time of a start is called: with caches that are there or not."""
        environment = self.environment(model, name)
        there = [Path(environment[key]).exists() for key in CACHES]
        return "start_warm" if all(there) else "start" if any(there) else "start_cold"

    def log(self, model: str, name: str) -> str:
        """A format's logs; for graphs from the compile cache, also what was said when they were compiled."""
        text = "".join(
            path.read_text(errors="replace") for path in self.folder(model, name).glob("*log")
        )
        kept = self.cache(model, name) / "fusion.txt"
        if lines := fusion_lines(text):
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text("\n".join(lines))
        elif from_cache(text) and kept.exists():
            text += "\n" + kept.read_text()
        return text

    def take(self, model: str, name: str, rows: Iterator[dict[str, Any]]) -> bool:
        """Append a format's rows as they come, and print them. Returns whether all went well."""
        print(f"{self.label(model)} {name}", flush=True)
        well = True
        begin = time.monotonic()
        phases = []
        for found in rows:
            label, kernels = ran_as(name, self.log(model, name))
            if "error" in found:
                print(f"  {found['error']}")
                well = False
            elif "phase" in found:
                self.profiles.append(self.row(model, label, **found))
                phases.append(found)
            else:
                value = round(found.pop("value"), 4)
                if found["measure"] == "start_warm" and compiled_anew(self.log(model, name)):
                    found["measure"] = "start"  # caches were there, and had something else
                self.add(self.row(model, label, kernels=kernels, value=value, **found))
                line = f"  {found['measure']:16} {value:10.3f} {found['unit']}"
                if "fastest" in found:
                    line += f"; fastest {found['fastest']:.3f}, spread {found['spread']:.0%}"
                print(line, flush=True)
        label, kernels = ran_as(name, self.log(model, name))
        print(
            f"  {label}: {kernels or 'no quantized kernel'}; {time.monotonic() - begin:.0f} s",
            flush=True,
        )
        print_profile(phases)
        return well

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; a spread is a share."""
        rounded = {key: round(row[key], 4) for key in ("spread", "fastest") if key in row}
        self.table.append(row | rounded | {"engine": OWN})

    def measures(self, model: str) -> list[str]:
        """What this run measures of a format."""
        plan = self.plan(model)
        if self.args.serve:
            return [serving_live.LAST]  # all are measured, and this one comes last
        if self.args.starts:
            return ["start_warm"]
        every = [f"prefill_{batch}x{prompt}" for batch, prompt in plan["prefill"]]
        return every + [f"decode_b{batch}" for batch in plan["decode"]]

    def missing(self, model: str, name: str) -> list[str]:
        """Those of a format that have no rows yet; none if the format does not fit."""
        common = self.row(model, name)
        there = {
            row["measure"]
            for row in read_rows(self.args.results)
            if all(row[key] == common[key] for key in ("gpu", "vllm", "commit", "model"))
            and row["format"].split(" (")[0] == name
        }
        return [m for m in self.measures(model) if m not in there and "fits" not in there]

    def todo(self, model: str) -> dict[str, list[str]]:
        """Format -> what to measure: bf16 again and what has no rows yet; nothing if nothing is missing."""
        every = self.measures(model)
        missing = {name: self.missing(model, name) for name in self.args.formats}
        left = {name: measures for name, measures in missing.items() if measures or self.args.profile}
        return {"bf16": every} | {n: m for n, m in left.items() if n != "bf16"} if left else {}


Todo = list[tuple[Run, str, list[str]]]
"""A run, a format, and what of it to measure."""


def groups(model: str, todo: Todo, most: int) -> Iterator[Todo]:
    """Parts of ``todo``, in its order, of at most ``most`` engines that are on the card at once and fit there."""
    part: Todo = []
    left = room = 0.95 * todo[0][0].memory if todo else 0
    for run, name, wanted in todo:
        needed = run.together(model, name)
        if part and (len(part) == most or needed > left):
            yield part
            part, left = [], room
        part.append((run, name, wanted))
        left -= needed
    if part:
        yield part


def measure_group(model: str, todo: Todo) -> list[str]:
    """Start several formats' engines at once, then measure one after the other, the rest idle. Returns which failed."""
    engines: list[tuple[Run, str, Engine, Path, str | None]] = []
    failed = []
    print("starting", *[f"{run.label(model)} {name}" for run, name, _ in todo], sep="\n  ", flush=True)
    try:
        for run, name, wanted in todo:
            if run.fits(model, name) and run.args.serve:
                if not run.take(model, name, serving_live.measure(run, model, name)):
                    failed.append(name)
            elif run.fits(model, name):
                alone = run.start_measure(model, name) if run.args.together == 1 else None
                go = run.folder(model, name) / "go"
                engines.append((run, name, run.engine(model, name, wanted, go), go, alone))
            else:
                print(f"{run.label(model)} {name}: does not fit", flush=True)
                run.add(run.row(model, name, measure="fits", value=0))
        for _, _, engine, _, _ in engines:
            engine.wait_until_ready()
        for run, name, engine, go, alone in engines:
            go.touch()
            well = run.take(model, name, engine.rows(alone))
            engine.close()
            if engine.problem:
                print(
                    f"  {name}: failed ({engine.problem}); errors in {engine.log}, and its end:",
                    *engine.tail(),
                    sep="\n    ",
                )
            if engine.problem or not well:
                failed.append(name)
            for key in CACHES:
                Path(run.environment(model, name)[key]).mkdir(parents=True, exist_ok=True)
    finally:
        for _, _, engine, _, _ in engines:
            engine.close()
    return failed


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def names(known: dict[str, Any]) -> Any:
        def parse(text: str) -> list[str]:
            found = list(known) if text == "all" else text.split(",")
            if unknown := set(found) - set(known):
                raise argparse.ArgumentTypeError(
                    f"unknown: {', '.join(sorted(unknown))}; use {', '.join(known)}"
                )
            return found

        return parse

    parser.add_argument(
        "--formats", type=names(FORMATS), metavar="A,B", help=f"of {', '.join(FORMATS)} [all]"
    )
    parser.add_argument(
        "--models", type=names(MODELS), metavar="A,B", help=f"of {', '.join(MODELS)} [llama-3-8b]"
    )
    parser.add_argument(
        "--tensor-parallel-size",
        type=lambda text: [int(size) for size in text.split(",")],
        default=[1],
        metavar="N,M",
        help="FlatQuant gets as many shards",
    )
    parser.add_argument(
        "--serve", action="store_true", help="vllm bench serve and vllm bench throughput"
    )
    parser.add_argument("--starts", action="store_true", help="only start each engine, with warm caches")
    parser.add_argument(
        "--profile", action="store_true", help="also the kernels of a decode and a prefill step"
    )
    parser.add_argument("--print", action="store_true", help="print the tables and measure nothing")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the table and measure nothing")
    parser.add_argument("--results", type=Path, default=RESULTS / "serving.csv")
    parser.add_argument("--profile-results", type=Path, default=RESULTS / "serving_profile.csv")
    parser.add_argument("--work", type=Path, default=Path("out/serving"), help="logs and model folders")
    parser.add_argument("--cache", type=Path, default=Path("out/serving-cache"), help="compile caches")
    parser.add_argument(
        "--together", type=int, default=1, metavar="N", help="engines on the card at once"
    )
    parser.add_argument("--limit", type=float, default=300, help="seconds for one format")
    args = parser.parse_args()
    if args.together > 1 and (args.serve or args.starts):
        parser.error("--together has small KV caches and times no start: not with --serve or --starts")
    args.work, args.cache = args.work.resolve(), args.cache.resolve()
    args.begin = datetime.datetime.now()
    return args


def main() -> None:
    """Measure what is not there yet, or show what is."""
    args = arguments()
    if args.print or args.plot:
        if args.print:
            print_tables(args.results, args.models, args.formats)
        if args.plot:
            args.plot.parent.mkdir(parents=True, exist_ok=True)
            plot(args.results, args.plot)
            print(f"wrote {args.plot}")
        return
    args.models, args.formats = args.models or ["llama-3-8b"], args.formats or list(FORMATS)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # and so end the engines
    runs = [Run(args, size) for size in args.tensor_parallel_size]
    if runs[0].cpu and args.models != ["tiny"]:
        sys.exit(
            "there is no GPU here: `--models tiny` tries the script itself on a CPU, nothing else would end"
        )
    failed = []
    for model in args.models:
        todo = [(run, name, wanted) for run in runs for name, wanted in run.todo(model).items()]
        if not todo:
            print(f"{model}: every figure has a row for this GPU, vLLM and commit in {args.results}")
        for part in groups(model, todo, args.together):
            failed += measure_group(model, part)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the rows of the others are in {args.results}")
    print(f"`--print` shows the tables of {args.results}")


if __name__ == "__main__":
    main()
