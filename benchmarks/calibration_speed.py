"""How long the calibration of a large model takes, and how much memory: one block of its shape, times its blocks.

    python benchmarks/calibration_speed.py --shape 8b --set precision='"high"' --set epochs=5

The block has random weights and random inputs and goes through the pipeline as it is (statistics, training, folding,
rounding; activations on the GPU where they fit, else on the CPU). Rows go to benchmarks/results/calibration_speed.csv.
"""

import argparse
import csv
import json
import tempfile
from pathlib import Path

import torch
from accuracy import commit, machine
from safetensors.torch import save_file
from transformers import LlamaConfig

from vllm_flatquant.calibration.meter import Meter, limit_memory, total_memory
from vllm_flatquant.calibration.quantize import choose_device, make_spec, stream_device
from vllm_flatquant.calibration.quantize_block import quantize_block
from vllm_flatquant.calibration.recipe import make_recipe
from vllm_flatquant.calibration.source import ModelSource, meta_model
from vllm_flatquant.calibration.streams import record_inputs

RESULTS = Path(__file__).parent / "results" / "calibration_speed.csv"
SHAPES: dict[str, tuple[int, dict[str, int]]] = {
    "tiny": (2, {"hidden_size": 64, "intermediate_size": 128, "heads": 4, "kv_heads": 2}),
    "8b": (32, {"hidden_size": 4096, "intermediate_size": 14336, "heads": 32, "kv_heads": 8}),
    "70b": (80, {"hidden_size": 8192, "intermediate_size": 28672, "heads": 64, "kv_heads": 8}),
}
"""Name -> blocks of the model, sizes of one (Llama 3's; ``tiny`` tries the script)."""
FIELDS = [
    "shape",
    "settings",
    "tokens",
    "block_seconds",
    "phases",
    "model_minutes",
    "first_loss",
    "last_loss",
    "peak_memory_gb",
    "memory_gb",
    "activations",
    "device",
    "torch",
    "transformers",
    "version",
    "commit",
]


def make_block(folder: Path, sizes: dict[str, int], seq_len: int, device: torch.device) -> Path:
    """A model folder with one random block of these sizes, in bf16, drawn on ``device``."""
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        num_hidden_layers=1,
        vocab_size=512,
        max_position_embeddings=seq_len,
        dtype="bfloat16",
    )
    folder.mkdir()
    torch.manual_seed(0)
    tensors = {}
    for name, meta in meta_model(config).state_dict().items():
        noise = torch.randn(meta.shape, dtype=torch.bfloat16, device=device)
        tensors[name] = (1 + 0.1 * noise if meta.ndim == 1 else noise * meta.shape[-1] ** -0.5).cpu()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=JSON", help="settings of the recipe"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--memory-gb", type=float, help="as if the GPU had no more than this")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    device = choose_device(args.device)
    settings = {k: json.loads(v) for k, v in (pair.split("=", 1) for pair in args.set)}
    recipe = make_recipe(**settings)
    blocks, sizes = SHAPES[args.shape]
    if args.memory_gb:
        limit_memory(device, args.memory_gb * 1e9 / total_memory(device))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = ModelSource(make_block(folder / "model", sizes, recipe.seq_len, device))
        tokens = torch.randint(512, (recipe.samples, recipe.seq_len))
        x, kwargs = record_inputs(source, tokens, device)
        x = x.to(stream_device(recipe, source, device))
        x_q = x.clone() if recipe.follows_quantized else x[:1].clone()
        meter = Meter(device)
        _, _, _, report = quantize_block(
            source, 0, recipe, make_spec(source, recipe), x, x_q, kwargs[0], device, folder, meter
        )
    row = {
        "shape": args.shape,
        "settings": json.dumps(settings),
        "tokens": tokens.numel(),
        "block_seconds": f"{report.seconds:.1f}",
        "phases": json.dumps({name: round(value, 1) for name, value in meter.seconds.items()}),
        "model_minutes": f"{report.seconds * blocks / 60:.1f}",
        "first_loss": f"{report.epoch_losses[0]:.4g}" if report.epoch_losses else "",
        "last_loss": f"{report.epoch_losses[-1]:.4g}" if report.epoch_losses else "",
        "peak_memory_gb": f"{report.peak_memory_gb:.1f}",
        "memory_gb": args.memory_gb or "",
        "activations": x.device.type,
        **machine(device),
        "commit": commit(),
    }
    print(row, flush=True)
    args.out.parent.mkdir(exist_ok=True)
    fresh = not args.out.exists()
    with args.out.open("a", newline="") as f:
        writer = csv.DictWriter(f, FIELDS)
        if fresh:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
