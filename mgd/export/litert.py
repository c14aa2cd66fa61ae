"""LiteRT (TensorFlow Lite), for Android and microcontrollers; its converter wants a venv of its own."""

from pathlib import Path

import numpy as np

from mgd.export.base import Deployed, Exporter, Int8, Runner, Target, traceable
from mgd.registry import EXPORTERS


@EXPORTERS.register("litert")
class LiteRTExporter(Exporter):
    """One `.tflite` file."""

    suffix = ".tflite"
    packages = ("litert_torch", "ai_edge_litert")
    extra = "litert"

    def write(self, network: Deployed, target: Target, path: Path, int8: Int8 | None = None) -> None:
        """See `Exporter.write`."""
        import litert_torch

        converted = litert_torch.convert(traceable(network), (target.example(),), dynamic_shapes=target.shapes())
        converted.export(str(path))

    def open(self, path: Path, threads: int) -> Runner:
        """See `Exporter.open`."""
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(model_path=str(path), num_threads=threads)
        place = interpreter.get_input_details()[0]["index"]

        def run(pixels: np.ndarray) -> np.ndarray:
            interpreter.resize_tensor_input(place, pixels.shape)
            interpreter.allocate_tensors()
            interpreter.set_tensor(place, pixels)
            interpreter.invoke()
            return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])

        return run
