"""Values from YAML and the command line, typed by a dataclass field's annotation: bool, int, float, str, Literal, tuple, `| None`."""

import contextlib
import math
import re
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

import yaml


class ConfigError(ValueError):
    """A key that does not exist, or a value that its field does not take; the message names key, expectation and value."""


class Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: `off` stays text and 1e-3 is a number (PyYAML reads them as False and as text)."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(?:true|True|false|False)$"), list("tTfF"))
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"),
    list("-+.0123456789"),
)


def parsed(text: str, kind: Any, key: str) -> Any:
    """A command line's text as `kind`. Text fields take it as it stands; "64,64" is a list."""
    options = get_args(kind) if _is_union(kind) else (kind,)
    if type(None) in options and text.lower() in ("null", "none", "~", ""):
        return None
    if any(option is str or get_origin(option) is Literal for option in options):
        return typed(text, kind, key)
    try:
        value = yaml.load(text, Loader)
        if isinstance(value, str) and any(get_origin(option) is tuple for option in options):
            value = [yaml.load(entry, Loader) for entry in value.strip("()").split(",") if entry.strip()]
    except yaml.YAMLError:
        value = text
    return typed(value, kind, key)


def typed(value: Any, kind: Any, key: str) -> Any:
    """`value` as the annotation `kind`, or ConfigError."""
    if _is_union(kind):
        options = get_args(kind)
        if value is None and type(None) in options:
            return None
        options = [option for option in options if option is not type(None)]
        if len(options) == 1:
            return typed(value, options[0], key)
        for option in options:
            with contextlib.suppress(ConfigError):
                return typed(value, option, key)
    if get_origin(kind) is tuple and value is not None and not isinstance(value, Mapping):
        entries = list(value) if isinstance(value, list | tuple) else [value]
        kinds = get_args(kind)
        if kinds[-1] is not Ellipsis and len(entries) != len(kinds):
            raise ConfigError(f"{key} must be {_name(kind)}, got {shown(value)}")
        return tuple(typed(entry, kinds[0], key) for entry in entries)
    if get_origin(kind) is Literal and value in get_args(kind):
        return value
    if kind is int and isinstance(value, float) and value.is_integer():  # 1e4
        return int(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value):
        return float(value)
    if isinstance(kind, type) and type(value) is kind and kind in (bool, int, str):
        return value
    raise ConfigError(f"{key} must be {_name(kind)}, got {shown(value)}")


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _name(kind: Any) -> str:
    if _is_union(kind):
        return " or ".join(_name(option) for option in get_args(kind))
    if get_origin(kind) is Literal:
        return " or ".join(repr(option) for option in get_args(kind))
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        return f"a list: each {_name(kinds[0])}" if kinds[-1] is Ellipsis else f"a list of {len(kinds)}: each {_name(kinds[0])}"
    return {bool: "true or false", int: "an integer", float: "a number", str: "text"}[kind]


def shown(value: Any) -> str:
    return repr(list(value)) if isinstance(value, tuple) else repr(value)
