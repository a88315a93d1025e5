"""Which tile is fastest for each shape and number of tokens? Writes the table that kernels/tiles.py reads.

    python benchmarks/tune_w4_gemm.py --shapes llama-8b --tokens 1,16,64 --out kernels/tile_table.py

Every candidate is compiled in parallel first, checked once per shape against an exact integer product, then
timed by graph replay over rotating weights. Every figure goes to --log, one JSON line each, and the table is written
after each shape and number of tokens: what a run that was cut off did not reach keeps the tile it had.
"""

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from timing import copies, graph_us, need_gpu, summary
from triton.runtime.errors import TritonError

from vllm_flatquant.kernels.tile_table import TABLE
from vllm_flatquant.kernels.tiles import BUCKETS, Tile
from vllm_flatquant.kernels.w4_gemm import run_tile, w4_gemm_ref

SHAPES = {  # (N, K, shards)
    "llama-8b": [(6144, 4096, 1), (4096, 4096, 1), (28672, 4096, 1), (4096, 14336, 1)],
    "llama-70b": [(10240, 8192, 1), (8192, 8192, 1), (57344, 8192, 1), (8192, 28672, 1)],
    "llama-8b-sharded": [(4096, k, s) for s in (2, 4, 8) for k in (4096, 14336)],
    "llama-8b-4": [(4096, 4096, 4), (4096, 14336, 4)],
    "qwen3-32b": [(10240, 5120, 1), (5120, 8192, 1), (51200, 5120, 1), (5120, 25600, 1)],
}


