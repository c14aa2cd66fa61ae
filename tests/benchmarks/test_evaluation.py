from mgd.benchmarks.evaluation import suite


def test_identical_result_and_a_ratio():
    (row,) = suite(num_classes=5, num_images=2, repetitions=1)  # raises when the two differ
    assert row["ratio"] == row["reference"] / row["ours"] > 0
