"""Linear probe and fine-tuning from a few labelled patients, always beside the same network that was not pre-trained.

Both arms get the same labelled slices, the same grid of settings, the same number of steps, and choose by 3D Dice on the validation
patients. The random arm's BatchNorm statistics are first estimated on the unlabelled pre-training images, so that its features are those of
a network that has seen the data.
"""

import copy
import itertools
import math
import time
from pathlib import Path

import numpy as np
import torch

from pix2rep import disk, evaluate, finetune, log, metrics, overlay, probe, report
from pix2rep.checkpoint import load_backbone
from pix2rep.config import Config
from pix2rep.data.cache import PreparedCase
from pix2rep.data.patches import open_source
from pix2rep.data.slices import StepSampler
from pix2rep.data.splits import labelled_patients
from pix2rep.mean_teacher import MeanTeacher
from pix2rep.networks import Segmenter, build_backbone
from pix2rep.plan import TASKS, count_of
from pix2rep.study import Study, open_study

SETTLING_BATCHES = 32  # batches that estimate BatchNorm statistics
SETTLING_IMAGES = {2: 16, 3: 2}  # in each, by dimensions
OWN = ("results.*", "models/*.safetensors", "overlays/*.png")  # what a run writes into RUN/<what>


def run(run_dir: Path, config: Config, what: str) -> dict:
    """Probe or fine-tune for every downstream.labelled x downstream.seeds x arm, test each model, and write RUN/<what>/.

    Results of an earlier call stay there until all of the new ones are written; a call that ends before leaves RUN/<what>.partial.
    what: one of plan.TASKS. Returns the report that results.json holds. Raises FileNotFoundError for a run without weights, ValueError
    for too few labelled patients or a part of the split without labels.
    """
    if what not in TASKS:
        raise ValueError(f"what must be one of {', '.join(TASKS)}, got {what!r}")
    with disk.replaced(Path(run_dir) / what, OWN) as folder:
        result = _run(Path(run_dir), config, what, folder)
    report.show(result)
    return result


def _run(run_dir: Path, config: Config, what: str, folder: Path) -> dict:
    pretrained, trained = load_backbone(run_dir)
    if config.network != trained.network:
        raise ValueError(f"network must be that of the run's weights, {trained.network}, got {config.network}")
    study = open_study(run_dir, config)
    pretrained = pretrained.to(study.device)
    validation = study.volumes("val")
    test = study.volumes("test")
    pool = study.volumes("pretrain")
    down = config.downstream
    # Every draw is made before the first model is trained: too few patients must not cost an hour.
    total = len({case.patient for case in pool})
    counts = dict.fromkeys(count_of(entry, total) for entry in down.labelled)
    draws = {(n, seed): labelled_patients(study.split, pool, n, seed) for n in counts for seed in down.seeds}
    rows, models, shown = [], [], {}
    for (n, seed), patients in draws.items():
        for arm in report.ARMS:
            started = time.perf_counter()
            backbone = pretrained if arm == "pretrained" else random_backbone(study, seed)
            entry = {"what": what, "labelled": n, "seed": seed, "arm": arm, "patients": patients}
            model, entry, predictions, new = one_model(backbone, study, entry, validation, test)
            entry["file"] = evaluate.save_model(model, folder / "models", entry, study)
            entry["seconds"] = round(time.perf_counter() - started, 1)
            rows += new
            models.append(entry)
            if (n, seed) == next(iter(draws)):
                shown[arm] = predictions
            report.say_model(entry, metrics.nanmean([row["dice"] for row in new]))
    result = report.write(folder, rows, models, study)
    n, seed = next(iter(draws))
    overlay.write(folder / "overlays", test, shown, study, f"{what}, {n} labelled, seed {seed}")
    return result


def one_model(backbone, study: Study, entry: dict, validation: list[PreparedCase], test: list[PreparedCase]):
    """Train one probe or fine-tune one copy of `backbone`, choose by the validation volumes, predict and score the test volumes.

    entry: what (one of plan.TASKS), labelled, seed, arm, patients (whose labels are used). Returns (Segmenter, the entry with the settings
    chosen and "validation_dice", {case id: labels [Z, H, W] on the source's own grid}, rows of `evaluate.score_case`). Raises ValueError when
    every setting diverged.
    """
    train = {"probe": _probe, "finetune": _finetune, "mean_teacher": _mean_teacher}[entry["what"]]
    seen = [bool(m.num_batches_tracked) for m in _batch_norms(backbone)]
    if any(seen) and not all(seen):  # a method that trains the encoder alone leaves the decoder's layers without statistics
        backbone = settled(backbone, study, entry["seed"])
    model, choice = train(backbone, study, study.labelled(entry["patients"]), validation, entry["seed"])
    entry = entry | choice
    predictions = {case.id: evaluate.predict_case(model, case, study) for case in test}
    return model, entry, predictions, [row for case in test for row in evaluate.score_case(predictions[case.id], case, study, entry)]


