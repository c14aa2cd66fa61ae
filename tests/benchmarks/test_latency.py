import numpy as np
import pytest

from mgd.benchmarks import inference
from mgd.errors import UserError
from mgd.recipe import parse_model

pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")


@pytest.mark.slow
def test_students_are_listed_with_what_fits(monkeypatch):
    heads = {name: inference.COMPARED_HEADS[name] for name in ("dense, width 256", "lraspp")}
    monkeypatch.setattr(inference, "COMPARED_HEADS", heads)
    rows = inference.students(["test_resnet"], 21, 64, 1, target_ms=1e9, repetitions=3)
    assert [row["p50 ms"] for row in rows] == sorted(row["p50 ms"] for row in rows)
    cost = {row["head"]: row["GMACs"] for row in rows}
    assert cost["lraspp"] < cost["dense, width 256"] and all(row["fits"] for row in rows)
    monkeypatch.setattr(inference, "COMPARED_HEADS", {"lraspp": heads["lraspp"]})
    assert not inference.students(["test_resnet"], 21, 64, 1, target_ms=0.0, repetitions=1)[0]["fits"]
    with pytest.raises(UserError, match="no such model"):
        inference.students(["mobilnet"], 21, 64, 1, 1.0, 1)


@pytest.mark.slow
def test_beside_segmentation_models_pytorch(monkeypatch):
    pytest.importorskip("segmentation_models_pytorch", reason="segmentation-models-pytorch is not installed")
    head = {"name": "lraspp", "channels": 16}
    table = {"backbone": "test_resnet", "pretrained": False, "output_stride": 16, "head": head}
    timed = []

    def alternate(calls, repetitions, device):
        timed.extend((name, call.args[0].dtype, call().dtype) for name, call in calls.items())
        return {"theirs": 8.0, "ours": 4.0, "int8": 1.0, "baked": 3.0, "baked int8": 2.0}

    monkeypatch.setattr(inference, "alternate", alternate)
    rows = inference.suite(parse_model(table, source="test"), 3, 64, 1, repetitions=1)
    names = ["infer: fp32, ms", "infer: fp32 -> int8, ms", "infer: baked, fp32 -> int8, ms"]
    assert [row["name"] for row in rows] == names
    assert [row["ratio"] for row in rows] == [2.0, 4.0, 1.5]
    pixels, logits, classes = np.float32, np.float32, np.uint8
    assert timed == [
        ("theirs", pixels, logits),
        ("ours", pixels, logits),
        ("int8", pixels, logits),
        ("baked", np.uint8, classes),
        ("baked int8", np.uint8, classes),
    ]
