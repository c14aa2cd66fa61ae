import pytest
import torch
from torch import nn

from mgd.errors import UserError
from mgd.inference import _starts, count_confusion, predict, predict_logits
from mgd.models.segmenter import SegOutput
from mgd.sections import Eval


class PixelWise(nn.Module):
    """Logits that depend on the pixel alone: any tiling must give the whole-image result."""

    def forward(self, image):
        return SegOutput(torch.stack([image[:, 0].float(), image[:, 1] * 2.0], dim=1), None)


@pytest.mark.parametrize("size", [(40, 40), (97, 33), (20, 100), (10, 12), (64, 64)])
def test_windows_cover_every_size(size):
    image = torch.randint(256, (2, 3, *size), dtype=torch.uint8)
    whole = predict_logits(PixelWise(), image, Eval(mode="whole"), 32)
    tiled = predict_logits(PixelWise(), image, Eval(mode="slide"), 32)
    assert torch.allclose(whole, tiled, atol=1e-4)


def test_windows_are_the_crop_at_two_thirds_stride():
    assert _starts(800, 800, 2 / 3) == [0]
    assert _starts(1024, 800, 2 / 3) == [0, 224]
    assert _starts(2048, 800, 2 / 3) == [0, 533, 1067, 1248]


def test_one_window_is_the_whole_image():
    torch.manual_seed(0)
    network = nn.Conv2d(3, 4, 5, padding=2)

    class Context(nn.Module):
        def forward(self, image):
            return SegOutput(network(image.float()), None)

    image = torch.randint(256, (1, 3, 30, 40), dtype=torch.uint8)
    whole = predict_logits(Context(), image, Eval(mode="whole"), 32)
    assert torch.equal(whole, predict_logits(Context(), image, Eval(mode="slide", crop=64), 32))
    assert not torch.allclose(whole, predict_logits(Context(), image, Eval(mode="slide"), 32), atol=1e-3)


def test_scales_and_flip_average_probabilities():
    torch.manual_seed(0)
    network = nn.Conv2d(3, 4, 3, padding=1)

    class Context(nn.Module):
        def forward(self, image):
            return SegOutput(network(image.float() / 255), None)

    image = torch.randint(256, (1, 3, 20, 30), dtype=torch.uint8)
    expected = torch.zeros(1, 4, 20, 30)
    for size in ((20, 30), (10, 15)):
        for flip in (False, True):
            view = nn.functional.interpolate(image.float(), size, mode="bilinear")
            logits = Context()(view.flip(-1)).logits.flip(-1) if flip else Context()(view).logits
            expected += nn.functional.interpolate(logits, (20, 30), mode="bilinear").softmax(1)
    done = predict(Context(), image, Eval(scales=(1.0, 0.5), flip=True), 32)
    assert torch.equal(done, expected.argmax(1))
    assert torch.equal(predict(Context(), image, Eval(), 32), Context()(image).logits.argmax(1))


def test_an_image_that_the_network_cannot_take_is_named():
    class Picky(nn.Module):
        def forward(self, image):
            assert image.shape[-1] % 7 == 0, "width must be a multiple of 7"
            return SegOutput(image.float(), None)

    items = [[("a", torch.zeros(3, 4, 14), torch.zeros(4, 14).long()), ("b", torch.zeros(3, 4, 8), torch.zeros(4, 8))]]
    with pytest.raises(UserError, match="^b cannot be predicted: width must be a multiple of 7.*; try --set eval"):
        count_confusion(Picky(), items, 3, Eval(), 32, torch.device("cpu"))
