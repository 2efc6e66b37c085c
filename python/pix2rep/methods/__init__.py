"""One file a paper: which views, which heads, one step."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from pix2rep.config import Config, from_dict

if TYPE_CHECKING:
    from torch import nn

    from pix2rep.methods.base import Method

METHODS = {
    "pix2rep": "Pix2Rep",
    "bim": "BIM",
