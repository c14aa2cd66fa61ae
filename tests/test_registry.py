import importlib.metadata
from collections import OrderedDict

import pytest

from mgd.errors import UserError
from mgd.registry import METHODS, Registry


def test_duplicate_name_raises():
    registry = Registry("thing", "mgd.things", [])
    registry.register("a")(int)
    with pytest.raises(ValueError, match="'a' is registered twice"):
        registry.register("a")(str)


def test_unknown_name_gives_the_closest_and_all():
    with pytest.raises(UserError, match="unknown method 'mgdd'; did you mean 'mgd'.*choices: .*supervised"):
        METHODS.get("mgdd")


def _entry_point(monkeypatch, value):
    point = importlib.metadata.EntryPoint(name="extra", value=value, group="mgd.things")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point] if group == "mgd.things" else [])


def test_plugin_from_an_entry_point(monkeypatch):
    _entry_point(monkeypatch, "collections:OrderedDict")
    registry = Registry("thing", "mgd.things", [])
    assert registry.names() == ["extra"]  # without loading it
    assert registry.get("extra") is registry.get("extra") is OrderedDict
    assert registry.package_of("extra") is None
    decorated = Registry("thing", "mgd.things", [])
    decorated.register("extra")(OrderedDict)  # by its own module, imported for another of its classes
    assert decorated.get("extra") is OrderedDict


def test_a_module_of_ours_that_fails_to_import_is_named_every_time():
    registry = Registry("thing", "mgd.things", ["no_such_module_here"])
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_module_here"):
            registry.get("a")


def test_plugin_that_fails_to_import_is_named(monkeypatch):
    _entry_point(monkeypatch, "no_such_module_here")
    with pytest.raises(UserError, match="plug-in 'extra' .*no_such_module_here.* fails to import"):
        Registry("thing", "mgd.things", []).get("extra")