def candidates(t: int, n: int, k: int, shards: int) -> list[Tile]:
    """What is worth trying for ``t`` tokens: small tiles that only stream weights, up to wide compute tiles."""
    tiles: list[Tile] = []
    if t <= 32:
        bm = 16 if t <= 16 else 32
        for far in (0, 8):
            tiles += [
                Tile(bm, 64, 4, 4, 4, 1, far),
                Tile(bm, 32, 2, 4, 4, 1, far),
                Tile(bm, 16, 1, 4, 4, 1, far),
            ]
        tiles += [Tile(bm, 32, 2, 8, 2, 1, 32), Tile(bm, 32, 2, 6, 2, 1, 0)]
    if t <= 128:
        bm = 16 if t <= 16 else 32 if t <= 32 else 64
        for bn, warps in ((64, 4), (128, 4), (256, 8)):
            work = -(-t // bm) * -(-n // bn)
            for split in (1, 2, 4, 7):
                for ctas in (1, 2, 3):
                    for kb in (1, 2):
                        room = 224_000 // ctas - bm * bn * 2 - 2048
                        stages = min(room // (kb * (bn * 64 + bm * 128)), 16 // kb)
                        if (
                            stages >= 3
                            and work * split <= 400
                            and work * split >= 60
                            and bn * ctas <= 256
                        ):
                            tiles.append(Tile(bm, bn, warps, stages, kb, ctas=ctas, split=split))
    if 32 < t <= 128:
        tiles += [
            Tile(32, 64, 4, 4, 2),
            Tile(64, 64, 4, 4, 2),
            Tile(64, 128, 4, 4, 1),
            Tile(64, 256, 8, 4, 1),
        ]
    if 64 < t <= 512:
        for split in (1, 2, 4) if n * t < 2**23 else (1,):
            tiles += [
                Tile(128, 128, 8, 7, ctas=1, split=split),
                Tile(128, 128, 4, 3, ctas=2, split=split),
            ]
            tiles += [
                Tile(64, 128, 4, 5, ctas=2, split=split),
                Tile(128, 256, 8, 5, ctas=1, split=split),
            ]
        tiles += [Tile(128, 64, 4, 4, ctas=2), Tile(64, 64, 4, 7, ctas=2)]
    if t > 512:
        tiles += [Tile(128, 256, 8, 5, group=g, ctas=1) for g in (2, 4, 8, 16)]
        tiles += [Tile(128, 128, 4, 3, group=g, ctas=2) for g in (4, 8)]
        tiles += [Tile(128, 128, 8, 7, ctas=1), Tile(128, 64, 4, 4, ctas=2)]
        tiles += [Tile(128, 256, 8, 5, ctas=1, split=2)] if n * t < 2**23 else []
    if t > 64:
        tiles += [Tile(128, 128, 8, 4), Tile(64, 128, 4, 4)]
    return [tile for tile in dict.fromkeys(tiles) if tile.fits(n, k, shards)]


def make(t: int, n: int, k: int, shards: int, count: int) -> list[list[torch.Tensor]]:
    """``count`` argument sets of a launch, with random codes."""
    sets = []
    for _ in range(count):
        codes = torch.randint(-8, 8, (t, k), dtype=torch.int8, device="cuda")
        weight = torch.randint(0, 256, (k // 128, n, 64), dtype=torch.uint8, device="cuda")
        scale = torch.rand(t, shards, device="cuda") + 0.1
        weight_scale = torch.rand(n, 1, device="cuda") + 0.1
        sets.append(
            [codes, scale, weight, weight_scale, torch.empty(t, n, dtype=torch.bfloat16, device="cuda")]
        )
    return sets


def compile_all(job: tuple[tuple[int, int, int], list[Tile]]) -> list[tuple[Tile, str]]:
    """Launch every tile once on a small T (fills the on-disk cache); returns those that failed."""
    (n, k, shards), tiles = job
    failed = []
    for tile in tiles:
        try:
            codes, scale, weight, weight_scale, out = make(8, n, k, shards, 1)[0]
            run_tile(codes, scale, weight, weight_scale, None, out, tile)
            torch.cuda.synchronize()
        except (RuntimeError, TritonError) as error:
            failed.append((tile, f"{type(error).__name__}: {str(error)[:200]}"))
    return failed


def check(t: int, n: int, k: int, shards: int, tile: Tile) -> None:
    """AssertionError unless every output equals the reference to a bf16 rounding; out is poisoned first."""
    from vllm_flatquant.kernels.pack import unpack_device

    codes, scale, weight, weight_scale, out = make(t, n, k, shards, 1)[0]
    out.fill_(float("nan"))
    run_tile(codes, scale, weight, weight_scale, None, out, tile)
    want = w4_gemm_ref(codes, scale, unpack_device(weight, k, shards), weight_scale, None, torch.float32)
    error = ((out.float() - want).abs() / (want.abs() + 1e-3 * want.abs().max())).max().item()
    assert error < 2**-7, f"{tile} wrong at T={t} N={n} K={k} S={shards}: {error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="llama-8b")
    parser.add_argument("--tokens", default=",".join(map(str, BUCKETS)))
    parser.add_argument("--log", default="tune.jsonl")
    parser.add_argument("--out", help="the table to update, kernels/tile_table.py")
    parser.add_argument("--workers", type=int, default=min(14, os.cpu_count() or 1))
    args = parser.parse_args()
    need_gpu()
    shapes = [shape for name in args.shapes.split(",") for shape in SHAPES[name]]
    tokens = [int(t) for t in args.tokens.split(",")]

    # What is compiled depends on the tile, the shards and divisibility, not on N and K themselves.
    jobs = {
        (tile, s): ((1024, k, s), [tile])
        for n, k, s in shapes
        for t in tokens
        for tile in candidates(t, n, k, s)
    }
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        failed = dict(pair for pairs in pool.map(compile_all, jobs.values()) for pair in pairs)
    print(f"compiled {len(jobs)} variants", flush=True)
    for tile, why in failed.items():
        print("skipped", tile, why, flush=True)

    gpu = torch.cuda.get_device_name()
    best: dict[tuple[int, int, int], dict[int, Tile]] = {}
    with open(args.log, "a") as log:
        for n, k, shards in shapes:
            count = copies(n * k // 2)
            sets = make(max(tokens), n, k, shards, count)
            for t in tokens:
                rows = []
                part = [[c[:t], s[:t], w, ws, o[:t]] for c, s, w, ws, o in sets]
                for tile in candidates(t, n, k, shards):
                    if tile in failed:
                        continue
                    check(t, n, k, shards, tile) if n * k < 2**25 and t < 2048 else None
                    figures = graph_us(
                        lambda i, p=part, tile=tile: run_tile(*p[i][:4], None, p[i][4], tile), count, 3
                    )
                    rows.append((summary(figures)[0], tile))
                    log.write(
                        json.dumps(
                            {
                                "gpu": gpu,
                                "n": n,
                                "k": k,
                                "s": shards,
                                "t": t,
                                "us": rows[-1][0],
                                "tile": tile,
                            }
                        )
                        + "\n"
                    )
                log.flush()
                rows.sort()
                best.setdefault((n, k, shards), {})[t] = rows[0][1]
                print(
                    f"N={n} K={k} S={shards} T={t}:",
                    *(f"{us:.1f} {tuple(x)};" for us, x in rows[:3]),
                    flush=True,
                )
                if args.out:
                    write(args.out, gpu, best)


def write(path: str, gpu: str, best: dict[tuple[int, int, int], dict[int, Tile]]) -> None:
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
        for name in sorted(table):
            file.write(f'    "{name}": {{\n')
            for shape in sorted(table[name]):
                file.write(f"        {shape}: {{\n")
                file.writelines(
                    f"            {t}: {tuple(table[name][shape][t])},\n"
                    for t in sorted(table[name][shape])
                )
                file.write("        },\n")
            file.write("    },\n")
        file.write("}\n")
    os.replace(path + ".new", path)


if __name__ == "__main__":
    main()
