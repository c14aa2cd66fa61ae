"""The card of a model on the hub, as far as the network itself knows it; mgd/hub.py adds its run."""

import html
from collections.abc import Sequence

from huggingface_hub import ModelCard, ModelCardData

TAGS = ("image-segmentation", "semantic-segmentation", "timm")

_USAGE = """\
```python
import PIL.Image
{imports}from mgd.models.segmenter import Segmenter

model = Segmenter.from_pretrained("{source}")
picture = {picture}  # any size and mode; yours here
found = model.predict(picture)
print([segment["label"] for segment in found.segments])
PIL.Image.fromarray(found.colors).save("prediction.png")
```

`found.label` holds a class index a pixel, `found.colors` the same in the colours below, and `model(pixels).logits`
`[B, K, H, W]` for pixels `[B, 3, H, W]` of 0..255. This needs the Python {packages}; no code is fetched."""


def short_card(
    backbone: str,
    classes: Sequence[str],
    colors: Sequence[Sequence[int]],
    source: str,
    plugin: str | None = None,
    **data,
) -> ModelCard:
    """Return the card of a network whose training is not known.

    Args:
        backbone: timm's name of it.
        classes: K class names.
        colors: K (r, g, b) colours.
        source: what to load it from: a repository, or a folder.
        plugin: package from outside that brings its head, if one does.
        **data: more fields of the front matter, such as `license`.
    """
    rows = [
        f"| {index} | {plain(name)} | `{hex_color(color)}` |"
        for index, (name, color) in enumerate(zip(classes, colors, strict=True))
    ]
    body = f"""\
# {source if "/" in source else "A segmentation network"}

A semantic segmentation network on the timm backbone `{backbone}`, {len(classes)} classes.

{usage(source, 'PIL.Image.new("RGB", (320, 240), "grey")', plugin=plugin)}

| index | class | colour |
|---|---|---|
"""
    return assembled(front_matter(TAGS, **data), body + "\n".join(rows) + "\n")


def front_matter(tags: Sequence[str], **data) -> ModelCardData:
    """Return what the hub reads of a card; `data` are fields beside those that all our cards share."""
    shared = {"library_name": "mgd", "pipeline_tag": "image-segmentation", "tags": list(tags)}
    return ModelCardData(**(shared | data))


def assembled(data: ModelCardData, body: str) -> ModelCard:
    """Return a card of front matter and Markdown."""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def usage(source: str, picture: str, imports: str = "", plugin: str | None = None) -> str:
    """Return the Markdown that shows how to load and use a model; its Python runs as it stands.

    Args:
        source: what to load it from: a repository, or a folder.
        picture: Python expression of a PIL image.
        imports: lines that `picture` needs.
        plugin: package from outside that brings its head, if one does.
    """
    packages = f"packages `mgd` and `{plugin}`" if plugin else "package `mgd`"
    return _USAGE.format(source=source, picture=picture, imports=imports, packages=packages)


def hex_color(color: Sequence[int]) -> str:
    """Return (r, g, b) as "#rrggbb"."""
    return "#" + "".join(f"{value:02x}" for value in color)


def plain(text: object) -> str:
    """Return text that is neither Markdown nor HTML, and fits into the cell of a table."""
    escaped = html.escape(" ".join(str(text).split()), quote=False)
    return "".join(f"\\{letter}" if letter in r"\`*_[]|" else letter for letter in escaped)
