"""The demo as a person uses it, in a real browser."""

import re
import shutil
import signal
import socket
import subprocess

import numpy as np
import PIL.Image
import pytest
from accelerate import Accelerator
from conftest import run_stage, stage_command

from mgd.experiment import run_recipe
from mgd.recipe import load

pytest.importorskip("gradio", reason="gradio is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


@pytest.fixture
def browser():
    """A headless Chromium: playwright's own, or one on the PATH."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = [None, *filter(None, map(shutil.which, names))]  # None: playwright's own
    with sync_api.sync_playwright() as playwright:
        for path in found:
            try:
                browser = playwright.chromium.launch(executable_path=path)
            except sync_api.Error:
                continue
            yield browser
            browser.close()
            return
        pytest.skip("no Chromium that starts, neither playwright's nor on the PATH")


@pytest.fixture
def demo(write_recipe):
    """The stage, serving two tiny trained models; its address."""
    recipes = [load(write_recipe(), [f"run.name={name}"]) for name in ("one", "two")]
    for recipe in recipes:
        run_recipe(recipe, Accelerator())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = stage_command("demo.py", "--model", recipes[0].run_dir, "--compare", recipes[1].run_dir, "--port", port)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line == f"http://127.0.0.1:{port}/ shows the page; Ctrl-C ends it\n", process.stderr.read()
        yield port
        taken = run_stage("demo.py", "--model", recipes[0].run_dir, "--port", port)
        assert (taken.returncode, taken.stderr.count("\n")) == (2, 1) and "cannot be used" in taken.stderr
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("the page is closed\n", "")
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


def test_an_image_is_uploaded_and_both_models_answer(browser, demo, tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    values = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    PIL.Image.fromarray(values).save(good)
    bad.write_bytes(b"no image")

    page = browser.new_page(viewport={"width": 1300, "height": 700})
    errors, outside = [], []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: outside.append(request.url) if _is_outside(request.url) else None)
    page.goto(f"http://127.0.0.1:{demo}")
    upload = page.locator("input[type=file]").first
    upload.wait_for(state="attached", timeout=60_000)
    assert page.get_by_label("Capture from camera").count() == 1

    upload.set_input_files(good)
    latency = page.locator(".latency")
    for index in range(2):
        sync_api.expect(latency.nth(index)).to_contain_text(
            re.compile(r"\d+ ms for 128 x 96 pixels on \w+"), timeout=60_000
        )
        sync_api.expect(page.locator(".legend").nth(index)).to_contain_text(re.compile("background.*disc.*star", re.S))
    overlays = page.locator(".overlay img")
    sync_api.expect(overlays).to_have_count(2)
    page.wait_for_function("[...document.querySelectorAll('.overlay img')].every(i => i.naturalWidth === 128)")
    page.screenshot(path=tmp_path / "page.png")

    page.get_by_label("Remove Image").click()
    page.locator("input[type=file]").first.set_input_files(bad)
    sync_api.expect(page.get_by_text("This image cannot be used")).to_be_visible(timeout=60_000)
    page.get_by_label("Remove Image").click()
    page.locator("input[type=file]").first.set_input_files(good)
    sync_api.expect(overlays).to_have_count(2, timeout=60_000)  # the server lives on
    assert not errors and not outside


def _is_outside(url):
    return not url.startswith(("http://127.0.0.1:", "data:", "blob:"))
