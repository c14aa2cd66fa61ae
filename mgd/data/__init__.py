"""Data: readers, partitions, augmentation, CutMix and the batches of a training step."""
