"""The demo's page as a program asks it: what it answers, and what it refuses."""

import io
import re

import numpy as np
import PIL.Image
import pytest
from conftest import run_stage

from mgd.errors import UserError
from mgd.models.segmenter import build_segmenter
from mgd.recipe import load

gr = pytest.importorskip("gradio", reason="gradio is not installed")
from mgd import demo  # noqa: E402

CLASSES, COLORS = ("sky", "a < b"), ((0, 0, 0), (0, 200, 0))


@pytest.fixture
def network(write_recipe):
    return build_segmenter(load(write_recipe()).student, CLASSES, COLORS, seed=0).eval()


def saved(path, size=(70, 50), mode="RGB", **options):
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    PIL.Image.fromarray(values).convert(mode).save(path, **options)
    return str(path)


def test_the_page_answers_for_both_models_and_lives_through_bad_files(network, tmp_path):
    from gradio_client import Client, handle_file

    page = demo.build([("one", network), ("two", network)])
    assert page.analytics_enabled is False
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, share=False, ssr_mode=False)
    try:
        client = Client(url, verbose=False, analytics_enabled=False)
        bad = tmp_path / "bad.png"
        bad.write_bytes(b"no image")
        with pytest.raises(
            Exception, match="This image cannot be used: cannot identify image file &#x27;bad.png&#x27;"
        ):
            client.predict(handle_file(bad), api_name="/segment")
        first, second, *times = client.predict(handle_file(saved(tmp_path / "good.png")), api_name="/segment")
        assert client.predict(None, api_name="/segment")[0] is None
    finally:
        page.close(verbose=False)
    for path in (first, second):
        with PIL.Image.open(path) as picture:
            assert picture.size == (70, 50)
    assert all(re.match(r"<b>\d+ ms</b> for 70 x 50 pixels on cpu", line) for line in times) and len(times) == 2


def test_a_file_is_read_as_the_network_reads_it(network, tmp_path):
    turned = PIL.Image.Exif()
    turned[0x0112] = 6  # lying on its side
    image = demo.read(saved(tmp_path / "turned.jpg", exif=turned))
    assert image.size == (50, 70) and image.mode == "RGB"
    shown, _ = demo.segment(network, image)
    wanted = (np.asarray(image).astype(int) + network.predict(image).colors) // 2
    assert (shown == wanted).all()
    assert demo.read(saved(tmp_path / "grey.png", mode="L")).mode == "RGB"


def test_what_cannot_be_used_is_refused_in_words(network, tmp_path, monkeypatch):
    whole = io.BytesIO()
    saved(whole, size=(300, 300), format="PNG")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:2000])
    with pytest.raises(gr.Error, match="This image cannot be used: .*truncated"):
        demo.read(str(tmp_path / "cut.png"))
    monkeypatch.setattr(demo, "MAX_PIXELS", 3000)
    with pytest.raises(gr.Error, match="70 x 50 pixels; at most 0.0 million"):
        demo.read(saved(tmp_path / "large.png"))
    monkeypatch.setattr(network, "forward", lambda _: (_ for _ in ()).throw(RuntimeError("out of <memory>")))
    with pytest.raises(gr.Error, match="The model cannot predict this image: .*out of &lt;memory&gt;"):
        demo.segment(network, PIL.Image.new("RGB", (40, 40)))
    with pytest.raises(UserError, match=r"cannot predict a whole image of 256x256: .* eval\.mode=slide"):
        demo.build([("one", network)])


def test_the_legend_names_every_class_beside_its_colour(network):
    text = demo.legend(network)
    assert "rgb(0, 0, 0)" in text and "rgb(0, 200, 0)" in text and "a &lt; b" in text and "a < b" not in text
    assert text.index("rgb(0, 200, 0)") < text.index("a &lt; b")


def test_the_stage_says_in_one_line_what_is_missing(tmp_path):
    done = run_stage("demo.py", "--model", tmp_path / "nowhere")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "no config.json there" in done.stderr
