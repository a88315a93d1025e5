"""The pipeline: inputs, blocks one by one, checkpoint; each stage is finished or absent."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UnsupportedError
from ..files import check_servable
from ..kernels.pack import packing_step
from ..spec import Activations, Factors, FlatQuantSpec, KVCache, Producer, Sites, Weights
from . import parallel
from .card import model_card, public_name
from .data import calibration_tokens
from .endtoend import LATENT, check_memory, distill, distill_tokens, finished_hidden
from .errors import UserError
from .export import (
    DISTILLED,
    OTHERS,
    ROUNDED_HEAD,
    build_checkpoint,
    save_others,
    save_tensors,
    write_side_files,
    write_text,
)
from .factors import factor_pair
from .fingerprint import (
    Run,
    check_recipe,
    check_same,
    check_transforms,
    environment,
    interrupted_run,
    other_bits,
    scan_weights,
    text_digest,
    token_digest,
)
from .golden import embedding_name, final_norm, golden, head_name, norm_name
from .head import head_cost, quantize_head
from .learned_rotation import find_rotation
from .meter import metered, total_memory
from .quantize_block import REPORT, BlockReport, load_block, quantize_block, save_block
from .recipe import Recipe
from .rotation import Rotation, rotated
from .shards import choose_shards
from .source import GOLDEN, ModelSource, WeightFiles, check_context
from .staging import CHECKPOINT, INPUTS, Staging, block_stage, check_out, explained
from .streams import (
    FULL,
    QUANTIZED,
    drop_streams,
    new_stream,
    read_streams,
    record_inputs,
    store_stream,
)

ROTATION, MATRICES = "rotation", "matrices.safetensors"
"""Stage of the rotation's matrices, and its file."""
HEAD_ROWS = 8
"""Calibration rows on which the cost of an 8-bit head is measured, where so many were followed."""


def choose_device(device: str) -> torch.device:
    """``auto`` is CUDA where there is one, of several processes each its own; UserError if CUDA is asked for and
    absent."""
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device '{device}' is unknown; use auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable CUDA GPU; use --device cpu")
    name = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    return parallel.own_device(torch.device(name))


