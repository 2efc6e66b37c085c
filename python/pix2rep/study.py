"""What every downstream command starts from: a run's data, its split by patient, its classes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pix2rep.config import Config
from pix2rep.data.cache import Prepared, PreparedCase, crop_or_pad, prepare
from pix2rep.data.discover import Case, class_names, discover
from pix2rep.data.pair import read_truth
from pix2rep.data.patches import read_patch, tiles
from pix2rep.data.splits import read_split


@dataclass(frozen=True)
class Study:
    """Prepared volumes, split by patient. `classes` names labels 1..K; `cases` are the source files by case id."""

    run: Path
    config: Config
    prepared: Prepared
    cases: dict[str, Case]
    split: dict
    classes: tuple[str, ...]
    device: torch.device

    def volumes(self, part: str) -> list[PreparedCase]:
        """Labelled volumes of one part of the split ("pretrain", "val", "test"). Raises ValueError where there are none."""
        found = self.labelled(self.split[part])
        if not found:
            raise ValueError(
                f"split part {part!r} must hold at least one patient with labels, got {len(self.split[part])} patients and no label "
                f"({self.run / 'split.json'}, data.root={self.config.data.root})"
            )
        return found

    def labelled(self, patients: list[str]) -> list[PreparedCase]:
        """Labelled volumes of some patients, in order of id."""
        wanted = set(patients)
        return [case for case in self.prepared.cases if case.patient in wanted and case.label_file is not None]

    @property
    def slides(self) -> bool:
        """Whether volumes are seen whole, in windows of data.size, rather than by their centre crop: 3D with downstream.sliding_window."""
        return len(self.config.data.size) == 3 and self.config.downstream.sliding_window

    def items(self, case: PreparedCase, what: str) -> np.ndarray:
        """`what` ("image" or "labels") of a volume at data.size: [Z, H, W] for slices, [T, D, H, W] for a three-entry size, the T tiles that
        cover the volume where it `slides`, else the centre alone.
        """
        size, array = self.config.data.size, getattr(case, what)()
        if self.slides:
            return np.stack([read_patch(array, low, size) for low in tiles(array.shape, size)])
        array = crop_or_pad(np.asarray(array), size)
        return array if len(size) == 2 else array[None]

    def stack(self, cases: list[PreparedCase]) -> tuple[torch.Tensor, torch.Tensor]:
        """All items of `cases`, on the device: images float32 [N, 1, *size] in [0, 1], labels int64 [N, *size]."""
        images = torch.from_numpy(np.concatenate([self.items(case, "image") for case in cases])).float()
        labels = torch.from_numpy(np.concatenate([self.items(case, "labels") for case in cases])).long()
        return images[:, None].to(self.device), labels.to(self.device)

    def truth(self, case: PreparedCase) -> np.ndarray:
        """Labels of the source file itself, uint8 [Z, H, W] in canonical axes, neither cropped nor resampled."""
        return read_truth(self.cases[case.id], self.config.data.label_affine)


def open_study(run: Path, config: Config) -> Study:
    """The study of a pre-training run, prepared again where data options have changed.

    Raises FileNotFoundError when the folder has no split.json, ValueError when nothing is labelled or data.classes does not fit the labels.
    """
    run = Path(run)
    if not (run / "split.json").is_file():
        raise FileNotFoundError(f"run must be a folder written by `pix2rep pretrain` (with split.json), got {run}")
    if config.pretrain.threads:
        torch.set_num_threads(config.pretrain.threads)
    cases = discover(config.data.root)
    prepared = prepare(cases, config.data, config.data.cache or run / "cache")
    return study_of(run, config, cases, prepared, read_split(run / "split.json", cases))


def study_of(run: Path, config: Config, cases: list[Case], prepared: Prepared, split: dict) -> Study:
    """The study of volumes that are prepared already. Raises ValueError when nothing is labelled, or for a device that is not there."""
    from pix2rep.pretrain import pick_device

    return Study(run, config, prepared, {c.id: c for c in cases}, split, _classes(prepared, config), pick_device(config.pretrain.device))


def _classes(prepared: Prepared, config: Config) -> tuple[str, ...]:
    labelled = sum(case.label_file is not None for case in prepared.cases)
    highest = prepared.num_classes
    if highest == 0:
        raise ValueError(
            f"data.root must hold labels above 0, got {labelled} label files for {len(prepared.cases)} volumes in {config.data.root}"
        )
    return tuple(config.data.classes) or class_names(config.data.root) or tuple(str(k) for k in range(1, highest + 1))
