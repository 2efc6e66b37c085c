"""Every key is typed by its annotation and refused by name."""

from dataclasses import fields

import pytest

from pix2rep import config as config_file
from pix2rep.config import PRESETS, Config, ConfigError, flatten, from_dict, load, save, to_dict


def test_round_trip_through_yaml(tmp_path):
    config = load(None, ["data.size=48,64", "data.spacing=1.25,1.5", "pretrain.amp=off", "data.classes=RV,MYO", "loss.num_samples=null"])
    save(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config == from_dict(to_dict(config))
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("pretrain.lr=1e-3", "pretrain.lr", 1e-3),  # PyYAML alone reads text
        ("pretrain.lr=1", "pretrain.lr", 1.0),
        ("pretrain.steps=1e4", "pretrain.steps", 10_000),
        ("pretrain.amp=off", "pretrain.amp", "off"),  # PyYAML alone reads False
        ("pretrain.compile=true", "pretrain.compile", True),
        ("data.size=[48, 64]", "data.size", (48, 64)),
        ("data.size=48,64", "data.size", (48, 64)),
        ("downstream.labelled=5", "downstream.labelled", (5,)),
        ("data.classes=RV, LV", "data.classes", ("RV", "LV")),
        ("data.root=007", "data.root", "007"),
        ("data.cache=null", "data.cache", None),
        ("data.cache=a=b", "data.cache", "a=b"),
        ("loss.num_samples=null", "loss.num_samples", None),
        ("pretrain.clip_grad=1", "pretrain.clip_grad", 1.0),
    ],
)
def test_override(text, key, value):
    got = flatten(load(None, [text]))[key]
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pretrain.lrr=1", r"unknown key 'pretrain.lrr'; did you mean pretrain.lr\?"),
        ("pretrian.steps=1", r"unknown key 'pretrian.steps'; did you mean pretrain.steps\?"),
        ("batch_size=8", r"unknown key 'batch_size'; did you mean pretrain.batch_size\?"),
        ("pretrain.steps=many", "pretrain.steps must be an integer, got 'many'"),
        ("pretrain.steps=1.5", "pretrain.steps must be an integer, got 1.5"),
        ("pretrain.steps=0", "pretrain.steps must be at least 1, got 0"),
        ("pretrain.steps=true", "pretrain.steps must be an integer, got True"),
        ("pretrain.compile=yes", "pretrain.compile must be true or false, got 'yes'"),
        ("pretrain.amp=on", "pretrain.amp must be 'auto' or 'bf16' or 'fp16' or 'off', got 'on'"),
        ("pretrain.lr=nan", "pretrain.lr must be a number"),
        ("data.size=64", r"data.size must be 2 numbers \(network.dims = 2\), got \[64\]"),
        ("data.percentiles=1", "data.percentiles must be a list of 2"),
        ("data.percentiles=99,1", "data.percentiles must be LOW,HIGH"),
        ("data.size=a,b", "data.size must be an integer, got 'a'"),
        ("loss.temperature=0", "loss.temperature must be above 0, got 0.0"),
        ("split.val=0.9", "split.val must be under 1 with split.test = 0.2, got 0.9"),
        ("loss.objective=barlo", "loss.objective must be 'infonce' or 'barlow', got 'barlo'"),
        ("loss.lambda_param=-1", "loss.lambda_param must be at least 0, got -1.0"),
        ("pretrain.seed=-1", "pretrain.seed must be at least 0, got -1"),
        ("pretrain", "an override must be section.key=value, got 'pretrain'"),
        ("pretrain=1", "an override must be section.key=value, got a section, 'pretrain'"),
    ],
)
def test_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        load(None, [text])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pretrain: {step: 1}", r"unknown key 'pretrain.step'; did you mean pretrain.steps\?"),
        ("pretraining: {steps: 1}", r"unknown key 'pretraining'; did you mean pretrain\?"),
        ("pretrain: 3", "pretrain must be a section of keys, got 3"),
        ("[1, 2]", "a config must be sections of keys"),
        ("data: {root: 7}", "data.root must be text, got 7"),
        ("data: {size: {a: 1}}", "data.size must be a list"),
        ("pretrain: {lr: null}", "pretrain.lr must be a number, got None"),
        ("a: [", "must be YAML"),
    ],
)
def test_refused_in_a_file(tmp_path, text, message):
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "wrong.yaml")


def test_file_then_overrides_then_defaults(tmp_path):
    (tmp_path / "some.yaml").write_text("pretrain: {steps: 7, lr: 1e-2, amp: off}\nsplit:\n")
    config = load(tmp_path / "some.yaml", ["pretrain.steps=9"])
    assert (config.pretrain.steps, config.pretrain.lr, config.pretrain.amp) == (9, 1e-2, "off")
    assert config.split == Config().split


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_load_by_name(path):
    assert load(path.stem) == load(path)


def test_unknown_preset_lists_the_known():
    with pytest.raises(FileNotFoundError, match="presets .*pix2rep_v1.*got pix2rep_v9"):
        load("pix2rep_v9")


def test_every_bound_names_a_key():
    bounded = {key for keys in config_file._AT_LEAST.values() for key in keys.split()}
    assert bounded <= set(flatten(Config()))
    assert {field.name for field in fields(Config)} == set(to_dict(Config()))
