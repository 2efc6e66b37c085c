"""Which volumes a folder holds: ACDC's layout, `imagesTr`/`labelsTr` (MSD, nnU-Net), or any folder of NIfTI files."""

import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

_EXPECTED = "data.root must be a folder with .nii or .nii.gz files"
_ACDC_FRAME = re.compile(r"(patient\d+)_frame(\d+)(_gt)?\.nii(?:\.gz)?$")
_ACDC_4D = re.compile(r"patient\d+_4d\.nii(?:\.gz)?$")
_LABEL = re.compile(r"[_-](?:gt|seg|label|labels|mask)$")
_CHANNEL = re.compile(r"_(\d{4})$")


@dataclass(frozen=True)
class Case:
    """One volume. `patient` is the unit of every split: volumes of one patient never part."""

    id: str  # unique in the data set, fit for a file name
    patient: str
    frame: str | None  # "ED" | "ES" where known
    image: Path
    label: Path | None

    @property
    def source(self) -> Path:
        """The file that `nifti.save_like` imitates."""
        return self.image


def discover(root) -> list[Case]:
    """Cases under `root`, sorted by id.

    ACDC: `patientNNN_frameMM.nii[.gz]` anywhere below, labels `_gt`; ED and ES from `Info.cfg`, else the lower number is ED, the next ES.
    4D files are ignored.
    MSD, nnU-Net: `imagesTr` and `labelsTr`; of several nnU-Net channels the first, `_0000`, is taken.
    Anything else: every NIfTI file below; `NAME_gt`, `NAME_seg`, `NAME_label`, `NAME_mask` are the labels of `NAME`; a patient is the first
    folder below the one that all share, or a file that lies in none.

    Raises FileNotFoundError when there is no such folder or no volume in it, ValueError for two files with one id.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{_EXPECTED}, got {root} ({'a file' if root.exists() else 'no such folder'})")
    files = _files(root)
    if any(_ACDC_FRAME.match(p.name) for p in files):
        cases = _acdc(files)
    elif (root / "imagesTr").is_dir():
        cases = _decathlon(root, files)
    else:
        cases = _any_folder(root, files)
    if not cases:
        raise FileNotFoundError(f"{_EXPECTED}, got {root} ({len(files)} found{', none of them an image' if files else ''})")
    return _unique(cases)


def class_names(root) -> tuple[str, ...]:
    """Names of labels 1..K: from `dataset.json` (MSD and nnU-Net spelling), ("RV", "MYO", "LV") for ACDC's layout, () otherwise."""
    root = Path(root)
    file = root / "dataset.json"
    if file.is_file():
        return _names_from_json(file)
    if any(_ACDC_FRAME.match(p.name) for p in _files(root)):
        return ("RV", "MYO", "LV")
    return ()


def disease_group(case) -> str | None:
    """`Group` of ACDC's Info.cfg beside the source of a Case or PreparedCase, such as "DCM"; None where there is no such file."""
    return _info(_info_file(case.source)).get("Group")


def _files(root: Path) -> list[Path]:
    """NIfTI files below `root` by name, sorted. A broken link is one too: reading it says so. Other folders' links are not followed."""

    def refused(error: OSError) -> None:
        log.warning("%s cannot be looked into (%s): its volumes are not seen", error.filename, error.strerror)

    found = []
    for folder, below, names in os.walk(root, onerror=refused):
        found += [Path(folder, name) for name in names if not name.startswith(".") and _stem(Path(name)) is not None]
        for name in below:
            if os.path.islink(os.path.join(folder, name)):
                log.warning("%s is a link to a folder: its volumes are not seen", os.path.join(folder, name))
    return sorted(found)


def _acdc(files: list[Path]) -> list[Case]:
    frames: dict[str, list[tuple[int, Path]]] = {}
    labels: dict[tuple[str, int], Path] = {}
    ignored = []
    for path in files:
        match = _ACDC_FRAME.match(path.name)
        if not match:
            ignored.append(path)
        elif match[3]:
            labels[match[1], int(match[2])] = path
        else:
            frames.setdefault(match[1], []).append((int(match[2]), path))
    other = [p for p in ignored if not _ACDC_4D.match(p.name)]
    if ignored:
        log.info("%d 4D cine files ignored", len(ignored) - len(other))
    if other:
        log.warning("%d files ignored that are no patientNNN_frameMM volume, first %s", len(other), other[0])
    cases = []
    for patient, found in frames.items():
        found.sort()
        info = _info(_info_file(found[0][1]))
        if "ED" in info or "ES" in info:
            names = {int(info[name]): name for name in ("ES", "ED") if info.get(name, "").isdigit()}
        else:
            names = {number: name for (number, _), name in zip(found, ("ED", "ES"), strict=False)}
        for number, path in found:
            cases.append(Case(f"{patient}_frame{number:02d}", patient, names.get(number), path, labels.pop((patient, number), None)))
    _warn_of_orphans(list(labels.values()))
    return cases


