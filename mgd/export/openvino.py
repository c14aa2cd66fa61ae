"""OpenVINO's intermediate representation; int8 from the quantised ONNX file."""

from pathlib import Path

from mgd.export.base import Deployed, Exporter, Int8, Runner, Target
from mgd.export.onnx import OnnxExporter
from mgd.registry import EXPORTERS


@EXPORTERS.register("openvino")
class OpenVinoExporter(Exporter):
    """A folder with `model.xml` and `model.bin`."""

    suffix = "_openvino"
    packages = ("openvino", *OnnxExporter.packages)
    extra = "openvino"
    quantizes = True

    def write(self, network: Deployed, target: Target, path: Path, int8: Int8 | None = None) -> None:
        """See `Exporter.write`."""
        import openvino

        path.mkdir()
        passing = path / "model.onnx"
        OnnxExporter().write(network, target, passing, int8)
        openvino.save_model(openvino.convert_model(passing), path / "model.xml", compress_to_fp16=False)
        passing.unlink()

    def open(self, path: Path, threads: int) -> Runner:
        """See `Exporter.open`."""
        import openvino

        # Left to itself it would compute in bf16 where the processor can, at an accuracy of its own.
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        compiled = openvino.Core().compile_model(path / "model.xml", "CPU", options)
        return lambda pixels: compiled(pixels)[0]
