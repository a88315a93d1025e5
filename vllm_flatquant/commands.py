"""The commands that look at models and checkpoints; ``cli.py`` has the one that makes them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda")]
JsonOption = Annotated[bool, typer.Option("--json", help="end with one line of JSON")]


def evaluate(
    model: Annotated[str, typer.Argument(help="checkpoint folder, or an unquantized model")],
    protocol: Annotated[
        str, typer.Option(help="wikitext2, c4-new, or plain (the text as it is)")
    ] = "plain",
    text: Annotated[
        str | None,
        typer.Option(help="UTF-8 text file; with a protocol its data: .txt, .json(l)(.gz), .parquet"),
    ] = None,
    tokens: Annotated[str | None, typer.Option(help=".npy file of token ids")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Hugging Face dataset, name or name:config [the protocol's]")
    ] = None,
    seq_len: Annotated[int | None, typer.Option(help="tokens per window [2048]")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="tasks of lm-evaluation-harness instead, separated by commas")
    ] = None,
    include_path: Annotated[
        str | None, typer.Option(help="with --tasks: folder with task files of your own")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="with --tasks: examples [the task's]")] = None,
    limit: Annotated[int | None, typer.Option(help="windows (or documents of a task) [all]")] = None,
    backend: Annotated[
        str, typer.Option(help="reference (PyTorch), vllm, or both and their difference")
    ] = "reference",
    original: Annotated[
        str | None, typer.Option(help="unquantized model to measure beside [the card's base_model]")
    ] = None,
    update_card: Annotated[
        bool, typer.Option("--update-card", help="put the result and the original's into README.md")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="of what is not integer: float32, bfloat16 or float16 [float32; bfloat16 with vLLM on a GPU]"
        ),
    ] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity, or the scores of tasks.

    Perplexity is over non-overlapping windows: the mean next-token cross entropy, exponentiated.
    """
    result: Any
    if tasks is not None:
        from .tools.tasks import run_tasks, score_lines

        names = [name.strip() for name in tasks.split(",") if name.strip()]
        result = run_tasks(
            *(
                model,
                names,
                include_path,
                num_fewshot,
                limit,
                backend,
                dtype,
                device,
                original,
                update_card,
            )
        )
        lines = score_lines(result)
    else:
        from .tools.evaluation import evaluate as run
        from .tools.evaluation import result_lines

        result = run(
            *(model, text, tokens, dataset, seq_len, limit, backend, dtype, device),
            *(protocol, original, update_card),
        )
        lines = result_lines(result)
    print("\n".join(lines))
    if as_json:
        print(json.dumps(result))


def inspect(
    folder: Annotated[str, typer.Argument(help="checkpoint folder")],
    verify: Annotated[bool, typer.Option("--verify", help="replay the golden prompt")] = False,
    backend: Annotated[
        str, typer.Option(help="with --verify: reference, vllm, or all that is installed")
    ] = "all",
    as_json: JsonOption = False,
) -> None:
    """Show what a checkpoint holds; with --verify, test it.

    Also whether it is complete, what would run it on this machine, and (with --verify) whether it still
    computes what it did when it was made.
    """
    from .tools.inspection import describe_folder, inspect_lines, verify_folder

    found = describe_folder(folder)
    print("\n".join(inspect_lines(found)))
    if verify:
        for line in verify_folder(folder, backend):
            print(line)
    if as_json:
        print(json.dumps(found))


def diff(
    first: Annotated[str, typer.Argument(help="checkpoint folder")],
    second: Annotated[str, typer.Argument(help="checkpoint folder")],
    as_json: JsonOption = False,
) -> None:
    """Compare two checkpoints.

    Configuration, recipe, tensors and recorded results. Like diff, status 0 if they are the same, 1 if they
    differ and 2 on trouble.
    """
    from .calibration.errors import UserError
    from .tools.diff import diff_folders, diff_lines

    try:
        found = diff_folders(first, second)
    except UserError as error:
        print(f"flatquant: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print("\n".join(diff_lines(found)))
    if as_json:
        print(json.dumps(found))
    if not found["same"]:
        raise SystemExit(1)


def convert(
    source: Annotated[
        str, typer.Argument(help="folder (or flat_matrices.pth) of another FlatQuant tool")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="checkpoint folder to make")],
    model: Annotated[
        str | None, typer.Option(help="original model, for what comes without weights or config.json")
    ] = None,
    scheme: Annotated[str | None, typer.Option(help="w4a4, ...: if the source does not say")] = None,
    kv: Annotated[int | None, typer.Option(help="KV-cache bits: if the source does not say")] = None,
    golden: Annotated[
        bool, typer.Option("--golden/--no-golden", help="run the model once, for `inspect --verify`")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a checkpoint")] = False,
) -> None:
    """Make a checkpoint from another FlatQuant tool's.

    Reads flat_matrices.pth and RealQuant folders of the official code, SqueezeBits W4A16 folders and
    vllm-ascend W4A4_FLATQUANT_DYNAMIC folders.
    """
    from .tools.convert import convert as run

    for note in run(source, out, model, scheme, kv, overwrite, golden):
        print(f"approximated: {note}")
    print(f"wrote {out}; serve it with: vllm serve {quote(str(out))}")


def plot(
    folder: Annotated[str, typer.Argument(help="checkpoint folder")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="where to [FOLDER/plots]")] = None,
    original: Annotated[
        str | None,
        typer.Option("--original", "--model", help="unquantized model [the card's base_model]"),
    ] = None,
    text: Annotated[str, typer.Option(help="what both models read: as --calib of quantize")] = "stdlib",
    block: Annotated[int | None, typer.Option(help="whose channels to show [the middle one]")] = None,
    samples: Annotated[int, typer.Option(help="windows of text")] = 4,
    seq_len: Annotated[int, typer.Option(help="tokens per window")] = 512,
    device: DeviceOption = "auto",
) -> None:
    """Draw flatness, errors and losses as PNG and SVG.

    Flatness is drawn before and after the transforms, errors by block, and losses of the training.
    """
    from .tools.plot import plot_folder

    files, missing = plot_folder(folder, out, original, text, block, samples, seq_len, device)
    for file in files:
        print(f"wrote {file}")
    for sentence in missing:
        print(sentence)


def recipes(
    name: Annotated[str | None, typer.Argument(help="show the settings of this one")] = None,
) -> None:
    """List the named recipes, or show one.

    With a name (or file), every setting of that one as YAML, to edit and pass to `quantize --recipe`.
    """
    from .calibration.recipes import choose_recipe
    from .tools.listing import recipe_table, recipe_yaml

    print(recipe_yaml(choose_recipe(name)) if name else recipe_table())


COMMANDS: dict[str, Callable[..., None]] = {
    "eval": evaluate,
    "inspect": inspect,
    "diff": diff,
    "convert": convert,
    "plot": plot,
    "recipes": recipes,
}
"""Name on the command line -> function; typer reads its signature."""