def random_backbone(study: Study, seed: int):
    """The run's architecture from a seeded fresh initialisation, BatchNorm statistics estimated on unlabelled pre-training images."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = build_backbone(study.config.network).to(study.device)
    return settled(backbone, study, seed)


@torch.no_grad()
def settled(backbone, study: Study, seed: int):
    """The backbone in eval mode, with statistics for the BatchNorm layers that saw no batch, estimated on unlabelled pre-training images."""
    norms = [m for m in _batch_norms(backbone) if not m.num_batches_tracked]
    if not norms:
        return backbone.eval()
    source = open_source(study.prepared, study.split["pretrain"], study.config)
    sampler = StepSampler(len(source), SETTLING_IMAGES[len(source.size)], seed)
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # plain average over the batches
    backbone.eval()
    for m in norms:
        m.train()
    for step in range(SETTLING_BATCHES):
        backbone(source.at(step).batch(sampler.indices(step))[0].to(study.device))
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    return backbone.eval()


def _batch_norms(backbone) -> list:
    return [m for m in backbone.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]


def validation_dice(prediction: np.ndarray, labels: np.ndarray, cases: list[PreparedCase], classes: int) -> float:
    """Mean 3D Dice over volumes and classes at data.size: prediction and labels [N, *size] are the stacked items of `cases`."""
    counts = [case.shape[0] if labels.ndim == 3 else 1 for case in cases]
    cuts = np.cumsum(counts)[:-1]
    pairs = zip(np.split(prediction, cuts), np.split(labels, cuts), strict=True)
    return metrics.nanmean([metrics.dice(p, t, classes) for p, t in pairs])


def whole_volume_dice(model, study: Study, cases: list[PreparedCase]) -> float:
    """Mean 3D Dice over volumes and classes on the prepared grid, by `evaluate.predict_prepared`."""
    classes = len(study.classes)
    return metrics.nanmean([metrics.dice(evaluate.predict_prepared(model, case, study), np.asarray(case.labels()), classes) for case in cases])


def _probe(backbone, study: Study, labelled: list[PreparedCase], validation: list[PreparedCase], seed: int):
    """The best linear layer on frozen features: (Segmenter, {settings, "validation_dice"})."""
    classes = len(study.classes)
    images, labels = study.stack(labelled)
    rows, targets = probe.labelled_pixels(backbone, images, labels, torch.Generator().manual_seed(seed))
    settings, weight, bias = probe.fit(rows, targets, classes, study.config.downstream, seed)
    model = Segmenter(copy.deepcopy(backbone), classes + 1, study.config.network.dims).to(study.device)

    def take(setting: int) -> Segmenter:
        with torch.no_grad():
            model.head.weight.copy_(weight[setting].view_as(model.head.weight))
            model.head.bias.copy_(bias[setting])
        return model

    if study.slides:
        scores = [whole_volume_dice(take(k), study, validation) for k in range(len(settings))]
    else:
        images, labels = study.stack(validation)
        predictions, truth = probe.predict_all(backbone, images, weight, bias), labels.cpu().numpy()
        scores = [validation_dice(p, truth, validation, classes) for p in predictions]
    best = int(np.nanargmax(np.nan_to_num(scores, nan=-1.0)))
    return take(best), {**settings[best], "validation_dice": scores[best]}


def _mean_teacher(backbone, study: Study, labelled: list[PreparedCase], validation: list[PreparedCase], seed: int):
    """As `_finetune`, with a mean teacher; its weight is chosen beside the learning rate ("teacher_weight")."""
    return _finetune(backbone, study, labelled, validation, seed, study.config.downstream.teacher_weight)


def _finetune(backbone, study: Study, labelled: list[PreparedCase], validation: list[PreparedCase], seed: int, weights=(None,)):
    """The best of one fine-tuning a learning rate and weight of a teacher (None: without one): (Segmenter, {"lr", "step",
    "validation_dice"}). Raises ValueError when every one diverged.
    """
    images, labels = study.stack(labelled)
    spacing = np.median([case.spacing for case in labelled], axis=0)[-images.ndim + 2 :]
    if study.slides:

        def validate(model):
            return whole_volume_dice(model, study, validation)

    else:
        seen, truth = study.stack(validation)
        truth = truth.cpu().numpy()

        def validate(model):
            return validation_dice(finetune.predict(model, seen), truth, validation, len(study.classes))

    best, rates = None, study.config.downstream.finetune_lr
    for lr, weight in itertools.product(rates, weights):
        model = finetune.build(backbone, len(study.classes), study.config.network.dims, seed).to(study.device)
        teacher = None if weight is None else MeanTeacher(model, study, weight, seed)
        own = tuple(spacing) if images.ndim == 5 else None
        score, step = finetune.fit(model, images, labels, lr, study.config, seed, validate, own, teacher)
        setting = {"lr": lr} | ({} if teacher is None else {"teacher_weight": weight})
        if math.isnan(score):
            name = ", ".join(f"{key} {value:g}" for key, value in setting.items())
            log.say(f"downstream.finetune_{name}: the loss is not finite, setting dropped")
        elif best is None or score > best[1]["validation_dice"]:
            best = model, setting | {"step": step, "validation_dice": score}
    if best is None:
        raise ValueError(f"downstream.finetune_lr must hold a rate at which the loss stays finite, got {rates}")
    return best
