"""A segmentation model as an ONNX file that runs without this package.

The graph takes any number of radiographs of any size and pads them itself; the fixed timestep is a
constant in it. The file's metadata say how radiographs must be read and what the classes are.
"""

import contextlib
import importlib.metadata
import io
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch as th

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage.files import check_output, write_atomically
from guided_diffusion.segmentation.categories import to_plain
from guided_diffusion.segmentation.certainty import FLOOR, POWER
from guided_diffusion.segmentation.model_file import SegmentationConfig, load_model
from guided_diffusion.segmentation.networks.union import Union

INPUT, OUTPUT = "radiographs", "scores"
TOLERANCE = 1e-4
# number, height and width of the images on which the file is compared with the network
CHECKED_SIZES = ((1, 64, 64), (3, 37, 90), (2, 16, 5))
_LARGEST = 2**14


def export(model_path: str, onnx_path: str) -> dict[str, str]:
    """Write a model file as ONNX, after checking that onnxruntime gives the same results.

    :return: the metadata.
    :raises UserError: for a kind of network that cannot be exported, if a package is missing, or
        if results differ by more than TOLERANCE.
    """
    check_output(onnx_path)
    onnx, onnxruntime = import_packages()
    model, config, _ = load_model(model_path)
    model.requires_grad_(False).eval()
    if isinstance(model, Union):
        graphs = [_graph(onnx, *pair, model_path) for pair in zip(model.networks, model.configs)]
        proto = _joined(onnx, graphs, model.by_certainty)
    else:
        proto = _graph(onnx, model, config, model_path)
    metadata = describe(config)
    onnx.helper.set_model_props(proto, metadata)
    onnx.checker.check_model(proto)
    content = proto.SerializeToString()
    _check(onnxruntime, content, model, config.in_channels)
    write_atomically(onnx_path, lambda file: file.write(content))
    return metadata


def _graph(
    onnx: ModuleType, model: th.nn.Module, config: SegmentationConfig, model_path: str
) -> Any:
    """A single network as an ONNX `ModelProto` for images of any size."""
    kind = config.kind_module()
    if not hasattr(kind, "ExportCore"):
        raise UserError(f"{model_path}: networks of kind {config.kind} cannot be exported to ONNX")
    core = kind.ExportCore(model)
    return _with_padding(onnx, _trace(core, core.multiple, config.in_channels), core.multiple)


def describe(config: SegmentationConfig) -> dict[str, str]:
    """What is needed to use the file without this package: two sentences, the rest as JSON."""
    reading = config.reading
    height, width = reading.geometry().height_width
    try:
        version = importlib.metadata.version("guided-diffusion")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    return {
        "input": f"{INPUT}: float32 [N x {config.in_channels} x H x W], black -1, white 1",
        "output": f"{OUTPUT}: float32 [N x {len(config.categories)} x H x W], logits; softmax over "
        "axis 1 gives probabilities",
        "reading": json.dumps(reading.to_dict()),
        "geometry": json.dumps({"kind": reading.resize, "height": height, "width": width}),
        "categories": json.dumps(to_plain(config.categories)),
        "timestep": json.dumps(config.timestep if config.kind == "unet" else None),
        "kind": json.dumps(config.kind),
        "version": json.dumps(version),
    }


