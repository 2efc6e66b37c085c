"""warp's CUDA kernels beyond the cases that all backends share: several points a warp, rows longer than registers, tiles of planes, the order of threads.
Emulated where there is no GPU."""

import pytest
import torch

from pix2rep_kernels import warp
from warp_helpers import DEVICE, compare, problem

pytestmark = pytest.mark.skipif("cuda" not in DEVICE, reason="neither _C_cuda on a GPU nor _C_emulated (PIX2REP_BUILD=emulate) is here")
GPU = DEVICE.get("cuda") == "cuda"


@pytest.mark.parametrize("channels, layout, dims, dtype", [
    (12, "last", 2, torch.float32),  # vectors, four lanes a point
    (17, "last", 2, torch.float32),  # one value a lane, a warp a point
    (16, "last", 3, torch.bfloat16),
    (5, "first", 3, torch.float16),
])  # fmt: skip
def test_a_warp_takes_several_points(channels, layout, dims, dtype):
    """1260 points: at least 16 a warp, of which a quarter of a warp to all of it reads one at a time."""
    size = (30, 21) if dims == 2 else (6, 15, 7)
    features, grid, options = problem(dims, channels, layout=layout, dtype=dtype, size=size)
    compare("cuda", features, grid, sorted_sums=False, normalize=True, **options)


@pytest.mark.parametrize("channels, layout, mode", [
    (532, "last", "linear"),  # 32 lanes of four values hold four vectors of a row between norm and store, and read a fifth again
    (135, "last", "linear"),
    (148, "last", "bicubic"),  # one
    (300, "first", "linear"),  # a tile of planes has 256 channels
    (263, "strided", "nearest"),
])  # fmt: skip
def test_rows_longer_than_what_is_held(channels, layout, mode):
    features, grid, options = problem(2, channels, layout=layout, size=(3, 4), mode=mode)
    for normalize in (True, False):
        compare("cuda", features, grid, sorted_sums=False, normalize=normalize, **options)


def test_gradients_that_are_not_aligned():
    features, grid, options = problem(2, 8, size=(3, 4))
    features = features.to(DEVICE["cuda"]).requires_grad_()
    grid = grid.to(features.device)
    upstream = torch.randn(24 * 8 + 1, device=features.device)[1:].view(24, 8)
    grads = []
    for given in (upstream, upstream.clone()):
        rows, _ = warp(features, grid, backend="cuda", **options)
        grads += torch.autograd.grad(rows, features, given)
    assert torch.allclose(*grads, atol=1e-6)


@pytest.mark.skipif(GPU, reason="the emulation chooses the order")
@pytest.mark.parametrize("layout", ["last", "first"])
def test_the_order_of_threads_changes_no_bit_of_rows(monkeypatch, layout):
    features, grid, options = problem(2, 20, layout=layout, size=(20, 30))
    first = warp(features, grid, normalize=True, backend="cuda", **options)
    for order in ("1", "2", "3"):
        monkeypatch.setenv("PIX2REP_EMULATE_ORDER", order)
        assert all(torch.equal(x, y) for x, y in zip(first, warp(features, grid, normalize=True, backend="cuda", **options), strict=True))
