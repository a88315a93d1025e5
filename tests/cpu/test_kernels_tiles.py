"""The tile table and its rule: whatever the shape, the tile it gets can compute it."""

import pytest

from vllm_flatquant.kernels import tiles
from vllm_flatquant.kernels.silu_mul_kron_quant import suits
from vllm_flatquant.kernels.tile_table import TABLE
from vllm_flatquant.kernels.tiles import BUCKETS, PLAIN, Tile, bucket, w4_gemm_tile, warmup_tokens

H100 = "NVIDIA H100 80GB HBM3"


def test_every_measured_tile_fits_its_shape() -> None:
    together: dict[tuple[int, int, int], set[int]] = {}  # a card takes what it lacks from the others
    for shapes in TABLE.values():
        for (n, k, shards), rows in shapes.items():
            assert set(rows) <= set(BUCKETS)
            together.setdefault((n, k, shards), set()).update(rows)
            for t, tile in rows.items():
                assert Tile(*tile).fits(n, k, shards)
                assert t == 1 or tile[0] > 1  # the kernel for one token takes no more
    assert all(1 in tokens and max(tokens) >= 2048 for tokens in together.values())


def test_a_measured_shape_gets_its_own_tile() -> None:
    for (n, k, shards), rows in TABLE[H100].items():
        for t, tile in rows.items():
            assert w4_gemm_tile(H100, True, t, n, k, shards) == Tile(*tile)


def test_a_card_takes_what_it_lacks_from_the_others(monkeypatch) -> None:
    """Its own rows count, then those of the first card in the table, then the next one's."""
    monkeypatch.setitem(TABLE, "a card", {(4096, 4096, 1): {16: tuple(PLAIN[16])}})
    tiles._tile.cache_clear()
    for t, n, k in [(1, 4096, 4096), (64, 4096, 4096), (16, 28672, 4096), (8192, 10240, 8192)]:
        assert w4_gemm_tile("a card", True, t, n, k, 1) == w4_gemm_tile(H100, True, t, n, k, 1)
    assert w4_gemm_tile("a card", True, 16, 4096, 4096, 1) == PLAIN[16]
    h200 = TABLE["NVIDIA H200"]
    assert 2048 not in TABLE[H100][4096, 4096, 1] and (4096, 4096, 2) not in TABLE[H100]
    assert w4_gemm_tile(H100, True, 2048, 4096, 4096, 1) == Tile(*h200[4096, 4096, 1][2048])
    assert w4_gemm_tile(H100, True, 1, 4096, 4096, 2) == Tile(*h200[4096, 4096, 2][1])
    assert next(iter(TABLE)) == H100
    tiles._tile.cache_clear()


@pytest.mark.parametrize("t", [1, 2, 16, 17, 64, 65, 300, 9000])
@pytest.mark.parametrize(
    "n,k,shards",
    [
        (384, 384, 1),
        (77, 640, 2),
        (5120, 25600, 1),
        (8192, 28672, 8),
        (1000, 1408, 4),
        (151936, 5120, 1),
    ],
)
def test_any_shape_gets_a_tile_that_fits(t: int, n: int, k: int, shards: int) -> None:
    for gpu, hopper in ((H100, True), ("NVIDIA H200", True), ("NVIDIA A100-SXM4-80GB", False)):
        tile = w4_gemm_tile(gpu, hopper, t, n, k, shards)
        assert tile.fits(n, k, shards)
        assert hopper or tile in PLAIN.values()


@pytest.mark.parametrize("gpu", [H100, "NVIDIA H200", "a card"])
def test_no_tile_is_half_empty(gpu: str) -> None:
    """Of shapes whose rows in the table are few, as those of a rank of a 70B model."""
    sizes = [
        (8192, 4096),
        (8192, 14336),
        (28672, 8192),
        (5120, 8192),
        (2560, 8192),
        (7168, 5120),
        (4096, 25600),
    ]
    for n, k in [shape[:2] for shapes in TABLE.values() for shape in shapes] + sizes:
        for shards in (1, 2, 4):
            for t in (1, 2, 16, 17, 65, 128, 129, 257, 512, 1024, 2048, 9000):
                tile = w4_gemm_tile(gpu, True, t, n, k, shards)
                assert tile.bm <= max(64, 2 * t - 1), (t, n, k, shards, tile)


def test_the_kernel_for_one_token_takes_no_more(monkeypatch) -> None:
    """Even where a table, of a search that was cut off, has nothing else."""
    for card in list(TABLE):
        monkeypatch.delitem(TABLE, card)
    one = Tile(1, 8, 4, 1, 32)
    monkeypatch.setitem(TABLE, "a card", {(4096, 4096, 1): {1: tuple(one)}})
    tiles._tile.cache_clear()
    assert w4_gemm_tile("a card", True, 1, 4096, 4096, 1) == one
    for t in (2, 16, 300):
        assert w4_gemm_tile("a card", True, t, 4096, 4096, 1) in PLAIN.values()
    tiles._tile.cache_clear()


def test_buckets_and_warm_up() -> None:
    assert [bucket(t) for t in (1, 2, 16, 17, 8192, 20000)] == [1, 16, 16, 32, 8192, 8192]
    assert warmup_tokens(100) == [1, 16, 32, 64, 100]
    assert warmup_tokens(8192) == list(BUCKETS)
    for t in range(1, 200):  # every number of tokens uses a tile that the warm-up has run
        warmed = {w4_gemm_tile(H100, True, w, 4096, 4096, 1) for w in warmup_tokens(200)}
        assert w4_gemm_tile(H100, True, t, 4096, 4096, 1) in warmed


@pytest.mark.parametrize("sms", [66, 78, 108, 114, 132, 144])
@pytest.mark.parametrize("most", [1, 100, 133, 150, 256, 2048, 8192, 10_000])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_warm_up_runs_every_form_of_silu(sms: int, most: int, shards: int) -> None:
    """Both its kernels are compiled at load if any batch of up to ``most`` tokens can need them."""
    left, right = (shards, 112, 112), (shards, 128, 128)
    needed = {suits(t, shards, left, right, sms) for t in range(1, most + 1)}
    assert needed == {suits(t, shards, left, right, sms) for t in warmup_tokens(most)}


def test_what_the_hopper_form_of_silu_takes() -> None:
    for a, b, taken in [
        (112, 128, True), (100, 128, True), (65, 64, True), (128, 128, True),
        (64, 128, False), (129, 128, False), (112, 96, False), (112, 256, False),
    ]:  # fmt: skip
        assert suits(10**6, 2, (2, a, a), (2, b, b), 132) == taken
    assert not suits(10**6, 1, (2, 112, 112), (2, 128, 128), 132)  # scales that do not fit the factors
    assert suits(1, 1, (1, 112, 112), (1, 128, 128), 132)
    assert not suits(0, 1, (1, 112, 112), (1, 128, 128), 132)  # nothing to launch
