"""Options of one method each; `config.LossConfig` holds what methods share. Where a paper's code or text gives a value, the comment says so."""

from dataclasses import dataclass
from typing import Literal

Checks = list[tuple[bool, str, str]]  # (holds, key, expectation)


@dataclass
class BimConfig:
    """Boundary-aware information maximisation (arXiv 2202.02371). "Official": read from its code."""

    heads: int = 3  # official; their losses are averaged
    clusters: int = 40  # official, a head; its scripts try 20, 40, 60
    head: Literal["linear", "mlp"] = "linear"  # official: linear; "mlp": 1x1 conv to head_hidden, LeakyReLU, 1x1 conv
    head_hidden: int = 64  # official
    alpha: float = 0.5  # official, where it has one value: 0 mutual information, 1 balanced and consistent clusters
    lamda: float = 1.0  # official: weight of the marginals' entropies
    information_weight: float = 1.0  # official
    boundary_weight: float = 1.0  # official, where it has one value; its scripts try 0 to 2
    window: int = 5  # official, pixels
    power: float = 0.75  # of the edges; official for ACDC and MMWHS, 0.5 for prostate and spleen
    outside: Literal["keep", "drop"] = "keep"  # official: "keep", features that T took from outside are 0 and count
    crop_rotation: float = 45.0  # degrees, U(-r, r), of both views alike; official for ACDC
    crop_scale: tuple[float, float] = (0.8, 1.0)  # share of the image's side; inferred (official: 224 pixels, whatever the slice's size)
    crop_flip: float = 0.5  # official: probability of a flip, for each axis
    jitter: tuple[float, float] = (0.5, 1.5)  # brightness and contrast, U each, a view its own; official for ACDC (its order is random)
    rotation: float = 45.0  # of T, degrees, U(-r, r); official, as the next four
    scale: tuple[float, float] = (0.8, 1.3)  # of T: above 1 zooms in
    translation: float = 0.1  # of T, share of half the image, U(-t, t) for each axis
    mirror: float = 0.9  # of T: probability for each axis (that each axis has its own draw is inferred)
    gamma: tuple[float, float] = (0.5, 2.0)  # of the transformed view's intensities, U
    encoder_weight: float = 0.0  # of InfoNCE at the bottleneck: official in one script (1); unknown whether the paper's tables have it
    encoder_hidden: int = 256  # official: MLP 256-256
    encoder_projection: int = 256
    temperature: float = 0.07  # official, of that InfoNCE
    partitions: int = 3  # official for ACDC: slices of the same third of a volume are each other's positives
    encoder_images: int = 50  # the most of a batch that are contrasted; official: its batches have no more

    def checks(self) -> Checks:
        at_least = {
            0: "lamda information_weight boundary_weight crop_rotation rotation translation encoder_weight",
            1: "heads head_hidden window encoder_hidden encoder_projection partitions",
            2: "clusters encoder_images",
        }
        return [
            *((getattr(self, key) >= bound, key, f"at least {bound}") for bound, keys in at_least.items() for key in keys.split()),
            *((0 <= getattr(self, key) <= 1, key, "in [0, 1]") for key in ("alpha", "crop_flip", "mirror")),
            *((0 < low <= high, key, "SMALLEST,LARGEST with 0 < SMALLEST <= LARGEST") for key in _RANGES for low, high in [getattr(self, key)]),
            (self.window % 2 == 1, "window", "odd"),
            (self.power > 0, "power", "above 0"),
            (self.temperature >= 0.01, "temperature", "at least 0.01"),
        ]


_RANGES = ("crop_scale", "jitter", "scale", "gamma")


@dataclass
class LrcConfig:
    def checks(self) -> Checks:
        return []


@dataclass
class PglConfig:
    def checks(self) -> Checks:
        return []
