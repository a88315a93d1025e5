"""Which tile is fastest for each shape and number of tokens? Writes the table that kernels/tiles.py reads.

    python benchmarks/tune_w4_gemm.py --layers llama-8b --tokens 1,16,64 --out kernels/tile_table.py

Every candidate is compiled in parallel first, compared with the plain kernel, then timed within a layer by graph
replay over rotating weights (`tuned_layer.py` says why): one product after the other, the largest weight first, the
rest with the best tiles so far. The three best and the present tile are timed again, in turns; the present one stays
unless another makes the layer quicker by more than --gain. Every figure goes to --log, one JSON line each, the layer's time
before and after to results/tuned_layers.csv, and the table is written after each number of tokens: what a run that was
cut off did not reach keeps the tile it had.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from timing import RESULTS, Table, environment, graph_us, need_gpu, summary
from triton.runtime.errors import TritonError
from tuned_layer import LAYERS, Product, Tokens, Weights

from vllm_flatquant.kernels.jit import hopper
from vllm_flatquant.kernels.tile_table import TABLE
from vllm_flatquant.kernels.tiles import BUCKETS, PLAIN, Tile, bucket, w4_gemm_tile
from vllm_flatquant.kernels.w4_gemm import run_tile

COLUMNS = ["gpu", "torch", "triton", "commit", "layer", "tokens", "before_us", "us"]
ON_CHIP = 224_000
"""Bytes of shared memory of an SM that stages and the output tile of a Hopper kernel may take."""


def hopper_tiles(t: int, n: int) -> Iterator[Tile]:
    """For up to 128 tokens: as many stages as fit beside ``ctas`` programs, or as 16 or 32 blocks of columns need.

    Fewer bytes on chip let the next kernel's first loads begin sooner, more keep more of this one's in flight.
    """
    bm = 16 if t <= 16 else 32 if t <= 32 else 64
    blocks_a_stage = (2,) if t <= 32 else (2, 1)
    kinds = [(bn, warps, kb) for bn, warps in ((64, 4), (128, 4), (256, 8)) for kb in blocks_a_stage]
    for bn, warps, kb in kinds:
        work = -(-t // bm) * -(-n // bn)
        for split in (1, 2, 4, 8):
            for ctas in (1, 2, 3):
                if not 60 <= work * split <= 400 or bn * ctas > 256:
                    continue
                room = (ON_CHIP // ctas - bm * bn * 2 - 2048) // (kb * (bn * 64 + bm * 128))
                for stages in {min(room, blocks // kb) for blocks in (16, 32)}:
                    if stages >= 3:
                        yield Tile(bm, bn, warps, stages, kb, ctas=ctas, split=split)


def plain_tiles(t: int) -> Iterator[Tile]:
    """The plain kernel's, for up to 32 tokens: small tiles that only stream weights."""
    bm = 16 if t <= 16 else 32
    for far in (0, 8, 32):
        yield Tile(bm, 64, 4, 4, 4, 1, far)
        yield Tile(bm, 32, 2, 4, 4, 1, far)
    yield Tile(bm, 32, 2, 6, 2, 1, 0)


def one_token_tiles(k: int) -> Iterator[Tile]:
    """The kernel for one token: 8 to 64 words of 8 weights a thread and step; what is left of K from L2 or from DRAM."""
    blocks = k // 128
    for bn in (4, 8, 16):
        for warps in (2, 4, 8):
            for kb in (8, 16, 32, 64, 128):
                if 8 <= kb * bn * 16 // (32 * warps) <= 64 and kb < 2 * blocks:
                    for far in {0, blocks if kb < blocks else 0}:
                        yield Tile(1, bn, warps, 1, kb, prefetch=far)


