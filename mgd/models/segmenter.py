"""The segmenter: plain pixels in, logits at input size out; saved as safetensors + config.json."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from mgd.errors import UserError, explained, one_line
from mgd.files import write_aside, write_json
from mgd.models.backbones import build_backbone, feature_maps
from mgd.models.card import short_card
from mgd.models.saved import FORMAT, find_model, read_config
from mgd.pictures import UNREADABLE, colorize, rescale, to_rgb, to_tensor, upright
from mgd.recipe import parse_model
from mgd.registry import HEADS
from mgd.sections import ModelSection


class SegOutput(NamedTuple):
    """Output of a segmenter."""

    logits: Tensor
    """`[B, K, H, W]` float32, at input size."""
    features: Tensor
    """`[B, C, h, w]`, the decoder map before the classifier; h = H/4, rounded up (`lraspp`: H/8, or less)."""


class Prediction(NamedTuple):
    """What a segmenter says of one image."""

    label: np.ndarray
    """`[H, W]` uint8 classes, at the size of the image."""
    colors: np.ndarray
    """`[H, W, 3]` uint8, the classes in their colours."""
    segments: list[dict[str, str | PIL.Image.Image]]
    """A class that is seen each, as pipelines of `transformers` return them: its name under `label`, its pixels as
    a black and white image under `mask`."""


class Segmenter(nn.Module, PyTorchModelHubMixin):
    """Backbone and head, with the normalisation of the backbone inside.

    Teachers and students with different statistics therefore take the same batch of pixels.

    Args:
        section: the recipe's `[student]`.
        classes: K class names.
        colors: K (r, g, b) colours.
        pretrained: load ImageNet weights into the backbone.
        image_scale: factor by which images were resized before they were cropped and learnt from.
        crop: side of the training crop, pixels.
    """

    def __init__(
        self,
        section: ModelSection,
        classes: Sequence[str],
        colors: Sequence[tuple[int, int, int]],
        pretrained: bool = False,
        image_scale: float = 1.0,
        crop: int | None = None,
    ) -> None:
        super().__init__()
        self.section, self.classes, self.colors = section, tuple(classes), tuple(map(tuple, colors))
        self.image_scale, self.crop = image_scale, crop
        self.backbone = build_backbone(section.backbone, section.output_stride, pretrained, section.multi_grid)
        low, high = self.backbone.feature_info.channels()
        self.head = HEADS.get(section.head.name)(section.head, low, high, len(self.classes))
        cfg = self.backbone.pretrained_cfg
        self.register_buffer("mean", torch.tensor(cfg["mean"]).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(cfg["std"]).view(1, 3, 1, 1) * 255, persistent=False)

    def forward(self, image: Tensor) -> SegOutput:
        """Segment a batch.

        Args:
            image: `[B, 3, H, W]`, pixel values 0..255, uint8 or float.
        """
        height, width = image.shape[-2:]
        logits, features = self.of_whole_cells(image)
        cell = logits.shape[-2] // features.shape[-2]
        return SegOutput(logits[..., :height, :width], features[..., : -(-height // cell), : -(-width // cell)])

    def of_whole_cells(self, image: Tensor) -> SegOutput:
        """Segment a batch, and what fills up its last cells.

        Args:
            image: `[B, 3, H, W]`, pixel values 0..255, uint8 or float.

        Returns:
            As of `forward`, with H and W rounded up to multiples of the output stride.
        """
        low, high = self.maps(image)
        logits, features = self.head(low, high)
        size = [side + missing for side, missing in zip(image.shape[-2:], self._missing(image), strict=True)]
        logits = functional.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
        return SegOutput(logits, features)

    def describe(self, image: Tensor) -> Tensor:
        """Describe images by what the backbone sees in them.

        Args:
            image: `[B, 3, H, W]`, pixel values 0..255, uint8 or float.

        Returns:
            `[B, C]`: the mean of its deepest feature map over all positions.
        """
        return self.maps(image)[1].float().mean(dim=(2, 3))

    def maps(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the backbone's two feature maps, of whole cells.

        Args:
            image: `[B, 3, H, W]`, pixel values 0..255, uint8 or float.

        Returns:
            `[B, C1, h/4, w/4]` and `[B, C2, h/s, w/s]`; h and w are H and W rounded up to multiples of the output
            stride s.

        A last cell that only part of the image fills would be spread over that part when the maps are enlarged, and
        all others be shifted: a point of mIoU on images of 180x240 at stride 16. So it is filled up with the
        backbone's mean colour, about as crops are in training (ImageNet's).
        """
        pixels = (image.to(self.mean.dtype) - self.mean) / self.std
        bottom, right = self._missing(image)
        if isinstance(bottom, torch.SymInt) or isinstance(right, torch.SymInt) or bottom or right:
            pixels = functional.pad(pixels, [0, right, 0, bottom])
        if not torch.compiler.is_exporting():  # a device's runtime chooses its own layout
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        return feature_maps(self.backbone, pixels)

    def _missing(self, image: Tensor) -> tuple[int, int]:
        """Rows and columns that an image lacks to be a multiple of the output stride."""
        stride = self.section.output_stride
        # No remainder of a negative number, which ExecuTorch takes for a negative one.
        return tuple((stride - side % stride) % stride for side in image.shape[-2:])

    @torch.inference_mode()
    def predict(self, picture: PIL.Image.Image) -> Prediction:
        """Segment one image of any size and mode, at the scale that the network was trained at.

        Args:
            picture: is turned upright as its EXIF says.

        Raises:
            UserError: not a PIL image, one that cannot be read, or the network cannot take a whole one of this size,
                say for want of memory, or gives values that are no number.
        """
        if not isinstance(picture, PIL.Image.Image):
            raise UserError(f"predict takes a PIL image, as PIL.Image.open gives it, not {type(picture).__name__}")
        was_training = self.training
        try:
            whole = to_rgb(upright(picture))
        except UNREADABLE as error:
            raise UserError(f"the image cannot be read: {one_line(error)}") from error
        small = rescale(whole, self.image_scale)
        problem = f"{self.section.backbone} cannot predict a whole image of {small.width}x{small.height}"
        try:
            with explained(problem, "stages/predict.py --set eval.mode=slide predicts in windows"):
                logits = self.eval()(to_tensor(small)[None].to(self.mean.device)).logits
                classes = enlarge(logits, whole.size[::-1]).argmax(dim=1)
        finally:
            self.train(was_training)
        check_finite(logits)
        return self.prediction(classes[0].to(torch.uint8).cpu().numpy())

    def prediction(self, label: np.ndarray) -> Prediction:
        """Dress up a label map `[H, W]` uint8."""
        segments = [
            {"label": self.classes[index], "mask": PIL.Image.fromarray((label == index).astype(np.uint8) * 255)}
            for index in np.unique(label)
        ]
        return Prediction(label, colorize(label, self.colors), segments)

    def save(self, folder: str | Path) -> None:
        """Write `model.safetensors` and `config.json` into `folder`."""
        folder = Path(folder)
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        write_aside(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        config = {
            "format": FORMAT,
            "model": self.section.model_dump(mode="json") | {"pretrained": False},
            "classes": list(self.classes),
            "colors": [list(color) for color in self.colors],
            "image_scale": self.image_scale,
            "crop": self.crop,
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
        }
        write_json(folder / "config.json", config)

    def _save_pretrained(self, save_directory: Path) -> None:
        self.save(save_directory)

    def push_to_hub(self, repo_id: str, *, model_card_kwargs: dict | None = None, **options) -> str:
        """Upload the network alone, with a short card; `stages/push.py` uploads a run.

        Args:
            repo_id: repository ("org/name").
            model_card_kwargs: see `generate_model_card`.
            **options: of `huggingface_hub.ModelHubMixin.push_to_hub`, such as `private`.

        Returns:
            URL of the commit.
        """
        card = {"repo_id": repo_id} | (model_card_kwargs or {})
        return super().push_to_hub(repo_id, model_card_kwargs=card, **options)

    def generate_model_card(self, repo_id: str = ".", **data) -> ModelCard:
        """Return a short card: what `save_pretrained` and `push_to_hub` write as README.md.

        Args:
            repo_id: what its usage example loads; "." is the folder that it lies in.
            **data: more fields of its front matter, such as `license`.
        """
        plugin = HEADS.package_of(self.section.head.name)
        return short_card(self.section.backbone, self.classes, self.colors, repo_id, plugin, **data)

    @classmethod
    def from_pretrained(cls, source: str | Path, **download) -> "Segmenter":
        """Load a segmenter for use, in eval mode, every weight accounted for.

        Args:
            source: a model on the hub ("org/name"), or a folder.
            **download: of a model on the hub: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.

        Raises:
            UserError: nothing there, or weights that do not fit the configuration.
        """
        return load_segmenter(source, **download).eval()


def enlarge(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize logits `[B, K, h, w]` to (H, W), bilinear."""
    if logits.shape[-2:] == size:
        return logits
    return functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def check_finite(scores: Tensor) -> None:
    """Refuse scores, of any shape, of which argmax would make class 0.

    Raises:
        UserError: some are no number.
    """
    if not scores.isfinite().all():
        raise UserError("the network gives values that are no number; its weights are of no use, train it anew")


def build_segmenter(
    section: ModelSection,
    classes: Sequence[str],
    colors: Sequence,
    seed: int,
    image_scale: float = 1.0,
    crop: int | None = None,
) -> Segmenter:
    """Build a segmenter for training.

    Args:
        section: backbone and head.
        classes: names, K of them.
        colors: one a class.
        seed: draws whatever is not pretrained.
        image_scale: factor of the images that it is trained on.
        crop: side of the training crop, pixels.

    Raises:
        UserError: see `build_backbone`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Segmenter(section, classes, colors, section.pretrained, image_scale, crop)
    return model.to(memory_format=torch.channels_last)


def nameless_segmenter(section: ModelSection, num_classes: int) -> Segmenter:
    """Build an untrained segmenter of classes without names or colours, to count, time or try it."""
    return Segmenter(section, [str(index) for index in range(num_classes)], [(0, 0, 0)] * num_classes)


def fingerprint(model: Segmenter) -> str:
    """Return a SHA-256 over architecture, normalisation and weights, to tell whether two networks are the same."""
    statistics = [model.mean.flatten().tolist(), model.std.flatten().tolist()]
    built = model.section.model_dump(mode="json", exclude={"pretrained"})
    digest = hashlib.sha256(json.dumps([built, statistics], sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_segmenter(source: str | Path, **download) -> Segmenter:
    """Load a saved segmenter, every weight accounted for.

    Args:
        source: folder with `model.safetensors` and `config.json`, a run folder (its `model/`), or
            a hub id ("org/name").
        **download: of a hub id: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.

    Raises:
        UserError: nothing there, or weights that do not fit the configuration.
    """
    folder = find_model(source, **download)
    config = read_config(folder / "config.json")
    section = parse_model(config["model"], source=str(folder / "config.json"))
    view = {key: config[key] for key in ("image_scale", "crop")}
    try:
        model = Segmenter(section, config["classes"], config["colors"], **view)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    for buffer, values in ((model.mean, config["mean"]), (model.std, config["std"])):
        if values:  # what the weights were trained with, whatever timm may say of the backbone one day
            buffer.copy_(torch.tensor(values).view(1, 3, 1, 1))
    try:
        open(folder / "model.safetensors", "rb").close()  # if it may not be read: safetensors says it is not there
        weights = load_file(folder / "model.safetensors")
        if odd := [
            name for name, tensor in weights.items() if tensor.is_floating_point() and not tensor.isfinite().all()
        ]:
            raise UserError(f"{folder / 'model.safetensors'}: {odd[0]} holds values that are no number")
        kinds = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        if odd := [name for name, tensor in weights.items() if tensor.dtype != kinds.get(name, tensor.dtype)]:
            raise UserError(f"{folder / 'model.safetensors'}: {odd[0]} is {weights[odd[0]].dtype}, not {kinds[odd[0]]}")
        model.load_state_dict(weights, strict=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / 'model.safetensors'} cannot be read: {error}") from error
    except RuntimeError as error:
        raise UserError(f"{folder}: the weights do not fit config.json: {one_line(error, 300)}") from error
    return model.to(memory_format=torch.channels_last)
