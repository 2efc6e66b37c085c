"""Backbones, projection heads, and what a network's name decides."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from pix2rep.compare_records import changed, inputs_of_pretraining
from pix2rep.config import NetworkConfig, completed, load, to_dict
from pix2rep.methods import build_method
from pix2rep.networks import Segmenter, build_backbone, projection_head
from pix2rep.plan import plan_of


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
    assert projection_head(config, 3)(features.repeat(2, 1, 1, 1, 1)).shape == (2, 5, 10, 32, 36)
    assert Segmenter(build_backbone(config), 4, dims=3)(torch.rand(1, 1, 32, 32, 32)).shape == (1, 4, 32, 32, 32)


def test_head_depth():
    counts = [sum(isinstance(m, nn.Conv2d) for m in projection_head(NetworkConfig(head_depth=depth), 4)) for depth in (0, 1, 2)]
    assert counts == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": (4, 8)}, r"network.channels must be five levels for basicunet, got \[4, 8\]"),
        ({"name": "vnet"}, "network.name must be one of basicunet, unet, .*, or \"package.module:factory\", got 'vnet'"),
        ({"name": "nowhere.at:all"}, "network.name must name something importable, got 'nowhere.at:all'"),
        ({"name": "torch.nn:Identity"}, "must make a Module with an integer out_channels"),
        ({"strides": ((2,),) * 4}, "network.strides must be null for basicunet"),
        ({"name": "unet"}, "network.strides must be given to make unet: pix2rep.config.completed derives them"),
        ({"name": "unet", "kernels": ((3,),) * 5}, "network.kernels must be null for unet"),
        ({"name": "unet", "strides": ((2,),)}, "network.strides must be 4 entries, each a number of at least 1 or 2 of them"),
        ({"name": "unet", "channels": (4, 8), "strides": ((2, 2, 2),)}, "network.strides must be 1 entries, each a number of at least 1 or 2"),
        ({"name": "unet", "channels": (4, 8), "strides": ((0,),)}, "network.strides must be 1 entries, each a number of at least 1"),
        ({"name": "unet", "channels": (4, 8), "feature_levels": 2}, "network.feature_levels must be under the number of levels, 2, for unet, got 2"),
        ({"name": "dynunet", "channels": (4, 8)}, r"network.channels must be 3 or more levels for dynunet, got \[4, 8\]"),
        ({"name": "dynunet", "channels": (4, 8, 8), "kernels": ((2,),) * 3}, "network.kernels must be 3 entries, each an odd number"),
        ({"name": "dynunet", "features": 8}, "network.features must be null or the first of network.channels, 32, for dynunet, got 8"),
        ({"name": "attentionunet", "norm": "instance"}, "network.norm must be batch for attentionunet, got 'instance'"),
        ({"name": "segresnet", "channels": (4, 8, 8)}, "network.channels must be 4 times 1, 2, 4, 8, 16 for segresnet"),
        ({"name": "swinunetr", "channels": (8, 8, 16, 32, 64, 128)}, "network.channels must be multiples of 12 for swinunetr"),
        ({"name": "swinunetr", "channels": (12, 12)}, "network.channels must be six levels for swinunetr"),
    ],
)
def test_network_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(NetworkConfig(**change))


def derived(*options):
    network = completed(load(None, ["network.name=dynunet", *options])).network
    return network.strides, network.kernels


def test_strides_and_kernels_follow_from_size_and_spacing():
    thick = derived("network.dims=3", "data.size=16,96,96", "data.spacing=5,1,1")  # 5 2 2, 5 4 4, 10 8 8, 20 16 16 mm
    assert thick == (((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)), ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)))
    few = derived("network.dims=3", "data.size=10,64,48", "data.spacing=1,1,1")  # z ends at 5 voxels
    assert few == (((2, 2, 2), (1, 2, 2), (1, 2, 2), (1, 2, 1)), ((3,) * 3,) * 5)
    late = derived("network.dims=3", "data.size=16,8,8", "data.spacing=5,1,1", "network.channels=4,8,8")  # z alone can be halved at last
    assert late == (((1, 2, 2), (2, 1, 1)), ((1, 3, 3), (1, 3, 3), (3, 3, 3)))
    twice = derived("network.dims=3", "data.size=32,32,32", "data.spacing=2,1,1", "network.channels=4,8,8")  # nnU-Net's limit
    assert twice == (((1, 2, 2), (2, 2, 2)), ((1, 3, 3), (3, 3, 3), (3, 3, 3)))
    assert derived("data.size=128,64", "network.channels=4,8,8") == (((2, 2), (2, 2)), ((3, 3),) * 3)
    wide = derived("data.size=64,64", "data.spacing=9,3,1", "network.channels=4,8,8")  # the first entry is z
    assert wide == (((1, 2), (2, 2)), ((1, 3), (3, 3), (3, 3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["network.dims=3", "data.size=32,32,32"], "data.spacing must be 3 numbers for network.name=dynunet: network.strides follow"),
        (["network.dims=3", "data.size=32,32,32", "data.spacing=1,1"], "data.spacing must be 3 numbers for network.name=dynunet"),
        (["data.size=32,32"], r"network.channels must be at most 4 levels for dynunet at data.size \[4, 4\]"),
    ],
)
def test_strides_that_cannot_be_derived(options, message):
    with pytest.raises(ValueError, match=message):
        derived(*options)


def test_what_is_complete_stays():
    """A run's saved network does not follow data.size any more."""
    first = completed(load(None, ["network.name=dynunet", "data.size=128,128", "network.channels=4,8,8"]))
    later = replace(first, data=replace(first.data, size=(32, 128), spacing=(4.0, 1.0)))
    assert completed(later).network == first.network == completed(first).network
    assert to_dict(first)["network"]["strides"] == [[2, 2], [2, 2]]
    given = completed(load(None, ["network.name=dynunet", "network.channels=4,8,8", "network.strides=2,2", "network.kernels=[[1, 3], 3, 5]"])).network
    assert (given.strides, given.kernels) == (((2, 2), (2, 2)), ((1, 3), (3, 3), (5, 5)))
    assert completed(load(None, ["network.name=some.module:factory"])).network.channels == (32, 32, 64, 128, 256)