def candidates(t: int, n: int, k: int, shards: int) -> list[Tile]:
    """What is worth trying for ``t`` tokens: small tiles that stream weights, up to wide compute tiles."""
    tiles: list[Tile] = list(one_token_tiles(k)) if t == 1 else []
    if t <= 32:
        tiles += plain_tiles(t)
    if t <= 128:
        tiles += hopper_tiles(t, n)
    if 64 < t <= 512:
        for split in (1, 2, 4) if n * t < 2**23 else (1,):
            tiles += [
                Tile(128, 128, 8, 7, ctas=1, split=split),
                Tile(128, 128, 4, 3, ctas=2, split=split),
                Tile(64, 128, 4, 5, ctas=2, split=split),
                Tile(128, 256, 8, 5, ctas=1, split=split),
                Tile(256, 128, 8, 4, ctas=1, split=split),
            ]
        tiles += [Tile(128, 64, 4, 4, ctas=2), Tile(64, 64, 4, 7, ctas=2)]
    if t > 512:
        tiles += [Tile(128, 256, 8, 5, group=g, ctas=1) for g in (2, 4, 8, 16)]
        tiles += [Tile(256, 128, 8, 4, group=g, ctas=1) for g in (2, 4, 8, 16)]
        tiles += [Tile(128, 128, 4, 3, group=g, ctas=2) for g in (4, 8)]
        tiles += [Tile(128, 128, 8, 7, ctas=1), Tile(128, 64, 4, 4, ctas=2), Tile(256, 64, 4, 2, ctas=2)]
        tiles += [Tile(128, 256, 8, 5, ctas=1, split=2)] if n * t < 2**23 else []
    return [tile for tile in dict.fromkeys(tiles) if tile.fits(n, k, shards)]


