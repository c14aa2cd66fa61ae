"""Core ML, for Apple's devices; converted anywhere, run on macOS only."""

import platform
from pathlib import Path

from mgd.errors import UserError
from mgd.export.base import GREATEST_SIDE, LEAST_SIDE, Deployed, Exporter, Int8, Runner, Target, trace
from mgd.registry import EXPORTERS


@EXPORTERS.register("coreml")
class CoreMLExporter(Exporter):
    """A `.mlpackage` folder, half precision."""

    suffix = ".mlpackage"
    packages = ("coremltools",)
    extra = "coreml"
    runs_here = platform.system() == "Darwin"

    def write(self, network: Deployed, target: Target, path: Path, int8: Int8 | None = None) -> None:
        """See `Exporter.write`."""
        if target.baked:
            raise UserError("its converter takes no uint8 pixels; leave out --bake")
        import coremltools

        traced = trace(network, target)
        side = coremltools.RangeDim(LEAST_SIDE, GREATEST_SIDE)
        shape = (1, 3, side, side) if target.dynamic else tuple(target.example().shape)
        converted = coremltools.convert(
            traced.run_decompositions({}),
            inputs=[coremltools.TensorType(name="image", shape=shape)],
            outputs=[coremltools.TensorType(name=target.output)],
            minimum_deployment_target=coremltools.target.iOS17,
        )
        converted.save(str(path))

    def open(self, path: Path, threads: int) -> Runner:
        """See `Exporter.open`."""
        import coremltools

        model = coremltools.models.MLModel(str(path))
        return lambda pixels: next(iter(model.predict({"image": pixels}).values()))
