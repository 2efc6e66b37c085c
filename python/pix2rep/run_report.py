"""`pix2rep report`: a pre-training run as one HTML file with curves, pictures and the downstream results that there are."""

import json
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
from torch import nn

from pix2rep import checkpoint, curves, page, pictures
from pix2rep import config as config_file
from pix2rep.colours import NEAR, Colours, agreement
from pix2rep.config import Config
from pix2rep.data.cache import PreparedCase, prepare
from pix2rep.data.discover import discover
from pix2rep.data.splits import read_split
from pix2rep.disk import atomic
from pix2rep.log import read_log, say
from pix2rep.looks import LOOKS
from pix2rep.methods import build_method
from pix2rep.methods.base import Method
from pix2rep.networks import build_backbone
from pix2rep.overlay import spread
from pix2rep.pairs import make_pair
from pix2rep.plan import TASKS
from pix2rep.typed import shown

PARTS = {"pretrain": "pre-training", "val": "validation"}
OVERLAYS = 3  # pictures a downstream task


@dataclass(frozen=True)
class Trained:
    """A backbone and its method in eval mode on the CPU, the steps they took, the file they come from."""

    backbone: nn.Module
    method: Method
    steps: int
    file: Path
    ended: bool
    heads: bool  # whether the method's heads are the trained ones


def write(run: Path, out: Path | None = None, cases: int = 2) -> Path:
    """Write RUN/report.html (or `out`), with pictures of `cases` patients each of the pre-training and the validation part; returns its path.

    Takes weights.safetensors, or the newest checkpoint of a run that has not ended. Where there is neither, or the volumes are gone, the page says so
    in place of the pictures. Raises FileNotFoundError for a folder without config.yaml or log.jsonl, ValueError for `cases` below 1 or
    a config that cannot be read.
    """
    run = Path(run)
    if cases < 1:
        raise ValueError(f"cases must be at least 1, got {cases}")
    for name in ("config.yaml", "log.jsonl"):
        if not (run / name).is_file():
            raise FileNotFoundError(f"run must be a folder written by pix2rep pretrain (with {name}), got {run}")
    config = config_file.load(run / "config.yaml")
    rows = read_log(run / "log.jsonl")
    parts = [*_header(run, config, rows), *_curves(config, rows), *_downstream(run)]
    try:
        parts += _pictures(run, config, cases)
    except (ValueError, OSError) as error:
        say(f"no pictures: {error}")
        parts += [page.heading("Pictures"), page.paragraph(f"There are none: {error}", "warn")]
    path = Path(out) if out else run / "report.html"
    with atomic(path) as temporary:
        temporary.write_text(page.document(f"Pre-training: {run.resolve().name}", parts), encoding="utf-8")
    return path


def load_trained(run: Path) -> Trained:
    """The backbone of a run, or of its newest checkpoint while it has no weights, and where pictures show them (`Look.heads`) the method's heads.

    Raises FileNotFoundError where there is neither, ValueError where weights and config.yaml do not belong together.
    """
    path, steps = run / "weights.safetensors", None
    if ended := path.is_file():
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            steps = int(file.metadata()["steps"])
    method = config_file.load(run / "config.yaml").loss.method
    found = _checkpoint(run, ended) if LOOKS[method].heads or not ended else None
    if found and steps in (None, found[1]["step"]):  # heads belong to the weights of their own step
        file, state = found
        config = config_file.from_dict(state["config"])
        backbone = build_backbone(config.network)
        backbone.load_state_dict(state["backbone"])
        method = build_method(config, backbone)
        method.load_state_dict(state["method"])
        return Trained(backbone.eval(), method.eval(), state["step"], file, ended, True)
    if not ended:
        raise FileNotFoundError(f"run must hold weights.safetensors or a checkpoint, got {run} before its first checkpoint")
    backbone, config = checkpoint.load_backbone(run)
    return Trained(backbone, build_method(config, backbone).eval(), steps, path, True, False)


def _checkpoint(run: Path, ended: bool) -> tuple[Path, dict] | None:
    """Path and state of the newest; None without one, or where a run that has ended can do without."""
    try:
        return checkpoint.newest(run)
    except ValueError:
        if not ended:
            raise
    return None


