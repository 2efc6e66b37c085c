"""Which backend a call gets: a name is final, "auto" takes the first that can run and is not known to be slower."""

import sys
from types import SimpleNamespace

import pytest
import torch

from pix2rep_kernels import dispatch


@pytest.fixture
def hub(monkeypatch):
    """A fake op with every backend; its hub may be given hooks."""
    hub = SimpleNamespace(why_not=lambda backend, tensors: None)
    monkeypatch.setitem(dispatch.HOMES, "fake", "fakehome")
    monkeypatch.setitem(sys.modules, "fakehome", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "fakehome.ops", SimpleNamespace(fake=hub))
    monkeypatch.setitem(sys.modules, "fakehome.ops.fake", hub)
    monkeypatch.setattr(dispatch, "why_unavailable", lambda op, backend: None)
    monkeypatch.delenv("PIX2REP_BACKEND", raising=False)
    return hub


def slow_when_tiny(backend, tensors):
    return "a call costs more than the work" if backend == "cpu" and tensors[0].numel() < 10 else None


def test_auto_leaves_out_what_is_slower(hub):
    assert dispatch.choose("fake", "auto", [torch.zeros(3)]) == "cpu"
    hub.why_slower = slow_when_tiny
    assert dispatch.choose("fake", "auto", [torch.zeros(3)]) == "reference"
    assert dispatch.choose("fake", "auto", [torch.zeros(30)]) == "cpu"


def test_a_name_is_final(hub, monkeypatch):
    hub.why_slower = slow_when_tiny
    assert dispatch.choose("fake", "cpu", [torch.zeros(3)]) == "cpu"
    assert dispatch.why_not("fake", "cpu", [torch.zeros(3)]) is None
    monkeypatch.setenv("PIX2REP_BACKEND", "cpu")
    assert dispatch.choose("fake", "auto", [torch.zeros(3)]) == "cpu"


def test_the_last_resort_is_not_asked(hub):
    hub.why_slower = lambda backend, tensors: "never"
    assert dispatch.choose("fake", "auto", [torch.zeros(3)]) == "reference"


def test_a_limit_raises_by_name_and_falls_back_on_auto(hub):
    hub.why_not = lambda backend, tensors: "it is too odd" if backend == "cpu" else None
    assert dispatch.choose("fake", "auto", [torch.zeros(3)]) == "reference"
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run fake: it is too odd"):
        dispatch.choose("fake", "cpu", [torch.zeros(3)])