def _decathlon(root: Path, files: list[Path]) -> list[Case]:
    labels = {_stem(p): p for p in files if p.parent == root / "labelsTr"}
    images = [p for p in files if p.parent == root / "imagesTr"]
    # `_0000` is a channel only where the name without it has a label or every image carries such a number: names may end in four digits.
    numbered = all(_CHANNEL.search(_stem(p)) for p in images)
    cases, channels = [], 0
    for path in images:
        name, channel = _stem(path), _CHANNEL.search(_stem(path))
        if channel and name not in labels and (numbered or name[: channel.start()] in labels):
            name = name[: channel.start()]
            if int(channel[1]):
                channels += 1
                continue
        cases.append(Case(name, name, None, path, labels.get(name)))
    _warn_of_orphans([labels[name] for name in labels.keys() - {case.id for case in cases}])
    if channels:
        log.warning("%d files of further channels ignored: the first channel of each case is used", channels)
    return cases


def _warn_of_orphans(labels: list[Path]) -> None:
    if labels:
        log.warning("%d labels without an image ignored, first %s", len(labels), min(labels))


def _any_folder(root: Path, files: list[Path]) -> list[Case]:
    named = [(p.with_name(_stem(p)), p) for p in files]
    names = {name for name, _ in named}
    labels, images, rivals = {}, [], []
    for name, path in named:
        owner = name.with_name(_LABEL.sub("", name.name) or name.name)
        if owner != name and owner in names:
            rivals += [owner] if owner in labels else []
            labels[owner] = path
        else:
            images.append((name, path))
    if rivals:
        log.warning("%d images have several label files; the last by name is taken, such as %s", len(set(rivals)), labels[rivals[0]])
    parents = [name.relative_to(root).parent.parts for name, _ in images]
    shared = 0
    while images and all(len(parts) > shared and parts[shared] == parents[0][shared] for parts in parents):
        shared += 1
    cases = []
    for name, path in images:
        parts = name.relative_to(root).parts[shared:]
        cases.append(Case("_".join(parts), parts[0], None, path, labels.get(name)))
    return cases


def _unique(cases: list[Case]) -> list[Case]:
    seen: dict[str, Case] = {}
    twice = [(seen[case.id], case) for case in cases if seen.setdefault(case.id, case) is not case]
    if twice:
        pairs = "\n  ".join(f"{first.id!r} from both {first.image} and {second.image}" for first, second in twice)
        raise ValueError(f"case ids must be unique, got {pairs}")
    return sorted(cases, key=lambda case: case.id)


def _stem(path: Path) -> str | None:
    for suffix in (".nii.gz", ".nii"):
        if path.name.endswith(suffix):
            return path.name[: -len(suffix)]
    return None


def _info_file(image: Path) -> Path:
    beside = image.parent / "Info.cfg"
    return beside if beside.is_file() else image.parent.parent / "Info.cfg"  # some copies hold each frame in a folder of its own


def _info(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    pairs = (line.split(":", 1) for line in file.read_text(errors="replace").splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _names_from_json(file: Path) -> tuple[str, ...]:
    try:
        labels = json.loads(file.read_text(encoding="utf-8")).get("labels", {}).items()
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} must hold a JSON object, labels one too, got {error}") from error
    names, highest = {}, 0
    for key, value in labels:
        if str(key).isdigit():  # MSD: {"1": "Anterior"}
            names[int(key)] = str(value)
        elif isinstance(value, int):  # nnU-Net: {"Anterior": 1}
            names[value] = str(key)
        elif isinstance(value, list):  # nnU-Net's regions: several labels, none named by it
            highest = max([highest, *(k for k in value if isinstance(k, int))])
    return tuple(names.get(k, str(k)) for k in range(1, max([highest, *names]) + 1))
