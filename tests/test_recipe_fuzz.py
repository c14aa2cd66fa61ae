"""Mutated recipes: a clear refusal or a sane recipe, never a traceback."""

import copy
import math
import tomllib

import tomli_w
from conftest import ROOT, TINY, merged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mgd.errors import UserError
from mgd.recipe import load, parse

FILES = ("quickstart", "city_r18_1-8", "voc_r18_1-8_kd", "camvid/half_lite0_1-16_mean_teacher", "folder")
FILES += ("quickstart_online",)
BASES = [TINY, *(tomllib.loads((ROOT / "recipes" / f"{name}.toml").read_text()) for name in FILES)]
CACHED = {"teachers": {"mode": "cached"}, "method": {"remix": "predictions"}}
CACHED["cache"] = {"scales": [1.0, 1.5], "flip": True, "cell": 8}
BASES.append(merged(BASES[1], CACHED))

NASTY = st.one_of(
    st.sampled_from([None, "", " ", "..", "../x", "0", "1/0", "-1", "nan", "{}", "{seed", "\x00", "ü" * 300, "mgd"]),
    st.sampled_from([0, -1, 1, 2**31, 2**63 - 1, -(2**63), 1e-320, 1e308, -0.0, math.nan, math.inf, True, False]),
    st.sampled_from([[], {}, [[]], [None], [1, "a"], {"name": 3}, {"name": "mgd"}, [0.0], ["deep"], [[0, 0, 0]] * 2]),
    st.text(max_size=8),
    st.integers(-(10**30), 10**30),
    st.floats(),
)


def _tables(table, path=()):
    yield path
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _tables(value, (*path, key))


@st.composite
def mutated(draw):
    table = copy.deepcopy(draw(st.sampled_from(BASES)))
    for _ in range(draw(st.integers(1, 3))):
        inner = table
        for key in draw(st.sampled_from(list(_tables(table)))):
            inner = inner[key]
        keys = sorted(inner)
        if draw(st.integers(0, 4)) == 0 or not keys:
            inner[draw(st.text(max_size=6))] = copy.deepcopy(draw(NASTY))
        elif draw(st.integers(0, 5)) == 0:
            del inner[draw(st.sampled_from(keys))]
        else:
            inner[draw(st.sampled_from(keys))] = copy.deepcopy(draw(NASTY))
    return table


def sane(recipe):
    """What no recipe may be, whatever the models say; written without them."""
    optim, data, run = recipe.optim, recipe.data, recipe.run
    assert 0 < optim.lr < math.inf and optim.batch_size >= 1 and 0 <= optim.momentum < 1
    assert 0 <= optim.weight_decay < math.inf and 0 <= optim.power < math.inf
    assert (optim.steps or optim.epochs) and min(optim.steps or 1, optim.epochs or 1) > 0
    assert data.crop >= 32 and data.scales and all(0 < scale < math.inf for scale in data.scales)
    assert 0 < data.image_scale < math.inf and data.workers >= 0
    assert run.seed >= 0 and "/" not in run.name and not run.name.startswith(".") and run.log_every >= 1
    assert recipe.student.output_stride in (8, 16, 32) and recipe.student.head.channels >= 1
    for name in ("weight", "temperature", "decay"):
        assert 0 <= getattr(recipe.method, name, 0) < math.inf
    teachers = set(getattr(recipe.method, "teachers", recipe.teachers))
    for term in ("pixel", "image", "region"):
        if section := getattr(recipe.method, term, None):
            assert 0 <= section.weight < math.inf and set(section.teachers) <= teachers
    assert not recipe.reference or 0 <= recipe.reference.miou <= 100


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(mutated())
def test_mutated_tables(table):
    try:
        recipe = parse(table, source="fuzz.toml")
    except UserError as error:
        assert all(line.startswith("fuzz.toml: ") for line in str(error).splitlines())
        return
    sane(recipe)
    assert parse(tomllib.loads(recipe.to_toml()), source="again").to_dict() == recipe.to_dict()


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(BASES), st.data())
def test_mutated_text(tmp_path_factory, base, data):
    text = tomli_w.dumps(base).encode()
    at = data.draw(st.integers(0, len(text)))
    until = data.draw(st.integers(at, min(len(text), at + 40)))
    text = text[:at] + data.draw(st.binary(max_size=12)) + text[until:]
    path = tmp_path_factory.getbasetemp() / "fuzz.toml"
    path.write_bytes(text)
    override = data.draw(st.one_of(st.none(), st.text(max_size=20), st.just("optim.lr=0.1")))
    try:
        sane(load(path, [] if override is None else [override]))
    except UserError as error:
        assert str(error).strip()
