"""Every format that is installed: the file against the network, in the file's own runtime."""

import copy
import errno

import numpy as np
import pytest
import torch
from timm.layers import AvgPool2dSame, Conv2dSame

from mgd.errors import UserError
from mgd.export import base
from mgd.export.base import Deployed, Exporter, Int8, Target, trace
from mgd.export.verify import Findings, Sample, judge, verified_export
from mgd.models.segmenter import build_segmenter
from mgd.recipe import parse_model
from mgd.registry import EXPORTERS

CLASSES, COLORS = list("abcd"), [(0, 0, 0)] * 4


def network(name="deeplabv3plus_separable", backbone="test_efficientnet"):
    head = {"name": name, "channels": 16} | ({} if name == "lraspp" else {"aspp_rates": [1]})
    section = parse_model({"backbone": backbone, "pretrained": False, "output_stride": 16, "head": head}, source="test")
    torch.manual_seed(0)
    model = build_segmenter(section, CLASSES, COLORS, seed=0)
    for module in model.modules():  # as trained, so that folding BatchNorm is put to the test
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def samples(count, sizes=((64, 96),), labeled=False):
    generator = torch.Generator().manual_seed(1)
    found = []
    for index in range(count):
        size = sizes[index % len(sizes)]
        coarse = torch.rand(1, 3, 8, 8, generator=generator) * 255
        pixels = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")[0].round().to(torch.uint8)
        label = torch.randint(4, size, generator=generator) if labeled else None
        found.append(Sample(pixels, label))
    return found


def exporter(name):
    found = EXPORTERS.get(name)()
    try:
        found.check()
    except UserError as error:
        pytest.skip(str(error))
    return found


@pytest.mark.parametrize(
    "name, kind",
    [
        *((name, kind) for name in ("onnx", "torch_export") for kind in ("plain", "dynamic", "baked")),
        *(("onnx", kind) for kind in ("dynamic baked", "baked cpu", "dynamic baked cpu")),
        *((name, kind) for name in ("executorch", "litert") for kind in ("dynamic", "baked")),
        ("openvino", "baked"),
        pytest.param("openvino", "dynamic", marks=pytest.mark.slow),
    ],
)
def test_file_does_what_the_network_does(tmp_path, name, kind):
    found, model = exporter(name), network()
    target = Target(64, 96, dynamic="dynamic" in kind, baked="baked" in kind, cpu="cpu" in kind)
    path = tmp_path / f"file{found.suffix}"
    found.write(Deployed(model, target), target, path)
    run = found.open(path, threads=1)
    for sample in samples(3, sizes=((64, 96), (100, 70), (65, 129)) if target.dynamic else ((64, 96),)):
        pixels = sample.pixels[None]
        given = pixels.numpy() if target.baked else pixels.float().numpy()
        with torch.no_grad():
            logits = model.eval()(pixels).logits
        if target.baked:
            output = run(given)
            assert output.dtype == np.uint8 and output.shape == logits.shape[:1] + logits.shape[2:]
            assert (output == logits.argmax(dim=1).numpy()).mean() > 0.999
        else:
            assert np.allclose(run(given), logits.numpy(), atol=1e-3)


def test_the_program_of_one_size_has_no_alias():
    target = Target(64, 96)  # whole cells: nothing is cut off
    program = trace(Deployed(network(), target), target).run_decompositions({})  # as Core ML's converter is given it
    assert not [node for node in program.graph.nodes if "alias" in str(node.target)]


def test_pooling_backbones_take_any_size(tmp_path):
    found, model, target = exporter("torch_export"), network(backbone="test_resnet"), Target(64, 96, dynamic=True)
    path = tmp_path / "a.pt2"
    found.write(Deployed(model, target), target, path)
    run = found.open(path, threads=1)
    for sample in samples(4, sizes=((64, 96), (100, 70), (65, 129), (97, 67))):
        with torch.no_grad():
            logits = model.eval()(sample.pixels[None]).logits
        assert np.allclose(run(sample.pixels[None].float().numpy()), logits.numpy(), atol=1e-3)


@pytest.mark.parametrize(("cpu", "int8"), [(False, False), (True, False), (True, True)])
def test_onnx_compares_classes_on_the_innermost_axis_for_cpus_alone(tmp_path, cpu, int8):
    found, target, path = exporter("onnx"), Target(64, 96, baked=True, cpu=cpu), tmp_path / "a.onnx"
    pixels = [sample.pixels[None].numpy() for sample in samples(2)]
    found.write(Deployed(network(), target), target, path, Int8(pixels) if int8 else None)
    import onnx

    nodes = onnx.load(path).graph.node
    argmax = next(node for node in nodes if node.op_type == "ArgMax")
    axis = next(attribute.i for attribute in argmax.attribute if attribute.name == "axis")
    enlarge = next(node for node in nodes if argmax.input[0] in node.output)  # in float, with nothing in between
    assert (axis, enlarge.op_type) == (3 if cpu else 1, "Resize")


@pytest.mark.parametrize("head", ["lraspp"])
def test_other_heads(tmp_path, head):
    found, target = exporter("onnx"), Target(64, 64)
    row, _ = verified_export(
        found, "onnx", network(head, "test_resnet"), target, tmp_path / "a.onnx", samples(2), None, 1.0, 1
    )
    assert row["same class %"] > 99.9 and row["logits off by"] < 1e-3 and row["mIoU %"] is None


