"""Every option of the trainer: one flat dataclass a part, read from YAML and from `key=value` overrides.

    config = load("pix2rep_v1", ["pretrain.steps=2000", "data.size=64,64"])
    config.pretrain.steps, save(config, "config.yaml")

A value is typed by its field's annotation; an unknown key or a value of another type is refused by name.
Imports nothing heavy: `pix2rep --help` goes through here.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from pix2rep.method_config import BimConfig, LrcConfig, PglConfig, SimclrConfig
from pix2rep.network_config import NetworkConfig
from pix2rep.network_config import completed as completed_network
from pix2rep.typed import ConfigError, Loader, parsed, shown, typed


@dataclass
class DataConfig:
    root: str = ""  # folder of volumes: ACDC layout, imagesTr/labelsTr, or any folder of .nii / .nii.gz
    cache: str | None = None  # where prepared volumes lie; default: RUN/cache
    size: tuple[int, ...] = (128, 128)  # in-plane crop or pad, pixels; 3D: D, H, W of the patches that are read
    spacing: tuple[float, ...] | None = None  # resampling, mm along H, W, or Z, H, W; None keeps the scanner's
    percentiles: tuple[float, float] = (1.0, 99.0)  # intensities are clipped to these, then scaled to [0, 1], volume by volume
    window: tuple[float, float] | None = None  # the same range for every volume instead, such as -1024,325 HU
    squares: tuple[float, float] | None = None  # 2D pre-training: random squares, side U of a slice's shorter one, resized to `size`; null: its centre
    roi: Literal["centre", "gt"] = "centre"  # crop; "gt": box of the labels plus `roi_margin` (as the official code; leaks labels)
    roi_margin: int = 10  # pixels
    classes: tuple[str, ...] = ()  # names of labels 1..K; empty: read from dataset.json, else "1", "2", …
    label_affine: Literal["check", "ignore"] = "check"  # "ignore": labels' voxels are in the image's order, whatever their header says
    skip_bad: bool = False  # leave out cases with a file that cannot be used; otherwise they are an error


@dataclass
class SplitConfig:
    file: str | None = None  # an existing split; default: made and written to RUN/split.json
    val: float = 0.1  # share of patients
    test: float = 0.2
    seed: int = 0
    exclude: tuple[str, ...] = ()  # patients of no part; the others stay where they are without it
    groups: str | None = None  # spread evenly over the parts: a CSV (patient,group) | "acdc": the official 100's, by number; null: Info.cfg


@dataclass
class SpatialConfig:
    """Ranges of the official Pix2Rep code; `probability`-like fields are per image."""

    rotation: float = 90.0  # degrees, U(-r, r)
    scale: tuple[float, float] = (0.33, 0.95)  # isotropic crop scale s ~ U; the crop stays inside the square before rotation
    translation: float = 0.0  # extra, share of half the image, U(-t, t) per axis
    flip: tuple[float, ...] = (0.38, 0.39)  # probability of a flip along x, along y (exclusive); the official code at batch 8: 0.45, 0.32
    elastic: float = 0.0  # probability of an elastic field (Pix2Rep-v2: 0.5)
    elastic_points: tuple[int, ...] = (5, 9)  # control points a side, one cubic B-spline field each
    elastic_displacement: tuple[float, ...] = (8.0, 2.5)  # pixels at 128 x 128, scaled with size, U(-d, d)


@dataclass
class PhotometricConfig:
    """Official Pix2Rep ranges; every view draws its own. Intensities enter in [0, 1]."""

    noise_std: float = 0.05  # U(0, s); the official 0.5 acts on raw scanner units
    noise_p: float = 0.3
    blur_sigma: float = 1.3  # pixels, U(0, s)
    blur_p: float = 0.5
    log_gamma: float = 0.3  # gamma = exp(U(-g, g)); official v1 0.05, v2 0.3
    gamma_p: float = 0.9
    bias_coefficients: float = 0.9  # cubic polynomial field, coefficients U(-c, c)
    bias_p: float = 0.75
    invert_p: float = 0.35  # 1 - x
    rescale_p: float = 0.0  # image's percentiles `rescale_percentiles` to U(rescale_low), U(rescale_high), clipped (v2; how often is inferred)
    rescale_percentiles: tuple[float, float] = (1.0, 99.0)  # v2
    rescale_low: tuple[float, float] = (0.0, 0.3)  # v2
    rescale_high: tuple[float, float] = (0.7, 1.0)  # v2
    order: Literal["v1", "v2"] = "v1"  # noise, blur, gamma, bias, rescale, inversion | bias, rescale, blur, gamma, noise, inversion of [0, 1]


@dataclass
class LossConfig:
    """`method` and `backend` are every method's; the rest is pix2rep's. The others have sections of their own."""

    method: str = "pix2rep"  # or another of `pix2rep.methods.METHODS`
    objective: Literal["infonce", "barlow"] = "infonce"
    temperature: float = 0.53  # of infonce
    lambda_param: float = 5e-3  # of barlow: weight of the entries off the diagonal
    num_samples: int | None = 1000  # pixel pairs a batch; null: every pixel
    per_image: bool = False
    head_on: Literal["map", "rows"] = "map"  # "rows": the head sees the pixels drawn alone, its batch statistics are theirs; less memory and time
    outside: Literal["keep", "drop"] = "keep"  # "keep" (official): pixels that the warp took from outside the image count too
    mode: Literal["linear", "nearest", "bicubic"] = "linear"  # interpolation of image and features
    backend: str = "auto"


@dataclass
class PretrainConfig:
    init: str | None = None  # backbone to begin with: a run's weights.safetensors or a probed or fine-tuned model's; null: random
    steps: int = 10_000
    batch_size: int = 8
    accumulate: int = 1  # micro-batches of batch_size a step; negatives stay inside a micro-batch
    optimizer: Literal["adamw", "radam", "sgd", "lars"] = "adamw"
    lr: float = 4.7e-4
    weight_decay: float = 0.0
    warmup: float = 0.0  # share of steps, linear from 0
    schedule: Literal["constant", "cosine"] = "constant"  # official v1: constant; "cosine" ends at 0
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"  # "auto": bf16 (fp16 where the GPU has none) on CUDA, off on CPU
    clip_grad: float | None = None  # largest L2 norm of the gradient; null: not clipped
    device: str = "auto"  # "auto": cuda where there is one | "cpu" | "cuda:1" …
    threads: int | None = None  # CPU threads; null: what PyTorch chooses
    compile: bool = False  # torch.compile of backbone and heads
    deterministic: bool = False  # bitwise repeatable on CUDA too, slower; the CPU always is, for one number of threads
    seed: int = 0
    log_every: int = 10  # steps; finiteness is checked then, and before each checkpoint
    checkpoint_every: int = 500
    keep: int = 2  # older checkpoints kept
    tensorboard: bool = False  # RUN/tensorboard beside log.jsonl; needs the package tensorboard


@dataclass
class DownstreamConfig:
    labelled: tuple[int | Literal["all"], ...] = (1,)  # patients with labels; "all": every one of the split's pretrain part that has some
    seeds: tuple[int, ...] = (0, 1, 2)  # each draws its own labelled patients
    probe_steps: int = 400
    probe_lr: tuple[float, ...] = (0.1, 0.02, 7.6e-3)  # tried on the validation patients, for both arms
    class_weights: tuple[Literal["none", "sqrt", "balanced"], ...] = ("none", "balanced")  # inverse frequency ** 0, 1/2, 1; likewise
    finetune_steps: int = 400
    finetune_batch_size: int = 16
    finetune_lr: tuple[float, ...] = (5e-4, 2e-3)  # backbone; tried likewise, for both arms
    finetune_head_lr: float = 1e-2
    teacher_weight: tuple[float, ...] = (1.0, 10.0)  # mean teacher only: of the consistency loss, once ramped up; tried likewise
    teacher_ramp: float = 0.4  # share of the steps; the weight grows as exp(-5 (1 - t)^2), t from 0 to 1
    teacher_decay: float = 0.95  # of the teacher's weights, a step (paper's 0.99 to 0.999 want thousands); a plain mean of all so far while that is shorter
    teacher_batch_size: int = 16  # unlabelled images a step
    weight_decay: float = 1e-5
    augment: bool = True  # fine-tuning only: the spatial changes below, then `photometric`
    augment_p: float = 0.8  # probability of the spatial ones, per image
    augment_rotation: float = 45.0  # degrees, U(-r, r); flips as in `spatial`
    augment_scale: tuple[float, float] = (0.7, 1.0)  # crop scale, U
    augment_translation: float = 0.1  # share of half the image, U(-t, t) per axis
    sliding_window: bool = True  # 3D: windows of data.size over whole volumes; false: their centre crop only
    sliding_overlap: float = 0.5  # share of a window, 0 to under 1
    overlays: int = 6  # pictures a run
    bootstrap: int = 2000  # resamples of patients for the 95 % interval


@dataclass
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    spatial: SpatialConfig = field(default_factory=SpatialConfig)
    photometric: PhotometricConfig = field(default_factory=PhotometricConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    bim: BimConfig = field(default_factory=BimConfig)
    lrc: LrcConfig = field(default_factory=LrcConfig)
    pgl: PglConfig = field(default_factory=PglConfig)
    simclr: SimclrConfig = field(default_factory=SimclrConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    downstream: DownstreamConfig = field(default_factory=DownstreamConfig)


METHOD_PARTS = ("bim", "lrc", "pgl", "simclr")
PRESETS = Path(__file__).with_name("configs")


def load(file: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file (a path, or a preset's name such as "pix2rep_v1"), apply "section.key=value" overrides, check ranges.

    Raises ConfigError, or FileNotFoundError when `file` is neither a path nor a preset.
    """
    values = {}
    if file is not None:
        path = find(file, PRESETS, "config must be a YAML file or one of the presets")
        try:
            values = yaml.load(path.read_text(encoding="utf-8"), Loader) or {}
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} must be YAML: {error}") from error
    config = from_dict(values)
    for text in overrides:
        override(config, text)
    check(config)
    return config


