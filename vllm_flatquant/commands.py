"""The commands that look at models and checkpoints; ``cli.py`` has the one that makes them."""

import json
from collections.abc import Callable
from typing import Annotated

import typer

DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda")]


def evaluate(
    model: Annotated[str, typer.Argument(help="checkpoint folder, or an unquantized model")],
    text: Annotated[str | None, typer.Option(help="UTF-8 text file")] = None,
    tokens: Annotated[str | None, typer.Option(help=".npy file of token ids")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Hugging Face dataset, name or name:config")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="tokens per window")] = 2048,
    limit: Annotated[int | None, typer.Option(help="windows to evaluate [all]")] = None,
    backend: Annotated[str, typer.Option(help="reference (PyTorch) or vllm")] = "reference",
    dtype: Annotated[str, typer.Option(help="mathematics outside the integer products")] = "float32",
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="end with one line of JSON")] = False,
) -> None:
    """Perplexity over non-overlapping windows: mean next-token cross entropy of each, exponentiated."""
    from .tools.evaluation import evaluate as run

    result = run(model, text, tokens, dataset, seq_len, limit, backend, dtype, device)
    print(
        f"perplexity {result['perplexity']:.4f} over {result['windows']} windows of {seq_len} tokens "
        f"({backend}, {dtype})"
    )
    if as_json:
        print(json.dumps(result))


def inspect(
    folder: Annotated[str, typer.Argument(help="checkpoint folder")],
    verify: Annotated[bool, typer.Option("--verify", help="replay the golden prompt")] = False,
    backend: Annotated[
        str, typer.Option(help="with --verify: reference, vllm, or all that is installed")
    ] = "all",
) -> None:
    """What a checkpoint holds, whether it is complete, and (with --verify) whether it still computes the
    same."""
    from .tools.inspection import inspect_folder, verify_folder

    print(inspect_folder(folder))
    if verify:
        for line in verify_folder(folder, backend):
            print(line)


def recipes(
    name: Annotated[str | None, typer.Argument(help="show the settings of this one")] = None,
) -> None:
    """List the named recipes; with a name (or file), every setting of that one as YAML, to edit and pass to
    `quantize --recipe`."""
    from .calibration.recipes import choose_recipe
    from .tools.listing import recipe_table, recipe_yaml

    print(recipe_yaml(choose_recipe(name)) if name else recipe_table())


COMMANDS: dict[str, Callable[..., None]] = {
    "eval": evaluate,
    "inspect": inspect,
    "recipes": recipes,
}
"""Name on the command line -> function; typer reads its signature."""
