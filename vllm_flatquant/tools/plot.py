"""``flatquant plot``: flatness before and after, each block's error, and the training losses, as PNG and SVG."""

from collections.abc import Mapping
from math import log10
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration.card import public_name
from ..calibration.data import calibration_tokens, check_vocabulary
from ..calibration.errors import UserError
from ..calibration.quantize import choose_device
from ..calibration.reference import load_reference, quantized_spec
from ..calibration.source import load_config, resolve_folder
from ..sites import SITE_NAMES
from .evaluation import card_original, unquantized
from .flatness import Flatness, measure_flatness
from .inspection import calibration_log

BEFORE, AFTER = "#D55E00", "#0072B2"
"""Vermillion and blue of Okabe and Ito's palette: told apart with any colour vision, and by line style."""
INPUTS = {
    "qkv": "q, k, v projections",
    "o": "output projection",
    "gate_up": "gate and up projections",
    "down": "down projection",
}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "flatquant",
    "svg.fonttype": "none",  # text stays text
}

Measured = Mapping[tuple[int, str], Flatness]


def plot_folder(
    folder: str,
    out: Path | None = None,
    original: str | None = None,
    text: str = "stdlib",
    block: int | None = None,
    samples: int = 4,
    seq_len: int = 512,
    device: str = "auto",
) -> tuple[list[Path], list[str]]:
    """Draw what a checkpoint's log and its transforms show.

    out: where to [a folder ``plots`` in the checkpoint]. original: the unquantized model [the card's base
    model]. text: as for calibration; ``samples`` windows of ``seq_len`` tokens run through both models.
    block: whose channels to show [the middle one]. Returns the files written, and sentences about what could
    not be drawn. Raises UserError for bad input or if Matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "plotting needs Matplotlib; install it with `pip install 'vllm-flatquant[plot]'`"
        ) from None
    path = resolve_folder(folder)
    spec = quantized_spec(path)
    if samples < 1 or seq_len < 1:
        raise UserError(
            f"samples={samples} of seq_len={seq_len} tokens show nothing; use 1 or more of each"
        )
    log, missing, figures = calibration_log(path), [], {}
    with matplotlib.rc_context(STYLE):
        if log:
            figures["errors"] = error_figure(log, path.resolve().name)
            if any(report.get("epoch_losses") for report in log):
                figures["losses"] = loss_figure(log, path.resolve().name)
        else:
            missing.append("no calibration_log.jsonl: errors and losses are not drawn")
        try:
            base = unquantized(original or card_original(path), path)
        except UserError as error:
            if original:
                raise
            missing.append(f"flatness is not drawn: {error}")
        else:
            count = load_config(path).num_hidden_layers
            shown = count // 2 if block is None else block
            if not 0 <= shown < count:
                raise UserError(f"block={shown} does not exist; the model has blocks 0 to {count - 1}")
            length = min(seq_len, getattr(load_config(path), "max_position_embeddings", seq_len))
            rows = calibration_tokens(text, path, samples, length, 0)
            check_vocabulary(rows, load_config(path).vocab_size)
            where = choose_device(device)
            before = measure_flatness(load_reference(base, where), rows)
            after = measure_flatness(load_reference(path, where), rows)
            name = f"{public_name(base)}, {spec.scheme.upper()}"
            figures["flatness"] = channel_figure(before, after, shown, name)
            figures["peaks"] = peak_figure(before, after, name)
        return write_figures(figures, out or path / "plots"), missing


def write_figures(figures: Mapping[str, Any], out: Path) -> list[Path]:
    """Each figure as NAME.png and NAME.svg in ``out``."""
    files = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            for kind, settings in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
                files.append(out / f"{name}.{kind}")
                figure.savefig(files[-1], **settings)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); choose another --out") from None
    return files


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure without a window, and its axes [rows, columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def channel_figure(before: Measured, after: Measured, block: int, name: str) -> Any:
    """Sorted channel magnitudes of one block's inputs and weights, by site."""
    figure, axes = new_figure(2, 4, 10, 4.8)
    figure.suptitle(
        f"{name}, block {block}: channel magnitudes, sorted (1 = the site's root mean square)",
        fontsize=10,
    )
    for column, site in enumerate(SITE_NAMES):
        for row, kind in enumerate(("activation", "weight")):
            ax = axes[row, column]
            for measured, colour, style, label in (
                (before, BEFORE, (0, (4, 1.5)), "original"),
                (after, AFTER, "solid", "transformed"),
            ):
                values = relative(getattr(measured[block, site], kind))
                share = torch.linspace(0, 100, len(values))
                ax.plot(share, values, color=colour, linestyle=style, linewidth=1.6, label=label)
            ax.axhline(1, color="#888888", linewidth=0.7, zorder=1)
            ax.set_yscale("log")
            ax.set_xlim(0, 100)
            ax.margins(y=0.08)
            if row == 0:
                ax.set_title(INPUTS[site], fontsize=9)
                ax.tick_params(labelbottom=False)
            else:
                ax.set_xlabel("channels, largest first [%]")
        axes[0, 0].set_ylabel("input channels")
        axes[1, 0].set_ylabel("weight columns")
    for row in axes:
        share_limits(row)
    common_legend(figure, axes[0, 0])
    return figure


def relative(magnitudes: Tensor) -> Tensor:
    """Descending, divided by their root mean square; zeros are left out of a logarithmic axis."""
    ordered = magnitudes.sort(descending=True).values
    scaled = ordered / ordered.square().mean().sqrt().clamp(min=1e-30)
    return scaled.where(scaled > 0, torch.nan)