def import_packages() -> tuple[ModuleType, ModuleType]:
    """onnx and onnxruntime; torch's exporter also needs onnxscript."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"exporting needs the package {error.name}: pip install '.[onnx]' in the checkout"
        ) from error
    return onnx, onnxruntime


@th.no_grad()
def _trace(core: th.nn.Module, multiple: int, in_channels: int) -> Any:
    """The core as an ONNX `ModelProto`."""
    dim = th.export.Dim
    sides = {
        axis: multiple * dim(name, min=1, max=_LARGEST // multiple)
        for axis, name in ((2, "rows"), (3, "columns"))
    }
    example = th.zeros(2, in_channels, 2 * multiple, 3 * multiple)
    shapes = ({0: dim("batch", min=1, max=_LARGEST), **sides},)
    with _quiet():
        program = th.onnx.export(
            core,
            (example,),
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=["padded"],
            output_names=["padded_scores"],
            optimize=False,  # runtimes optimise when they load the file
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    return program.model_proto


def _with_padding(onnx: ModuleType, proto: Any, multiple: int) -> Any:
    """Add padding before the core, which repeats the last row and column, and cropping after it."""
    graph, helper = proto.graph, onnx.helper
    constants = {
        "pad_multiple": [multiple, multiple],
        "pad_before": [0] * 6,
        "crop_start": [0, 0],
        "crop_axes": [2, 3],
    }
    graph.initializer.extend(
        helper.make_tensor(name, onnx.TensorProto.INT64, [len(values)], values)
        for name, values in constants.items()
    )
    before = [
        helper.make_node("Shape", [INPUT], ["sides"], start=2),
        helper.make_node("Neg", ["sides"], ["minus_sides"]),
        helper.make_node("Mod", ["minus_sides", "pad_multiple"], ["missing"]),
        helper.make_node("Concat", ["pad_before", "missing"], ["pads"], axis=0),
        helper.make_node("Pad", [INPUT, "pads"], ["padded"], mode="edge"),
    ]
    names = ["padded_scores", "crop_start", "sides", "crop_axes"]
    after = [helper.make_node("Slice", names, [OUTPUT])]
    nodes = [*before, *graph.node, *after]
    channels, classes = (
        place[0].type.tensor_type.shape.dim[1].dim_value for place in (graph.input, graph.output)
    )
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    kind = onnx.TensorProto.FLOAT
    for places, name, depth in ((graph.input, INPUT, channels), (graph.output, OUTPUT, classes)):
        shape = ["batch", depth, "height", "width"]
        places.append(helper.make_tensor_value_info(name, kind, shape))
    return proto


def _joined(onnx: ModuleType, graphs: Sequence[Any], by_certainty: bool) -> Any:
    """One graph of several: the logarithm of the mean of their probabilities, as in `Union`."""
    joined, helper = type(graphs[0])(), onnx.helper
    named = [
        onnx.compose.add_prefix(graph, f"network_{number}/", rename_inputs=False)
        for number, graph in enumerate(graphs)
    ]
    joined.CopyFrom(named[0])
    graph = joined.graph
    for other in named[1:]:
        graph.node.extend(other.graph.node)
        graph.initializer.extend(other.graph.initializer)
        graph.value_info.extend(other.graph.value_info)
        joined.functions.extend(other.functions)
    classes = graph.output[0].type.tensor_type.shape.dim[1].dim_value

    def node(kind: str, *inputs: str, output: str = "", **more: Any) -> str:
        name = output or f"union/{len(graph.node)}"
        graph.node.append(helper.make_node(kind, inputs, [name], **more))
        return name

    def constant(value: float | Sequence[int]) -> str:
        array = np.array(value, np.float32 if isinstance(value, float) else np.int64)
        name = f"union/constant_{len(graph.initializer)}"
        graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        return name

    def logsumexp(logs: Sequence[str]) -> str:
        largest = node("Max", *logs)
        powers = [node("Exp", node("Sub", log, largest)) for log in logs]
        return node("Add", largest, node("Log", node("Sum", *powers)))

    def log_certainty(log: str) -> str:
        """Of probabilities, given their logarithms: see `certainty`."""
        product = node("ReduceMean", node("Mul", node("Exp", log), log), constant([1, 2, 3]))
        entropy = node("Mul", product, constant(-classes / math.log(max(2, classes))))
        raised = node("Add", entropy, constant(FLOOR))
        return node("Mul", node("Log", raised), constant(float(POWER)))

    logs = [node("LogSoftmax", one.graph.output[0].name, axis=1) for one in named]
    weights = [log_certainty(log) if by_certainty else constant(0.0) for log in logs]
    weighted = [node("Add", log, weight) for log, weight in zip(logs, weights)]
    node("Sub", logsumexp(weighted), logsumexp(weights), output=OUTPUT)
    graph.output[0].name = OUTPUT
    return joined


@th.no_grad()
def _check(
    onnxruntime: ModuleType, content: bytes, model: Callable[[th.Tensor], th.Tensor], channels: int
) -> None:
    """:raises UserError: if onnxruntime's scores differ from the network's."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    generator = th.Generator().manual_seed(0)
    for count, height, width in CHECKED_SIZES:
        images = 2 * th.rand(count, channels, height, width, generator=generator) - 1
        found = session.run([OUTPUT], {INPUT: images.numpy()})[0]
        expected = model(images).numpy()
        if found.shape != expected.shape or not np.abs(found - expected).max() <= TOLERANCE:
            raise UserError(
                f"onnxruntime and torch differ by more than {TOLERANCE} for images of "
                f"{height}x{width} pixels; nothing was written"
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporter's progress messages and its warnings about itself."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
