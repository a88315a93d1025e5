"""The ``flatquant`` command."""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from . import __version__
from .commands import COMMANDS, DeviceOption

POLITE_STOPS = (signal.SIGTERM, signal.SIGHUP)
QUIET = 3.0
"""Seconds that a process of torchrun leaves to another one to say what is wrong."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes a default such as [recipe] for a style and drops it
    help="Quantize models with FlatQuant and check the result. Serve one with `vllm serve DIR`.",
)


def print_version(wanted: bool) -> None:
    """Print the version and end, if it is asked for."""
    if wanted:
        print(f"vllm-flatquant {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=print_version, is_eager=True, help="show the version and exit"
        ),
    ] = False,
) -> None:
    """Options of ``flatquant`` itself."""


@app.command()
def quantize(
    out: Annotated[Path, typer.Option("--out", "-o", help="checkpoint folder to make")],
    model: Annotated[
        str | None, typer.Argument(help="folder or Hugging Face name of the unquantized model")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="a name that `flatquant recipes` lists, or a YAML file [flatquant-w4a4]"),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="bits of weights and activations: w4, w3 or w2 with a4, a8 or a16; w8a8, w8a16 [recipe]"
        ),
    ] = None,
    kv: Annotated[
        int | None, typer.Option(help="bits of the KV cache: 16, 8 or 4; saves no memory yet [recipe]")
    ] = None,
    lm_head_bits: Annotated[
        int | None, typer.Option(help="bits of the output head: 16, or 8 (its cost is printed) [recipe]")
    ] = None,
    rounding: Annotated[str | None, typer.Option(help="rtn, gptq or qronos [recipe]")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="weights per scale (with 16-bit activations) [recipe]")
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(
            help="1, 2, 4 or 8: tensor-parallel sizes that divide it can serve [recipe: what suits the model]"
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="default, or quick (reduced: for trying things out)")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="calibration rows [preset or recipe]")] = None,
    seq_len: Annotated[int | None, typer.Option(help="tokens per row [preset or recipe]")] = None,
    epochs: Annotated[
        int | None, typer.Option(help="training epochs per block [preset or recipe]")
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(
            help="FILE.txt, FILE.jsonl, FILE.npy, stdlib or a dataset name [recipe, else stdlib]"
        ),
    ] = None,
    device: DeviceOption = "auto",
    seed: Annotated[int | None, typer.Option(help="of every random choice [recipe]")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace a checkpoint; start again")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="go on with an interrupted run; it knows all other settings"),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="only say what it will take: try one block, estimate the rest"),
    ] = False,
) -> None:
    """Turn a model into a quantized checkpoint, block by block."""
    from .calibration import launch
    from .calibration.errors import UserError
    from .calibration.recipe import PRESETS, make_recipe
    from .calibration.recipes import DEFAULT, choose_recipe, preset_settings

    if not launch.is_writer():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    if dry_run and launch.world() > 1:
        raise UserError("--dry-run plans a run of one process; start it without torchrun")
    if preset not in (None, *PRESETS):
        raise UserError(f"preset '{preset}' is unknown; use one of {', '.join(PRESETS)}")
    # "" is what an unset variable of a script gives, and no default.
    named = DEFAULT if recipe is None else recipe
    given = {
        "scheme": scheme,
        "kv": kv,
        "lm_head": lm_head_bits,
        "rounding": rounding,
        "group_size": group_size,
        "shards": shards,
        "samples": samples,
        "seq_len": seq_len,
        "epochs": epochs,
        "seed": seed,
    }
    reduced = preset_settings(preset, named) if preset else {}
    changed = {**reduced, **{k: v for k, v in given.items() if v is not None}}
    if not resume or recipe is not None:
        chosen = choose_recipe(named, **changed)
        if calib is None and not resume:
            chosen.check_calib(named)
        settings, calib = chosen.recipe, chosen.calib if calib is None else calib
    if resume:
        from .calibration.fingerprint import interrupted_run

        before = interrupted_run(out.resolve())
        if recipe is None:
            settings = make_recipe(**{**before.recipe.model_dump(), **changed})
        model, calib = model or before.model, before.calib if calib is None else calib
        device = before.device if device == "auto" else device
    if model is None:
        raise UserError(
            "Missing argument 'MODEL': the folder or Hugging Face name of the unquantized model"
        )
    calib = "stdlib" if calib is None else calib
    # Only now: torch and Transformers take seconds, which nobody should wait for a mistyped name.
    from .tools.progress import quantize_with_progress, what_is_kept

    if preset == "quick":
        many = "s" if settings.epochs > 1 else ""
        epochs_too = f" and {settings.epochs} epoch{many}" if settings.epochs else ""
        print(
            f"preset quick: reduced to {settings.samples} samples of {settings.seq_len} tokens{epochs_too}; "
            "use --preset default for accuracy"
        )
    if dry_run:
        from .tools.planning import print_plan

        print_plan(model, out, settings, calib, device)
        return
    try:
        quantize_with_progress(model, out, settings, calib, device, overwrite, resume)
    except (KeyboardInterrupt, SystemExit) as stop:
        if launch.is_writer():
            print(f"flatquant: interrupted; {what_is_kept(out)}", file=sys.stderr)
        raise SystemExit(130 if isinstance(stop, KeyboardInterrupt) else stop.code) from None


for name, command in COMMANDS.items():
    app.command(name=name)(command)


def fail(message: str) -> NoReturn:
    """Print one sentence and leave with status 1."""
    print(f"flatquant: {message}", file=sys.stderr)
    raise SystemExit(1)


def leave_to_others(error: Exception) -> None:
    """In a process of torchrun: wait for the one whose sentence says more, as torchrun then ends this one. The
    first process speaks for all that fail alike, and all speak before those that only saw another stop."""
    from .calibration import launch

    stopped = isinstance(error, launch.Stopped)
    if launch.world() > 1 and (stopped or not launch.is_writer()):
        time.sleep(2 * QUIET if stopped else QUIET)


def stop_again(lost: "sys.UnraisableHookArgs") -> None:
    """``sys.unraisablehook``: a stop that fell into a finalizer, where Python drops what is raised, comes again a
    moment later, or the run would go on for hours."""
    error = lost.exc_value
    number = 0
    if isinstance(error, KeyboardInterrupt):
        number = signal.SIGINT
    elif isinstance(error, SystemExit) and error.code in [128 + stop for stop in POLITE_STOPS]:
        number = int(error.code) - 128
    if not number:
        sys.__unraisablehook__(lost)
        return
    again = threading.Timer(0.1, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


def main() -> None:
    """Entry point: bad input ends in one sentence and status 1, no traceback."""
    # Waiting threads must not spin: on a busy machine that costs many times the work itself.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from .calibration.errors import UserError

    sys.unraisablehook = stop_again
    # A polite stop unwinds as Ctrl-C does, so that nothing half-written stays.
    for number in POLITE_STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP, and shall
            signal.signal(number, lambda received, _: sys.exit(128 + received))
    try:
        try:
            app()
        except SystemExit as done:
            served = sys.modules.get("vllm_flatquant.tools.served")
            if done.code or served is None or not served.engines_started:
                raise
            # vLLM's native threads can abort a finished process on its way out; everything is written.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    except UserError as error:
        leave_to_others(error)
        fail(str(error))


if __name__ == "__main__":
    main()