def save(config: Config, path: str | Path) -> None:
    """Write every option as YAML, atomically."""
    from pix2rep.checkpoint import atomic

    with atomic(path) as temporary:
        text = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, default_flow_style=None)
        temporary.write_text(text, encoding="utf-8")


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Sections of plain values (tuples become lists), as YAML, JSON and checkpoints hold them."""
    return {
        section: {key: _listed(value) for key, value in values.items()}
        for section, values in asdict(config).items()
    }


def _listed(value: Any) -> Any:
    return [_listed(entry) for entry in value] if isinstance(value, tuple) else value


def from_dict(values: Mapping[str, Any]) -> Config:
    """Inverse of `to_dict`; what is left out keeps its default. Raises ConfigError."""
    config = Config()
    if not isinstance(values, Mapping):
        raise ConfigError(f"a config must be sections of keys ({', '.join(_sections())}), got {values!r}")
    for section, entries in values.items():
        if section not in _sections():
            raise _unknown(section)
        if entries is not None and not isinstance(entries, Mapping):
            raise ConfigError(f"{section} must be a section of keys, got {entries!r}")
        for name, value in (entries or {}).items():
            _set(config, f"{section}.{name}", lambda kind, key, value=value: typed(value, kind, key))
    return config


def flatten(config: Config) -> dict[str, Any]:
    """{"section.key": value} of every option."""
    return {f"{section}.{key}": value for section, values in asdict(config).items() for key, value in values.items()}


def completed(config: Config) -> Config:
    """What `network` leaves open, decided by its name, data.size and data.spacing. Raises ConfigError for what the named network has not."""
    return replace(config, network=completed_network(config.network, config.data.size, config.data.spacing))


def check(config: Config) -> None:
    """Raise ConfigError for a value outside its range. (Lengths that depend on the data are checked where they are used.)"""
    value = flatten(config)
    for bound, keys in _AT_LEAST.items():
        for key in keys.split():
            entries = value[key] if isinstance(value[key], tuple) else (value[key],)
            if any(isinstance(entry, int | float) and entry < bound for entry in entries):
                raise ConfigError(f"{key} must be at least {bound}, got {shown(value[key])}")
    low, high = config.data.percentiles
    small, large = config.spatial.scale
    dims = config.network.dims
    for holds, key, expected in (
        (0 <= low < high <= 100, "data.percentiles", "LOW,HIGH with 0 <= LOW < HIGH <= 100"),
        (0 < small <= large, "spatial.scale", "SMALLEST,LARGEST with 0 < SMALLEST <= LARGEST"),
        (dims in (2, 3), "network.dims", "2 or 3"),
        (config.data.squares is None or dims == 2, "data.squares", "null with network.dims=3"),
        (config.data.squares is None or 0 < config.data.squares[0] <= config.data.squares[1] <= 1, "data.squares", "SMALLEST,LARGEST in (0, 1], or null"),
        (config.network.feature_levels in (1, 2, 3, 4), "network.feature_levels", "1, 2, 3 or 4"),
        (len(config.data.size) == dims, "data.size", f"{dims} numbers (network.dims = {dims})"),
        (config.split.val + config.split.test < 1, "split.val", f"under 1 with split.test = {config.split.test:g}"),
        (config.loss.temperature > 0, "loss.temperature", "above 0"),
        (0 <= config.downstream.sliding_overlap < 1, "downstream.sliding_overlap", "at least 0 and under 1"),
        (len(config.downstream.teacher_weight) > 0, "downstream.teacher_weight", "a list of at least one number"),
        (0 < config.downstream.teacher_ramp <= 1, "downstream.teacher_ramp", "a share of the steps, above 0"),
        (0 <= config.downstream.teacher_decay < 1, "downstream.teacher_decay", "at least 0 and under 1"),
        (config.pretrain.lr > 0, "pretrain.lr", "above 0"),
        (config.pretrain.warmup <= 1, "pretrain.warmup", "a share of the steps, 0 to 1"),
        (config.pretrain.clip_grad is None or config.pretrain.clip_grad > 0, "pretrain.clip_grad", "above 0, or null"),
        *((holds, f"{part}.{key}", expected) for part in METHOD_PARTS for holds, key, expected in getattr(config, part).checks()),
    ):
        if not holds:
            raise ConfigError(f"{key} must be {expected}, got {shown(value[key])}")


_AT_LEAST = {
    0: "data.roi_margin split.val split.test split.seed loss.lambda_param pretrain.seed downstream.seeds"
    " network.head_depth pretrain.weight_decay pretrain.warmup downstream.teacher_weight",
    1: "data.size network.channels network.features network.head_hidden network.projection loss.num_samples"
    " pretrain.steps pretrain.batch_size pretrain.accumulate pretrain.threads pretrain.log_every pretrain.checkpoint_every pretrain.keep"
    " downstream.labelled downstream.probe_steps downstream.finetune_steps downstream.finetune_batch_size"
    " downstream.teacher_batch_size downstream.bootstrap",
}


def find(file: str | Path, packaged: Path, expected: str) -> Path:
    """`file`, or the YAML file of that name in the folder `packaged`. Raises FileNotFoundError: `expected` and the names there are."""
    path = Path(file)
    named = packaged / f"{path.name.removesuffix('.yaml')}.yaml"
    if path.is_file():
        return path
    if path.name == str(file) and named.is_file():
        return named
    names = ", ".join(sorted(entry.stem for entry in packaged.glob("*.yaml")))
    raise FileNotFoundError(f"{expected} {names}, got {file}")


def _sections() -> list[str]:
    return [part.name for part in fields(Config)]


def override(config: Config, text: str) -> None:
    """Set one option from "section.key=value". Raises ConfigError."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"an override must be section.key=value, got {text!r}")
    _set(config, key.strip(), lambda kind, key: parsed(value.strip(), kind, key))


def _set(config: Config, key: str, read: Callable[[Any, str], Any]) -> None:
    section, _, name = key.partition(".")
    if key in _sections():
        raise ConfigError(f"an override must be section.key=value, got a section, {key!r}")
    part = getattr(config, section) if section in _sections() else None
    kinds = {entry.name: entry.type for entry in fields(part)} if part else {}
    if name not in kinds:
        raise _unknown(key)
    setattr(part, name, read(kinds[name], key))


def _unknown(key: str) -> ConfigError:
    from difflib import get_close_matches

    known = list(flatten(Config()))
    named = [full for full in known if full.partition(".")[2] == key.rpartition(".")[2]]  # right name, wrong or no section
    close = named or get_close_matches(key, known + _sections(), n=1, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"sections: {', '.join(_sections())}"
    return ConfigError(f"unknown key {key!r}; {hint}")
