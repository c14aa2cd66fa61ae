"""A step of each method against a plain restatement with separate forwards."""

import pytest
import torch
from conftest import Toy
from torch.nn import functional

from mgd.errors import UserError
from mgd.losses.cwd import channel_wise
from mgd.losses.kd import pixel_kl
from mgd.losses.supervised import ohem_cross_entropy
from mgd.methods.base import OHEM
from mgd.methods.cps import CPS, CPSConfig
from mgd.methods.cwd import CWD, CWDConfig
from mgd.methods.kd import KD, KDConfig
from mgd.methods.mean_teacher import MeanTeacher, MeanTeacherConfig
from mgd.methods.mgd import MGD, ImageTerm, MGDConfig, PixelTerm, RegionTerm, TeacherTargets
from mgd.methods.supervised import Supervised, SupervisedConfig
from mgd.models.segmenter import SegOutput


def _mixed(batch, first, second):
    return torch.where(batch["mask"], second, first)


def test_mgd_is_equation_7(batch):
    student, deep, wide = Toy(0), Toy(1, channels=9), Toy(2, channels=12)
    config = MGDConfig(
        pixel=PixelTerm(teachers=("deep", "wide"), weight=0.7),
        image=ImageTerm(teachers=("deep",), weight=0.02, reduction="sum"),
        region=RegionTerm(teachers=("wide",), weight=30.0, grid=3),
    )
    out = MGD(config, [student], {"deep": deep, "wide": wide}).step(batch, 0)

    image = _mixed(batch, batch["unlabeled"], batch["mix"])
    labeled, mixed = student(batch["image"]), student(image)
    expected = functional.cross_entropy(labeled.logits, batch["label"], ignore_index=255)
    for teacher in (deep, wide):
        pseudo = _mixed(batch, teacher(batch["unlabeled"]).logits, teacher(batch["mix"]).logits).argmax(1)
        expected = expected + 0.7 * functional.cross_entropy(labeled.logits, teacher(batch["image"]).logits.argmax(1))
        expected = expected + 0.7 * functional.cross_entropy(mixed.logits, pseudo)
    pooled = (mixed.logits.mean((2, 3)) - deep(image).logits.mean((2, 3))).abs().sum()

    def correlation(features):
        vectors = functional.adaptive_avg_pool2d(features, 3).flatten(2).transpose(1, 2)
        return functional.cosine_similarity(vectors[:, :, None], vectors[:, None], dim=-1)

    region = ((correlation(mixed.features) - correlation(wide(image).features)) ** 2).mean()
    expected = expected + 0.02 * pooled + 30.0 * region
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert set(out.log) == {
        "loss_supervised",
        "loss_pixel_labeled",
        "loss_pixel_unlabeled",
        "loss_image",
        "loss_region",
    }
    first = torch.autograd.grad(out.loss, student.parameters())
    second = torch.autograd.grad(expected, student.parameters())
    for mine, plain in zip(first, second, strict=True):
        assert torch.allclose(mine, plain, rtol=1e-4, atol=1e-7)


def test_regions_finer_than_the_features_are_refused(batch):
    fine, coarse = Toy(0), Toy(1)
    cells = min(fine(batch["image"]).features.shape[-2:])
    for grid in (cells, cells + 1):
        method = MGD(MGDConfig(region=RegionTerm(teachers=("wide",), grid=grid)), [fine], {"wide": coarse})
        if grid == cells:
            method.step(batch, 0)
            continue
        with pytest.raises(UserError, match=rf"grid = {grid} is finer than the {cells} x .* of \[teachers.wide\]"):
            method.step(batch, 0)
        seen = {"wide": TeacherTargets(features=torch.ones(2, 4, grid, grid))}  # of a cache
        with pytest.raises(UserError, match=r"of the features of \[student\]; make it smaller, \[data\] crop larger"):
            method.student_loss(fine(torch.cat([batch["image"]] * 2)), batch["label"], seen)


