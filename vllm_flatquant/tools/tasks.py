"""``flatquant eval --tasks``: the tasks of lm-evaluation-harness, on the reference backend or through vLLM.

Without a network: put the task files (with local ``data_files``) into a folder, give it as
``--include-path`` and set HF_DATASETS_OFFLINE=1. A task file can name Python code, which then runs.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..calibration.card import add_results
from ..calibration.data import load_tokenizer
from ..calibration.errors import UserError
from ..calibration.hub import check_hub
from ..calibration.quantize import choose_device
from ..calibration.reference import load_reference
from ..calibration.source import load_config, resolve_folder
from ..files import first_line
from . import served
from .evaluation import DTYPES, check_options, check_served, default_dtype, free_gpu, original_folder

Scores = dict[str, dict[str, float]]
"""Task -> metric -> value."""


def run_tasks(
    model: str,
    tasks: list[str],
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    backend: str = "reference",
    dtype: str | None = None,
    device: str = "auto",
    original: str | None = None,
    update_card: bool = False,
) -> dict[str, Scores]:
    """Scores by backend (``reference``, ``vllm``), and by ``original`` where one is given.

    limit: documents of each task. Raises UserError for bad input or if lm-eval is not installed.
    """
    check_options(backend, dtype, limit)
    dtype = dtype or default_dtype(backend)
    check_hub()
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError(
            "--tasks needs lm-evaluation-harness; install it with `pip install 'vllm-flatquant[eval]'`"
        ) from None
    if include_path and not Path(include_path).is_dir():
        raise UserError(f"--include-path {include_path} is no folder; give the folder of the task files")
    manager = TaskManager(include_path=include_path)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown or not tasks:
        raise UserError(
            f"task '{unknown[0] if unknown else ''}' is unknown; `lm_eval ls tasks` lists the built-in ones, and "
            "--include-path adds a folder of your own"
        )
    path = resolve_folder(model)
    beside = original_folder(path, original, update_card)
    runs = {name: path for name in ("reference", "vllm") if backend in (name, "both")}
    if beside:
        runs["original"] = beside
    context = min(
        getattr(load_config(folder), "max_position_embeddings", 2048) for folder in runs.values()
    )
    scores = {}
    for name, folder in runs.items():
        through = name if name != "original" else next(iter(runs))
        lm = _language_model(folder, through, dtype, device, context)
        scores[name] = _evaluate(lm, tasks, manager, num_fewshot, limit)
        if through == "vllm":
            lm.model.llm_engine.engine_core.shutdown()
        del lm
        free_gpu()
    if update_card:
        add_results(path, card_results(scores, num_fewshot, limit))
    return scores


def _language_model(path: Path, backend: str, dtype: str, device: str, context: int) -> Any:
    """lm-eval's wrapper around the folder's model."""
    if backend == "reference":
        from lm_eval.models.huggingface import HFLM

        network: Any = load_reference(path, choose_device(device), DTYPES[dtype])
        if hasattr(network.config, "quantization_config"):
            del network.config.quantization_config  # lm-eval would look the method up in Transformers
        return HFLM(pretrained=network, tokenizer=load_tokenizer(path), batch_size=1, max_length=context)
    check_served(path, dtype)
    served.prepare_engine()
    try:
        from lm_eval.models.vllm_causallms import VLLM
    except ImportError as error:
        raise UserError(f"lm-eval cannot use vLLM here ({error}); use --backend reference") from None
    return VLLM(
        pretrained=str(path), dtype=dtype, max_model_len=context, enable_prefix_caching=False, seed=0
    )


def _evaluate(
    lm: Any, tasks: list[str], manager: Any, num_fewshot: int | None, limit: int | None
) -> Scores:
    from lm_eval import simple_evaluate

    try:
        found = simple_evaluate(
            model=lm,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )
    except (FileNotFoundError, ConnectionError, OSError) as error:
        raise UserError(
            f"the data of {', '.join(tasks)} cannot be read ({first_line(error)}); check the network, or give task files with "
            "local data in --include-path"
        ) from None
    assert found is not None  # None only on the other ranks of a distributed run
    scores: Scores = {}
    for task, metrics in found["results"].items():
        scores[task] = {
            name.removesuffix(",none"): value
            for name, value in metrics.items()
            if isinstance(value, float) and "_stderr" not in name
        }
    return scores


def card_results(
    scores: dict[str, Scores], num_fewshot: int | None, limit: int | None
) -> list[EvalResult]:
    """Scores as the hub's metadata holds them, the original's beside."""
    backend = next(iter(scores))
    original = scores.get("original", {})
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=task,
            metric_type=metric,
            metric_name=metric,
            metric_value=round(value, 4),
            metric_args={
                "few_shot": "default of the task" if num_fewshot is None else num_fewshot,
                "documents": "all" if limit is None else limit,
                "backend": backend,
                "unquantized": round(original[task][metric], 4) if task in original else None,
            },
        )
        for task, metrics in scores[backend].items()
        for metric, value in metrics.items()
    ]


def score_lines(scores: dict[str, Scores]) -> list[str]:
    """A table: one line per task and metric, one column per backend, and the difference of two."""
    columns = list(scores)
    lines = [f"{'task':24} {'metric':16} " + " ".join(f"{name:>10}" for name in columns)]
    if {"reference", "vllm"} <= set(columns):
        lines[0] += f" {'vllm - ref':>10}"
    for task, metrics in scores[columns[0]].items():
        for metric, value in metrics.items():
            values = [scores[name][task][metric] for name in columns]
            line = f"{task:24} {metric:16} " + " ".join(f"{v:10.4f}" for v in values)
            if {"reference", "vllm"} <= set(columns):
                line += f" {scores['vllm'][task][metric] - value:+10.4f}"
            lines.append(line)
    return lines