@pytest.mark.parametrize("name", ["onnx", "openvino", "executorch"])
def test_int8_is_smaller_and_stays_close(tmp_path, name):
    found, model, target, pictures = exporter(name), network(), Target(64, 96), samples(8, labeled=True)
    path = tmp_path / f"file{found.suffix}"
    row, _ = verified_export(found, name, model, target, path, pictures, pictures, 100.0, 1)
    assert 75 < row["same class %"] < 100 and abs(row["mIoU %"] - row["network's mIoU %"]) < 5
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    weights = path / "model.bin" if path.is_dir() else path
    assert weights.stat().st_size < 3.5 * sum(value.numel() for value in model.parameters())  # of fp32: 4


class Rounded(Exporter):
    """Rounds logits, the less so the more layers stay in float."""

    suffix, quantizes, step = ".txt", True, 0.0

    def write(self, network, target, path, int8=None):
        float_layers = int8.float_layers if int8 else 0
        self.network, self.step = network, 0.0 if float_layers >= 8 else 2.0
        path.write_text(str(float_layers))

    def open(self, path, threads):
        def run(pixels):
            logits = self.network(torch.from_numpy(pixels))
            return (logits.div(self.step).round() * self.step if self.step else logits).numpy()

        return run


def test_int8_tries_again_with_more_layers_in_float(tmp_path):
    path, pictures = tmp_path / "a.txt", samples(4)
    _, notes = verified_export(Rounded(), "rounded", network(), Target(64, 96), path, pictures, pictures, 1.0, 1)
    assert notes == ["the first 8 convolutions stay in float"] and path.read_text() == "8"


def test_a_file_that_does_not_verify_is_an_error(tmp_path):
    with pytest.raises(UserError, match="--format rounded: the file does not do what the network does and was not"):
        verified_export(Rounded(), "rounded", network(), Target(64, 96), tmp_path / "a", samples(2), None, 1.0, 1)


def test_a_full_disk_is_not_blamed_on_the_network(tmp_path):
    class Full(Exporter):
        def write(self, *_):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="^the file cannot be written: No space left on device; make room, or name"):
        verified_export(Full(), "full", network(), Target(64, 96), tmp_path / "model.x", samples(1), None, 1.0, 1)


def test_judge():
    def findings(off=0.0, up_to=10.0, agreement=100.0, miou=None, miou_network=None):
        return Findings(20, off, up_to, agreement, miou, miou_network)

    assert judge(findings(), False, 1.0) is None
    assert judge(findings(off=9e-3), False, 1.0) is None  # of logits up to 10
    assert judge(findings(off=2e-2), False, 1.0) == "logits are off by 0.02; at most 0.01 is allowed"
    assert "only 99.80 %" in judge(findings(agreement=99.8), False, 1.0)
    assert judge(findings(agreement=96.0, off=3.0), True, 1.0) is None
    assert "only 94.00 %" in (few := judge(findings(agreement=94.0), True, 1.0)) and "leave out --int8" in few
    assert judge(findings(agreement=90.0, miou=50.0, miou_network=50.9), True, 1.0) is None
    lost = judge(findings(agreement=99.0, miou=50.0, miou_network=51.1), True, 1.0)
    assert lost == "it loses 1.10 points of mIoU; at most 1 may go (--max-drop)"


def test_miou_of_the_file(tmp_path):
    """Against sets of pixels, at the size of the labels."""
    found, model, target = exporter("onnx"), network(), Target(64, 64)
    pictures = samples(4, sizes=((64, 96), (50, 70)), labeled=True)
    row, _ = verified_export(found, "onnx", model, target, tmp_path / "a.onnx", pictures, None, 1.0, 1)
    intersections = unions = 0
    for sample in pictures:
        pixels = torch.nn.functional.interpolate(
            sample.pixels[None].float(), size=(64, 64), mode="bilinear", antialias=True
        )
        logits = model.eval()(pixels).logits
        resized = torch.nn.functional.interpolate(logits, size=sample.label.shape, mode="bilinear").argmax(1)
        for index in range(4):
            a, b = resized[0] == index, sample.label == index
            intersections = intersections + torch.eye(4)[index] * (a & b).sum()
            unions = unions + torch.eye(4)[index] * (a | b).sum()
    assert row["mIoU %"] == pytest.approx((intersections / unions).mean().item() * 100, abs=0.05)


@pytest.mark.parametrize("kernel, stride, dilation", [(3, 2, 1), (5, 2, 1), (3, 1, 2), (4, 3, 1), (1, 1, 1)])
def test_same_padding_is_timms(kernel, stride, dilation):
    theirs = Conv2dSame(3, 4, kernel, stride=stride, dilation=dilation)
    ours = copy.deepcopy(theirs)
    ours.__class__ = base._SimplyPadded
    for size in ((32, 33), (31, 34), (35, 36)):
        image = torch.randn(1, 3, *size)
        assert torch.equal(ours(image), theirs(image))


@pytest.mark.parametrize("stride", [1, 2])
def test_pools_are_those_of_timm_and_torch(stride):
    halving = base._HalvingPool if stride == 2 else torch.nn.AvgPool2d
    for theirs, swapped in (
        (AvgPool2dSame(2, stride, ceil_mode=True, count_include_pad=False), base._SimplyPaddedPool),
        (torch.nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False), halving),
        (torch.nn.AvgPool2d((2, 2), stride, ceil_mode=True), halving),
        (torch.nn.AvgPool2d(2, stride, ceil_mode=True, divisor_override=1), torch.nn.AvgPool2d),
        (torch.nn.AvgPool2d(2, stride, padding=1, ceil_mode=True), torch.nn.AvgPool2d),
    ):
        original = type(theirs)
        ours = base.traceable(theirs)
        assert type(ours) is swapped and type(theirs) is original
        for size in ((32, 33), (31, 34), (35, 36), (7, 5)):
            image = torch.randn(1, 3, *size)
            assert torch.allclose(ours(image), theirs(image), atol=1e-6)
