import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from mgd.checkpoint import FILE, load_checkpoint, save_checkpoint
from mgd.errors import UserError
from mgd.files import write_json, write_text


def _trained(name, seed=0):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    make = {"sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "adamw": torch.optim.AdamW}[name]
    return network, make(network.parameters())


def _steps(network, optimizer, first, count):
    for step in range(first, first + count):
        torch.manual_seed(step)
        network(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_resuming_is_bit_exact(name, tmp_path):
    network, optimizer = _trained(name)
    _steps(network, optimizer, 0, 5)
    save_checkpoint(tmp_path, {"network0": network}, optimizer, {"step": 5, "seconds": 1.5})
    _steps(network, optimizer, 5, 5)
    again, its_optimizer = _trained(name, seed=9)
    assert load_checkpoint(tmp_path, {"network0": again}, its_optimizer) == {"step": 5, "seconds": 1.5}
    _steps(again, its_optimizer, 5, 5)
    for first, second in zip(network.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(first, second)


def test_nothing_to_resume(tmp_path):
    network, optimizer = _trained("sgd")
    assert load_checkpoint(tmp_path / "none", {"network0": network}, optimizer) is None


def test_a_foreign_or_damaged_file_is_refused(tmp_path):
    network, optimizer = _trained("sgd")
    save_checkpoint(tmp_path, {"network0": network}, optimizer, {"step": 1})
    other = nn.Conv2d(3, 4, 3)
    with pytest.raises(UserError, match="cannot be resumed from: .*start over with --restart"):
        load_checkpoint(tmp_path, {"network0": other}, torch.optim.SGD(other.parameters()))
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be resumed from"):
        load_checkpoint(tmp_path, {"network0": network}, optimizer)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    write_text(tmp_path / "a.json", "old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(
        UserError, match="a.json cannot be written: No space left on device; what stood there is intact"
    ):
        write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_json_is_strict_and_readable_by_others(tmp_path):
    write_json(tmp_path / "a.json", {"iou": [1.0, float("nan")]})
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == {"iou": [1.0, None]}
    assert (tmp_path / "a.json").stat().st_mode & 0o444 == 0o444


@pytest.mark.parametrize(("there", "named"), [({"format": 99}, 99), ({}, 1)])
def test_a_resume_point_of_another_version_is_refused(tmp_path, there, named):
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    save_checkpoint(tmp_path, {"network": network}, optimizer, {"step": 1})
    path = tmp_path / "state.safetensors"
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["mgd"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    del header["format"]  # the first ones had none
    save_file(tensors, path, metadata={"mgd": json.dumps(header | there)})
    message = f"it is of format {named}, this version of mgd writes 3; start over with --restart"
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path, {"network": network}, optimizer)
