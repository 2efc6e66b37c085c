"""MONAI's networks by name: MONAI's own features and weights, every size, every method, probe and windows."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from monai.inferers import sliding_window_inference
from monai.networks import nets
from safetensors.torch import load_file

from pix2rep import backbones, downstream, probe
from pix2rep.config import completed, load
from pix2rep.data.phantom_ct import write_ct_phantoms
from pix2rep.methods import build_method
from pix2rep.methods.base import Network
from pix2rep.network_config import NETWORKS
from pix2rep.networks import Segmenter, build_backbone
from pix2rep.pretrain import run
from pix2rep.synthetic import synthetic
from pix2rep_kernels import native
from sweep import FULL

CHANNELS = {"basicunet": "4,4,8,8,8", "segresnet": "4,8,16", "swinunetr": "12,12,24,48,96,192"}
LAST = {"basicunet": "final_conv", "dynunet": "output_block", "attentionunet": "model.2", "segresnet": "conv_final.2", "swinunetr": "out"}
SIZE = {2: (12, 17), 3: (7, 16, 18)}
NAMES = sorted(NETWORKS)
every_network = pytest.mark.parametrize("name", NAMES)
both_dims = pytest.mark.parametrize("dims", [2, 3])


def config_of(name, dims, *options):
    if name == "swinunetr":
        pytest.importorskip("einops")
        if dims == 3 and not FULL:
            pytest.skip("its windows of a volume take seconds each: make test-full")
    strides = {2: "2,2", 3: "[[1, 2, 2], [2, 2, 2]]"}[dims]
    own = [f"network.strides={strides}"] if "strides" in NETWORKS[name].options else []
    size = ["network.dims=3", "data.size=7,16,18"] if dims == 3 else ["data.size=12,17"]
    return completed(load(None, [f"network.name={name}", f"network.channels={CHANNELS.get(name, '4,8,8')}", *own, *size, *options]))


def made(name, dims, *options):
    torch.manual_seed(0)
    return build_backbone(config_of(name, dims, *options).network)


def monais(name, network):
    dims, channels, strides = network.dims, network.channels, network.strides
    first, instance = (1,) * dims, ("instance", {"affine": True})
    return {
        "basicunet": lambda: nets.BasicUNet(dims, 1, 3, (*channels, network.features), norm=instance),
        "unet": lambda: nets.UNet(dims, 1, network.features, channels, strides, num_res_units=2, norm=instance),
        "dynunet": lambda: nets.DynUNet(dims, 1, 3, network.kernels, (first, *strides), strides, channels),
        "attentionunet": lambda: nets.AttentionUnet(dims, 1, 3, channels, strides),
        "segresnet": lambda: nets.SegResNet(dims, 4, 1, 3, norm=instance, blocks_down=(1, 2, 2), blocks_up=(1, 1)),
        "swinunetr": lambda: nets.SwinUNETR(1, 3, feature_size=12, norm_name=instance, spatial_dims=dims),
    }[name]()


@every_network
@both_dims
def test_features_are_what_monais_last_layer_reads(name, dims):
    network = config_of(name, dims, *(["network.norm=instance"] if "norm" in NETWORKS[name].options else [])).network
    ours, theirs = build_backbone(network), monais(name, network)
    image = torch.rand(2, 1, *ours.padded(SIZE[dims]))
    before = ours(image)
    left_out = (f"{LAST[name]}.", "skip_layers.") if name in LAST else ()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing and all(key.startswith(left_out) for key in unexpected) and bool(unexpected) == (name in LAST)
    seen = []
    if name in LAST:
        theirs.get_submodule(LAST[name]).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    seen.append(theirs(image))
    after = ours(image)
    torch.testing.assert_close(after, seen[0])
    assert after.shape[1] == ours.out_channels and not torch.allclose(before, after, atol=0.01)
    missing, unexpected = theirs.load_state_dict(build_backbone(network).state_dict(), strict=False)
    assert not unexpected and all(key.startswith(left_out) for key in missing)


@every_network
@both_dims
def test_any_size_and_the_encoder_beside(name, dims):
    backbone = made(name, dims, "network.feature_levels=2").eval()
    image = torch.rand(1, 1, *SIZE[dims])
    maps, padded = backbone.encode(image), backbone.padded(SIZE[dims])
    assert tuple(m.shape[1] for m in maps) == backbone.encoder_channels
    assert tuple(n * s for n, s in zip(maps[-1].shape[2:], backbone.stride, strict=True)) == padded
    features = backbone(image)
    assert features.shape == (1, backbone.out_channels, *SIZE[dims]) and torch.equal(features, backbone.decode(maps, SIZE[dims]))
    one = made(name, dims)
    missing = [p - n for p, n in zip(padded, SIZE[dims], strict=True)]
    whole = torch.nn.functional.pad(image, [p for m in reversed(missing) for p in (m // 2, m - m // 2)], mode="replicate")
    inner = one.eval()(whole)[(..., *(slice(m // 2, m // 2 + n) for m, n in zip(missing, SIZE[dims], strict=True)))]
    torch.testing.assert_close(features[:, : one.out_channels], inner)
    assert one.out_channels < backbone.out_channels


def test_an_axis_is_halved_only_where_the_strides_say_so():
    backbone = made("dynunet", 3)
    assert backbone.stride == (2, 4, 4) and backbone.padded((7, 16, 18)) == (8, 16, 20)
    assert [tuple(m.shape[2:]) for m in backbone.encode(torch.rand(1, 1, 7, 16, 18))] == [(8, 16, 20), (8, 8, 10), (4, 4, 5)]
    assert made("segresnet", 2).padded((3, 2)) == (4, 8)  # one value at the bottom would have no variance


@pytest.mark.parametrize("method", ["pix2rep", "bim", "lrc", "pgl"])
@both_dims
@every_network
def test_a_step_of_every_method(name, dims, method):
    if method == "pgl" and dims == 2:
        pytest.skip("3D only")
    if name in ("basicunet", "swinunetr") and dims == 3 and method != "pgl":
        pytest.skip("padded to 32 voxels it takes seconds; 2D has the other methods")
    if method == "lrc" and (reason := native.why_missing("cpu")):
        pytest.skip(reason)
    heads = "network.head_hidden=4 network.projection=4 loss.num_samples=16 bim.encoder_weight=1 bim.heads=1 bim.clusters=3 bim.window=3"
    heads += " lrc.queue=4 pgl.head_hidden=4 pgl.projection=4"
    config = config_of(name, dims, f"loss.method={method}", *heads.split())
    backbone = made(name, dims)
    parts = build_method(config, backbone)
    generator = torch.Generator().manual_seed(0)
    batch = synthetic(config, 2, parts.needs)
    backbone.train()
    loss, _ = parts.step(Network(parts, backbone), batch, generator)
    loss.backward()
    grads = {key: weight.grad for key, weight in backbone.named_parameters()}
    trained = [key for key, grad in grads.items() if grad is not None]
    assert loss.isfinite() and all(grads[key].isfinite().all() for key in trained) and sum(grads[key].abs().sum() for key in trained) > 0
    assert method == "pgl" or len(trained) == len(grads)


@every_network
@both_dims
def test_probe_and_windows(name, dims):
    backbone = made(name, dims).eval()
    images, labels = torch.rand(2, 1, *SIZE[dims]), torch.zeros(2, *SIZE[dims], dtype=torch.int64)
    rows, targets = probe.labelled_pixels(backbone, images, labels, torch.Generator().manual_seed(0))
    assert rows.shape == (targets.numel(), backbone.out_channels)
    model, window = Segmenter(backbone, 3, dims).eval(), SIZE[dims]
    volume = torch.rand(1, 1, *(n + 3 for n in window))
    with torch.no_grad():
        found = sliding_window_inference(volume, window, 2, model, 0.0, "constant")
        first = model(volume[(..., *(slice(0, n) for n in window))])
    assert found.shape == (1, 3, *volume.shape[2:])
    corner = (..., *(slice(0, 3) for _ in window))  # seen by the first window alone
    torch.testing.assert_close(found[corner], first[corner])


def test_the_guide_has_every_networks_size():
    guide = (Path(__file__).parents[2] / "docs/guides/networks.md").read_text()
    for name in [name for name in NAMES if name != "swinunetr" or find_spec("einops")]:
        counts = []
        for size in ("128,128", "96,96,96"):
            dims = size.count(",") + 1
            spacing = ",".join("1" * dims)
            options = [f"network.name={name}", f"network.dims={dims}", f"data.size={size}", f"data.spacing={spacing}"]
            with torch.device("cpu" if name == "swinunetr" else "meta"):  # MONAI reads a value while it builds that one
                backbone = build_backbone(completed(load(None, options)).network)
            counts.append(sum(weight.numel() for weight in backbone.parameters()) / 1e6)
        assert re.search(rf"^\| `{name}` \| .* \| {counts[0]:.2f} M \| {counts[1]:.2f} M \|", guide, re.MULTILINE), (name, counts)


def test_swinunetr_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(backbones, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="network.name=swinunetr needs the package einops"):
        build_backbone(load(None, ["network.name=swinunetr"]).network)


def test_strides_are_the_runs_own(tmp_path):
    """Derived once, from thick slices; a probe at another data.size has the network of the run."""
    write_ct_phantoms(tmp_path / "data", patients=5, size=32)
    options = "network.name=dynunet network.dims=3 data.size=4,16,16 data.spacing=20,9,9 network.channels=4,8,8 network.head_hidden=4"
    options += " network.projection=4 loss.num_samples=16 pretrain.steps=1 pretrain.batch_size=2 pretrain.device=cpu pretrain.threads=1"
    options += " split.val=0.2 split.test=0.2 downstream.seeds=0 downstream.probe_steps=2 downstream.probe_lr=0.1 downstream.class_weights=none"
    options += " downstream.bootstrap=50 downstream.overlays=1 downstream.sliding_overlap=0"
    asked = load(None, options.split())
    assert asked.network.strides is None
    weights = run(tmp_path / "data", tmp_path / "run", asked)
    config = load(tmp_path / "run/config.yaml", ["data.size=8,16,16"])
    assert config.network.strides == ((1, 2, 2), (1, 2, 2)) and config.network.kernels[0] == (1, 3, 3)
    assert load_file(weights)["input_block.conv1.conv.weight"].shape == (4, 1, 1, 3, 3)
    report = downstream.run(tmp_path / "run", config, "probe")
    assert json.dumps(report["config"]["network"]["strides"]) == "[[1, 2, 2], [1, 2, 2]]"
    run(tmp_path / "data", tmp_path / "run", load(None, [*options.split(), "pretrain.steps=2"]), resume=True)  # the same derivation
    with pytest.raises(ValueError, match="data.spacing was .*network.kernels was"):
        run(tmp_path / "data", tmp_path / "run", load(None, [*options.split(), "data.spacing=9,9,9"]), resume=True)
