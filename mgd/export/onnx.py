"""ONNX, run by ONNX Runtime; int8 by static quantisation in QDQ form."""

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from mgd.export.base import Deployed, Exporter, Int8, Runner, Target, trace
from mgd.registry import EXPORTERS

if TYPE_CHECKING:
    import onnx_ir


@EXPORTERS.register("onnx")
class OnnxExporter(Exporter):
    """One `.onnx` file, weights inside."""

    suffix = ".onnx"
    packages = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")
    extra = "onnx"
    quantizes = True
    has_cpu_layout = True

    def write(self, network: Deployed, target: Target, path: Path, int8: Int8 | None = None) -> None:
        """See `Exporter.write`."""
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells of every operator set that it tries
        traced = trace(network, target)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                traced,
                (target.example(),),
                input_names=["image"],
                output_names=[target.output],
                dynamic_shapes=target.shapes(),
                dynamo=True,
                verbose=False,
            )
        plain = path if int8 is None else path.with_name(f"{path.name}.float")
        if target.baked and target.cpu:
            _put_classes_last(program.model.graph)
        program.save(plain, external_data=False)
        if int8 is not None:
            _quantize(plain, path, int8)

    def open(self, path: Path, threads: int) -> Runner:
        """See `Exporter.open`."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Or the threads of one session go on spinning while the next one runs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda pixels: session.run(None, {"image": pixels})[0]


def _put_classes_last(graph: "onnx_ir.Graph") -> None:
    """Enlarge the logits, and look for the likeliest class, with the classes as the innermost axis.

    ONNX Runtime's CPU kernels for both are faster there than over `[B, K, H, W]`. Its CUDA kernel takes any Resize for
    NCHW and would give other logits (https://github.com/microsoft/onnxruntime/pull/12815).
    """
    import onnx_ir as ir

    argmax = next(node for node in graph if node.op_type == "ArgMax")
    resize = argmax.inputs[0].producer()
    assert resize.op_type == "Resize", resize
    logits, sizes = resize.inputs[0], resize.inputs[3]
    order = [0, 2, 3, 1]
    transpose = ir.node("Transpose", [logits], {"perm": order})
    indices = ir.node("Constant", [], {"value_ints": order})
    gather = ir.node("Gather", [sizes, *indices.outputs])
    enlarge = ir.node("Resize", [*transpose.outputs, None, None, *gather.outputs], resize.attributes)
    likeliest = ir.node("ArgMax", enlarge.outputs, {"axis": 3, "keepdims": 0})
    graph.insert_before(argmax, [transpose, indices, gather, enlarge, likeliest])
    ir.convenience.replace_all_uses_with(argmax.outputs, likeliest.outputs)
    graph.remove([argmax, resize], safe=True)


def _quantize(plain: Path, path: Path, int8: Int8) -> None:
    """Quantise a float file, which is deleted."""
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.pixels: Iterator[np.ndarray] = iter(int8.calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            pixels = next(self.pixels, None)
            return None if pixels is None else {"image": pixels}

    logging.getLogger().addFilter(_not_of_preprocessing)
    prepared = path.with_name(f"{path.name}.prepared")
    try:
        quant_pre_process(plain, prepared, skip_symbolic_shape=True)
        nodes = onnx.load(prepared).graph.node
        kept = [node.name for node in nodes if node.op_type == "Conv"][: int8.float_layers]
        # Pixels and logits have ranges that 8 bits do not do justice to, and cost little.
        kept += [node.name for node in nodes if node.op_type in ("Sub", "Div", "Resize", "ArgMax")]
        quantization.quantize_static(
            prepared,
            path,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            # With 8 bits the sums overflow on x86 processors without VNNI, which costs points of mIoU.
            reduce_range=True,
            nodes_to_exclude=kept,
        )
    finally:
        logging.getLogger().removeFilter(_not_of_preprocessing)
        for file in (plain, prepared):
            file.unlink(missing_ok=True)


def _not_of_preprocessing(record: logging.LogRecord) -> bool:
    return "pre-process" not in record.getMessage()
