"""Test volumes through saved downstream models: 3D Dice and HD95 a class and volume, predictions back in the geometry of the source
files.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from monai.inferers import sliding_window_inference
from nibabel.affines import voxel_sizes

from pix2rep import metrics, report
from pix2rep.config import Config
from pix2rep.data.arrays import resize_depth
from pix2rep.data.cache import PreparedCase
from pix2rep.data.nifti import save_like
from pix2rep.networks import Segmenter, build_backbone
from pix2rep.plan import TASKS
from pix2rep.study import Study, open_study

SLICES = 32  # at once through the network
WINDOWS = 2  # of a sliding window, likewise


def predict_case(model, case: PreparedCase, study: Study) -> np.ndarray:
    """Labels of one volume on its source's own grid, uint8 [Z, H, W] in canonical axes. Where the study does not slide: background outside
    the centre crop to data.size.

    Probabilities are resampled linearly and the largest wins: labels resampled themselves would carry the prepared grid's steps.
    """
    whole = np.zeros(case.native_shape, np.uint8)
    (z0, z1), (y0, y1), (x0, x1) = case.crop
    parts = probabilities(model, case, study)
    if case.shape[0] != z1 - z0:
        parts = resize_depth(torch.cat(list(parts)), z1 - z0).split(SLICES)
    parts = (F.interpolate(p, (y1 - y0, x1 - x0), mode="bilinear", align_corners=False, antialias=True) for p in parts)
    whole[z0:z1, y0:y1, x0:x1] = np.concatenate([_labels(p) for p in parts])
    return whole


def predict_prepared(model, case: PreparedCase, study: Study) -> np.ndarray:
    """Labels of one volume on its prepared grid, uint8 [Z, H, W]; otherwise as `predict_case`."""
    return np.concatenate([_labels(p) for p in probabilities(model, case, study)])


@torch.no_grad()
def probabilities(model, case: PreparedCase, study: Study) -> Iterator[torch.Tensor]:
    """Probabilities of classes 1..K of the prepared volume, slices at a time: float32 [n, K, H, W]; 0 where nothing was predicted."""
    model.eval()

    def foreground(x: torch.Tensor) -> torch.Tensor:
        return model(x.to(study.device)).float().softmax(1)[:, 1:]

    size = study.config.data.size
    if study.slides:
        whole = torch.from_numpy(np.asarray(case.image(), np.float32))[None, None]
        overlap = study.config.downstream.sliding_overlap
        found = sliding_window_inference(whole, size, WINDOWS, foreground, overlap, "gaussian", sw_device=study.device, device="cpu")
        yield from found[0].transpose(0, 1).split(SLICES)
        return
    for batch in torch.from_numpy(study.items(case, "image").astype(np.float32))[:, None].split(SLICES):
        p = _fit(foreground(batch), case.shape[-len(size) :])
        yield p if len(size) == 2 else p[0].transpose(0, 1)


def _labels(p: torch.Tensor) -> np.ndarray:
    """The likeliest of background and classes: probabilities [n, K, H, W] of classes 1..K -> uint8 [n, H, W]."""
    best, label = p.max(1)
    return torch.where(best > 1 - p.sum(1), label + 1, 0).byte().cpu().numpy()


def _fit(p, shape: tuple[int, ...]):
    """Centre crop or zero padding of the last axes to `shape`: what `crop_or_pad` does to arrays."""
    pads = []
    for n, s in zip(reversed(p.shape[-len(shape) :]), reversed(shape), strict=True):
        front = (s - n) // 2 if s >= n else -((n - s) // 2)
        pads += [front, s - n - front]
    return F.pad(p, pads)


def score_case(prediction: np.ndarray, case: PreparedCase, study: Study, entry: dict) -> list[dict]:
    """One row a class: what, labelled, seed, arm, patient, frame, case, class, dice, hd95, hd95_unit, voxels of truth and prediction.

    prediction [Z, H, W] on the source file's own grid: neither a crop nor resampling makes the task easier.
    """
    truth = study.truth(case)
    unit, spacing = distance_unit(voxel_sizes(np.asarray(case.affine))[::-1])
    overlap = metrics.dice(prediction, truth, len(study.classes))
    distance = metrics.hd95(prediction, truth, len(study.classes), spacing)
    identity = {key: entry[key] for key in ("what", "labelled", "seed", "arm")} | {
        "patient": case.patient,
        "frame": case.frame or "",
        "case": case.id,
    }
    return [
        identity
        | {"class": name, "dice": float(overlap[k]), "hd95": float(distance[k]), "hd95_unit": unit}
        | {"truth_voxels": int((truth == k + 1).sum()), "predicted_voxels": int((prediction == k + 1).sum())}
        for k, name in enumerate(study.classes)
    ]


def distance_unit(spacing) -> tuple[str, tuple[float, ...]]:
    """("mm", spacing); ("voxel", spacing) for a spacing of exactly 1, 1, 1, which is what headers say that have lost theirs."""
    spacing = tuple(float(s) for s in spacing)
    return ("voxel" if all(s == 1.0 for s in spacing) else "mm"), spacing


def save_model(model, folder: Path, entry: dict, study: Study) -> str:
    """Write a downstream model (backbone and head) as safetensors into `folder`; what it is goes into the metadata.

    Returns its path below the run once the folder of `disk.replaced` has taken its place. Raises `disk.DiskFull` where there is no space.
    """
    from pix2rep.checkpoint import save_tensors

    path = folder / f"n{entry['labelled']}_seed{entry['seed']}_{entry['arm']}.safetensors"
    save_tensors(path, model.state_dict(), {"pix2rep": json.dumps(entry | {"classes": list(study.classes)})})
    return os.path.join(entry["what"], folder.name, path.name)


def load_model(path: Path, study: Study):
    """(Segmenter in eval mode, entry) from a file of `save_model`. Raises ValueError when its classes are not the study's."""
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        entry = json.loads((file.metadata() or {}).get("pix2rep", "null"))
        state = {name: file.get_tensor(name) for name in file.keys()}
    if entry is None:
        raise ValueError(f"model must be a file written by `pix2rep probe` or `pix2rep finetune`, got {path} (no pix2rep metadata)")
    if tuple(entry.pop("classes")) != study.classes:
        raise ValueError(
            f"model {path} must have the classes of the data, {study.classes}, got another set; was data.root or data.classes changed?"
        )
    model = Segmenter(build_backbone(study.config.network), len(study.classes) + 1, study.config.network.dims)
    model.load_state_dict(state)
    return model.to(study.device).eval(), entry