def test_mgd_with_soft_labels_learns_from_probabilities(batch):
    student, deep, wide = Toy(0), Toy(1), Toy(2)
    config = MGDConfig(pixel=PixelTerm(teachers=("deep", "wide"), labels="soft"))
    out = MGD(config, [student], {"deep": deep, "wide": wide}).step(batch, 0)
    mixed = student(_mixed(batch, batch["unlabeled"], batch["mix"])).logits
    expected = functional.cross_entropy(student(batch["image"]).logits, batch["label"], ignore_index=255)
    for teacher in (deep, wide):
        for seen, said in (
            (student(batch["image"]).logits, teacher(batch["image"]).logits.softmax(1)),
            (mixed, _mixed(batch, teacher(batch["unlabeled"]).logits, teacher(batch["mix"]).logits).softmax(1)),
        ):
            expected = expected + functional.cross_entropy(seen, said)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_mgd_weighs_what_teachers_give_to_rare_classes(batch, labels):
    student, deep, wide = Toy(0), Toy(1), Toy(2)
    pixels = torch.tensor([1000, 400, 100, 25])
    config = MGDConfig(pixel=PixelTerm(teachers=("deep", "wide"), labels=labels, class_balance=0.5))
    method = MGD(config, [student], {"deep": deep, "wide": wide})
    method.weigh_classes(pixels)
    out = method.step(batch, 0)

    weights = (pixels.double().quantile(0.5) / pixels.double()).sqrt()
    mixed = student(_mixed(batch, batch["unlabeled"], batch["mix"])).logits
    labeled = student(batch["image"]).logits
    # The true labels are not weighted: [method] class_balance is a key of its own.
    expected = functional.cross_entropy(labeled, batch["label"], ignore_index=255)
    for teacher in (deep, wide):
        seen = _mixed(batch, teacher(batch["unlabeled"]).logits, teacher(batch["mix"]).logits)
        for logits, said in ((labeled, teacher(batch["image"]).logits), (mixed, seen)):
            if labels == "hard":
                expected = expected + functional.cross_entropy(logits, said.argmax(1), weight=weights)
            else:
                shares = said.softmax(1) * weights[:, None, None]
                expected = expected - (shares * logits.log_softmax(1)).sum() / shares.sum()
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert out.loss.item() != pytest.approx(
        MGD(config, [student], method.teachers).step(batch, 0).loss.item(), rel=1e-3
    )


def test_mgd_runs_a_teacher_only_on_what_its_terms_need(batch):
    sizes = {}

    class Counting(Toy):
        def forward(self, image):
            sizes[self.name] = image.shape[0]
            return super().forward(image)

    teachers = {"deep": Counting(1), "wide": Counting(2)}
    for name, teacher in teachers.items():
        teacher.name = name
    config = MGDConfig(
        pixel=PixelTerm(teachers=("deep",), on=("unlabeled",)), image=ImageTerm(), region=RegionTerm(teachers=("wide",))
    )
    out = MGD(config, [Toy(0)], teachers).step(batch, 0)
    assert sizes == {"deep": 4, "wide": 2}
    assert set(out.log) == {"loss_supervised", "loss_pixel_unlabeled", "loss_region"}


def test_teachers_stay_frozen(batch):
    teacher, student = Toy(1, norm=True), Toy(0, norm=True)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    config = MGDConfig(pixel=PixelTerm(teachers=("deep",)))
    method = MGD(config, [student], {"deep": teacher})
    for network in method.networks:
        network.train()
    method.step(batch, 0).loss.backward()
    assert not teacher.training and all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert student.norm.num_batches_tracked == 1


def test_cps_step(batch):
    first, second = Toy(0), Toy(1)
    out = CPS(CPSConfig(weight=1.5), [first, second]).step(batch, 0)
    image = _mixed(batch, batch["unlabeled"], batch["mix"])
    expected = 0.0
    for network, other in ((first, second), (second, first)):
        pseudo = _mixed(batch, other(batch["unlabeled"]).logits, other(batch["mix"]).logits).argmax(1)
        expected += functional.cross_entropy(network(batch["image"]).logits, batch["label"], ignore_index=255).item()
        expected += 1.5 * functional.cross_entropy(network(image).logits, pseudo).item()
    assert out.loss.item() == pytest.approx(expected, rel=1e-10)