def make_spec(source: ModelSource, recipe: Recipe) -> FlatQuantSpec:
    """The checkpoint's spec; UserError if model and recipe do not fit together."""
    from .. import __version__

    config, arch = source.config, source.arch
    try:
        check_servable(config)
    except UnsupportedError as error:
        raise UserError(f"{source.path}/{error}") from None
    shapes = {n: source.files.shape(f"{source.block_prefix(0)}{n}.weight") for n in arch.linears}
    head_dim = source.head_dim
    heads, hidden = shapes[arch.o][1] // head_dim, shapes[arch.qkv[0]][1]
    intermediate = shapes[arch.down][1]
    kv_heads = shapes[arch.qkv[1]][0] // head_dim
    shards = choose_shards(recipe, heads, kv_heads, intermediate)
    check_context(config, recipe.seq_len)
    for name, (_, width) in shapes.items():
        on_a_rank = width // shards if name in (arch.o, arch.down) else width
        if recipe.group_size and on_a_rank % recipe.group_size:
            raise UserError(
                f"group_size={recipe.group_size} does not divide the input width {on_a_rank} of {name} on a "
                "rank; choose a divisor, or leave the group size out"
            )
        step = packing_step(recipe.weight_bits)
        if on_a_rank % step:
            raise UserError(
                f"{name} has {on_a_rank} inputs on a rank, which {recipe.weight_bits}-bit packing cannot hold: "
                f"it needs a multiple of {step}; choose another scheme"
            )
    online = recipe.transforms

    def factors(site: str, width: int, named: str) -> Factors | None:
        if site not in online:
            return None
        left, right = factor_pair(width, named, recipe.widest_factor)
        return Factors(left=left, right=right)

    return FlatQuantSpec(
        producer=Producer(name="vllm-flatquant", version=__version__),
        weights=Weights(bits=recipe.weight_bits, group_size=recipe.group_size),  # type: ignore[arg-type]
        activations=Activations(bits=recipe.activation_bits),  # type: ignore[arg-type]
        kv=KVCache(k_bits=recipe.k_bits, v_bits=recipe.v_bits, symmetric=recipe.kv != 4),  # type: ignore[arg-type]
        shards=shards,
        lm_head_bits=recipe.lm_head,
        ignore=["lm_head"] if recipe.lm_head == 16 else [],
        sites=Sites(
            qkv=factors("qkv", hidden, "hidden_size"),
            o=heads // shards if "o" in online else None,
            gate_up=factors("gate_up", hidden, "hidden_size"),
            down=factors("down", intermediate // shards, "intermediate_size / shards"),
            k=head_dim if recipe.k_bits < 16 else None,
        ),
    )


def _ignore(*_: object) -> None: ...


@dataclass
class Callbacks:
    """What a run tells while it works.

    accepted: model, recipe and text passed the checks that need no weights. progress: of the stage ``check`` (of the
    weight files), ``quantize``, ``write`` (the text of the last stage) or ``distill``, the finished fraction.
    """

    accepted: Callable[[], None] = _ignore
    block: Callable[[BlockReport], None] = _ignore
    progress: Callable[[str, float], None] = _ignore
    note: Callable[[str], None] = _ignore


def quantize(
    model: str | Path,
    out: str | Path,
    recipe: Recipe,
    calib: str = "stdlib",
    device: str = "auto",
    overwrite: bool = False,
    callbacks: Callbacks | None = None,
    resume: bool = False,
) -> Path:
    """Quantize a Hugging Face model into a checkpoint folder that vLLM serves.

    model: folder or hub name. out: folder to make. calib: see ``calibration_tokens``. resume: go on with the
    interrupted run to ``out``, which must have been of the same model, recipe, tokens and device.
    Returns ``out``. Raises UserError for bad input. Finished blocks stay in the staging folder if anything
    goes wrong after them; before the first block nothing stays. In a process of torchrun: see parallel.py.
    """
    tell = (callbacks if parallel.is_writer() else None) or Callbacks()
    parallel.share(recipe)  # refuses what several processes cannot do
    out = Path(out).resolve()
    where = choose_device(device)
    before = interrupted_run(out) if resume else None
    if before:
        check_recipe(out, before.recipe, recipe)
    else:
        check_out(out, overwrite, Path(model))
    source, spec, tokens = check_inputs(model, out, recipe, calib, where, overwrite or resume)
    with parallel.group(where), Staging(out) as staging, explained(out, staging):
        if parallel.is_writer():
            if not before:
                staging.refuse_finished(overwrite)  # now, not after every weight was read
            elif not staging.has(CHECKPOINT) and not staging.is_published():
                check_transforms(out, spec, source.block_prefix(0).removesuffix("."))
            tell.accepted()
            run = describe_run(model, calib, where, overwrite, recipe, source, tokens, before, tell)
            begin(staging, run, before, tell)
        parallel.wait()
        run = interrupted_run(out)
        published, built = staging.is_published(), staging.has(CHECKPOINT)
        parallel.wait()  # every process has seen the same
        if not published and not built:
            run_stages(staging, source, run, spec, tokens, where, tell)
        if parallel.is_writer():
            staging.remove() if published else staging.publish(run.overwrite)
    return out


def check_inputs(
    model: str | Path, out: Path, recipe: Recipe, calib: str, device: torch.device, overwrite: bool
) -> tuple[ModelSource, FlatQuantSpec, Tensor]:
    """The model, the spec of its checkpoint and the calibration rows int64 [N, T], after every check that needs
    none of the weights. Arguments as ``quantize``. Raises UserError."""
    source = ModelSource(model)
    text = [Path(calib)] if Path(calib).is_file() else []
    check_out(out, overwrite, source.path, *text)
    spec = make_spec(source, recipe)
    tokens = calibration_tokens(calib, source.path, recipe.samples, recipe.seq_len, recipe.seed)
    if recipe.distill_epochs:
        check_memory(source, recipe, device)  # now, not after all blocks
    return source, spec, tokens


def describe_run(
    model: str | Path,
    calib: str,
    device: torch.device,
    overwrite: bool,
    recipe: Recipe,
    source: ModelSource,
    tokens: Tensor,
    before: Run | None,
    tell: Callbacks,
) -> Run:
    """This run as its staging folder remembers it, after reading every weight that is not as ``before``."""
    known = before.weights if before else {}
    tell.progress("check", 0.0)
    return Run(
        model=str(Path(model).resolve()) if Path(model).exists() else str(model),
        calib=str(Path(calib).resolve()) if Path(calib).is_file() else calib,
        device=device.type,
        overwrite=overwrite,
        recipe=recipe,
        weights=scan_weights(source.files.shards, known, lambda done: tell.progress("check", done)),
        config=text_digest(source.raw_config),
        tokens=token_digest(tokens),
        environment=environment(device),
        processes=parallel.world(),
    )


def begin(staging: Staging, run: Run, before: Run | None, tell: Callbacks) -> None:
    """Go on with the interrupted run ``before``, or make the staging folder ready for a new one; UserError
    if the two do not agree, or if nobody decided what to do with finished blocks."""
    if before:
        check_same(staging.out, before, run)
        other = other_bits(before, run)
        if other:
            tell.note(f"the last bits can differ from an uninterrupted run: {other}")
        run.overwrite = run.overwrite or before.overwrite
        check_out(staging.out, run.overwrite or staging.is_published())
    else:
        staging.start_over(run.overwrite)
    staging.write_run(run.model_dump_json(indent=2) + "\n")


def run_stages(
    staging: Staging,
    source: ModelSource,
    run: Run,
    spec: FlatQuantSpec,
    tokens: Tensor,
    device: torch.device,
    tell: Callbacks,
) -> None:
    """Every stage that is not finished yet, in order: rotation, inputs, other tensors, blocks, distillation,
    checkpoint.

    Each fills a folder that ``staging`` shows complete or not at all; its tensors-*.safetensors go into the
    checkpoint. Of several processes the first does alone what is not about rows; each has its rows of the tokens.
    """
    recipe, blocks = run.recipe, source.num_blocks
    own, tokens = parallel.share(recipe), parallel.own_rows(tokens, recipe.batch_size)
    done = staging.finished_blocks()
    source = rotate_source(staging, source, recipe, tokens, device)
    kwargs = prepare_inputs(staging, source, tokens, device, write=done == 0)
    if parallel.is_writer() and not staging.has(OTHERS):
        with staging.stage(OTHERS) as folder:
            save_others(folder, source)
    x, x_q = read_streams(staging.folder / streams_stage(done), stream_device(own, source, device))
    for i in range(done, blocks):
        with staging.shared_stage(block_stage(i)) as folder, seeded(recipe.seed * 1009 + i, device):
            x, x_q, tensors, report = quantize_block(
                source, i, own, spec, x, x_q, kwargs[i], device, folder
            )
            save_block(folder, source.block_prefix(i), x, x_q, tensors, report)
            del tensors  # not beside the next block
        drop_streams(staging.folder / streams_stage(i))
        tell.block(report)
        tell.progress("quantize", (i + 1) / blocks)
    if not parallel.is_writer():
        return
    if recipe.distill_epochs:
        if not staging.has(DISTILLED):
            with staging.stage(DISTILLED) as folder, seeded(recipe.seed * 1009 + blocks, device):
                distill_blocks(folder, staging, source, recipe, spec, tokens, device, tell)
        x_q = read_streams(staging.folder / DISTILLED, device)[1]
    if recipe.lm_head < 16 and not staging.has(ROUNDED_HEAD):
        with staging.stage(ROUNDED_HEAD) as folder:
            round_head(folder, staging, source, x_q[:HEAD_ROWS], tokens[:HEAD_ROWS], device, tell)
    with staging.stage(CHECKPOINT) as folder:
        build_checkpoint(folder, staging, blocks)
        write_documents(folder, staging, source, run, spec)
        prompt = golden(source, WeightFiles(folder), tokens[0], x_q[0], device)
        save_file(prompt, folder / GOLDEN)


def rotate_source(
    staging: Staging, source: ModelSource, recipe: Recipe, tokens: Tensor, device: torch.device
) -> ModelSource:
    """The source that the blocks are read from: rotated if the recipe says so, by matrices that are a stage."""
    if recipe.rotation == "none":
        return source
    if parallel.is_writer() and not staging.has(ROTATION):
        with staging.stage(ROTATION) as folder, seeded(recipe.seed * 1009 - 1, device):
            with metered(device) as cost:
                find_rotation(source, recipe, tokens, device).save(folder / MATRICES)
            write_text(folder / REPORT, json.dumps({"rotation": recipe.rotation, **cost}) + "\n")
    parallel.wait()
    return rotated(source, Rotation.load(staging.folder / ROTATION / MATRICES), device)


def distill_blocks(
    folder: Path,
    staging: Staging,
    source: ModelSource,
    recipe: Recipe,
    spec: FlatQuantSpec,
    tokens: Tensor,
    device: torch.device,
    tell: Callbacks,
) -> None:
    """The last, end-to-end stage: its tensors take the place of those of the blocks."""
    done = [
        load_block(staging.folder / block_stage(i), source.block_prefix(i))
        for i in range(source.num_blocks)
    ]
    rows = recipe.distill_generated
    tell.note(
        f"end-to-end stage: {f'the model writes {rows} rows, then ' if rows else ''}{recipe.distill_epochs} epochs; "
        "if it is interrupted, --resume starts this stage again"
    )
    with metered(device) as cost:
        if rows:
            tell.progress("write", 0.0)
        text = distill_tokens(source, tokens, recipe, device, lambda part: tell.progress("write", part))
        tell.progress("distill", 0.0)
        finished, others, report = distill(
            source, done, text, recipe, spec, device, lambda part: tell.progress("distill", part)
        )
    tell.note(str(report))
    if report.worse:
        finished = [{n: t for n, t in b.items() if not n.endswith(LATENT)} for b in done]
        others = {n: source.files.tensor(n) for n in others}
    for i, tensors in enumerate(finished):
        save_tensors(folder, {source.block_prefix(i) + n: t for n, t in tensors.items()}, i)
    save_tensors(folder, others, source.num_blocks)
    embedding = others.get(embedding_name(source))
    x_q = finished_hidden(source, finished, tokens[:1], spec, device, embedding)
    store_stream(folder / QUANTIZED, x_q)
    write_text(folder / REPORT, json.dumps(asdict(report) | {"undone": report.worse} | cost) + "\n")


def round_head(
    folder: Path,
    staging: Staging,
    source: ModelSource,
    hidden: Tensor,
    tokens: Tensor,
    device: torch.device,
    tell: Callbacks,
) -> None:
    """The stage of an 8-bit head. hidden: output of the last finished block [N, T, hidden]."""
    files = WeightFiles(staging.folder / OTHERS)
    trained = WeightFiles(staging.folder / DISTILLED) if staging.has(DISTILLED) else files
    name = head_name(source, files)
    weight = (trained if name in trained else files).tensor(name)
    head = quantize_head(weight)
    norm = final_norm(source, trained if norm_name(source) in trained else files, device)
    hidden = norm(hidden.to(device, torch.float32))
    report = head_cost(weight, head, hidden, tokens[: len(hidden)])
    save_tensors(folder, head)
    write_text(folder / REPORT, json.dumps(asdict(report)) + "\n")
    tell.note(str(report))
    if source.config.tie_word_embeddings:
        size = sum(tensor.nbytes for tensor in head.values())
        tell.note(
            f"the head was tied to the embedding, which keeps its 16 bits: the checkpoint is {size / 1e6:.1f} MB larger"
        )


def streams_stage(done: int) -> str:
    """The stage whose output the block ``done`` reads."""
    return block_stage(done - 1) if done else INPUTS


def prepare_inputs(
    staging: Staging, source: ModelSource, tokens: Tensor, device: torch.device, write: bool
) -> list[dict[str, Any]]:
    """The arguments of every block beside its input; with ``write`` also the stage that holds the first
    block's input."""
    if not write:
        return record_inputs(source, tokens[:1], device)[1]
    with staging.shared_stage(INPUTS) as folder:
        shape = (*tokens.shape, source.config.hidden_size)
        x = new_stream(folder / FULL, shape, torch.device("cpu"))
        return record_inputs(source, tokens, device, x)[1]


def write_documents(
    folder: Path, staging: Staging, source: ModelSource, run: Run, spec: FlatQuantSpec
) -> None:
    """config.json, tokenizer, recipe, log and model card."""
    config = {k: v for k, v in source.raw_config.items() if k != "_name_or_path"}  # a local path
    if spec.lm_head_bits < 16:
        config["tie_word_embeddings"] = False  # the embedding keeps its 16 bits
    write_side_files(folder, source.path, config, spec)
    model, calib = public_name(run.model), public_name(run.calib)
    write_text(folder / "recipe.yaml", run.recipe.to_yaml(calib))
    stages = [ROTATION, *map(block_stage, range(source.num_blocks)), DISTILLED, ROUNDED_HEAD]
    reports = [staging.folder / stage / REPORT for stage in stages]
    lines = [report.read_text(encoding="utf-8") for report in reports if report.exists()]
    write_text(folder / "calibration_log.jsonl", "".join(lines))
    write_text(folder / "README.md", model_card(source.path, model, spec, run.recipe, calib))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """PyTorch's global random numbers start from ``seed`` inside and are what they were outside: no stage
    depends on those before it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def stream_device(recipe: Recipe, source: ModelSource, device: torch.device) -> torch.device:
    """Where activations live: the GPU if four streams take less than a quarter of it, else the CPU (mapped
    files, so that the disk takes what memory cannot)."""
    if device.type != "cuda":
        return device
    stream = recipe.samples * recipe.seq_len * source.config.hidden_size * 4
    return device if 4 * stream < total_memory(device) / 4 else torch.device("cpu")
