"""torch.export's own archive: for AOTInductor and C++, and for PyTorch without our code."""

from pathlib import Path

import numpy as np
import torch

from mgd.export.base import Deployed, Exporter, Int8, Runner, Target, trace
from mgd.registry import EXPORTERS


@EXPORTERS.register("torch_export")
class TorchExporter(Exporter):
    """One `.pt2` file."""

    suffix = ".pt2"

    def write(self, network: Deployed, target: Target, path: Path, int8: Int8 | None = None) -> None:
        """See `Exporter.write`."""
        traced = trace(network, target)
        torch.export.save(traced, path)

    def open(self, path: Path, threads: int) -> Runner:
        """See `Exporter.open`."""
        network = torch.export.load(path).module()

        def run(pixels: np.ndarray) -> np.ndarray:
            torch.set_num_threads(threads)
            with torch.inference_mode():
                return network(torch.from_numpy(pixels)).numpy()

        return run
