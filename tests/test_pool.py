"""pool: values, gradients, properties, edges; every backend that runs here, against PyTorch's scatter in float64."""

import itertools
import math

import pytest
import torch

from pix2rep_kernels import pool
from pix2rep_kernels.testing import error
from pool_helpers import DEVICE, EVERY, FAST, LABELS, both, compare, none_of, ours, problem
from sweep import FULL, some

CPU = [b for b in FAST if b not in ("triton", "cuda")]  # float64 too
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of inf - inf in the interpreter

# Values and gradients


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("backend", FAST)
def test_values_and_gradients(backend, dims):
    for layout, labels, (regions, runs) in some(backend, itertools.product(("last", "first", "strided"), LABELS, ((1, 6), (5, 1), (5, 6), (40, 1))), 4):
        compare(backend, *problem(dims, layout=layout, labels=labels, regions=regions, runs=runs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", CPU)
def test_precisions(backend, dtype):
    for layout, channels, dims in itertools.product(("last", "first", "strided"), (3, 16, 33, 70), (2, 3)):
        compare(backend, *problem(dims, channels, layout=layout, dtype=dtype))


@pytest.mark.parametrize("backend", CPU)
def test_gradcheck(backend):
    for layout, dims in itertools.product(("last", "first"), (1, 2, 3)):
        features, labels, regions = problem(dims, 3, layout=layout, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda f, x=labels, r=regions: pool(f, x, regions=r, backend=backend)[0], features.requires_grad_())


TRITON_CASES = [
    *({"layout": layout, "labels": labels} for layout, labels in zip(("last", "first", "strided", "last", "first"), LABELS, strict=True)),
    *({"dims": dims, "layout": layout, "channels": 3} for dims in (1, 3) for layout in ("last", "first")),
    {"channels": 150, "space": (2, 3)},  # more than one block of channels, either way
    {"channels": 40, "space": (2, 3), "layout": "first"},
    {"channels": 2, "space": (20, 30), "regions": 1, "batch": 1},  # several pieces a region
    {"channels": 1, "space": (15, 9), "regions": 2, "layout": "first", "runs": 40},
    {"channels": 1, "space": (1, 1), "regions": 1, "batch": 1},
    {"channels": 3, "space": (2, 2), "regions": 40000, "batch": 1, "runs": 1} if FULL else {"channels": 3, "space": (1, 5), "regions": 1},
    {"dtype": torch.float16, "channels": 16},
    {"dtype": torch.bfloat16, "channels": 5, "layout": "first"},
]  # fmt: skip


@pytest.mark.parametrize("backend", [b for b in EVERY if b in ("triton", "cuda")])
@pytest.mark.parametrize("case", TRITON_CASES, ids=lambda case: "-".join(str(v) for v in case.values()).replace("torch.", ""))
def test_gpu_kernels(case, backend):
    compare(backend, *problem(**case))


# Properties


@pytest.mark.parametrize("backend", EVERY)
def test_one_pixel_a_region_and_one_region(backend):
    """The means are the features, bit for bit; then the mean of all of them."""
    for layout in ("last", "first"):
        features, _, _ = problem(layout=layout, space=(3, 4))
        rows = features.flatten(2).transpose(1, 2)
        means, counts = ours(backend)(features, torch.arange(12).view(1, 3, 4).expand(2, -1, -1), 12)
        assert torch.equal(means, rows) and (counts == 1).all()
        means, counts = ours(backend)(features, torch.zeros(2, 3, 4, dtype=torch.uint8), 1)
        assert error([means], [rows.double().mean(1, keepdim=True)]) <= torch.finfo(torch.float32).eps and (counts == 12).all()


@pytest.mark.parametrize("backend", EVERY)
def test_order_of_pixels_and_regions(backend):
    """Permuting the pixels leaves the means, relabelling permutes them."""
    features, labels, regions = problem()
    means, counts = ours(backend)(features, labels, regions)
    order, names = torch.randperm(35), torch.randperm(regions)
    shuffled = features.flatten(2)[..., order].view_as(features), labels.flatten(1)[:, order].view_as(labels)
    got = ours(backend)(*shuffled, regions)
    assert error([got[0]], [means]) <= torch.finfo(torch.float32).eps and torch.equal(got[1], counts)
    renamed = torch.where((labels >= 0) & (labels < regions), names[labels.clamp(0, regions - 1)], labels)
    got = ours(backend)(features, renamed, regions)
    assert torch.equal(got[0][:, names], means) and torch.equal(got[1][:, names], counts)


@pytest.mark.parametrize("backend", EVERY)
def test_sums_are_kept(backend):
    """sum_r c_r mu_r is the sum of the pixels that have a region, and sum_r c_r is how many they are."""
    for layout in ("last", "first"):
        features, labels, regions = problem(layout=layout)
        means, counts = ours(backend)(features, labels, regions)
        kept = features.double().masked_fill(none_of(labels, regions), 0)
        assert error([(means.double() * counts.unsqueeze(2)).sum(1)], [kept.flatten(2).sum(2)]) <= 4 * torch.finfo(torch.float32).eps
        assert torch.equal(counts.sum(1), (~none_of(labels, regions)).flatten(1).sum(1))


@pytest.mark.parametrize("backend", CPU)
def test_linear_and_adjoint(backend):
    """Pooling is linear, and its gradient is its transpose: <pool f, g> = <f, pool^T g>."""
    for dims, layout in itertools.product((1, 2, 3), ("last", "first")):
        f, labels, regions = problem(dims, layout=layout, dtype=torch.float64)
        h = torch.randn_like(f)
        call = ours(backend)
        means = call(f, labels, regions)[0]
        assert error([call(2 * f - 3 * h, labels, regions)[0]], [2 * means - 3 * call(h, labels, regions)[0]]) < 1e-14
        g = torch.randn_like(means)
        transposed = both(call, f, labels, regions, g)[2]
        assert abs((means * g).sum() - (f * transposed).sum()) < 1e-13 * means.norm() * g.norm()


@pytest.mark.parametrize("backend", EVERY)
def test_a_million_equal_values(backend):
    """Their mean is that value: sums in float32 would drift by thousands of roundings. Interpreted kernels take 5,000."""
    space = (1000, 1000) if backend != "triton" or DEVICE[backend] == "cuda" else (50, 100)
    for layout in ("last", "first"):
        features = torch.full((1, 2, 1, 1), 0.1).expand(1, 2, *space).contiguous()
        if layout == "last":
            features = features.contiguous(memory_format=torch.channels_last)
        means, counts = ours(backend)(features, torch.zeros(1, *space, dtype=torch.uint8), 2)
        assert counts.tolist() == [[math.prod(space), 0]]
        assert (means[0, 0] / 0.1 - 1).abs().max() <= 2 * torch.finfo(torch.float32).eps and means[0, 1].count_nonzero() == 0


# Edges


@pytest.mark.parametrize("backend", EVERY)
def test_labels_out_of_range(backend):
    """Negative labels, labels from `regions` on, past int32: NaN there changes nothing and gets gradient exactly 0."""
    outside = {
        torch.uint8: (255, 5), torch.int8: (-1, -128, 127), torch.int16: (-(2**15), 5), torch.int32: (-1, 2**31 - 1),
        torch.int64: (2**32, -(2**63), 2**40 + 1),
    }  # fmt: skip
    for (dtype, values), layout in itertools.product(outside.items(), ("last", "first")):
        if backend == "triton" and DEVICE[backend] == "cpu" and (dtype in (torch.int16, torch.int32) or layout == "first"):
            continue  # interpreted
        features, labels, regions = problem(layout=layout, regions=5, channels=6)
        labels = labels.clamp(0, regions - 1).to(dtype)
        for i, value in enumerate(values):
            labels[:, i, i : i + 3] = value
        upstream = torch.randn(2, regions, 6)
        expected = both(ours("reference"), features.masked_fill(none_of(labels, regions), 0), labels, regions, upstream)
        poison = features.masked_fill(none_of(labels, regions), math.nan)
        for got, wanted in zip(both(ours(backend), poison, labels, regions, upstream), expected, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("backend", EVERY)
def test_empty_regions(backend):
    """Mean 0, count 0; NaN or inf upstream of one vanishes."""
    for layout in ("last", "first"):
        features, labels, regions = problem(layout=layout, regions=5, channels=6)
        upstream = torch.randn(2, regions, 6)
        plain = both(ours(backend), features, labels, regions, upstream)
        empty = plain[1] == 0
        assert empty[:, 1].all() and plain[0][empty].count_nonzero() == 0
        upstream[empty] = torch.tensor([math.nan, math.inf, -math.inf, 1e38, -1.0, math.nan])
        assert torch.equal(both(ours(backend), features, labels, regions, upstream)[2], plain[2])


@pytest.mark.parametrize("backend", EVERY)
def test_nan_and_inf_reach_their_region_alone(backend):
    for layout in ("last", "first"):
        features, _, _ = problem(layout=layout, channels=9)
        labels = torch.arange(35).floor_divide(9).view(1, 5, 7).repeat(2, 1, 1)
        features[0, 2, 0, 3], features[0, 3, 4, 6], features[1, 4, 2, 0], features[1, 4, 2, 1] = math.nan, math.inf, math.inf, -math.inf
        means, _ = ours(backend)(features, labels, 4)
        expected, _ = ours("reference")(features, labels, 4)
        assert means[0, 0, 2].isnan() and means[0, 3, 3] == math.inf and means[1, 1, 4].isnan() and means.isfinite().sum() == means.numel() - 3
        torch.testing.assert_close(means, expected, rtol=1e-6, atol=1e-7, equal_nan=True)
        upstream = torch.randn(2, 4, 9)
        upstream[0, 1, 5], upstream[1, 2, 0] = math.nan, -math.inf
        grad = both(ours(backend), features, labels, 4, upstream)[2].flatten(2)
        assert grad[0, 5, 9:18].isnan().all() and (grad[1, 0, 18:27] == -math.inf).all() and grad.isfinite().sum() == grad.numel() - 18


@pytest.mark.parametrize("backend", FAST)
def test_channels_and_sizes(backend):
    for channels, layout in some(backend, itertools.product((1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 100, 127, 129, 260, 512), ("last", "first")), 2):
        compare(backend, *problem(channels=channels, layout=layout, space=(6, 11), regions=9, runs=5))
    sizes = ((1, 1), (1, 2), (2, 1), (1, 31), (33, 1), (16, 16), (15, 17), (127, 129), (257, 3), (1, 4099))
    for space, layout in itertools.product(sizes, ("last", "first")):
        compare(backend, *problem(channels=18, layout=layout, space=space, regions=13, runs=9))


@pytest.mark.parametrize("backend", CPU)
def test_chunks_of_pixels_and_blocks_of_channels(backend):
    """Images of several chunks; more regions than pixels; so many regions that channels go block by block."""
    for layout in ("last", "first"):
        compare(backend, *problem(batch=1, channels=20, layout=layout, space=(101, 103), regions=7, runs=60))
        compare(backend, *problem(batch=1, channels=3, layout=layout, space=(5, 5), regions=3000, runs=1))
        compare(backend, *problem(batch=1, channels=150, layout=layout, space=(9, 9), regions=2000, runs=1))


@pytest.mark.parametrize("backend", FAST)
def test_strides(backend):
    """Slices, transposed, expanded and overlapping tensors, an offset that no vector is aligned to; labels likewise; an expanded gradient."""
    wide, labels, regions = problem(channels=40, batch=4, space=(12, 14), layout="first", regions=6)
    last = wide.contiguous(memory_format=torch.channels_last)
    views = {
        "channels": (wide[:, 3:30:2], labels), "rows": (wide[:, :, 1:-1], labels[:, 1:-1]), "columns": (wide[:, :, :, 1:-2], labels[:, :, 1:-2]),
        "images": (wide[::2], labels[::2]), "transposed": (wide.transpose(2, 3), labels.transpose(1, 2)), "one image": (wide[:1].expand(4, -1, -1, -1), labels),
        "one channel": (wide[:, :1].expand(-1, 20, -1, -1), labels), "one pixel": (wide[:, :, :1, :1].expand(-1, -1, 5, 6), labels[:, :5, :6]),
        "one column": (wide[:, :, :, :1].expand(-1, -1, -1, 14), labels), "one column, last": (last[:, :, :, :1].expand(-1, -1, -1, 14), labels),
        "offset": (torch.randn(wide.numel() + 1)[1:].view_as(wide), labels), "channels of last": (last[:, 5:25], labels),
        "one channel of last": (last[:, 5:6], labels), "columns of last": (last[:, :, :, 1:-2], labels[:, :, 1:-2]),
        "expanded labels": (wide, labels[:1].expand(4, -1, -1)), "labels of one pixel": (last, labels[:, :1, :1].expand(-1, 12, 14)),
    }  # fmt: skip
    for features, where in views.values():
        compare(backend, features, where, regions)
    leaf = wide.requires_grad_()
    grads = [torch.autograd.grad(ours(b)(leaf, labels, regions)[0].sum(), leaf)[0] for b in (backend, "reference")]
    assert torch.equal(*grads)


@pytest.mark.parametrize("backend", EVERY)
def test_nothing_to_pool(backend):
    features, labels, _ = problem(channels=9)
    cases = [
        (features, labels, 0), (features[:0], labels[:0], 3), (features[:, :0], labels, 3), (features[:, :, :0], labels[:, :0], 3), (features, labels - 100, 3)
    ]  # fmt: skip
    for f, where, regions in cases:
        means, counts, grad = both(ours(backend), f, where, regions, torch.randn(len(f), regions, f.shape[1]))
        assert means.shape == (len(f), regions, f.shape[1]) and counts.shape == (len(f), regions) and grad.shape == f.shape
        assert means.count_nonzero() == 0 and grad.count_nonzero() == 0
        assert torch.equal(counts, ours("reference")(f, where, regions)[1])


@pytest.mark.parametrize("backend", EVERY)
def test_gradients_keep_the_layout(backend):
    for dims, layout in itertools.product((2, 3), ("last", "first")):
        features, labels, regions = problem(dims, channels=4, layout=layout, space=(3,) * dims)
        assert both(ours(backend), features, labels, regions, torch.randn(2, regions, 4))[2].stride() == features.stride()