def _header(run: Path, config: Config, rows: list[dict]) -> list[str]:
    opt = config.pretrain
    begun = [row for row in rows if row.get("event") in ("start", "resume")]
    start = begun[-1] if begun else {}
    steps = [row for row in rows if row.get("event") == "step"]
    taken = steps[-1]["step"] if steps else 0
    ended = any(row.get("event") == "end" and row.get("step") == opt.steps for row in rows)
    split = json.loads((run / "split.json").read_text(encoding="utf-8")) if (run / "split.json").is_file() else {}
    patients = ", ".join(f"{len(split[part])} {part}" for part in ("pretrain", "val", "test") if part in split)
    skipped = {row["case"]: row["reason"] for row in rows if row.get("event") == "skipped"}
    device = start.get("device", "")
    facts = [
        ("state", "ended" if ended else "not ended"),
        ("method", f"{config.loss.method}, {config.loss.objective}" if config.loss.method == "pix2rep" else config.loss.method),
        ("data", config.data.root),
        ("patients", patients or "unknown (no split.json)"),
        ("slices" if config.network.dims == 2 else "volumes", f"{start.get('slices', 'unknown')}, of {' x '.join(map(str, config.data.size))} pixels"),
        ("steps", f"{taken} of {opt.steps}, {opt.batch_size} x {opt.accumulate} images each"),
        ("time in the loop", f"{_duration(steps, opt.batch_size * opt.accumulate)} on {device}, resumed {max(0, len(begun) - 1)} times"),
        ("last row", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(rows[-1]["time"])) if rows and "time" in rows[-1] else "none"),
        ("versions", ", ".join(f"{name} {number}" for name, number in start.get("versions", {}).items())),
        ("skipped volumes", str(len(skipped))),
    ]
    parts = [page.table(facts)]
    if bad := [row for row in rows if row.get("event") == "diverged"]:
        last = bad[-1]
        parts.append(page.paragraph(f"Diverged at step {last['step']}: {last['what']}; patients in the batch: {', '.join(last['patients'])}", "warn"))
    if skipped:
        parts.append(page.folded(f"{len(skipped)} skipped volumes, with the reason", page.table(skipped.items(), ("case", "reason"))))
    now, default = config_file.flatten(config), config_file.flatten(config_file.completed(Config()))
    changed = [(key, shown(now[key]), shown(default[key])) for key in now if now[key] != default[key] and key != "data.root"]
    parts.append(page.folded(f"{len(changed)} options differ from the defaults", page.table(changed, ("option", "here", "default"))))
    return parts


def _duration(steps: list[dict], images: int) -> timedelta:
    """Of the loop over all sessions, from the rates of the rows."""
    total, before = 0.0, 0
    for row in steps:
        rate = row.get("images_per_s")
        if isinstance(rate, int | float) and rate > 0:
            total += (row["step"] - before) * images / rate
        before = row["step"]
    return timedelta(seconds=round(total))


def _curves(config: Config, rows: list[dict]) -> list[str]:
    found = curves.series(rows)
    parts = [page.heading("Curves")]
    if not found:
        return [*parts, page.paragraph("The log has no row of a step yet.", "note")]
    parts += [page.paragraph(finding.text, "note" if finding.good else "warn") for finding in curves.judge(found, config)]
    resumed = [row["step"] for row in rows if row.get("event") == "resume"]
    figure = curves.figure(found, config, resumed)
    parts.append(page.svg_of(figure, "Curves of the log: " + ", ".join(found)))
    legend = "Below each curve: what it does in a healthy run. Grey: collapsed, or unrelated."
    legend += " Dashed: the loss when all similarities are alike." if curves.alike_loss(config) else ""
    legend += " Dotted: resumed here." if resumed else ""
    parts.append(page.paragraph(legend))
    values = [
        (curves.TITLES.get(name, name), *(f"{v:.4g}" for v in (own[0][1], own[-1][1], min(v for _, v in own), max(v for _, v in own))))
        for name, own in found.items()
    ]
    return [*parts, page.table(values, ("in the log", "first row", "last row", "smallest", "largest"))]


def _downstream(run: Path) -> list[str]:
    """Tables of every task, then their pictures, those of a volume one below the other."""
    parts, found = [], {}
    for what in TASKS:
        file = run / what / "results.json"
        if not file.is_file():
            continue
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            parts += [page.heading(f"Downstream: {what}"), *_results(result)]
            for path in sorted((run / what / "overlays").glob("*.png")):
                found.setdefault(path.stem, []).append((what, path))
        except (ValueError, KeyError, TypeError, OSError) as error:
            parts.append(page.paragraph(f"{file} cannot be read: {error!r}", "warn"))
    names = sorted(name for name in found if len(found[name]) == max(map(len, found.values())))  # those of both commands, where there are any
    for k, i in enumerate(spread(len(names), OVERLAYS) if names else []):
        parts += _predictions(names[i], found[names[i]], k == 0)
    return parts


def _predictions(case: str, pictures: list[tuple[str, Path]], first: bool) -> list[str]:
    parts = []
    if first:
        text = "Test volumes where the truth has most foreground. Colours are classes; on predictions the truth's outline is white: colours should fill it. "
        text += "Dice is the mean over the classes of the whole volume, of the first draw of labelled patients."
        parts += [page.heading("Predictions"), page.paragraph(text)]
    for what, path in pictures:
        try:
            parts.append(page.picture(page.png_from(path), f"Labels of {case}: truth and predictions of {what}", f"{case}, {what}."))
        except OSError as error:
            parts.append(page.paragraph(f"{path} cannot be read: {error!r}", "warn"))
    return parts


