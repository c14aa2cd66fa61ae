"""The page of stages/demo.py: a picture in, each model's classes laid over it, with a legend and the latency."""

import html
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import gradio as gr
import numpy as np
import PIL.Image

from mgd.errors import UserError, one_line
from mgd.models.segmenter import Segmenter
from mgd.pictures import UNREADABLE, decode, to_rgb
from mgd.plots import overlay

MAX_PIXELS = 4096 * 4096
"""Of a picture; with many classes a larger one could take all memory, and the server with it."""


def build(models: Sequence[tuple[str, Segmenter]]) -> gr.Blocks:
    """Build the page; `launch` serves it.

    Args:
        models: title and network in eval mode of each, shown side by side.

    Raises:
        UserError: a network cannot predict whole images.
    """
    for _, network in models:
        network.predict(PIL.Image.new("RGB", (256, 256)))  # what is set up once counts for no picture's latency

    def show(upload: Mapping | None) -> list[np.ndarray | str | None]:
        if upload is None:
            return [None] * 2 * len(models)
        image = read(upload["path"])
        pictures, times = zip(*(segment(network, image) for _, network in models), strict=True)
        return [*pictures, *times]

    overlays: list[gr.Image] = []
    latencies: list[gr.HTML] = []
    with gr.Blocks(title="mgd", analytics_enabled=False, fill_width=True) as page:
        with gr.Row():
            with gr.Column(min_width=280):
                picture = gr.Image(label="picture", sources=["upload", "webcam", "clipboard"], buttons=[], height=420)
            for title, network in models:
                with gr.Column(min_width=280):
                    overlays.append(
                        gr.Image(
                            label=title,
                            interactive=False,
                            elem_classes="overlay",
                            buttons=["download", "fullscreen"],
                            height=420,
                        )
                    )
                    latencies.append(gr.HTML(elem_classes="latency"))
                    gr.HTML(legend(network), elem_classes="legend")
        # Without preprocessing a file comes as it is: what is wrong with it is ours to say.
        outputs = [*overlays, *latencies]
        picture.change(show, picture, outputs, preprocess=False, show_progress_on=overlays, api_name="segment")
    return page


def read(path: str) -> PIL.Image.Image:
    """Read an uploaded file as an upright RGB image.

    Raises:
        gr.Error: it is no image, damaged or too large; the page shows why.
    """
    try:
        with PIL.Image.open(path) as header:
            if header.width * header.height > MAX_PIXELS:
                raise ValueError(f"{header.width} x {header.height} pixels; at most {MAX_PIXELS / 1e6:.1f} million")
        return to_rgb(decode({"bytes": None, "path": path}))
    except UNREADABLE as error:
        raise _refusal("This image cannot be used", str(error).replace(path, Path(path).name)) from error


def segment(network: Segmenter, image: PIL.Image.Image) -> tuple[np.ndarray, str]:
    """Predict one image.

    Args:
        network: in eval mode.
        image: upright, RGB.

    Returns:
        The image `[H, W, 3]` uint8 under the classes' colours, and a line that says how long the prediction took.

    Raises:
        gr.Error: the network cannot predict it, say for want of memory.
    """
    begin = time.perf_counter()
    try:
        label = network.predict(image).label
    except UserError as error:
        raise _refusal("The model cannot predict this image", str(error)) from error
    milliseconds = (time.perf_counter() - begin) * 1e3
    where = network.mean.device.type
    return (
        overlay(np.asarray(image), label, network.colors),
        f"<b>{milliseconds:.0f} ms</b> for {image.width} x {image.height} pixels on {where}",
    )


def legend(network: Segmenter) -> str:
    """Return the names of the classes beside their colours, as HTML."""
    square = '<span style="display:inline-block; width:1em; height:1em; vertical-align:-0.1em; border:1px solid #888'
    items = [
        f'<span style="white-space:nowrap">{square}; background:rgb{color}"></span> {html.escape(name)}</span>'
        for name, color in zip(network.classes, network.colors, strict=True)
    ]
    return f'<div style="display:flex; flex-wrap:wrap; gap:0.3em 1.2em">{"".join(items)}</div>'


def _refusal(what: str, reason: str) -> gr.Error:
    text = html.escape(f"{what}: {one_line(reason)}")
    return gr.Error(text, duration=None, print_exception=False)
