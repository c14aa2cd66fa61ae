import pytest
import torch

from mgd.models.segmenter import build_segmenter
from mgd.optim import build_optimizer, poly_lr, total_steps
from mgd.recipe import parse_model
from mgd.sections import Optim


def test_norms_and_biases_are_not_decayed():
    head = {"name": "deeplabv3plus", "channels": 16}
    section = parse_model({"backbone": "test_convnext", "pretrained": False, "output_stride": 32, "head": head}, "test")
    model = build_segmenter(section, ("a", "b"), ((0, 0, 0),) * 2, seed=0)
    for name, cls in (("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)):
        optimizer = build_optimizer(Optim(name=name, lr=0.1, steps=1, weight_decay=0.01), [model])
        assert isinstance(optimizer, cls)
        decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        spared = {
            id(p)
            for m in model.modules()
            for n, p in m.named_parameters(recurse=False)
            if n == "bias" or "Norm" in type(m).__name__ or n == "gamma"
        }
        assert len(decay) == len(list(model.parameters()))
        assert all(value == (0.0 if key in spared else 0.01) for key, value in decay.items())


def test_poly_schedule():
    section = Optim(lr=0.01, steps=100)
    assert poly_lr(section, 0, 100) == 0.01
    assert poly_lr(section, 50, 100) == pytest.approx(0.01 * 0.5**0.9)
    assert 0 < poly_lr(section, 99, 100) < 0.01 * 0.02


def test_steps_of_the_voc_protocol():
    # 1/16 of VOC: 662 labelled, 9920 unlabelled, 32 epochs of the larger set at batch 8.
    assert total_steps(Optim(lr=0.01, epochs=32), 662, 9920) == 39680
    assert total_steps(Optim(lr=0.01, epochs=1, batch_size=8), 20, 9) == 3
    assert total_steps(Optim(lr=0.01, steps=7), 20, 9) == 7
