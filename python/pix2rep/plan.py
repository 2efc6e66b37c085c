"""A comparison's plan: methods x label counts x seeds, read from YAML, checked like a config file.

    plan = load_plan("acdc_small", data="../data/acdc", out="runs/acdc")
    plan.config_of("pix2rep", seed=1)  # every option of that pre-training

Imports nothing heavy, as `config` does not.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from pix2rep import config as config_file
from pix2rep.config import Config
from pix2rep.typed import ConfigError, Loader, shown, typed

PLANS = Path(__file__).with_name("plans")
ALL = "all"
SHARED = ("data", "split", "downstream")  # the same for every method, or the comparison would be none
OWN_KEYS = {  # options that the plan has a key for: two places would contradict each other
    "data.root": "data", "data.cache": "out", "pretrain.seed": "seeds", "downstream.seeds": "seeds", "downstream.labelled": "labelled",
}  # fmt: skip
RESERVED = ("cache", "overlays")  # folders beside those of the methods
Task = Literal["probe", "finetune", "mean_teacher"]
TASKS = get_args(Task)


@dataclass
class Method:
    """One arm. `seeds`, `labelled`, `tasks`: fewer than the plan's; None: the same."""

    pretrain: bool = True  # false: random initialisation
    options: dict[str, dict[str, Any]] = field(default_factory=dict)  # over the plan's
    match_time: str | None = None  # method whose pre-training time this one's pretrain.steps are set to fill
    seeds: tuple[int, ...] | None = None
    labelled: tuple[str, ...] | None = None
    tasks: tuple[Task, ...] | None = None


@dataclass
class Plan:
    """`labelled` holds counts as text, or "all". `base`: the config that every method starts from."""

    data: str | None = None
    out: str | None = None
    config: str | None = None
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    methods: dict[str, Method] = field(default_factory=dict)
    reference: str | None = None
    labelled: tuple[str, ...] = ("1", ALL)
    tasks: tuple[Task, ...] = ("probe", "finetune")
    seeds: tuple[int, ...] = (0, 1, 2)
    base: Config = field(default_factory=Config)

    def config_of(self, method: str, seed: int = 0, steps: int | None = None) -> Config:
        """Every option of a method, what its network leaves open decided; `steps` overrides pretrain.steps."""
        made = _with_options(self.base, self.methods[method].options, f"methods.{method}.options")
        made = replace(made, pretrain=replace(made.pretrain, seed=seed, steps=steps or made.pretrain.steps))
        return config_file.completed(made)

    def counts(self, total: int) -> tuple[int, ...]:
        """Label counts of the plan, where `total` patients have labels; ascending, each once."""
        return tuple(sorted({count_of(entry, total) for entry in self.labelled}))

    def seeds_of(self, method: str) -> tuple[int, ...]:
        return self.methods[method].seeds or self.seeds

    def cells(self, total: int) -> list[tuple[str, int, str, int]]:
        """(task, labelled, method, seed) of every cell, in this order of nesting."""
        return [
            (task, n, name, seed)
            for task in self.tasks
            for n in self.counts(total)
            for name, method in self.methods.items()
            for seed in self.seeds_of(name)
            if task in (method.tasks or self.tasks) and n in {count_of(entry, total) for entry in method.labelled or self.labelled}
        ]

    def pretrainings(self) -> list[tuple[str, int]]:
        """(method, seed) of every pre-training."""
        return [(name, seed) for name, method in self.methods.items() if method.pretrain for seed in self.seeds_of(name)]


def count_of(entry: str, total: int) -> int:
    return total if entry == ALL else int(entry)


def load_plan(file: str | Path, overrides: Iterable[str] = (), data: str | Path | None = None, out: str | Path | None = None) -> Plan:
    """Read a YAML file (a path, or a packaged plan's name such as "smoke"); "section.key=value" overrides go over its options.

    `data` and `out` go over the plan's. Raises ConfigError, or FileNotFoundError when `file` is neither a path nor a packaged plan.
    """
    path = config_file.find(file, PLANS, "plan must be a YAML file or one of")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} must be YAML: {error}") from error
    plan = plan_of(values, overrides)
    plan.data, plan.out = (str(given) if given else own for given, own in ((data, plan.data), (out, plan.out)))
    return plan


def plan_of(values: Mapping[str, Any], overrides: Iterable[str] = ()) -> Plan:
    """The plan that a YAML file's `values` say. Raises ConfigError."""
    values = dict(_mapping(values, "a plan"))
    methods = values.pop("methods", None)
    plan = _read(Plan(), values, "", hidden=("methods", "base"))
    plan.methods = {str(name): _method(str(name), entry) for name, entry in _mapping(methods, "methods").items()}
    plan.base = _with_options(config_file.load(plan.config), plan.options, "options")
    for text in overrides:
        config_file.override(plan.base, text)
    for key in OWN_KEYS:
        if key in {text.partition("=")[0].strip() for text in overrides}:
            raise ConfigError(f"{key} must be left out: the plan's key {OWN_KEYS[key]!r} decides it")
    config_file.check(plan.base)
    _check(plan)
    return plan


