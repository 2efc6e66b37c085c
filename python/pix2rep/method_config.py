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
    mirror: float = 0.9  # official: probability of a mirrored axis, for each axis
    gamma: tuple[float, float] = (0.5, 2.0)  # official: of the transformed view's intensities, U
    jitter: tuple[float, float] = (0.5, 1.5)  # official for ACDC: brightness and contrast of both views, U each
    encoder_weight: float = 0.0  # of InfoNCE at the bottleneck: official in one script (1); unknown whether the paper's tables have it
    encoder_hidden: int = 256  # official: MLP 256-256
    encoder_projection: int = 256
    temperature: float = 0.07  # official, of that InfoNCE
    partitions: int = 3  # official for ACDC: slices of the same third of a volume are each other's positives
    encoder_rows: int = 50  # official: the most that are contrasted, both views counted

    def checks(self) -> Checks:
        return [
            *((getattr(self, key) >= 1, key, "at least 1") for key in ("heads", "head_hidden", "window", "encoder_hidden", "encoder_projection", "partitions")),
            *((getattr(self, key) >= 0, key, "at least 0") for key in ("lamda", "information_weight", "boundary_weight", "encoder_weight")),
            (self.clusters >= 2, "clusters", "at least 2"),
            (self.encoder_rows >= 4, "encoder_rows", "at least 4"),
            (0 <= self.alpha <= 1, "alpha", "in [0, 1]"),
            (self.window % 2 == 1, "window", "odd"),
            (self.power > 0, "power", "above 0"),
            (0 <= self.mirror <= 1, "mirror", "a probability"),
            (0 < self.gamma[0] <= self.gamma[1], "gamma", "SMALLEST,LARGEST with 0 < SMALLEST <= LARGEST"),
            (0 <= self.jitter[0] <= self.jitter[1], "jitter", "SMALLEST,LARGEST with 0 <= SMALLEST <= LARGEST"),
            (self.temperature >= 0.01, "temperature", "at least 0.01"),
        ]


@dataclass
class LrcConfig:
    def checks(self) -> Checks:
        return []


@dataclass
class PglConfig:
    def checks(self) -> Checks:
        return []
