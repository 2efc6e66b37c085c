"""Views: grids that mean what they say, intensities that stay an image's own."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from pix2rep.config import PhotometricConfig, SpatialConfig
from pix2rep.views import Photometric, SpatialView, identity, warp_image, warp_labels
from pix2rep.views.spatial import dense

STILL = {"rotation": 0.0, "scale": (1.0, 1.0), "translation": 0.0, "flip": (0.0, 0.0)}
QUIET = {"noise_p": 0.0, "blur_p": 0.0, "gamma_p": 0.0, "bias_p": 0.0, "invert_p": 0.0}


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth(batch=3, size=(33, 33), seed=0) -> torch.Tensor:
    coarse = torch.rand(batch, 1, *[max(2, n // 6) for n in size], generator=generator(seed))
    return F.interpolate(coarse, size, mode="bilinear" if len(size) == 2 else "trilinear", align_corners=True)


class TestSpatial:
    @pytest.mark.parametrize("size", [(16, 20), (6, 12, 10)])
    def test_shapes(self, size):
        d = len(size)
        assert SpatialView(SpatialConfig(), d)(4, size, generator()).shape == (4, d, d + 1)
        assert SpatialView(SpatialConfig(elastic=0.5), d)(4, size, generator()).shape == (4, *size, d)
        assert identity(4, d).shape == (4, d, d + 1)

    def test_same_generator_state_same_grids_and_images_differ(self):
        view = SpatialView(SpatialConfig(elastic=0.5))
        first = view(8, (32, 32), generator(1))
        torch.testing.assert_close(first, view(8, (32, 32), generator(1)), rtol=0, atol=0)
        assert (first - view(8, (32, 32), generator(2))).abs().max() > 0.1
        assert (first[0] - first[1]).abs().max() > 0.1

    @pytest.mark.parametrize("elastic", [0.0, 1.0])
    def test_nothing_to_do_is_the_identity(self, elastic):
        view = SpatialView(SpatialConfig(**STILL, elastic=elastic, elastic_displacement=(0.0, 0.0)))
        x = torch.rand(2, 1, 9, 12)
        torch.testing.assert_close(warp_image(x, view(2, (9, 12), generator())), x, atol=1e-5, rtol=0)

    def test_quarter_turn_is_exact(self):
        x = torch.rand(1, 1, 7, 7)
        c, s = 0.0, 1.0
        turned = warp_image(x, torch.tensor([[[c, -s, 0.0], [s, c, 0.0]]]))
        torch.testing.assert_close(turned, torch.rot90(x, 1, (2, 3)), atol=1e-5, rtol=0)

    @pytest.mark.parametrize(("flip", "axes"), [((1.0, 0.0), (3,)), ((0.0, 1.0), (2,))])
    def test_flips_are_about_x_then_y(self, flip, axes):
        view = SpatialView(SpatialConfig(**STILL | {"flip": flip}))
        x = torch.rand(2, 1, 8, 6)
        torch.testing.assert_close(warp_image(x, view(2, (8, 6), generator())), x.flip(axes), atol=1e-5, rtol=0)

    def test_flips_exclude_each_other_and_come_as_often_as_asked(self):
        theta = SpatialView(SpatialConfig(**STILL | {"flip": (0.38, 0.39)}))(4000, (8, 8), generator())
        flipped = theta.diagonal(dim1=1, dim2=2) < 0
        assert not flipped.all(dim=1).any()
        assert flipped.float().mean(dim=0).tolist() == pytest.approx([0.38, 0.39], abs=0.03)

    def test_rotation_and_scale_ranges(self):
        theta = SpatialView(SpatialConfig(rotation=40, scale=(0.4, 0.7), flip=(0, 0)))(4000, (32, 32), generator())
        scale = theta[:, :, :2].det().sqrt()
        angle = torch.atan2(theta[:, 1, 0], theta[:, 0, 0]) * 180 / math.pi
        for value, low, high in ((scale, 0.4, 0.7), (angle, -40, 40)):
            assert low - 1e-3 <= value.min() < low + 0.05 * (high - low) and high - 0.05 * (high - low) < value.max() <= high + 1e-3

    def test_the_crop_stays_inside_before_rotation(self):
        grid = dense(SpatialView(SpatialConfig(rotation=0, scale=(0.3, 0.9)))(500, (16, 16), generator()), (16, 16))
        assert grid.abs().max() <= 1 + 1e-5 and grid.abs().max() > 0.98

    def test_translation_acts_inside_the_crop_and_rotation_on_both(self):
        theta = SpatialView(SpatialConfig(rotation=90, scale=(0.5, 0.5), translation=0.4, flip=(0, 0)))(4000, (32, 32), generator())
        rotation = theta[:, :, :2] / 0.5
        shift = (rotation.transpose(1, 2) @ theta[:, :, 2:])[..., 0]  # crop shift within 0.5, translation within 0.5 * 0.4
        assert 0.65 < shift.abs().max() <= 0.7 + 1e-5
        assert theta[:, :, 2].abs().max() > 0.75  # beyond the box: it was rotated

    def test_rotation_keeps_distances_on_oblong_images_and_voxels(self):
        size, spacing = (9, 17, 33), (5.0, 2.0, 1.0)
        config = SpatialConfig(rotation=60, scale=(0.5, 0.5), flip=())
        theta = SpatialView(config, 3, spacing=spacing)(20, size, generator())
        half = torch.tensor([(n - 1) * s / 2 for n, s in zip(size, spacing, strict=True)][::-1])
        linear = theta[:, :, :3] * half[:, None] / half / 0.5  # in mm, the scale taken out
        torch.testing.assert_close(linear @ linear.transpose(1, 2), torch.eye(3).expand(20, 3, 3), atol=1e-5, rtol=0)
        assert (linear - torch.eye(3)).abs().amax(dim=(1, 2)).min() > 1e-3

    def test_elastic_comes_first_then_the_affine(self):
        # With the same draws, g = theta(p + e(p)): taking the affine out must leave the elastic field alone, still at the borders.
        config = SpatialConfig(rotation=30, scale=(0.6, 0.9), elastic=1.0, elastic_points=(5,), elastic_displacement=(8.0,))
        theta = SpatialView(SpatialConfig(**vars(config) | {"elastic": 0.0}))(4, (65, 65), generator(3))
        grid = SpatialView(config)(4, (65, 65), generator(3))
        inverse = torch.linalg.inv(theta[:, :, :2])
        moved = torch.einsum("bij,bhwj->bhwi", inverse, grid - theta[:, None, None, :, 2])
        field = moved - dense(identity(4), (65, 65))
        limit = 8.0 * 2 / 127
        assert 0.2 * limit < field.abs().max() < limit
        border = torch.cat([field[:, 0], field[:, -1], field[:, :, 0], field[:, :, -1]], dim=1)
        assert border.abs().max() < limit / 6 + 1e-5

    def test_elastic_field_is_the_same_at_every_size_and_does_not_fold(self):
        config = SpatialConfig(**STILL, elastic=1.0)
        fine, coarse = (SpatialView(config)(8, (n, n), generator(5)) for n in (65, 33))
        torch.testing.assert_close(fine[:, ::2, ::2], coarse, atol=1e-5, rtol=0)
        dx, dy = fine.diff(dim=2)[:, :-1], fine.diff(dim=1)[:, :, :-1]
        assert (dx[..., 0] * dy[..., 1] - dx[..., 1] * dy[..., 0]).min() > 0

    def test_elastic_comes_as_often_as_asked(self):
        grid = SpatialView(SpatialConfig(**STILL, elastic=0.3))(1000, (8, 8), generator())
        moved = (grid - dense(identity(1000), (8, 8))).abs().amax(dim=(1, 2, 3)) > 1e-4
        assert moved.float().mean() == pytest.approx(0.3, abs=0.05)

    def test_labels_follow_the_image(self):
        labels = torch.randint(0, 4, (5, 24, 24), generator=generator())
        grid = SpatialView(SpatialConfig(elastic=0.5))(5, (24, 24), generator())
        warped = warp_labels(labels, grid)
        assert warped.dtype == labels.dtype
        # One-hot channels warped by themselves agree at every pixel.
        channels = warp_image(F.one_hot(labels, 4).movedim(-1, 1).float(), grid, mode="nearest")
        torch.testing.assert_close(channels.argmax(dim=1), warped)

    @pytest.mark.parametrize(
        "bad",
        [
            {"rotation": -1},
            {"scale": (0.9, 0.3)},
            {"scale": (0.0, 0.3)},
            {"translation": -0.1},
            {"flip": (0.7, 0.7)},
            {"flip": (0.1, 0.1, 0.1)},
            {"elastic": 1.5},
            {"elastic_points": (5,)},
            {"elastic_points": (2, 9)},
        ],
        ids=str,
    )
    def test_bad_options(self, bad):
        with pytest.raises(ValueError, match=f"spatial.{next(iter(bad))}"):
            SpatialView(SpatialConfig(**bad))

    def test_bad_calls(self):
        with pytest.raises(ValueError, match="dims must be 2 or 3, got 4"):
            SpatialView(SpatialConfig(), 4)
        with pytest.raises(ValueError, match="size have 2 entries"):
            SpatialView(SpatialConfig())(2, (8, 8, 8))


class TestPhotometric:
    @pytest.mark.parametrize("size", [(24, 20), (6, 12, 10), (1, 16)])
    def test_keeps_shape_dtype_and_input(self, size):
        x = torch.rand(4, 1, *size)
        before = x.clone()
        view = Photometric(PhotometricConfig())
        y = view(x, generator())
        assert y.shape == x.shape and y.dtype == x.dtype and y.isfinite().all()
        torch.testing.assert_close(x, before, rtol=0, atol=0)
        torch.testing.assert_close(view(x, generator()), y, rtol=0, atol=0)
        assert (view(x, generator(1)) - y).abs().max() > 0.01

    def test_nothing_drawn_is_nothing_done(self):
        x = torch.rand(4, 1, 8, 8)
        torch.testing.assert_close(Photometric(PhotometricConfig(**QUIET))(x, generator()), x, rtol=0, atol=0)

    @pytest.mark.parametrize("name", ["noise", "blur", "gamma", "bias", "invert", "rescale"])
    def test_each_change_comes_as_often_as_asked(self, name):
        x = 0.1 + 0.8 * torch.rand(1, 1, 8, 8, generator=generator()).expand(2000, -1, -1, -1)
        y = Photometric(PhotometricConfig(**QUIET | {f"{name}_p": 0.35}))(x, generator())
        changed = (y - x).abs().amax(dim=(1, 2, 3)) > 1e-6
        # A blur of less than about 0.2 pixels changes nothing that float32 shows: sigma is U(0, 1.3).
        assert changed.float().mean() == pytest.approx(0.35, abs=0.08 if name == "blur" else 0.035)

    def test_inversion(self):
        x = torch.randn(2, 1, 8, 8)  # values that left [0, 1] are not clamped
        torch.testing.assert_close(Photometric(PhotometricConfig(**QUIET | {"invert_p": 1.0}))(x), 1 - x)

    def test_noise_is_within_its_spread_and_differs_between_images(self):
        y = Photometric(PhotometricConfig(**QUIET | {"noise_p": 1.0, "noise_std": 0.2}))(torch.zeros(200, 1, 32, 32), generator())
        spread = y.std(dim=(1, 2, 3))
        assert spread.max() < 0.22 and spread.mean() == pytest.approx(0.1, abs=0.01) and spread.std() > 0.03
        assert y.mean().abs() < 0.002

    @pytest.mark.parametrize("size", [(32, 32), (16, 16, 16)])
    def test_blur_keeps_constants_and_spreads_a_point_evenly(self, size):
        view = Photometric(PhotometricConfig(**QUIET | {"blur_p": 1.0, "blur_sigma": 1.3}))
        torch.testing.assert_close(view(torch.full((2, 1, *size), 0.7), generator()), torch.full((2, 1, *size), 0.7))
        point = torch.zeros(8, 1, *size)
        centre = tuple(n // 2 for n in size)
        point[(slice(None), 0, *centre)] = 1
        y = view(point, generator())
        torch.testing.assert_close(y.flatten(1).sum(1), torch.ones(8))
        torch.testing.assert_close(y, y.transpose(-1, -2), atol=1e-6, rtol=0)
        peak = y[(slice(None), 0, *centre)]
        assert peak.std() > 0.05  # every image its own sigma

    def test_gamma_is_monotonic_keeps_the_ends_and_clamps_only_what_it_powers(self):
        x = torch.linspace(0, 1, 64).view(1, 1, 8, 8).repeat(50, 1, 1, 1)
        y = Photometric(PhotometricConfig(**QUIET | {"gamma_p": 1.0, "log_gamma": 0.3}))(x, generator())
        assert (y.flatten(1).diff(dim=1) > 0).all()
        torch.testing.assert_close(y[:, 0, 0, 0], torch.zeros(50))
        torch.testing.assert_close(y[:, 0, -1, -1], torch.ones(50))
        gamma = y[:, 0, 4, 4].log() / x[0, 0, 4, 4].log()
        assert math.exp(-0.3) <= gamma.min() < 0.8 and 1.25 < gamma.max() <= math.exp(0.3)
        below = torch.full((500, 1, 4, 4), -0.5)
        z = Photometric(PhotometricConfig(**QUIET | {"gamma_p": 0.5}))(below, generator())
        assert set(z.unique().tolist()) == {-0.5, 0.0}

    def test_bias_field_is_a_smooth_positive_factor(self):
        ones = torch.ones(20, 1, 33, 33)
        field = Photometric(PhotometricConfig(**QUIET | {"bias_p": 1.0, "bias_coefficients": 0.9}))(ones, generator())
        assert (field > 0).all()
        log = field.log()[:, 0].double()
        assert log.diff(n=4, dim=2).abs().max() < 1e-4 < log.diff(n=3, dim=2).abs().max()  # cubic along a line
        assert log.abs().max() <= 10 * 0.9 and log.std(dim=(1, 2)).min() > 0.05
        assert log[:, 16, 16].abs().max() <= 0.9  # the constant

    def test_rescaling_takes_percentiles_to_drawn_ends(self):
        x = 0.4 + 0.2 * torch.rand(300, 1, 20, 20, generator=generator())
        y = Photometric(PhotometricConfig(**QUIET | {"rescale_p": 1.0}))(x, generator()).flatten(1)
        low, high = y.amin(1), y.amax(1)
        assert 0 <= low.min() < 0.02 and 0.28 < low.max() <= 0.3 and 0.7 <= high.min() < 0.72 and 0.98 < high.max() <= 1
        x, order = x.flatten(1).sort(1)
        y = y.gather(1, order)
        assert (y[:, :5] == low[:, None]).all() and (y[:, 395:] == high[:, None]).all()  # 1 % of 400 at both ends
        share = (x - x[:, 4:5]) / (x[:, 395:396] - x[:, 4:5])
        torch.testing.assert_close(y, low[:, None] + (high - low)[:, None] * share.clamp(0, 1), atol=1e-5, rtol=0)
        flat = Photometric(PhotometricConfig(**QUIET | {"rescale_p": 1.0}))(torch.ones(4, 1, 8, 8), generator())
        assert (flat == flat[:, :, :1, :1]).all() and 0 <= flat.min() and flat.max() <= 0.3

    def test_the_second_order_rescales_before_noise_and_inverts_what_is_in_range(self):
        x = torch.rand(200, 1, 8, 8, generator=generator())
        noisy = QUIET | {"noise_p": 1.0, "noise_std": 0.5, "rescale_p": 1.0}
        first, second = (Photometric(PhotometricConfig(**noisy, order=order))(x, generator()) for order in ("v1", "v2"))
        assert 0 <= first.min() and first.max() <= 1 and second.min() < -0.5 and second.max() > 1.5
        inverted = Photometric(PhotometricConfig(**QUIET | {"invert_p": 1.0}, order="v2"))(3 * x - 1, generator())
        torch.testing.assert_close(inverted, 1 - (3 * x - 1).clamp(0, 1))

    @pytest.mark.parametrize(
        "bad",
        [
            {"noise_p": 1.2}, {"blur_sigma": -1.0}, {"bias_coefficients": -0.5}, {"rescale_p": 2.0}, {"rescale_percentiles": (99.0, 1.0)},
            {"rescale_high": (0.5, 1.5)}, {"rescale_low": (0.0, 0.8)}, {"order": "v3"},
        ],
        ids=str,
    )  # fmt: skip
    def test_bad_options(self, bad):
        with pytest.raises(ValueError, match=f"photometric.{next(iter(bad))}"):
            Photometric(PhotometricConfig(**bad))

    @pytest.mark.parametrize("x", [torch.rand(2, 3, 8, 8), torch.rand(2, 8, 8), torch.zeros(2, 1, 8, 8).long()], ids=["rgb", "3d", "int"])
    def test_bad_images(self, x):
        with pytest.raises(ValueError, match=r"x must be a float tensor \[B, 1, \*S\]"):
            Photometric(PhotometricConfig())(x)


def test_photometric_views_commute_with_a_warp_where_they_act_pointwise():
    x = smooth()
    view = Photometric(PhotometricConfig(**QUIET | {"gamma_p": 1.0}))
    grid = SpatialView(SpatialConfig(**STILL | {"flip": (1.0, 0.0)}))(3, (33, 33), generator())
    torch.testing.assert_close(warp_image(view(x, generator(2)), grid), view(warp_image(x, grid), generator(2)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dims", [2, 3])
def test_no_value_is_read_back_to_the_host(dims):
    size = (16,) * dims
    with FakeTensorMode():  # raises where Python would need a number from a tensor
        x = torch.rand(2, 1, *size)
        grid = SpatialView(SpatialConfig(elastic=0.5), dims)(2, size)
        assert warp_image(Photometric(PhotometricConfig(rescale_p=0.5, order="v2"))(x), grid).shape == x.shape