def to_dict(plan: Plan) -> dict[str, Any]:
    """Plain values that `plan_of` reads again: every option spelled out under `options`, no preset named."""
    full = config_file.to_dict(plan.base)
    options = {section: {k: v for k, v in keys.items() if f"{section}.{k}" not in OWN_KEYS} for section, keys in full.items()}
    methods = {
        name: {part.name: _plain(value) for part in fields(method) if (value := getattr(method, part.name)) not in (None, {})}
        for name, method in plan.methods.items()
    }
    kept = {key: _plain(getattr(plan, key)) for key in ("data", "out", "reference", "labelled", "tasks", "seeds")}
    return kept | {"methods": methods, "options": options}


def _plain(value: Any) -> Any:
    return [int(v) if isinstance(v, str) and v.isdigit() else v for v in value] if isinstance(value, tuple) else value


def _mapping(value: Any, what: str) -> Mapping:
    if not isinstance(value, Mapping) or not value:
        raise ConfigError(f"{what} must be a section of keys, got {value!r}")
    return value


def _read(target, values: Mapping[str, Any], prefix: str, hidden: tuple[str, ...] = ()):
    """Set the fields of a dataclass from `values`, each by its annotation."""
    kinds = {part.name: part.type for part in fields(target) if part.name not in hidden}
    for key, value in values.items():
        if key not in kinds:
            close = get_close_matches(str(key), [*kinds, *(() if prefix else ("methods",))], n=1)
            section = f"options.{key}" if key in vars(Config()) else None
            hint = f"did you mean {prefix}{section or close[0]}?" if section or close else f"keys: {', '.join(kinds)}"
            raise ConfigError(f"unknown key {prefix + str(key)!r}; {hint}")
        if key == "options":
            read = {k: dict(_mapping(v, f"{prefix}options.{k}")) for k, v in _mapping(value, f"{prefix}options").items()}
        elif key == "labelled":
            read = _labelled(value, f"{prefix}labelled")
        else:
            read = typed(value, kinds[key], f"{prefix}{key}")
        if isinstance(read, tuple):
            if not read:
                raise ConfigError(f"{prefix}{key} must not be empty, got []")
            read = tuple(dict.fromkeys(read))
        setattr(target, key, read)
    return target


def _labelled(value: Any, key: str) -> tuple[str, ...]:
    entries = value if isinstance(value, list) else [value]
    for entry in entries:
        if entry != ALL and (type(entry) is not int or entry < 1):
            raise ConfigError(f'{key} must be a list: each a number of patients, at least 1, or "all", got {shown(value)}')
    return tuple(str(entry) for entry in entries)


def _method(name: str, values: Any) -> Method:
    key = f"methods.{name}"
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name) or name in RESERVED:
        raise ConfigError(f"a method's name must be letters, digits and _ . + -, and none of {', '.join(RESERVED)}, got {name!r}")
    method = _read(Method(), _mapping(values, key) if values else {}, f"{key}.")
    for section in method.options:
        if section in SHARED:
            raise ConfigError(f"{key}.options must leave {section} to the plan's options, which hold for every method")
    if method.match_time and not method.pretrain:
        raise ConfigError(f"{key}.match_time needs a pre-training, got pretrain: false")
    return method


def _with_options(base: Config, options: Mapping[str, Mapping[str, Any]], what: str) -> Config:
    for section, entries in options.items():
        for name in entries:
            if f"{section}.{name}" in OWN_KEYS:
                raise ConfigError(f"{what}.{section}.{name} must be left out: the plan's key {OWN_KEYS[f'{section}.{name}']!r} decides it")
    values = config_file.to_dict(base)
    merged = {section: values.get(section, {}) | dict(options.get(section, {})) for section in (*values, *options)}
    try:
        config = config_file.from_dict(merged)
        config_file.check(config)
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from None
    return config


def _check(plan: Plan) -> None:
    names = list(plan.methods)
    if min(plan.seeds) < 0:
        raise ConfigError(f"seeds must be at least 0, got {shown(plan.seeds)}")
    if plan.reference is not None and plan.reference not in names:
        raise ConfigError(f"reference must be one of the methods {', '.join(names)}, got {plan.reference!r}")
    for name, method in plan.methods.items():
        plan.config_of(name)
        for key in ("seeds", "labelled", "tasks"):
            own, allowed = getattr(method, key), getattr(plan, key)
            if own and not set(own) <= set(allowed):
                raise ConfigError(f"methods.{name}.{key} must be among the plan's {shown(allowed)}, got {shown(own)}")
        other = plan.methods.get(method.match_time or name)
        if method.match_time and (other is None or method.match_time == name or not other.pretrain or other.match_time):
            raise ConfigError(
                f"methods.{name}.match_time must name another method that is pre-trained for a number of steps of its own, got {method.match_time!r}"
            )
