"""crosscorr's CUDA kernels beyond the cases that all backends share: edges of tiles, layouts, bits, ranges, arguments. Emulated where there is no GPU."""

import math

import pytest
import torch

from crosscorr_helpers import DEVICE, EVERY, GPU, both, compare, laid_out, ours, refuses_what_does_not_fit, views, weights
from pix2rep_kernels.ops.crosscorr import moments
from pix2rep_kernels.testing import error
from sweep import FULL

pytestmark = pytest.mark.skipif("cuda" not in EVERY, reason="neither _C_cuda on a GPU nor _C_emulated (PIX2REP_BUILD=emulate) is here")

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
# Tiles of the moments are 64 x 64, 128 x 128 and 256 x 128 features, 64 x 64 and 128 x 64 in float32, and take 32 rows; gradients take 64 features, all of
# them at once to 256 x 256, and 32, 64 or 128 rows by how many.
CASES = [
    *((33, *widths, BRAIN, "numbers") for widths in ((64, 64), (64, 65), (65, 8), (128, 129), (129, 128), (256, 8))),
    *((33, *widths, HALF, "mask") for widths in ((8, 64), (64, 128), (136, 16), (8, 264))),
    *((33, *widths, SINGLE, "numbers") for widths in ((64, 64), (65, 64), (16, 68), (128, 4))),
    *((n, 16, 24, BRAIN, "none") for n in (31, 32, 64, 65)),
    *((n, 200, 8, HALF, "none") for n in (32, 33)),
    *((n, 4, 8, SINGLE, "none") for n in (32, 127, 128)),
    (40, 64, 128, BRAIN, "none"),  # three of a block's four warps have a share of the gradients
    (40, 192, 130, BRAIN, "mask"),  # six of eight
    (40, 328, 16, BRAIN, "mask"),  # gP is streamed
    (40, 3, 330, HALF, "numbers"),
    (300, 3, 5, BRAIN, "mask"),  # several ranges of rows
    (530, 3, 5, SINGLE, "numbers"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(v) for v in case).replace("torch.", ""))
def test_edges_of_tiles(case):
    n, d1, d2, dtype, weight = case
    compare("cuda", *views(n, d1, d2, dtype), weights(weight, n))


@pytest.mark.parametrize("dtype, widths", [(SINGLE, (16, 40)), (BRAIN, (16, 72)), (HALF, (19, 8))])
def test_layouts_give_the_same_bits(dtype, widths):
    """Copied 16 bytes at once or value by value, along features or rows; NaN lies between what is theirs."""
    n = 70
    (x, y), w, upstream = views(n, *widths, dtype), weights("numbers", n), torch.randn(*widths)
    dense = both(ours("cuda"), x, y, upstream, weight=w)
    for layout in ("planes", "wide", "offset", "backwards"):
        for pair in ((laid_out(x, layout), y), (x, laid_out(y, layout))):
            assert all(torch.equal(a, b) for a, b in zip(both(ours("cuda"), *pair, upstream, weight=w), dense, strict=True)), layout
    spread = torch.stack([w, torch.full_like(w, math.nan)], 1).flatten()[::2]
    assert torch.equal(ours("cuda")(x, y, weight=spread), dense[0])


@pytest.mark.parametrize("dtype, widths", [(SINGLE, (20, 9)), (BRAIN, (20, 9)), (BRAIN, (3, 330))])
def test_subsets_of_gradients(dtype, widths):
    x, y = views(70, *widths, dtype)
    upstream = torch.randn(*widths)
    full = both(ours("cuda"), x, y, upstream)[1:]
    for k in range(2):
        assert torch.equal(both(ours("cuda"), x, y, upstream, (k == 0, k == 1))[1], full[k])


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_a_row_left_out_may_hold_anything(dtype):
    """First and last of a step, of a range, of all; no bit changes, in either layout."""
    n = 150
    (x, y), w, upstream = views(n, 16, 8, dtype), torch.rand(n) + 0.1, torch.randn(16, 8)
    w[[0, 31, 32, 127, 128, n - 1]] = 0
    clean = both(ours("cuda"), x, y, upstream, weight=w)
    for bad in (math.nan, math.inf):
        for layout in ("rows", "planes"):
            spoilt = [laid_out(torch.where((w == 0).unsqueeze(1), bad, t), layout) for t in (x, y)]
            got = both(ours("cuda"), *spoilt, upstream, weight=w)
            assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))
            assert all(g[w == 0].count_nonzero() == 0 for g in got[1:])


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN])
def test_moments_of_what_the_products_take(dtype):
    """Of one view given twice the product's diagonal is the sum of squares, and 16-bit pivots are exact."""
    x, _ = views(200, 20, 1, dtype)
    x, w = x.to(DEVICE["cuda"]), weights("numbers", 200).to(DEVICE["cuda"])
    m = moments(x, x, weight=w, backend="cuda")
    assert error([m.product.diagonal()], [m.square_x]) < (1e-6 if dtype == SINGLE else 4e-3)
    assert torch.equal(m.pivot_x, m.pivot_x.to(dtype).float()) and error([m.count], [w.double().sum()]) < 1e-7
    assert torch.equal(m.sum_x, m.sum_y) and torch.equal(m.square_x, m.square_y)


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN])
def test_same_bits_every_time(dtype):
    x, y = views(150, 24, 17, dtype)
    w, upstream = weights("numbers", 150), torch.randn(24, 17)
    first, *others = (both(ours("cuda"), x, y, upstream, weight=w) for _ in range(20 if GPU else 2))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.skipif(GPU, reason="the emulation chooses the order")
@pytest.mark.parametrize("dtype, shape", [(SINGLE, (160, 8, 8)), (BRAIN, (160, 136, 8)), (HALF, (160, 19, 8)), (BRAIN, (20, 328, 8))])
def test_the_order_of_threads_and_blocks_changes_no_bit(monkeypatch, dtype, shape):
    """A missing barrier shows where threads run in another order: with more steps than slots to copy into."""
    (x, y), w, upstream = views(*shape, dtype), weights("numbers", shape[0]), torch.randn(*shape[1:])
    monkeypatch.delenv("PIX2REP_EMULATE_ORDER", raising=False)
    first = both(ours("cuda"), x, y, upstream, weight=w)
    for order in ("1", "2", "3", "4", "5") if FULL else ("1",):
        monkeypatch.setenv("PIX2REP_EMULATE_ORDER", order)
        assert all(torch.equal(a, b) for a, b in zip(first, both(ours("cuda"), x, y, upstream, weight=w), strict=True))


def test_arguments():
    if GPU:
        pytest.skip("the emulated op is asked")
    x, y = views(5, 3, 4)
    refuses_what_does_not_fit(torch.ops.pix2rep_emulated, (x, y, torch.ones(5).double()), (x.double(), y, None), (x, y.int(), None))