def _results(result: dict) -> list[str]:
    classes = result["classes"]
    rows = []
    for entry in result["summary"]:
        dice = entry["dice"]
        seeds = " ".join("-" if v is None else f"{v:.3f}" for v in entry["seeds"].values())
        weights = {"pretrained": "pre-trained", "random": "from random"}.get(entry["arm"], entry["arm"])
        rows.append((entry["labelled"], weights, *(_mean(dice[name]) for name in classes), _interval(dice["mean"]), seeds, entry["patients"]))
    parts = [page.table(rows, ("labelled", "weights", *classes, "mean Dice [95 % interval]", "each seed", "test patients"))]
    for difference in result["differences"]:
        text = f"{difference['labelled']} labelled: pre-trained minus random {_interval(difference, '+')} Dice, paired by patient."
        parts.append(page.paragraph(text))
    return parts


def _mean(interval: dict) -> str:
    return "-" if interval["mean"] is None else f"{interval['mean']:.3f}"


def _interval(interval: dict, sign: str = "") -> str:
    if interval["mean"] is None:
        return "-"
    mean = f"{interval['mean']:{sign}.3f}"
    return mean if interval["low"] is None else f"{mean} [{interval['low']:{sign}.3f}, {interval['high']:{sign}.3f}]"


def _pictures(run: Path, config: Config, count: int) -> list[str]:
    trained = load_trained(run)
    if not (run / "split.json").is_file():
        raise FileNotFoundError(f"run must hold split.json to choose patients from, got {run}")
    cases = discover(config.data.root)
    prepared = prepare(cases, config.data, config.data.cache or run / "cache")
    split = read_split(run / "split.json", cases)
    chosen = choose(prepared.cases, split, count, config.pretrain.seed)
    look = LOOKS[config.loss.method]
    own = trained.heads or not look.heads
    pairs = [make_pair(case, part, look, trained.method, trained.backbone, index, own) for index, (part, case) in enumerate(chosen)]
    colours = Colours.fit([features for pair in pairs for features in (pair.features_1, pair.features_2)])
    following = {pair.case: [*pairs[i + 1 :], *pairs[:i]] for i, pair in enumerate(pairs)}
    others = {case: other for case, rest in following.items() for other in rest[:1]}  # a patient has one pair
    infonce = config.loss.method == "pix2rep" and config.loss.objective == "infonce"
    scene = pictures.Scene(colours, config.loss.temperature if infonce else None, others, tuple(pairs))
    origin = f"Features of the backbone at step {trained.steps}, from {trained.file.name}"
    origin += "." if trained.ended else ": the run has not ended, these are its newest checkpoint's."
    shares = ", ".join(f"{share:.0%}" for share in colours.explained)
    parts = [page.heading("Pictures"), page.paragraph(f"{origin} {look.words(config)}")]
    if not own:
        parts.append(page.paragraph("What the heads make of features is not shown: they are in checkpoints only, and the run has none of that step.", "warn"))
    parts += [
        page.paragraph(
            f"Colours: one PCA for all pictures, so that a colour means the same everywhere; component 1 is lightness, 2 blue to yellow, 3 green to red "
            f"({shares} of the variance). Cosines are of features minus their mean over all pictures."
        ),
        page.table(
            [(pair.case, PARTS[pair.part], *_numbers(agreement(pair, colours))) for pair in pairs],
            ("case", "part", "cosine, corresponding pixels", "unrelated pixels", f"match within {NEAR:g} pixels", "by chance"),
        ),
        page.paragraph(
            "The more the first cosine exceeds the second, and matches exceed chance, the better features follow the transform; validation patients, "
            "which pre-training never saw, should do about as well."
        ),
    ]
    for pair in pairs:
        parts.append(page.heading(f"{pair.case}, {PARTS[pair.part]} patient: {pair.plane}", 3))
        for panel in look.panels:
            drawn = panel(pair, scene)
            if drawn is not None:
                parts.append(page.picture(page.png_of(drawn.figure), drawn.alt, drawn.caption))
    return parts


def choose(cases: list[PreparedCase], split: dict, count: int, seed: int) -> list[tuple[str, PreparedCase]]:
    """(part, case): the first volume of up to `count` patients each of the parts PARTS, drawn by `seed`."""
    chosen = []
    for k, part in enumerate(PARTS):
        first: dict[str, PreparedCase] = {}
        for case in sorted(cases, key=lambda case: case.id):
            if case.patient in split[part]:
                first.setdefault(case.patient, case)
        patients = sorted(first)
        order = np.random.default_rng([seed, k]).permutation(len(patients))[:count]
        chosen += [(part, first[patients[i]]) for i in sorted(order)]
    return chosen


def _numbers(found: dict[str, float]) -> list[str]:
    form = {"corresponding": "{:.2f}", "unrelated": "{:.2f}", "found": "{:.0%}", "chance": "{:.1%}"}
    return ["-" if found[name] != found[name] else form[name].format(found[name]) for name in form]
