"""Labelled pixels that are not spread evenly: two processes learn what one would."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from torch.nn import functional

from mgd.methods.base import OHEM
from mgd.methods.supervised import Supervised, SupervisedConfig

RANK = """
import sys, torch
from safetensors.torch import load_file, save_file
from mgd.methods.base import OHEM
from mgd.methods.mgd import MGD, MGDConfig, PixelTerm, TeacherTargets
from mgd.methods.supervised import Supervised, SupervisedConfig
from mgd.models.segmenter import SegOutput
rank, file = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method="file://" + file + ".store", rank=rank, world_size=2)
batch = load_file(file)
logits, label = batch["logits"], batch["label"]

def save_mean(name, loss, mine):
    # loss and gradient, as DistributedDataParallel averages them
    loss.backward()
    gradient = torch.zeros_like(logits)
    gradient[rank :: 2] = mine.grad
    both = torch.cat([loss.detach().reshape(1), gradient.flatten()])
    torch.distributed.all_reduce(both)
    if rank == 0:
        save_file({"mean": both / 2}, file + "." + name)

hard = OHEM(threshold=0.3, min_kept_per_image=0)
for name, ohem, balance in (("all", None, 0), ("ohem", hard, 0), ("all.rare", None, 1), ("ohem.rare", hard, 1)):
    mine = logits[rank :: 2].clone().requires_grad_()
    method = Supervised(SupervisedConfig(ohem=ohem, class_balance=balance), [])
    method.weigh_classes(torch.tensor([16, 8, 4, 2, 1]))
    if balance:
        method.class_weights *= 1e-3  # only their ratios matter, also where they sum to less than 1
    save_mean(name, method.labeled_loss(mine, label[rank :: 2]), mine)
for labels in ("hard", "soft"):
    mine = logits[rank :: 2].clone().requires_grad_()
    pixel = PixelTerm(teachers=("deep",), labels=labels, class_balance=1, on=("unlabeled",))
    method = MGD(MGDConfig(pixel=pixel), [], {"deep": torch.nn.Identity()})
    method.weigh_classes(torch.tensor([16, 8, 4, 2, 1]))
    output = SegOutput(torch.cat([mine, mine]), torch.cat([mine, mine]))
    seen = {"deep": TeacherTargets(unlabeled=batch[labels][rank :: 2])}
    ignored = torch.full_like(label[rank :: 2], 255)
    save_mean(labels, method.student_loss(output, ignored, seen).loss, mine)
torch.distributed.destroy_process_group()
"""


def test_two_processes_have_the_loss_and_gradient_of_one(tmp_path):
    torch.manual_seed(0)
    logits, label = torch.randn(4, 5, 6, 7) * 2, torch.randint(5, (4, 6, 7))
    label[0, :5], label[2] = 255, 255  # the first process has one row of labels, the second all of them
    file = tmp_path / "batch.safetensors"
    hard_labels = torch.randint(5, (4, 6, 7)) * torch.tensor([0, 1, 1, 1])[:, None, None]  # of one image all frequent
    soft_labels = (torch.randn(4, 5, 6, 7) * 2).softmax(1)
    save_file({"logits": logits, "label": label, "hard": hard_labels, "soft": soft_labels}, file)
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(file)], cwd=ROOT) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    loss = functional.cross_entropy(logits.requires_grad_(), label, ignore_index=255, reduction="none")
    hard = (label != 255) & (logits.softmax(1).gather(1, label.clamp(max=4)[:, None])[:, 0] <= 0.3)
    rare = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0])[label.clamp(max=4)]
    same = torch.ones_like(rare)
    cases = {
        "all": (label != 255, same),
        "ohem": (hard, same),
        "all.rare": (label != 255, rare),
        "ohem.rare": (hard, rare),
    }
    means = {name: (loss * weight)[chosen].sum() / weight[chosen].sum() for name, (chosen, weight) in cases.items()}
    weights = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0])
    means["hard"] = functional.cross_entropy(logits, hard_labels, weight=weights)
    shares = soft_labels * weights[:, None, None]
    means["soft"] = -(shares * logits.log_softmax(1)).sum() / shares.sum()
    for name, mean in means.items():
        (gradient,) = torch.autograd.grad(mean, logits, retain_graph=True)
        found = load_file(f"{file}.{name}")["mean"]
        assert found[0].item() == pytest.approx(mean.item(), rel=1e-6)
        assert torch.allclose(found[1:].view_as(gradient), gradient, rtol=1e-5, atol=1e-8)
    with_ohem = Supervised(SupervisedConfig(ohem=OHEM(threshold=0.3, min_kept_per_image=0)), [])
    assert with_ohem.labeled_loss(logits, label).item() == pytest.approx(loss[hard].mean().item(), rel=1e-6)
