"""Runs on small hand-made volumes in ACDC's layout: a bright disc in a darker ring."""

import nibabel
import numpy as np
import torch

from pix2rep import checkpoint
from pix2rep import config as config_file
from pix2rep.data.discover import discover
from pix2rep.data.splits import write_split
from pix2rep.networks import build_backbone

SIZE = 32
SPACING = (1.5, 1.5, 8.0)


def volume(seed: int):
    """A bright disc (label 1) in a darker ring (label 2) on a noisy ground, somewhere in [X, Y, Z] = 36 x 40 x 4."""
    rng = np.random.default_rng(seed)
    shape = (36, 40, 4)
    x, y = np.meshgrid(np.arange(shape[0]), np.arange(shape[1]), indexing="ij")
    labels = np.zeros(shape, np.uint8)
    for z in range(shape[2]):
        cx, cy = rng.uniform(15, 21), rng.uniform(17, 23)
        r = np.hypot(x - cx, y - cy)
        labels[..., z] = np.where(r < 4, 1, np.where(r < 7, 2, 0))
    image = np.choose(labels, (60, 200, 120)) + rng.normal(0, 8, shape)
    return image.astype(np.int16), labels


def write_patients(root, count: int, labelled: int | None = None):
    """`count` patients of two frames, stored left-posterior-superior; the first `labelled` with labels."""
    affine = np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1.0])
    for p in range(1, count + 1):
        folder = root / f"patient{p:03d}"
        folder.mkdir(parents=True)
        for frame in (1, 8):
            image, labels = volume(100 * p + frame)
            nibabel.save(nibabel.Nifti1Image(image, affine), folder / f"patient{p:03d}_frame{frame:02d}.nii.gz")
            if labelled is None or p <= labelled:
                nibabel.save(nibabel.Nifti1Image(labels, affine), folder / f"patient{p:03d}_frame{frame:02d}_gt.nii.gz")


def small_config(root):
    return config_file.load(
        None,
        [f"data.root={root}", f"data.size={SIZE},{SIZE}", "network.channels=4,4,8,8,8", "network.features=8", "pretrain.device=cpu"]
        + [
            "downstream.seeds=0",
            "downstream.probe_steps=60",
            "downstream.finetune_steps=10",
            "downstream.finetune_batch_size=4",
            "downstream.overlays=2",
        ]
        + ["downstream.finetune_lr=2e-3", "downstream.bootstrap=200"],
    )


def write_run(root, run, split=None):
    """A run folder as `pix2rep pretrain` leaves it, its weights a seeded initialisation."""
    config = small_config(root)
    patients = sorted({case.patient for case in discover(root)})
    run.mkdir()
    write_split(
        split or {"version": 1, "seed": 0, "pretrain": patients[:-3], "val": patients[-3:-2], "test": patients[-2:]}, run / "split.json"
    )
    config_file.save(config, run / "config.yaml")
    torch.manual_seed(7)
    checkpoint.save_backbone(run, build_backbone(config.network), config, steps=0)
    return config