def share_limits(row: Any) -> None:
    """One y range for all axes of a row, so that they compare; numbers on the first alone."""
    low = min(ax.get_ylim()[0] for ax in row)
    high = max(ax.get_ylim()[1] for ax in row)
    for i, ax in enumerate(row):
        ax.set_ylim(max(low, 1e-3), high)
        log_ticks(ax)
        if i:
            ax.tick_params(labelleft=False)


def log_ticks(ax: Any) -> None:
    """Ticks of a logarithmic y axis as plain numbers; between powers of ten too where there are few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = ax.get_ylim()
    steps = {
        0.5: (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0),
        1: (1.0, 1.5, 2.0, 3.0, 5.0, 7.0),
        2: (1.0, 2.0, 5.0),
        3: (1.0, 3.0),
    }
    between = next((subs for most, subs in steps.items() if log10(high / low) < most), (1.0,))
    ax.yaxis.set_major_locator(LogLocator(subs=between))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def common_legend(figure: Any, ax: Any) -> None:
    """One legend below all axes."""
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)


def peak_figure(before: Measured, after: Measured, name: str) -> Any:
    """Largest activation of a token by its root mean square, by block and site."""
    figure, axes = new_figure(1, 4, 10, 3.0)
    figure.suptitle(
        f"{name}: largest activation of a token over its root mean square (lower quantizes better)",
        fontsize=10,
    )
    blocks = sorted({i for i, _ in before})
    for ax, site in zip(axes[0], SITE_NAMES, strict=True):
        for measured, colour, style, marker, label in (
            (before, BEFORE, (0, (4, 1.5)), "s", "original"),
            (after, AFTER, "solid", "o", "transformed"),
        ):
            values = [measured[i, site].peak for i in blocks]
            ax.plot(
                *(blocks, values),
                color=colour,
                linestyle=style,
                marker=marker,
                markersize=3.5,
                label=label,
            )
        ax.set_yscale("log")
        ax.set_title(INPUTS[site], fontsize=9)
        ax.set_xlabel("block")
        whole_numbers(ax)
    share_limits(axes[0])
    axes[0, 0].set_ylabel("max / RMS")
    common_legend(figure, axes[0, 0])
    return figure


def error_figure(log: list[dict[str, Any]], name: str) -> Any:
    """Each block's error before and after training, or where nothing was trained at the start and finished."""
    start = "before training" if any(report.get("epoch_losses") for report in log) else "at the start"
    figure, axes = new_figure(1, 1, 6, 3.2)
    ax = axes[0, 0]
    blocks = [report["block"] for report in log]
    for key, colour, style, marker, label in (
        ("error_before", BEFORE, (0, (4, 1.5)), "s", start),
        ("error_after", AFTER, "solid", "o", "finished"),
    ):
        values = [report.get(key) or torch.nan for report in log]
        ax.plot(
            *(blocks, values), color=colour, linestyle=style, marker=marker, markersize=4, label=label
        )
    ax.set_yscale("log")
    ax.set_xlabel("block")
    ax.set_ylabel("mean squared error of the output")
    ax.set_title(f"{name}: each quantized block against the original one", fontsize=10)
    whole_numbers(ax)
    log_ticks(ax)
    ax.legend()
    return figure


def loss_figure(log: list[dict[str, Any]], name: str) -> Any:
    """Training loss of each block by epoch, over that of its first epoch."""
    import matplotlib
    from matplotlib.colors import Normalize

    figure, axes = new_figure(1, 1, 6, 3.2)
    ax = axes[0, 0]
    trained = [report for report in log if report.get("epoch_losses") and report["epoch_losses"][0] > 0]
    colours = matplotlib.colormaps["viridis"]
    norm = Normalize(0, max(1, len(log) - 1))
    for report in trained:
        losses = report["epoch_losses"]
        ax.plot(
            range(1, len(losses) + 1),
            [loss / losses[0] for loss in losses],
            color=colours(0.9 * norm(report["block"])),
            linewidth=1.4,
            marker="o",
            markersize=2.5,
        )
    if len(trained) <= 8:
        name_lines(ax, trained)
    else:
        scale = matplotlib.cm.ScalarMappable(Normalize(0, (len(log) - 1) / 0.9), colours)
        bar = figure.colorbar(scale, ax=ax, label="block", boundaries=torch.arange(len(log) + 1) - 0.5)
        bar.set_ticks([0, len(log) // 2, len(log) - 1])
    ax.set_xlabel("epoch")
    ax.set_ylabel("loss / loss of the first epoch")
    ax.set_title(f"{name}: training loss of each block", fontsize=10)
    whole_numbers(ax)
    return figure


def name_lines(ax: Any, trained: list[dict[str, Any]]) -> None:
    """The block's number at the end of each line, moved apart where ends are close."""
    low, high = ax.get_ylim()
    height = low
    for report in sorted(trained, key=lambda r: r["epoch_losses"][-1] / r["epoch_losses"][0]):
        losses = report["epoch_losses"]
        height = max(losses[-1] / losses[0], height)
        ax.annotate(
            f"block {report['block']}",
            *((len(losses), height), (6, 0)),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
        height += 0.045 * (high - low)


def whole_numbers(ax: Any) -> None:
    """Ticks of the x axis at integers."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
