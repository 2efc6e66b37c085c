"""align: values, gradients, properties, edges; every backend that runs here, against F.grid_sample in float64."""

import itertools
import math

import pytest
import torch

from align_helpers import DEVICE, EXACT, FAST, SPACES, affine, both, compare, feature_map, ours, problem
from pix2rep_kernels import align
from pix2rep_kernels.testing import backends, error
from sweep import FULL, some

pytestmark = [
    pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid:UserWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # numpy's, of NaN and inf in the interpreter
]
LAYOUTS = [("last", "last"), ("first", "first"), ("last", "first"), ("strided", "last")]
EPS = torch.finfo(torch.float32).eps


# Values and gradients


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("backend", FAST)
def test_values_and_gradients(backend, dims, mode):
    """Every option, against F.affine_grid, F.grid_sample, products and sums."""
    options = itertools.product((True, False), ("zeros", "border"), LAYOUTS, itertools.product((True, False), repeat=2), (17, 5) if FULL else (17,))
    for align_corners, padding_mode, layouts, kinds, channels in some(backend, options):
        tensors, keywords = problem(dims, channels, layouts=layouts, affine=kinds, mode=mode)
        compare(backend, tensors, align_corners=align_corners, padding_mode=padding_mode, **keywords)


@pytest.mark.parametrize("backend", FAST)
def test_subsets_of_maps_and_results(backend):
    """Any of the two maps wants a gradient, any of the three results brings one."""
    for layouts in LAYOUTS[:3]:
        for wanted in ((0,), (1,), (0, 1)):
            for through in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in (1, 2, 3)):
                if not (set(through) & {0} or (1 in through and 0 in wanted) or (2 in through and 1 in wanted)):
                    continue  # nothing that PyTorch would differentiate
                tensors, keywords = problem(layouts=layouts)
                compare(backend, tensors, wanted=wanted, through=through, **keywords)


@pytest.mark.parametrize("backend", FAST)
def test_norms_do_not_reach_the_other_map(backend):
    """The gradient of sq1 alone is exactly 0 for f2, and the other way round."""
    for layouts, channels in itertools.product(LAYOUTS, (3, 17)):
        tensors, keywords = problem(channels=channels, layouts=layouts)
        upstream = [torch.randn(2, *keywords["size"])] * 3
        for own in (0, 1):
            results = both(ours(backend), tensors, upstream, through=(1 + own,), **keywords)
            assert results[3 + 1 - own].count_nonzero() == 0 and results[3 + own].count_nonzero() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", FAST)
def test_precisions(backend, dtype):
    if dtype == torch.float64 and backend == "triton":
        pytest.skip("float64 runs on the backends reference and cpu only")
    for layouts, dims, channels in some(backend, itertools.product(LAYOUTS, (2, 3), (5, 33)), 4):
        tensors, keywords = problem(dims, channels, layouts=layouts, dtype=dtype)
        compare(backend, tensors, **keywords)


@pytest.mark.parametrize("backend", FAST)
def test_float64_grids(backend):
    """Each grid brings its own precision; that of the results is the maps'. Triton takes coordinates in float32, which alone its error may then show."""
    for grid_dtypes in ((torch.float64, torch.float64), (torch.float32, torch.float64)):
        for kinds in ((True, True), (False, True)):
            tensors, keywords = problem(affine=kinds, grid_dtypes=grid_dtypes)
            upstream = [torch.randn(2, *keywords["size"])] * 3
            got = both(ours(backend), tensors, upstream, **keywords)
            truth = both(ours("reference"), [t.double() for t in tensors], upstream, **keywords)
            assert all(t.dtype == torch.float32 for t in got) and error(got, truth) <= (64 if backend == "triton" else 8) * EPS


@pytest.mark.parametrize("backend", EXACT)
def test_gradcheck(backend):
    small = {2: {"spaces": ((3, 2), (2, 3)), "size": (1, 3)}, 3: {"spaces": ((2, 1, 3), (2, 2, 2)), "size": (1, 2, 2)}}
    for dims, mode, layouts in itertools.product((2, 3), ("linear", "nearest"), LAYOUTS[:2]):
        tensors, keywords = problem(dims, 2, batch=1, layouts=layouts, affine=(True, False), dtype=torch.float64, mode=mode, **small[dims])
        maps = [f.requires_grad_() for f in tensors[:2]]
        assert torch.autograd.gradcheck(lambda f1, f2, tensors=tensors, k=keywords: align(f1, f2, *tensors[2:], backend=backend, **k)[:3], maps)