def test_cps_in_bf16_trains_every_weight(batch):
    networks = [Toy(0).float(), Toy(1).float()]
    for network in networks:
        network.forward = lambda image, n=network: SegOutput(
            functional.interpolate(n.classifier(n.body(image.float()).tanh()).float(), scale_factor=2), None
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        CPS(CPSConfig(), networks).step(batch, 0).loss.backward()
    assert all(p.grad is not None and p.grad.any() for network in networks for p in network.parameters())


def test_region_level_is_not_computed_in_bf16():
    from mgd.losses.mgd import region_level

    student, teacher = torch.randn(2, 2, 8, 14, 14)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = region_level(student, teacher)
    assert inside.item() == region_level(student, teacher).item()


@pytest.mark.parametrize("on", [("labeled",), ("unlabeled",), ("labeled", "unlabeled")])
@pytest.mark.parametrize(("method", "config", "loss"), [(KD, KDConfig, pixel_kl), (CWD, CWDConfig, channel_wise)])
def test_kd_and_cwd_average_the_teachers_on_what_the_recipe_says(batch, method, config, loss, on):
    student, deep, wide = Toy(0), Toy(1), Toy(2)
    section = config(distill_from=("deep", "wide"), on=on, weight=2.0, temperature=3.0)
    out = method(section, [student], {"deep": deep, "wide": wide}).step(batch, 0)
    image = _mixed(batch, batch["unlabeled"], batch["mix"])
    expected = functional.cross_entropy(student(batch["image"]).logits, batch["label"], ignore_index=255)
    views = {"labeled": batch["image"], "unlabeled": image}
    for teacher in (deep, wide):
        for view in on:
            seen = student(views[view]).logits, teacher(views[view]).logits
            expected = expected + 2.0 * loss(*seen, 3.0) / 2
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    out.loss.backward()
    assert all(parameter.grad is None for parameter in deep.parameters())
    with pytest.raises(UserError, match="distill_from = 'deep': no such teacher"):
        method.check(section, ("depp",))
    with pytest.raises(UserError, match="nothing uses the teacher 'other'; name it in distill_from"):
        method.check(section, ("deep", "wide", "other"))


@pytest.mark.parametrize(("method", "config", "loss"), [(KD, KDConfig, pixel_kl), (CWD, CWDConfig, channel_wise)])
def test_kd_and_cwd_mix_what_was_cached_and_leave_out_its_padding(batch, method, config, loss):
    student, size = Toy(0), batch["mask"].shape[-2:]
    seen, shown = {}, {}
    for index, key in enumerate(("image", "unlabeled", "mix")):
        generator = torch.Generator().manual_seed(index)
        seen[key] = torch.randn(2, 4, *size, generator=generator, dtype=torch.float64)
        shown[key] = torch.rand(2, *size, generator=generator) < 0.7
    cached = {f"{key}/deep/fine_logits": value for key, value in seen.items()}
    cached |= {f"{key}/valid": value for key, value in shown.items()}
    out = method(config(distill_from=("deep",), weight=2.0), [student]).step(batch | cached, 0)
    temperature = config(distill_from=("deep",)).temperature
    expected = functional.cross_entropy(student(batch["image"]).logits, batch["label"], ignore_index=255)
    image, mixed = _mixed(batch, batch["unlabeled"], batch["mix"]), _mixed(batch, seen["unlabeled"], seen["mix"])
    inside = torch.where(batch["mask"][:, 0], shown["mix"], shown["unlabeled"])
    for pixels, logits, where in ((batch["image"], seen["image"], shown["image"]), (image, mixed, inside)):
        expected = expected + 2.0 * loss(student(pixels).logits, logits, temperature, where)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_mean_teacher_step_and_average(batch):
    student = Toy(0)
    method = MeanTeacher(MeanTeacherConfig(weight=7.0, decay=0.9), [student])
    with torch.no_grad():
        student.classifier.weight += 0.1  # so that student and average differ
    before = [p.clone() for p in method.average.parameters()]
    out = method.step(batch, 3)
    image = _mixed(batch, batch["unlabeled"], batch["mix"])
    first, second = (method.average(batch[key]).logits.softmax(1) for key in ("unlabeled", "mix"))
    distance = (student(image).logits.softmax(1) - _mixed(batch, first, second)).square().mean()
    expected = functional.cross_entropy(student(batch["image"]).logits, batch["label"], ignore_index=255)
    assert out.loss.item() == pytest.approx((expected + 7.0 * distance).item(), rel=1e-10)
    method.after_step(3)  # 1 - 1 / 4 is still below the decay
    for old, new, current in zip(before, method.average.parameters(), student.parameters(), strict=True):
        assert torch.allclose(new, 0.75 * old + 0.25 * current)
    assert MeanTeacherConfig().weight == 100.0 and CWDConfig(distill_from=("a",)).weight == 3.0
    before = [p.clone() for p in method.average.parameters()]
    method.after_step(1000)  # 1 - 1 / 1001 is past it
    for old, new, current in zip(before, method.average.parameters(), student.parameters(), strict=True):
        assert torch.allclose(new, 0.9 * old + 0.1 * current)
    assert method.deployed() is method.average and set(method.averages) == {"average"}


def test_ohem_takes_the_place_of_cross_entropy(batch):
    student = Toy(0)
    out = Supervised(SupervisedConfig(ohem=OHEM(threshold=0.01, min_kept_per_image=20)), [student]).step(batch, 0)
    expected = ohem_cross_entropy(student(batch["image"]).logits, batch["label"], 0.01, 40)[0]
    half = ohem_cross_entropy(student(batch["image"]).logits, batch["label"], 0.01, 20)[0]
    assert half.item() != pytest.approx(expected.item(), rel=1e-3)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    plain = Supervised(SupervisedConfig(), [student]).step(batch, 0).loss
    assert out.loss > plain


def test_remix_mixes_what_the_teachers_said_of_both_images(batch):
    student, deep, wide = Toy(0), Toy(1, channels=9), Toy(2, channels=12)
    terms = {"image": ImageTerm(teachers=("deep",)), "region": RegionTerm(teachers=("wide",), grid=2)}
    calls = []
    for teacher in (deep, wide):
        teacher.register_forward_hook(lambda module, args, out: calls.append(args[0].shape[0]))
    config = MGDConfig(pixel=PixelTerm(teachers=("deep", "wide")), remix="predictions", **terms)
    out = MGD(config, [student], {"deep": deep, "wide": wide}).step(batch, 0)
    assert calls == [6, 6]  # labelled, first and second; no pass over the mixed images
    mixed = student(_mixed(batch, batch["unlabeled"], batch["mix"]))
    first, second = deep(batch["unlabeled"]), deep(batch["mix"])
    pooled = (mixed.logits.mean((2, 3)) - _mixed(batch, first.logits, second.logits).mean((2, 3))).abs().sum()
    assert out.log["loss_image"].item() == pytest.approx(pooled.item(), rel=1e-10)
    first, second = wide(batch["unlabeled"]).features, wide(batch["mix"]).features
    share = functional.avg_pool2d(batch["mask"].double(), 2)
    from mgd.losses.mgd import region_level

    expected = region_level(mixed.features, first * (1 - share) + second * share, 2)
    assert out.log["loss_region"].item() == pytest.approx(expected.item(), rel=1e-10)
    plain = MGDConfig(pixel=PixelTerm(teachers=("deep", "wide")), **terms)
    exact = MGD(plain, [student], {"deep": deep, "wide": wide}).step(batch, 0)
    assert exact.log["loss_pixel_unlabeled"].item() == pytest.approx(out.log["loss_pixel_unlabeled"].item(), rel=1e-12)
    assert exact.log["loss_image"].item() != pytest.approx(out.log["loss_image"].item(), rel=1e-6)
