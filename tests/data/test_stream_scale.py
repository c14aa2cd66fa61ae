"""200 000 images as a stream: memory, speed beside a map-style pool, a place far inside.

`pytest -m slow -s tests/data/test_stream_scale.py` prints the figures.
"""

import io
import itertools
import resource
import statistics
import time
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
from accelerate import Accelerator

from mgd.data.feed import Feed
from mgd.data.images import Images
from mgd.data.loaders import TrainingPairs
from mgd.data.reading import load_splits
from mgd.data.stream import Pool, whole_pool
from mgd.recipe import load
from mgd.sections import UnlabeledSection

COUNT, SHARDS = 200_000, 40


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (512, 512, 3)).astype(np.uint8)
    features = datasets.Features({"image": datasets.Image()})
    for shard in range(SHARDS):
        rows = []
        for _ in range(COUNT // SHARDS):
            top, left = rng.integers(0, 512 - 64, 2)
            buffer = io.BytesIO()
            PIL.Image.fromarray(texture[top : top + 64, left : left + 64]).save(buffer, "JPEG", quality=80)
            rows.append({"bytes": buffer.getvalue(), "path": None})
        datasets.Dataset.from_dict({"image": rows}, features=features).to_parquet(folder / f"{shard:03d}.parquet")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_200_000_images(parquet, write_recipe, tmp_path):
    recipe = load(write_recipe(data={"workers": 0}))
    splits = load_splits(recipe.data)
    labeled = Images(splits.labeled, splits.decoder)
    section = UnlabeledSection(parquet=str(parquet), streaming=True)
    pool = Pool(section)
    assert pool.count == COUNT
    whole = Images(whole_pool(section), splits.decoder)
    streamed = TrainingPairs(labeled, None, recipe.data, 0)
    mapped = TrainingPairs(labeled, whole, recipe.data, 0)
    accelerator, batch_size = Accelerator(), 100
    last = COUNT // (2 * batch_size)  # two images a sample

    # ---- speed, in turns ----
    feeds = {
        "stream": Feed(streamed, pool, recipe.data, accelerator, tmp_path, {"step": 0, "stream": None}).batches(
            0, 10**6, batch_size
        ),
        "map": Feed(mapped, None, recipe.data, accelerator, tmp_path, {"step": 0, "stream": None}).batches(
            0, 10**6, batch_size
        ),
    }
    seconds = {name: [] for name in feeds}
    for _ in range(30):
        for name, batches in feeds.items():
            began = time.perf_counter()
            for _ in range(4):
                next(batches)
            seconds[name].append(time.perf_counter() - began)
    rates = {name: 4 * 2 * batch_size / statistics.median(times[3:]) for name, times in seconds.items()}
    print(f"\nimages/s: stream {rates['stream']:.0f}, map-style {rates['map']:.0f}, ", end="")
    print(f"ratio {rates['stream'] / rates['map']:.2f}")
    del feeds

    # ---- memory over one pass ----
    feed = Feed(streamed, pool, recipe.data, accelerator, tmp_path, {"step": 0, "stream": None})
    resident, at_two_thirds, following = [], None, []
    for step, batch in enumerate(feed.batches(0, last, batch_size), 1):
        if step % (last // 10) == 0:
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20)
        if at_two_thirds is None and step == last * 2 // 3:
            at_two_thirds = feed.state()
        elif at_two_thirds and len(following) < 3:
            following.append(batch["unlabeled_id"] + batch["mix_id"])
    print("resident MiB after each tenth of the pass:", " ".join(f"{size:.0f}" for size in resident))
    assert max(resident) < 1.1 * resident[0]

    # ---- taken up deep inside ----
    began = time.perf_counter()
    again = Feed(streamed, pool, recipe.data, accelerator, tmp_path, {"step": 0, "stream": at_two_thirds})
    batches = itertools.islice(again.batches(last * 2 // 3, last, batch_size), 3)
    assert [batch["unlabeled_id"] + batch["mix_id"] for batch in batches] == following
    print(f"taken up at image {COUNT * 2 // 3} with the same images, first three batches in ", end="")
    print(f"{time.perf_counter() - began:.1f} s")
