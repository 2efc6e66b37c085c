"""Random squares of slices: where they lie, what they show, that a step fixes them."""

import contextlib

import numpy as np
import pytest
import torch

from pix2rep.config import ConfigError, load
from pix2rep.data.cache import Prepared
from pix2rep.data.patches import open_source
from pix2rep.data.squares import SquareSource
from pix2rep.training import Training
from volumes import prepared_case

SIZE = (12, 16)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Two volumes of 3 slices, 40 x 60: intensity is x / 64 in one, y / 64 in the other; labels are x."""
    folder = tmp_path_factory.mktemp("ramps")
    _, y, x = np.meshgrid(np.arange(3), np.arange(40), np.arange(60), indexing="ij")
    return Prepared(folder, [prepared_case(folder, "x", x / 64, x), prepared_case(folder, "y", y / 64, x)])


def test_a_square_is_what_the_image_and_the_labels_show(prepared):
    source = SquareSource(prepared, prepared.patients, SIZE, (0.3, 0.9), labelled=True).at(3)
    images, labels = source.batch([1, 4])
    assert images.shape == (2, 1, *SIZE) and images.dtype == torch.float32 and labels.dtype == torch.int64
    for image, shown, index, axis in zip(images[:, 0].double(), labels, (1, 4), (1, 0), strict=True):
        *first, side = source.square(index)
        centres = [a + (np.arange(n) + 0.5) * side / n for a, n in zip(first, SIZE, strict=True)]  # of pixels of the result, in the slice
        along = image.mean(1 - axis)[3:-3]  # cubic convolution repeats the edges
        np.testing.assert_allclose(along, (centres[axis][3:-3] - 0.5) / 64, atol=1e-3)
        assert image.std(1 - axis).max() < 1e-3
        np.testing.assert_array_equal(shown, np.broadcast_to(np.floor(centres[1]), SIZE))


def test_squares_lie_anywhere_inside_and_have_every_size(prepared):
    source = SquareSource(prepared, prepared.patients, SIZE, (0.33, 0.75))
    found = np.array([source.at(step).square(index) for step in range(300) for index in (0, 5)])
    y, x, side = found.T
    assert y.min() == 0 and x.min() == 0 and (y + side).max() == 40 and (x + side).max() == 60
    assert set(side) == set(range(13, 31))  # round(0.33 * 40) to 0.75 * 40
    assert len(np.unique(found, axis=0)) > 550
    again = SquareSource(prepared, prepared.patients, SIZE, (0.33, 0.75)).at(7)
    assert again.square(5) == tuple(found[15]) != SquareSource(prepared, prepared.patients, SIZE, (0.33, 0.75), seed=1).at(7).square(5)


def test_intensities_stay_in_range(prepared, tmp_path):
    noise = np.random.default_rng(0).integers(0, 2, (1, 30, 30))  # cubic convolution overshoots
    images, _ = SquareSource(Prepared(tmp_path, [prepared_case(tmp_path, "n", noise)]), ["n"], SIZE, (0.5, 0.5)).batch([0])
    assert images.min() == 0 and images.max() == 1


def test_the_preset_trains_on_squares(prepared):
    tiny = "data.size=16,16 network.channels=4,4,8,8,8 network.features=8 network.head_hidden=8 network.projection=8"
    config = load("pix2rep_v2", [*tiny.split(), *"pretrain.batch_size=2 pretrain.steps=3 pretrain.device=cpu pretrain.threads=1".split()])
    source = open_source(prepared, prepared.patients, config)
    assert isinstance(source, SquareSource) and source.share == (0.33, 0.75)
    assert config.photometric.rescale_p == 1 and config.photometric.order == "v2"
    training = Training(config, torch.device("cpu"), source)
    with contextlib.closing(training.batches(0)) as whole, contextlib.closing(training.batches(1)) as later:
        first, second = next(whole), next(whole)
        assert torch.equal(second.images, next(later).images) and not torch.equal(first.images, second.images)
        training.step(2, whole, monitor=False)
    assert training.collect(1) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data.squares=0.8,0.3"], r"data.squares must be SMALLEST,LARGEST in \(0, 1\], or null, got \[0.8, 0.3\]"),
        (["data.squares=0.3,1.2"], "data.squares must be SMALLEST,LARGEST"),
        (["data.squares=0.3,0.8", "network.dims=3", "data.size=8,8,8"], "data.squares must be null with network.dims=3"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        load(None, options)
