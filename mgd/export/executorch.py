"""ExecuTorch with the XNNPACK backend: Android, iOS and small Linux boards; int8 by PT2E quantisation."""

import warnings
from pathlib import Path

import torch

from mgd.export.base import Deployed, Exporter, Int8, Runner, Target, trace
from mgd.registry import EXPORTERS


@EXPORTERS.register("executorch")
class ExecuTorchExporter(Exporter):
    """One `.pte` file."""

    suffix = ".pte"
    packages = ("executorch", "torchao")
    extra = "executorch"
    quantizes = True

    def write(self, network: Deployed, target: Target, path: Path, int8: Int8 | None = None) -> None:
        """See `Exporter.write`."""
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = trace(network, target)
            if int8 is not None:
                quantized = _quantize(traced, int8)
                traced = trace(quantized, target)
            program = to_edge_transform_and_lower(traced, partitioner=[XnnpackPartitioner()]).to_executorch()
        path.write_bytes(program.buffer)

    def open(self, path: Path, threads: int) -> Runner:
        """See `Exporter.open`."""
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
        from executorch.runtime import Runtime

        _unsafe_reset_threadpool(threads)  # the only way from Python; unsafe while a program runs, and none does
        method = Runtime.get().load_program(path).load_method("forward")
        return lambda pixels: method.execute([torch.from_numpy(pixels)])[0].numpy()


def _quantize(traced: torch.export.ExportedProgram, int8: Int8) -> torch.fx.GraphModule:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    module = traced.module()
    convolutions = [node for node in module.graph.nodes if "conv" in str(node.target)]
    kept = {node.name for node in convolutions[: int8.float_layers]}
    quantizer = XNNPACKQuantizer()
    quantizer.set_global(get_symmetric_quantization_config(is_per_channel=True))
    quantizer.set_filter_function(lambda node: node.name not in kept)
    prepared = prepare_pt2e(module, quantizer)
    with torch.no_grad():
        for pixels in int8.calibration:
            prepared(torch.from_numpy(pixels))
    return convert_pt2e(prepared)