TRITON_CASES = [
    {"affine": (True, False), "channels": 5},
    {"affine": (False, True), "mode": "nearest", "padding_mode": "zeros", "layouts": ("last", "first"), "channels": 3},
    {"layouts": ("first", "first"), "align_corners": True, "channels": 20, "sorted_sums": False},
    {"layouts": ("strided", "last"), "sorted_sums": False, "padding_mode": "zeros"},
    {"dims": 3, "channels": 5},
    {"dims": 3, "channels": 3, "layouts": ("first", "first"), "affine": (False, False), "padding_mode": "zeros", "sorted_sums": False},
    {"channels": 1, "spaces": ((1, 1), (3, 1)), "size": (1, 2), "sorted_sums": False},
    {"channels": 300, "spaces": ((2, 2), (2, 3)), "size": (1, 3), "batch": 1},  # more than one block of channels
    {"channels": 40, "spaces": ((2, 2), (2, 3)), "size": (1, 3), "layouts": ("first", "first"), "sorted_sums": False},
    {"dtype": torch.float16, "wanted": (0,), "size": (2, 3), "sorted_sums": False},
    {"dtype": torch.bfloat16, "wanted": (1,), "size": (2, 3)},
]  # fmt: skip


@pytest.mark.skipif("triton" not in backends("align"), reason="triton does not run here")
@pytest.mark.parametrize("case", TRITON_CASES, ids=lambda case: "-".join(str(v) for v in case.values()).replace("torch.", ""))
def test_triton(case):
    flow = {name: case[name] for name in ("sorted_sums", "wanted") if name in case}
    tensors, keywords = problem(**{"size": (3, 4) if case.get("dims", 2) == 2 else (2, 2, 3)} | {k: v for k, v in case.items() if k not in flow})
    compare("triton", tensors, **flow, **keywords)


# Properties


def run(backend, *tensors, **options):
    return [t.cpu() for t in align(*(t.to(DEVICE[backend]) for t in tensors), backend=backend, **options)]


@pytest.mark.parametrize("backend", FAST)
def test_one_map_with_itself(backend):
    """dot = sq1 = sq2 to the bit."""
    for dims, layout, channels in itertools.product((2, 3), ("last", "first"), (1, 5, 33, 130)):
        (f, _, grid, _), keywords = problem(dims, channels, layouts=(layout, layout))
        dot, sq1, sq2, _ = run(backend, f, f, grid, grid, **keywords)
        assert torch.equal(dot, sq1) and torch.equal(dot, sq2)


@pytest.mark.parametrize("backend", FAST)
def test_identity_grids_take_plain_products(backend):
    for dims, layouts, mode, align_corners in itertools.product((2, 3), LAYOUTS, ("linear", "nearest"), (True, False)):
        space = SPACES[dims][0]
        f1, f2 = (feature_map(2, 20, space, layout) for layout in layouts)
        identity = torch.eye(dims, dims + 1).expand(2, -1, -1)
        dot, sq1, sq2, valid = run(backend, f1, f2, identity, identity, mode=mode, align_corners=align_corners)
        a, b = f1.double(), f2.double()
        # A coordinate is off by a few roundings of the largest axis, which moves that part of a difference of neighbours.
        bound = (4 if mode == "nearest" else 64) * EPS
        assert error([dot, sq1, sq2], [(a * b).sum(1), (a * a).sum(1), (b * b).sum(1)]) <= bound
        assert valid.all()


@pytest.mark.parametrize("backend", FAST)
def test_exchanging_the_sides_exchanges_everything(backend):
    for layouts, channels in itertools.product(LAYOUTS, (3, 17)):
        (f1, f2, g1, g2), keywords = problem(channels=channels, layouts=layouts, affine=(True, False))
        upstream = [torch.randn(2, *keywords["size"]) for _ in range(3)]
        there = both(ours(backend), (f1, f2, g1, g2), upstream, **keywords)
        back = both(ours(backend), (f2, f1, g2, g1), [upstream[i] for i in (0, 2, 1)], **keywords)
        assert error([back[i] for i in (0, 2, 1, 4, 3)], there) <= 2 * EPS
        assert torch.equal(run(backend, f1, f2, g1, g2, **keywords)[3], run(backend, f2, f1, g2, g1, **keywords)[3])


@pytest.mark.parametrize("backend", EXACT)
def test_bilinear_and_quadratic(backend):
    for layouts in LAYOUTS:
        (f, h, g1, g2), keywords = problem(layouts=layouts, dtype=torch.float64)
        k = torch.randn_like(f)
        first, second, mixed = (run(backend, x, h, g1, g2, **keywords) for x in (f, k, 2 * f - 3 * k))
        assert error([mixed[0]], [2 * first[0] - 3 * second[0]]) < 1e-14 and torch.equal(mixed[2], first[2])
        scaled = run(backend, 4 * f, h, g1, g2, **keywords)
        assert torch.equal(scaled[0], 4 * first[0]) and torch.equal(scaled[1], 16 * first[1])


@pytest.mark.parametrize("backend", FAST)
def test_cauchy_schwarz(backend):
    """Of equal, nearly equal and unrelated maps; each sum is off by at most C + 2 roundings of its terms' sizes."""
    for channels, near in itertools.product((1, 7, 64, 200), (0.0, 1e-3, 1.0)):
        (f, _, grid, _), keywords = problem(channels=channels)
        dot, sq1, sq2, _ = run(backend, f, f + near * torch.randn_like(f), grid, grid, **keywords)
        assert (dot.double() ** 2 <= sq1.double() * sq2.double() * (1 + 4 * (channels + 2) * EPS)).all()