def run(run_dir: Path, config: Config, predictions: Path | None = None) -> dict:
    """Evaluate every saved downstream model of a run on the test patients again, and write RUN/evaluate/.

    predictions: folder for the predicted labels, as NIfTI in each source file's own shape, orientation and affine; None writes none.
    Returns the report. Raises FileNotFoundError when the run has no saved model.
    """
    run_dir = Path(run_dir)
    files = sorted(file for kind in TASKS for file in (run_dir / kind / "models").glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"run must hold models of `pix2rep probe` or `pix2rep finetune` ({', '.join(f'{task}/models' for task in TASKS)}), got {run_dir} (0 found)"
        )
    study = open_study(run_dir, config)
    test = study.volumes("test")
    rows, models = [], []
    for file in files:
        model, entry = load_model(file, study)
        entry["file"] = os.path.relpath(file, run_dir)
        start = len(rows)
        for case in test:
            labels = predict_case(model, case, study)
            rows += score_case(labels, case, study, entry)
            if predictions is not None:
                target = Path(predictions) / entry["what"] / file.stem / f"{case.id}.nii.gz"
                target.parent.mkdir(parents=True, exist_ok=True)
                save_like(labels, study.cases[case.id], target)
        models.append(entry)
        report.say_model(entry, metrics.nanmean([row["dice"] for row in rows[start:]]))
    result = report.write(run_dir / "evaluate", rows, models, study)
    report.show(result)
    return result
