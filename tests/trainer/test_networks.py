"""Backbones and projection heads."""

import pytest
import torch
from torch import nn

from pix2rep.config import NetworkConfig
from pix2rep.networks import Segmenter, build_backbone, projection_head


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (5, 70)])
def test_backbone_takes_any_size(norm, size):
    backbone = build_backbone(NetworkConfig(channels=(4, 4, 8, 8, 8), features=6, norm=norm))
    assert backbone(torch.rand(1, 1, *size)).shape == (1, 6, *size)


def test_padding_is_invisible_on_sizes_that_fit():
    backbone = build_backbone(NetworkConfig(channels=(4, 4, 8, 8, 8), features=6)).eval()
    image = torch.rand(1, 1, 40, 33)
    padded = nn.functional.pad(image, (7, 8, 4, 4), mode="replicate")  # to 48 x 48, half on each side
    torch.testing.assert_close(backbone(image), backbone(padded)[:, :, 4:44, 7:40])


def test_backbone_computes_what_basicunet_does():
    from monai.networks.nets import BasicUNet

    backbone = build_backbone(NetworkConfig(channels=(4, 4, 8, 8, 8), features=6)).eval()
    plain = BasicUNet(2, 1, 1, features=(4, 4, 8, 8, 8, 6), norm="batch").eval()
    plain.load_state_dict(backbone.state_dict(), strict=False)
    plain.final_conv = nn.Identity()
    image = torch.rand(2, 1, 48, 64)
    torch.testing.assert_close(backbone(image), plain(image), rtol=0, atol=0)


@pytest.mark.parametrize("levels", [1, 3])
def test_encoder_and_decoder_are_the_backbone(levels):
    backbone = build_backbone(NetworkConfig(channels=(4, 4, 8, 8, 16), features=6, feature_levels=levels)).eval()
    image = torch.rand(1, 1, 40, 33)
    maps = backbone.encode(image)
    assert tuple(m.shape[1] for m in maps) == backbone.encoder_channels == (4, 4, 8, 8, 16)
    assert maps[-1].shape[2:] == (3, 3)  # padded to 48 x 48
    assert torch.equal(backbone.decode(maps, (40, 33)), backbone(image))


def test_networks_in_3d():
    config = NetworkConfig(dims=3, channels=(2, 2, 2, 2, 2), features=3, head_hidden=4, projection=5)
    features = build_backbone(config)(torch.rand(1, 1, 10, 32, 36))
    assert features.shape == (1, 3, 10, 32, 36)
    assert projection_head(config)(features.repeat(2, 1, 1, 1, 1)).shape == (2, 5, 10, 32, 36)
    assert Segmenter(build_backbone(config), 4, dims=3)(torch.rand(1, 1, 32, 32, 32)).shape == (1, 4, 32, 32, 32)


def test_head_depth():
    counts = [sum(isinstance(m, nn.Conv2d) for m in projection_head(NetworkConfig(head_depth=depth))) for depth in (0, 1, 2)]
    assert counts == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": (4, 8)}, r"network.channels must be five levels for basicunet, got \[4, 8\]"),
        ({"name": "unet"}, 'network.name must be "basicunet" or "package.module:factory", got \'unet\''),
        ({"name": "nowhere.at:all"}, "network.name must name something importable, got 'nowhere.at:all'"),
        ({"name": "torch.nn:Identity"}, "must make a Module with an integer out_channels"),
    ],
)
def test_network_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(NetworkConfig(**change))
