"""A finished model as a graph that other programs run without this package: ONNX, OpenVINO or torch.export.

Pixels in, answers out: the encoder, the head and the decoding are all in the graph, the batch is of any size. Before it
is written it has to answer a few pictures as the model does.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor, nn

from ordinalclip.calibration import LEVELS, OF_VALUES, Calibration
from ordinalclip.data import Part, Parts, load_parts
from ordinalclip.external import served
from ordinalclip.files import check_replaceable, whole, write_json
from ordinalclip.gauges import KINDS, drawn_gauges
from ordinalclip.heads import Prediction, without_branches
from ordinalclip.images import (
    FORMATS,
    MAX_PIXELS,
    MAX_RATIO,
    BrokenImageError,
    PixelSpec,
    load_image,
    prepare,
    read_formats,
)
from ordinalclip.model import OrdinalModel
from ordinalclip.progress import Progress, announced
from ordinalclip.provenance import fingerprints, versions
from ordinalclip.ranks import Ranks
from ordinalclip.run_folder import RunFolder
from ordinalclip.weights import first_line

Format = Literal["onnx", "torch-export", "openvino"]
Arrays = dict[str, np.ndarray]  # inputs or outputs of a graph by name
Run = Callable[[Arrays], Arrays]

GRAPHS = {"onnx": "model.onnx", "torch-export": "model.pt2", "openvino": "model.xml"}
MARK = "export.json"
OURS = (MARK, *GRAPHS.values(), "model.onnx.data", "model.bin", "preprocessing.json", "ranks.json", "predict.py")
BATCHES = (1, 3, 7)  # in which a graph is tried
TOLERANCE = 1e-4  # of values as a share of the range of the ranks, and of probabilities
TIE = 1e-6  # so near to a boundary rounding decides which of two ranks is answered
USUAL_LEVEL = 0.9  # of intervals, where there were pictures enough for it
CALIBRATION = 200  # pictures for int8
SCORED = 500  # pictures of the validation part by which its price is known
# Of the encoder; head and decoding stay in float32. With the activations, or what is before them would get its 8 bits
# for a range that they cut off: answers then moved four times as far.
QUANTISED = ("Conv", "MatMul", "Gemm", "Relu", "Clip")


class Served(nn.Module):
    """What is exported: (B, 3, size, size) pixels -> `value` (B,) in label units, `rank` (B,), and `probabilities`
    (B, R) of heads that have them. A value is NaN where anything is not finite that `check_numbers` would have refused.

    A model that keeps intervals takes a level () besides, and gives `low` and `high` (B,).

    Attributes:
        levels: those of its intervals, lowest, usual and highest; None: it keeps none.
    """

    def __init__(self, model: OrdinalModel):
        super().__init__()
        self.model = model.eval()
        self.levels: tuple[float, float, float] | None = None
        if model.calibration is not None and (known := model.calibration.levels):
            self.levels = known[0], min(USUAL_LEVEL, known[-1]), known[-1]

    def forward(self, pixel_values: Tensor, level: Tensor | None = None) -> dict[str, Tensor]:
        model = self.model
        with without_branches() as unchecked:
            prediction = model.answer(model.head(model.encoder(pixel_values)))
        value = prediction.value
        for each in unchecked:
            value = torch.where(each.isfinite().reshape(each.shape[0], -1).all(dim=1), value, torch.nan)
        found = {"value": value, "rank": prediction.rank}
        if prediction.probabilities is not None:
            found["probabilities"] = prediction.probabilities
        if self.levels is not None:
            assert model.calibration is not None
            assert level is not None
            found["low"], found["high"] = model.calibration.interval(prediction, level)
        return found

    def inputs(self, pixels: Tensor, level: float | None = None) -> dict[str, Tensor]:
        """What `forward` takes, by name; the usual level where none is said."""
        if self.levels is None:
            return {"pixel_values": pixels}
        return {"pixel_values": pixels, "level": torch.tensor(self.levels[1] if level is None else level)}

    @property
    def outputs(self) -> list[str]:
        """The names of what `forward` gives."""
        size = self.model.config.pixel_spec.size
        with torch.no_grad():
            return list(self(**self.inputs(torch.zeros(1, 3, size, size))))


@dataclass(frozen=True)
class Agreement:
    """How far a graph's answers are from the model's.

    Attributes:
        pictures: how many were asked.
        value: largest difference of values, as a share of the range of the ranks.
        probability: largest difference of probabilities; None: the head has none.
        interval: largest difference of the ends of intervals, as that of values; None: the model keeps none.
        ties: answers, or ends of intervals, that lie within `TIE` of two ranks, and fell on the other one.
    """

    pictures: int
    value: float
    probability: float | None
    interval: float | None
    ties: int

    def __str__(self) -> str:
        share = "" if self.probability is None else f", of probabilities {self.probability:.1g}"
        share += "" if self.interval is None else f", of ends of intervals {self.interval:.1g} of that range"
        ties = f"; {self.ties} of them on a tie between two ranks, where either may be answered" * (self.ties > 0)
        return (
            f"largest difference from the model on {self.pictures} pictures: of values {self.value:.1g} of the range of"
            f" the ranks{share}{ties}"
        )


@dataclass(frozen=True)
class Cost:
    """What int8 costs.

    Attributes:
        difference: mean absolute difference of values from those in float32, in label units.
        before, after: mean absolute error in float32 and int8; None where there are no labels.
        pictures: how many were asked.
        where: whose they are.
    """

    difference: float
    before: float | None
    after: float | None
    pictures: int
    where: str

    def __str__(self) -> str:
        mae = "" if self.before is None else f"MAE {self.before:.4g} before, {self.after:.4g} after; "
        return f"int8: {mae}answers move by {self.difference:.4g} on average ({self.pictures} {self.where})"


@dataclass(frozen=True)
class Exported:
    """What was written: the folder, how well the graph agrees (for int8: before it is quantised), what int8 costs."""

    folder: Path
    agreement: Agreement
    cost: Cost | None = None


def export(
    model: str | Path | OrdinalModel,
    folder: str | Path,
    format: Format = "onnx",
    int8: bool = False,
    pictures: Sequence[Any] | None = None,
    calibration: int = CALIBRATION,
    overwrite: bool = False,
    quiet: bool = True,
) -> Exported:
    """Write a model as a graph, with all that is needed to ask it: `predict.py`, `preprocessing.json`, `ranks.json`.

    Args:
        model: a run folder, a model folder, a name on the hub, or a model in memory, which stays as it is.
        folder: to write.
        format: "onnx" (model.onnx), "openvino" (model.xml, model.bin) or "torch-export" (model.pt2).
        int8: weights and activations of the encoder in 8 bits, per channel, calibrated on pictures. ONNX alone.
        pictures: what `load_image` takes; to calibrate on and to try the graph with. Default: of a run its training
            part to calibrate on; drawn instruments to try.
        calibration: how many pictures to calibrate on at most.
        overwrite: replace an export that is in the folder.

    Raises:
        ImportError: a package that writes or runs the format is not installed; FileExistsError: the folder holds
            something; FileNotFoundError: no such model; ValueError: an unknown format, a method or a backbone that
            cannot be exported, a graph that does not answer as the model does, no pictures to calibrate on.
    """
    if format not in get_args(Format):
        raise ValueError(f"format {format!r} is unknown; choices: {', '.join(get_args(Format))}")
    if int8 and format != "onnx":
        raise ValueError(f"int8 is for format onnx, not {format}")
    folder = Path(folder)
    check_replaceable(folder, "export", MARK, OURS, overwrite)
    _check_installed(format)
    loaded, name, run = (model, str(model.name_or_path), None) if isinstance(model, OrdinalModel) else served(model)
    graph = Served(deepcopy(loaded).deploy().float().cpu())
    deployed = graph.model
    source = f"method {deployed.config.method!r} on backbone {deployed.config.backbone!r}"
    parts = _parts_of(run) if int8 and pictures is None and run is not None else None
    calibrating = _calibration(parts, pictures, calibration) if int8 else None
    tried = _tried(deployed.config.pixel_spec, pictures)
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole(folder) as aside:
        aside.mkdir()
        file = aside / GRAPHS[format]
        with announced(f"exporting {name or source}", quiet), _explained(source, format):
            _write_graph(graph, format, file)
        ask = RUNNERS[format](file)
        agreement = _compared(graph, ask, tried, f"{source}, {format}")
        cost = None
        if calibrating is not None:
            before = ask
            with announced("quantising", quiet), _explained(source, "int8"):
                _quantise(file, _Batches(graph, calibrating, quiet))
            cost = _cost(parts, graph, before, RUNNERS[format](file), calibrating, quiet)
        _write_beside(aside, graph, format, run)
        written = {
            "model": _source(name, deployed),
            "format": format,
            "int8": int8,
            "agreement": asdict(agreement),
            "cost": None if cost is None else asdict(cost),
            "versions": versions() | _versions(format),
        }
        write_json(aside / MARK, written)
    return Exported(folder, agreement, cost)


NEEDED = {
    "onnx": {"onnx": "export", "onnxscript": "export", "onnxruntime": "export"},
    "openvino": {"openvino": "openvino"},
    "torch-export": {},
}


def _check_installed(format: Format) -> None:
    for package, extra in NEEDED[format].items():
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(
                f"format {format} needs {package}: pip install 'ordinalclip[{extra}]' ({error})"
            ) from error


def _versions(format: Format) -> dict[str, str]:
    return {package: str(importlib.import_module(package).__version__) for package in NEEDED[format]}


def _source(name: str, model: OrdinalModel) -> dict[str, str]:
    """What was exported, without where it lay."""
    return {
        "folder": Path(name).name if name else "",
        "method": model.config.method,
        "backbone": model.config.backbone.partition(":")[0],
    }


@contextlib.contextmanager
def _explained(source: str, form: str) -> Iterator[None]:
    """What the libraries raise, in one line.

    Raises:
        ValueError: it cannot be exported.
    """
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (OSError, MemoryError, BrokenImageError):
        raise
    except Exception as error:  # whatever they are made of
        raise ValueError(f"{source} cannot be exported to {form}: {_innermost(error)}") from error


def _innermost(error: BaseException) -> str:
    """What went wrong at first, in a line of a size that can be read."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _write_graph(graph: Served, format: Format, file: Path) -> None:
    """The graph as a file of a format."""
    size = graph.model.config.pixel_spec.size
    inputs = graph.inputs(torch.zeros(2, 3, size, size))
    free: Any = dict.fromkeys(inputs) | {"pixel_values": {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        program = torch.export.export(graph, (), inputs, dynamic_shapes=free, strict=False)
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)  # which tells where this machine keeps its files
    if format == "torch-export":
        torch.export.save(program, file)
    elif format == "openvino":
        import openvino

        converted = openvino.convert_model(program)
        named = [*zip(converted.inputs, inputs, strict=True), *zip(converted.outputs, graph.outputs, strict=True)]
        for port, name in named:
            port.get_tensor().set_names({name})
        openvino.save_model(converted, file, compress_to_fp16=False)
    else:
        free = dict.fromkeys(inputs) | {"pixel_values": {0: "batch"}}
        options: Any = {"dynamic_shapes": free, "output_names": graph.outputs, "verbose": False}
        exported = torch.onnx.export(program, (), dynamo=True, **options)
        assert exported is not None
        exported.save(file)


def run_onnx(file: Path, threads: int = 0) -> Run:
    """Ask model.onnx; of 0 threads onnxruntime takes as many as there are cores."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(None, inputs), strict=True))


def run_openvino(file: Path, threads: int = 0) -> Run:
    """Ask model.xml, or a model.onnx."""
    import openvino

    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}  # or processors that know bfloat16 compute in it
    if threads:
        options |= {"INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(file, "CPU", options)
    return lambda inputs: {output.any_name: array for output, array in compiled(inputs).items()}


def run_torch(file: Path) -> Run:
    """Ask model.pt2."""
    module = torch.export.load(file).module()

    def run(inputs: Arrays) -> Arrays:
        with torch.no_grad():
            outputs = module(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        return {name: tensor.numpy() for name, tensor in outputs.items()}

    return run


RUNNERS: dict[str, Callable[..., Run]] = {"onnx": run_onnx, "openvino": run_openvino, "torch-export": run_torch}


def _tried(spec: PixelSpec, pictures: Sequence[Any] | None) -> Tensor:
    """Pixels of as many pictures as all `BATCHES` take: of those that are given, or drawn instruments."""
    count = sum(BATCHES)
    if pictures is not None and len(pictures):
        rows = np.linspace(0, len(pictures) - 1, count).round().astype(int).tolist()
        return torch.stack([prepare(load_image(pictures[row], f"picture {row + 1}"), spec) for row in rows])
    drawn = [each for kind in KINDS for each, _ in drawn_gauges(kind, -(-count // len(KINDS)), 7)]
    return torch.stack([prepare(each, spec) for each in drawn[:count]])


def _compared(graph: Served, run: Run, pixels: Tensor, where: str) -> Agreement:
    """Ask the graph in all `BATCHES`, and at all of `Served.levels`.

    Raises:
        ValueError: it answers otherwise than the model.
    """
    found, begin = [], 0
    for size, level in zip(BATCHES, graph.levels or (None,) * len(BATCHES), strict=True):
        found.append(agreement(graph, run, pixels[begin : begin + size], level, where))
        begin += size

    def largest(name: str) -> float | None:
        values = [getattr(each, name) for each in found]
        return None if values[0] is None else max(values)

    value = largest("value")
    assert value is not None
    ties = sum(each.ties for each in found)
    return Agreement(begin, value, largest("probability"), largest("interval"), ties)


def agreement(graph: Served, run: Run, pixels: Tensor, level: float | None = None, where: str = "") -> Agreement:
    """How far the answers of a graph in a file are from the model's, for one batch.

    Args:
        graph: what it was exported from.
        run: asks it.
        pixels: (B, 3, size, size).
        level: of intervals; None: the usual one.
        where: begins the message of errors.

    Raises:
        ValueError: values, probabilities or ends of intervals differ by more than `TOLERANCE`, or ranks differ that are
            on no tie.
    """
    model, ranks = graph.model, graph.model.head.ranks
    inputs = {name: tensor.numpy() for name, tensor in graph.inputs(pixels, level).items()}
    expected, found = model.predict(pixels), run(inputs)
    wide = ranks.values[-1] - ranks.values[0]

    def largest(moved: np.ndarray, share: float = 1.0) -> float:
        return float(np.nan_to_num(np.abs(moved) / share, nan=np.inf).max(initial=0.0))

    tied = on_a_tie(expected, ranks, model.config.decoding).numpy()
    other = found["rank"] != expected.rank.numpy()
    value = largest((found["value"] - expected.value.numpy())[~(tied & other)], wide)
    share = interval = None
    if expected.probabilities is not None:
        share = largest(found["probabilities"] - expected.probabilities.numpy())
    ties = tied & other
    if graph.levels is not None:
        assert model.calibration is not None
        asked = float(inputs["level"])
        ends = torch.stack(model.calibration.interval(expected, torch.tensor(asked)), dim=1).numpy()
        moved = np.stack([found["low"], found["high"]], axis=1) - ends
        on_edge = _ends_on_a_tie(model.calibration, expected, asked).numpy() | ties
        far = ~(np.abs(moved) <= TOLERANCE * wide).all(axis=1)
        ties |= on_edge & far
        interval = largest(moved[~(on_edge & far)], wide)
    strange = int((other & ~tied).sum())
    if strange or not max(value, share or 0.0, interval or 0.0) <= TOLERANCE:
        raise ValueError(
            f"{where}: the graph does not answer as the model does: values differ by {value:.2g} of the range of the "
            f"ranks, probabilities by {share or 0:.2g}, ends of intervals by {interval or 0:.2g}, {strange} of "
            f"{len(pixels)} ranks; allowed is {TOLERANCE:g}, and no other rank"
        )
    return Agreement(len(pixels), value, share, interval, int(ties.sum()))


def _ends_on_a_tie(calibration: Calibration, prediction: Prediction, level: float) -> Tensor:
    """(B,) whether a rank's score lies so near to the threshold that rounding decides whether it is inside."""
    if calibration.kind in OF_VALUES and not calibration.by_rank:
        return torch.zeros(len(prediction.value), dtype=torch.bool)
    threshold = calibration.thresholds[:, round(level * 100) - round(LEVELS[0] * 100)]
    return ((calibration.scores(prediction) - threshold).abs() <= TIE * (1 + threshold.abs())).any(dim=1)


def on_a_tie(prediction: Prediction, ranks: Ranks, decoding: str) -> Tensor:
    """(B,) whether an answer lies within `TIE` of two ranks."""
    if prediction.probabilities is None or decoding == "expectation":
        values = prediction.value.double()
        inner = torch.tensor(ranks.values, dtype=torch.float64).unfold(0, 2, 1).mean(dim=1)
        if ranks.edges is not None:
            edges = ranks.edges[1:-1] if len(ranks.edges) == len(ranks) + 1 else ranks.edges
            inner = torch.tensor(edges, dtype=torch.float64)
        return (values[:, None] - inner).abs().amin(dim=1) <= TIE * (ranks.values[-1] - ranks.values[0])
    if decoding == "median":
        return (prediction.probabilities.cumsum(dim=1) - 0.5).abs().amin(dim=1) <= TIE
    first, second = prediction.probabilities.topk(2, dim=1).values.unbind(dim=1)
    return first - second <= TIE


class _Pictures(Sequence[Any]):
    """Some rows of a part, spread over its labels."""

    def __init__(self, part: Part, count: int):
        order = np.argsort(part.values, kind="stable")
        self.part, self.rows = part, order[np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.part.image(int(self.rows[index]))

    @property
    def labels(self) -> np.ndarray:
        return self.part.values[self.rows]


def _parts_of(run: RunFolder) -> Parts:
    """The run's data, as it was.

    Raises:
        ValueError: it is not there any more, or another.
    """
    config = run.read_config()
    elsewhere = "name pictures to calibrate on (--data)"
    if config.data.source == "memory":
        raise ValueError(f"{run.path}: the run got its data in memory; {elsewhere}")
    try:
        parts = load_parts(config.data, config.ranks, config.seed)
    except (OSError, ValueError) as error:
        raise ValueError(f"{run.path}: the run's data cannot be read ({first_line(error)}); {elsewhere}") from error
    if changed := run.data_difference(fingerprints(parts)):
        raise ValueError(f"{run.path}: {changed}; {elsewhere}")
    return parts


def _calibration(parts: Parts | None, pictures: Sequence[Any] | None, count: int) -> Sequence[Any]:
    """Pictures to calibrate on."""
    if count < 1:
        raise ValueError(f"calibration must be 1 or more pictures, got {count}")
    if pictures is not None:
        if not len(pictures):
            raise ValueError("no pictures to calibrate on")
        rows = np.unique(np.linspace(0, len(pictures) - 1, min(count, len(pictures))).round().astype(int)).tolist()
        return [pictures[row] for row in rows]
    if parts is None:
        raise ValueError("int8 needs pictures to calibrate on: the model is of no run that is here; name some (--data)")
    return _Pictures(parts.train, count)


class _Batches:
    """Calibration pictures one by one, as onnxruntime asks for them."""

    def __init__(self, graph: Served, pictures: Sequence[Any], quiet: bool):
        self.graph, self.pictures = graph, pictures
        self.rows = iter(Progress(range(len(pictures)), "calibrating", unit="images", quiet=quiet))

    def get_next(self) -> Arrays | None:
        row = next(self.rows, None)
        return None if row is None else _inputs(self.graph, self.pictures, row)


def _inputs(graph: Served, pictures: Sequence[Any], row: int) -> Arrays:
    """One picture, as a graph takes it."""
    pixels = prepare(load_image(pictures[row], f"picture {row + 1}"), graph.model.config.pixel_spec)
    return {name: tensor.numpy() for name, tensor in graph.inputs(pixels[None]).items()}


def _quantise(file: Path, batches: _Batches) -> None:
    """model.onnx in 8 bits, in its place."""
    import onnx
    from onnxruntime.quantization import QuantFormat, quantize_static

    graph = onnx.load(file).graph
    head = [node.name for node in graph.node if not _of_encoder(node)]
    small = file.with_name("int8.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_static(
            file,
            small,
            batches,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=QUANTISED,
            per_channel=True,
            nodes_to_exclude=head,
        )
    small.replace(file)


def _of_encoder(node: Any) -> bool:
    scopes = next((each.value for each in node.metadata_props if each.key == "namespace"), "")
    return "model.encoder" in scopes


def _cost(parts: Parts | None, graph: Served, before: Run, after: Run, pictures: Sequence[Any], quiet: bool) -> Cost:
    """What int8 costs: on the validation part of a run, else on the pictures that it was calibrated on."""
    labels, where = None, "pictures that it was calibrated on"
    if parts is not None and parts.validation is not None:
        pictures = _Pictures(parts.validation, SCORED)
        labels, where = pictures.labels, "pictures of the validation part"
    values = []
    for row in Progress(range(len(pictures)), "comparing", unit="images", quiet=quiet):
        inputs = _inputs(graph, pictures, row)
        values.append([float(ask(inputs)["value"][0]) for ask in (before, after)])
    found = np.array(values)
    if not np.isfinite(found).all():
        raise ValueError("int8: the model answers with numbers that are not finite")
    moved = float(np.abs(found[:, 1] - found[:, 0]).mean())
    if labels is None:
        return Cost(moved, None, None, len(pictures), where)
    first, second = np.abs(found - labels[:, None]).mean(axis=0).tolist()
    return Cost(moved, first, second, len(pictures), where)


def _write_beside(folder: Path, graph: Served, format: Format, run: RunFolder | None) -> None:
    """What is needed to ask the graph: how pixels are prepared, the ranks, and a program that does it."""
    model = graph.model
    spec, ranks = model.config.pixel_spec, model.head.ranks
    formats = FORMATS if run is None else read_formats(run.read_config().data.extra_formats)
    limits = {"max_pixels": MAX_PIXELS, "max_ratio": MAX_RATIO}
    write_json(
        folder / "preprocessing.json", asdict(spec) | {"scaled_size": spec.scaled_size, "formats": formats} | limits
    )
    levels = None if graph.levels is None else dict(zip(("lowest", "usual", "highest"), graph.levels, strict=True))
    write_json(
        folder / "ranks.json", {"values": ranks.values, "names": ranks.names, "unit": ranks.unit, "levels": levels}
    )
    package = {"onnx": "onnxruntime", "openvino": "openvino", "torch-export": "torch"}[format]
    environment = Environment(
        loader=PackageLoader("ordinalclip", "assets/export"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    title = f"Answers of an ordinal regression model ({GRAPHS[format]}) to pictures, as a table."
    text = environment.get_template("predict.py.jinja").render(
        title=title, format=format, package=package, levels=graph.levels
    )
    (folder / "predict.py").write_text(text, encoding="utf-8")