@pytest.mark.parametrize("backend", FAST)
def test_a_flip_of_map_and_grid_changes_nothing(backend):
    for dims, align_corners in itertools.product((2, 3), (True, False)):
        tensors, keywords = problem(dims, align_corners=align_corners)
        plain = run(backend, *tensors, **keywords)
        for axis in range(dims):
            mirror = tensors[2].clone()
            mirror[:, dims - 1 - axis] *= -1  # x is the last spatial axis
            flipped = run(backend, tensors[0].flip(2 + axis), tensors[1], mirror, tensors[3], **keywords)
            assert error(flipped[:3], plain[:3]) <= 64 * EPS and torch.equal(flipped[3], plain[3])


@pytest.mark.parametrize("backend", FAST)
def test_two_crops_agree_on_their_common_box(backend):
    """PGL's case: crops of one volume, one of them flipped; a linear ramp is interpolated exactly, so the rows are equal."""
    zyx = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (12, 20, 24)), indexing="ij")
    volume = torch.stack([zyx[0], zyx[1] - zyx[2], 1 + 0.5 * zyx[2], zyx[0] + zyx[1], *(c * zyx[1] + 1 for c in range(8))])[None]
    first, second = (slice(0, 8), slice(2, 16), slice(3, 19)), (slice(2, 11), slice(5, 20), slice(8, 24))
    low, high = (2, 5, 8), (8, 16, 19)  # of the common box

    def box(crop, flips):
        scale, shift = [], []
        for lo, hi, part, flip in reversed(list(zip(low, high, crop, flips, strict=True))):
            extent = part.stop - part.start
            begin, end = ((2 * (v - part.start) / extent - 1) * (-1 if flip else 1) for v in (lo, hi))
            # Half a voxel inside, where the map's border does not clamp the ramp.
            inset = (1 if end > begin else -1) / extent
            scale.append((end - begin) / 2 - inset), shift.append((begin + end) / 2)
        return affine(scale, shift).float()

    flips = (False, True, True)
    f1, f2 = volume[(..., *first)].float(), volume[(..., *second)].float().flip(3, 4)
    dot, sq1, sq2, valid = run(backend, f1, f2, box(first, (False,) * 3), box(second, flips), size=(3, 4, 5))
    assert valid.all() and sq1.min() > 1
    # A coordinate is off by some roundings of 1, times half an axis and the ramp's slope.
    assert ((sq1 + sq2 - 2 * dot).abs() <= 64 * EPS * sq1).all()


@pytest.mark.parametrize("backend", EXACT)
def test_adjoint(backend):
    """The gradient is the transpose of the derivative: <J(h1, h2), g> = <(h1, h2), J^T g>, J by linearity of dot in each map."""
    for dims, layouts in itertools.product((2, 3), LAYOUTS):
        (f1, f2, g1, g2), keywords = problem(dims, layouts=layouts, dtype=torch.float64)
        h1, h2 = torch.randn_like(f1), torch.randn_like(f2)
        upstream = [torch.randn(2, *keywords["size"], dtype=torch.float64) for _ in range(3)]

        def call(a, b, g1=g1, g2=g2, keywords=keywords):
            return run(backend, a, b, g1, g2, **keywords)

        # d sq1 (h1) = 2 <A f1, A h1>, which dot gives with both sides on grid1
        derivative = (
            call(h1, f2)[0] + call(f1, h2)[0],
            2 * run(backend, f1, h1, g1, g1, **keywords)[0],
            2 * run(backend, f2, h2, g2, g2, **keywords)[0],
        )
        grads = both(ours(backend), (f1, f2, g1, g2), upstream, **keywords)[3:]
        left = sum((d * g).sum() for d, g in zip(derivative, upstream, strict=True))
        right = (h1 * grads[0]).sum() + (h2 * grads[1]).sum()
        assert abs(left - right) < 1e-12 * sum(g.norm() for g in grads) * h1.norm()


@pytest.mark.parametrize("backend", FAST)
def test_valid_lies_inside_both(backend):
    f1, f2 = feature_map(1, 9, (4, 5)), feature_map(1, 9, (6, 3))
    edge = 1.0000001
    grid1 = torch.tensor([[-1.0, 1.0], [edge, 0.0], [0.0, 0.0], [0.5, -0.5], [math.nan, 0.0], [0.0, -edge]]).view(1, 2, 3, 2)
    grid2 = torch.tensor([[1.0, -1.0], [0.0, 0.0], [0.0, edge], [0.3, 0.1], [0.0, 0.0], [0.0, -edge]]).view(1, 2, 3, 2)
    for align_corners in (True, False):
        dot, sq1, sq2, valid = run(backend, f1, f2, grid1, grid2, align_corners=align_corners)
        assert valid.flatten().tolist() == [True, False, False, True, False, False] and valid.dtype == torch.bool
        nan = [False] * 4 + [True, False]
        assert dot.isnan().flatten().tolist() == nan and sq1.isnan().flatten().tolist() == nan and sq2.isfinite().all()