def compile_all(job: tuple[Product, list[Tile]]) -> list[tuple[Tile, str]]:
    """Launch every tile once on a few tokens (fills the on-disk cache); returns those that failed."""
    (n, k, shards), tiles = job
    failed = []
    for tile in tiles:
        try:
            t = min(tile.bm, 8)
            codes = torch.zeros(t, k, dtype=torch.int8, device="cuda")
            weight = torch.zeros(k // 128, n, 64, dtype=torch.uint8, device="cuda")
            scale, weight_scale = (torch.ones(size, device="cuda") for size in ((t, shards), (n, 1)))
            out = torch.empty(t, n, dtype=torch.bfloat16, device="cuda")
            run_tile(codes, scale, weight, weight_scale, None, out, tile)
            torch.cuda.synchronize()
        except (RuntimeError, TritonError) as error:
            failed.append((tile, f"{type(error).__name__}: {str(error)[:200]}"))
    return failed


class Tuner:
    """Times a layer with one tile or another, and says so in a log."""

    def __init__(self, tokens: Tokens, t: int, count: int, log: str) -> None:
        self.tokens, self.t, self.count, self.log = tokens, t, count, log

    def us(self, tiles: dict[str, Tile], replays: int) -> float:
        calls = 4 if self.t > 1024 else 16
        return summary(graph_us(self.tokens.layer_with(tiles), self.count, replays, 0.5, calls))[0]

    def right(self, site: str, tile: Tile, want: torch.Tensor) -> bool:
        """Whether a tile gives what the plain kernel gives, to a rounding of the output."""
        error = (self.tokens.product_of(site, tile).float() - want).abs() / (want.abs() + 1e-6)
        return bool(error.max() <= 2**-7)  # NaN is not

    def best(
        self, site: str, product: Product, tiles: dict[str, Tile], left_out: set[Tile], gain: float
    ) -> Tile:
        """The tile of one product with which the layer is quickest; AssertionError if one computes something else."""
        present, rows = tiles[site], []
        want = self.tokens.product_of(site, PLAIN[bucket(self.t, tuple(PLAIN))]).float()
        for tile in candidates(self.t, *product):
            if tile in left_out:
                continue
            assert self.right(site, tile, want), f"{tile} is wrong at T={self.t}, N, K, S = {product}"
            rows.append((self.us(tiles | {site: tile}, 3), tile))
            with open(self.log, "a") as log:
                line = {"t": self.t, "site": site, "product": product, "us": rows[-1][0], "tile": tile}
                log.write(json.dumps(line) + "\n")
        finalists = list(dict.fromkeys([present] + [tile for _, tile in sorted(rows)[:3]]))
        again: dict[Tile, list[float]] = {tile: [] for tile in finalists}
        for turn in range(5):
            for tile in finalists[:: -1 if turn % 2 else 1]:
                again[tile].append(self.us(tiles | {site: tile}, 5))
        middle = [sorted(again[tile])[2] for tile in finalists]
        us, tile = min(zip(middle, finalists, strict=True))
        chosen = tile if us < (1 - gain) * middle[0] else present
        print(
            f"  T={self.t} {site} {product}: {middle[0]:.2f} us {tuple(present)}, best {us:.2f} {tuple(tile)}",
            flush=True,
        )
        return chosen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", default="llama-8b", help=f"of {', '.join(LAYERS)}")
    parser.add_argument("--tokens", default=",".join(map(str, BUCKETS)))
    parser.add_argument("--sites", default="gate_up,down,qkv,o", help="products to tune")
    parser.add_argument("--gain", type=float, default=0.005, help="least gain of the layer for a change")
    parser.add_argument("--log", default="tune.jsonl")
    parser.add_argument("--results", type=Path, default=RESULTS / "tuned_layers.csv")
    parser.add_argument("--out", help="the table to update, kernels/tile_table.py")
    parser.add_argument("--workers", type=int, default=min(15, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after them")
    args = parser.parse_args()
    need_gpu()
    if unknown := set(args.layers.split(",")) - set(LAYERS):
        parser.error(f"--layers: {', '.join(sorted(unknown))} is none of {', '.join(LAYERS)}")
    layers = {name: LAYERS[name] for name in args.layers.split(",")}
    tokens = [int(t) for t in args.tokens.split(",")]
    until = time.monotonic() + args.seconds
    gpu, wgmma = torch.cuda.get_device_name(), hopper(torch.device("cuda"))

    # What is compiled depends on the tile, the shards and divisibility; for one token on K, never on N.
    jobs = {
        (tile, product[2], product[1] if tile.bm == 1 else 0): ((1024, *product[1:]), [tile])
        for layer in layers.values()
        for product in layer.products().values()
        for t in tokens
        for tile in candidates(t, *product)
    }
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        failed = dict(pair for pairs in pool.map(compile_all, jobs.values()) for pair in pairs)
    print(f"compiled {len(jobs)} variants", flush=True)
    for tile, why in failed.items():
        print("skipped", tile, why, flush=True)

    results = Table(args.results, COLUMNS, COLUMNS)
    found: dict[Product, dict[int, Tile]] = {}
    for name, layer in layers.items():
        count = 4 if layer.hidden <= 4096 else 2
        weights = Weights(layer, count)
        for t in tokens:
            if time.monotonic() > until:
                return
            tuner = Tuner(Tokens(weights, t), t, count, args.log)
            tiles = {
                site: found.get(p, {}).get(t) or w4_gemm_tile(gpu, wgmma, t, *p)
                for site, p in layer.products().items()
            }
            first = dict(tiles)
            for site, product in layer.products().items():
                if site in args.sites.split(",") and t not in found.get(product, {}):
                    tiles[site] = tuner.best(site, product, tiles, set(failed), args.gain)
                    found.setdefault(product, {})[t] = tiles[site]
            # In turns: a card that has been busy is slower.
            turns = [(tuner.us(first, 5), tuner.us(tiles, 5)) for _ in range(3)]
            before, after = (sorted(figures)[1] for figures in zip(*turns, strict=True))
            print(f"{name} T={t}: {before:.2f} -> {after:.2f} us", flush=True)
            if args.out:
                write(args.out, gpu, found)
            row = {"layer": name, "tokens": t, "before_us": f"{before:.2f}", "us": f"{after:.2f}"}
            results.append(environment() | row)


def write(path: str, gpu: str, best: dict[Product, dict[int, Tile]]) -> None:
    """Update the rows of ``gpu`` in the table at ``path`` and rewrite it."""
    table = {
        name: {shape: dict(rows) for shape, rows in shapes.items()} for name, shapes in TABLE.items()
    }
    for shape, tiles in best.items():
        table.setdefault(gpu, {}).setdefault(shape, {}).update(
            {t: tuple(tile) for t, tile in tiles.items()}
        )
    with open(path + ".new", "w") as file:
        file.write('"""Measured tiles, written by benchmarks/tune_w4_gemm.py: ')
        file.write('{GPU: {(N, K, shards): {tokens: tile}}}."""\n\n')
        file.write("TABLE: dict[str, dict[tuple[int, int, int], dict[int, tuple[int, ...]]]] = {\n")
        for name, shapes in table.items():  # in their order, in which cards lend each other rows
            file.write(f'    "{name}": {{\n')
            for shape, rows in sorted(shapes.items()):
                file.write(f"        {shape}: {{\n")
                file.writelines(f"            {t}: {tuple(tile)},\n" for t, tile in sorted(rows.items()))
                file.write("        },\n")
            file.write("    },\n")
        file.write("}\n")
    os.replace(path + ".new", path)


if __name__ == "__main__":
    main()
