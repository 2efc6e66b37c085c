"""One file a paper: which views, which heads, one step."""

from pix2rep.config import Config


def build_method(config: Config):
    """The method named by loss.method. Raises ValueError for an unknown one."""
    from pix2rep.methods.pix2rep import Pix2Rep

    methods = {"pix2rep": Pix2Rep}
    if config.loss.method not in methods:
        raise ValueError(f"loss.method must be one of {', '.join(methods)}, got {config.loss.method!r}")
    return methods[config.loss.method](config)