def test_a_plans_methods_have_their_networks():
    """A cell without pre-training builds from the plan; a record is JSON, which has no tuples."""
    network = {"name": "dynunet", "channels": [4, 8, 8]}
    plan = plan_of({"methods": {"random": {"pretrain": False}}, "options": {"network": network, "data": {"size": [128, 16]}}})
    config = plan.config_of("random")
    assert config.network.strides == ((2, 2), (2, 2)) and build_backbone(config.network).stride == (4, 4)
    inputs = inputs_of_pretraining(config, "", [])
    assert not changed({"inputs": json.loads(json.dumps(inputs))}, inputs)


@pytest.mark.parametrize("size", [(8, 16, 16), (7, 16, 13)])
def test_pgl_finds_places_in_the_maps_of_an_anisotropic_encoder(size):
    """A map that holds each of its voxels' place in the crop, read where both crops see a region, is that region's place."""
    options = ["network.name=dynunet", "network.channels=4,8,8", "network.strides=[[1, 2, 2], [2, 2, 2]]", "pgl.head_hidden=4", "pgl.projection=4"]
    config = completed(load("pgl", [*options, f"data.size={','.join(map(str, size))}", "network.features=null"]))
    method = build_method(config, backbone := build_backbone(config.network))
    deepest = backbone.encode(torch.rand(1, 1, *size))[-1]
    assert tuple(deepest.shape[2:]) == (4, 4, 4) and backbone.padded(size) == (8, 16, 16)
    flip = torch.tensor([[False, True, True]])
    places = []
    for axis, (n, stride, backwards) in enumerate(zip(size, (2, 4, 4), flip[0], strict=True)):
        centres = (torch.arange(4) + 0.5) * stride - (4 * stride - n) // 2
        shape = [-1 if a == axis else 1 for a in range(3)]
        places.append((n - centres if backwards else centres).view(shape).expand(4, 4, 4))
    low, high = torch.tensor([[2.0, 4.0, 5.0]]), torch.tensor([[5.0, 12.0, 10.5]])
    grid = method._grid(low, high, size, flip, deepest)
    found = method._interpolated(torch.stack(places)[None], grid, (2, 3, 4))
    steps = [(torch.arange(m) + 0.5) / m for m in (2, 3, 4)]
    expected = [low[0, a] + (high - low)[0, a] * s for a, s in enumerate(steps)]
    torch.testing.assert_close(found[0], torch.stack(torch.meshgrid(*expected, indexing="ij")))
