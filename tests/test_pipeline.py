"""Everything that the pipeline may be given: it works, or is refused by its name in one error."""

import base64
import io
import json
import os
import subprocess
import sys
import threading
import zlib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from families import make_family
from transformers import AutoModel, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from ordinalclip import OrdinalConfig, OrdinalModel, OrdinalRegressionPipeline, Ranks
from ordinalclip.gauges import make_gauges
from ordinalclip.images import BrokenImageError, load_image
from ordinalclip.pipeline import MOST_FETCHED, fetch, load_pipeline

TASK = "image-ordinal-regression"
RANKS = Ranks.linear(0, 100, 21, unit="%")
ROOT = Path(__file__).parents[1]


def saved(folder, spec="tiny"):
    torch.manual_seed(3)
    model = OrdinalModel.build(spec, RANKS, "cross_entropy").eval()
    with torch.no_grad():
        model.head.linear.weight.normal_(std=0.3)  # so that every picture has an answer of its own
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline(TASK, model=str(folder))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Six PNG files, whose answers differ."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, row in enumerate(make_gauges("dial", 6)):
        row["image"].save(folder / f"{number}.png")
    return sorted(map(str, folder.iterdir()))


@pytest.fixture(scope="module")
def expected(pipe, files):
    found = [pipe(file) for file in files]
    assert len({answer["top"][0]["probability"] for answer in found}) == len(files)
    return found


def same(answers, expected):
    answers = list(answers)
    assert len(answers) == len(expected)
    for one, other in zip(answers, expected, strict=True):
        assert one["value"] == pytest.approx(other["value"], abs=1e-3)
        assert [each["name"] for each in one["top"]] == [each["name"] for each in other["top"]]
        probabilities = [each["probability"] for each in one["top"]]
        assert probabilities == pytest.approx([each["probability"] for each in other["top"]], abs=1e-5)


def as_base64(file):
    return base64.b64encode(Path(file).read_bytes()).decode()


def pixels_of(file):
    return torch.from_numpy(np.array(load_image(file)))


@pytest.mark.parametrize(
    "given",
    [
        Path,
        lambda file: Path(file).read_bytes(),
        load_image,
        lambda file: pixels_of(file).numpy(),
        as_base64,
        lambda file: base64.encodebytes(Path(file).read_bytes()).decode(),  # in lines
        lambda file: f"data:image/png;base64,{as_base64(file)}",
        lambda file: pixels_of(file).permute(2, 0, 1),
        lambda file: pixels_of(file).permute(2, 0, 1) / 255,
        lambda file: (pixels_of(file).permute(2, 0, 1).double() / 255).requires_grad_(),
        lambda file: pixels_of(file).permute(2, 0, 1).to(torch.uint16) * 257,
        lambda file: {"bytes": Path(file).read_bytes(), "path": None},
    ],
)
def test_kinds_of_pictures(pipe, files, expected, given):
    same(pipe([given(file) for file in files]), expected)
    same([pipe(given(files[0]))], expected[:1])


def test_tensors_have_their_channels_first():
    grey = torch.arange(12, dtype=torch.uint8).reshape(3, 4) * 20
    for tensor in (grey, grey[None], grey[None].expand(3, 3, 4), grey.float() / 255):
        assert np.array_equal(np.array(load_image(tensor))[..., 1], grey.numpy())
    opaque = torch.cat([grey[None].expand(3, 3, 4), torch.full((1, 3, 4), 255, dtype=torch.uint8)])
    assert np.array_equal(np.array(load_image(opaque))[..., 0], grey.numpy())
    assert np.array(load_image(torch.zeros(4, 2, 2))).min() == 255  # transparent lies on white
    wide = torch.zeros(3, 5, 3)  # could be either, if a shape were guessed at
    assert load_image(wide).size == (3, 5)


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        (torch.zeros(8, 9, 3), r"a tensor of shape \(8, 9, 3\); allowed are \(H, W\), \(1, H, W\), \(3, H, W\) and"),
        (torch.zeros(2, 3, 8, 8), "of a batch give a list of its pictures"),
        (torch.zeros(3, 8, 8) - 0.1, r"a tensor of floats must lie in \[0, 1\]"),
        (torch.full((3, 8, 8), 255.0), r"a tensor of floats must lie in \[0, 1\]"),
        (torch.full((3, 8, 8), torch.nan), r"a tensor of floats must lie in \[0, 1\]"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "a tensor of int64; allowed are uint8, uint16 and floats"),
        (torch.zeros(3, 0, 8), "8 x 0: no pixels"),
        ("data:image/svg+xml,<svg/>", "a data: URL; allowed is data:image/KIND;base64,CONTENT"),
        ("data:image/png;base64,iVBOR!!!", "a data: URL whose base64 is damaged"),
        ("data:image/png;base64,", "empty, 0 bytes"),
        (f"data:image/png;base64,{'QUJD' * 20}", r"\(102 characters\): not a readable image \(cut off, or in none of"),
        ("QUJD" * 30, r"QUJDQUJD.*\.\.\. \(120 characters\): .*no such file, and if it is base64 cut off, or in none"),
        ("pictures/of/yesterday/that/are/not/there/any/more.png", "No such file"),
        ({"image": None, "label": 3}, "a row with image, label given; give the picture in it"),
        (7, "int given; allowed are a path, bytes, base64, a PIL image, an array and a tensor"),
    ],
)
def test_other_pictures_are_refused(pipe, picture, said):
    for given in (picture, [picture]):
        with pytest.raises(BrokenImageError, match=said):
            pipe(given)


def test_base64_is_decoded_as_strictly_as_files(pipe, files):
    """Turned by its EXIF, of a foreign format, of too many pixels; a file of such a name goes first."""
    image = load_image(files[0])
    exif = image.getexif()
    exif[274] = 6
    stream = io.BytesIO()
    image.save(stream, "PNG", exif=exif)
    turned = load_image(base64.b64encode(stream.getvalue()).decode())
    assert np.array_equal(np.array(turned), np.rot90(np.array(image), -1))
    stream = io.BytesIO()
    image.save(stream, "PPM")
    with pytest.raises(BrokenImageError, match="in none of the formats JPEG"):
        load_image(base64.b64encode(stream.getvalue()).decode())
    header = as_base64(files[0])
    huge = bytearray(base64.b64decode(header))
    huge[16:24] = (60_000).to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    with pytest.raises(BrokenImageError, match="3600000000 pixels"):
        load_image(base64.b64encode(huge).decode())


def test_a_file_goes_before_base64_of_its_name(tmp_path, monkeypatch, files):
    monkeypatch.chdir(tmp_path)
    name = "QUJD" * 20
    (tmp_path / name).write_bytes(Path(files[0]).read_bytes())
    assert load_image(name).size == load_image(files[0]).size


# ---- several


def table_of(files):
    rows = {"image": files, "label": list(range(len(files)))}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def streamed(files):
    return table_of(files).to_iterable_dataset()


class OfTorch(torch.utils.data.Dataset):
    def __init__(self, files):
        self.files = files

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return pixels_of(self.files[index]).permute(2, 0, 1)


SEVERAL = {
    "list": list,
    "tuple": tuple,
    "generator": lambda files: (file for file in files),
    "iterator": iter,
    "map": lambda files: map(load_image, files),
    "Dataset": table_of,
    "column": lambda files: table_of(files)["image"],
    "KeyDataset": lambda files: KeyDataset(table_of(files), "image"),
    "stream": streamed,
    "torch": OfTorch,
}


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("kind", SEVERAL)
def test_several_pictures_keep_their_order(pipe, files, expected, kind, batch_size):
    answers = pipe(SEVERAL[kind](files), batch_size=batch_size)
    assert isinstance(answers, list) == (kind in ("list", "tuple"))
    same(answers, expected)


@pytest.mark.parametrize("kind", ["list", "generator", "Dataset", "KeyDataset"])
def test_processes_that_decode(pipe, files, expected, kind):
    same(pipe(SEVERAL[kind](files), num_workers=2, batch_size=4), expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_size": 2},
        pytest.param({"num_workers": 2}, marks=pytest.mark.slow),
        pytest.param({"num_workers": 2, "batch_size": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_broken_picture_among_several_is_one_error(pipe, files, tmp_path, options):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for given in ([*files, str(tmp_path / "broken.png")], (file for file in [files[0], str(tmp_path / "broken.png")])):
        with pytest.raises(BrokenImageError) as caught:
            list(pipe(given, **options))
        assert str(caught.value).startswith(f"{tmp_path}/broken.png: not a readable image (cut off, or in none of")
        assert "\n" not in str(caught.value)


def test_iterators_are_not_read_ahead_of_their_answers(pipe, files):
    taken = []
    answers = pipe(taken.append(file) or file for file in files)
    next(iter(answers))
    assert len(taken) < len(files)


def test_nothing_gives_nothing(pipe):
    assert pipe([]) == pipe(()) == []
    assert list(pipe(iter([]))) == list(pipe(table_of([]))) == []


def test_data_sets_whose_pictures_are_not_found(pipe, files):
    two = table_of(files).add_column("other", files).cast_column("other", datasets.Image())
    with pytest.raises(ValueError, match=r'those of images image, other; say which: KeyDataset\(table, "COLUMN"\)'):
        pipe(two)
    with pytest.raises(ValueError, match="its columns are label, those of images none"):
        pipe(table_of(files).remove_columns("image"))
    with pytest.raises(ValueError, match="a data set with parts; give one of them: train, test"):
        pipe(datasets.DatasetDict(train=two, test=two))


# ---- URLs


@contextmanager
def server(answer):
    """A real HTTP server on this machine; `answer(request)` writes what comes after the status line."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answer(self)

        def log_message(self, *_):
            pass

    own = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    own.daemon_threads = True
    thread = threading.Thread(target=own.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{own.server_port}/picture.png"
    finally:
        own.shutdown()
        own.server_close()
        thread.join()


def send(request, content, length=None):
    request.send_response(200)
    request.send_header("Content-Length", str(len(content) if length is None else length))
    request.end_headers()
    request.wfile.write(content)


def test_a_url(pipe, files, expected):
    content = Path(files[0]).read_bytes()
    with server(lambda request: send(request, content)) as url:
        same([pipe(url), *pipe([url, url], timeout=20, num_workers=1)], expected[:1] * 3)


def test_a_url_that_gives_no_picture_is_one_error(pipe, files):
    content = Path(files[0]).read_bytes()
    for answer, said in (
        (lambda request: request.send_error(404), r"not fetched \(HTTP Error 404"),
        (lambda request: send(request, b"<html>sorry</html>"), "cut off, or in none of the formats"),
        (lambda request: send(request, content[:1000], len(content)), "not fetched .*cut off|not fetched .*Incomplete"),
        (lambda request: request.wfile.write(b"nonsense\r\n\r\n"), "not fetched"),
    ):
        with server(answer) as url, pytest.raises(BrokenImageError, match=said) as caught:
            pipe(url)
        assert str(caught.value).startswith(f"{url}: ")
    with pytest.raises(BrokenImageError, match=r"^http://127\.0\.0\.1:9/a\.png: not fetched .*refused"):
        pipe("http://127.0.0.1:9/a.png")
    with pytest.raises(BrokenImageError, match=r"^http://: not fetched"):
        pipe("http://")


def test_a_url_that_hangs_or_drips_ends_in_time(folder, pipe):
    asked, done = threading.Event(), threading.Event()

    def hang(request):
        asked.set()
        done.wait(60)

    def drip(request):
        request.send_response(200)
        request.send_header("Content-Length", "1000000")
        request.end_headers()
        while not done.wait(0.05):
            request.wfile.write(b"x")

    whole = pipeline(TASK, model=str(folder), timeout=0.3)  # for all calls
    for answer in (hang, drip):
        with server(answer) as url:
            for call in (lambda: pipe(url, timeout=0.3), lambda: whole(url), lambda: pipe([url], timeout=0.3)):
                with pytest.raises(BrokenImageError, match=r"not fetched \(no answer in time; timeout=0\.3 seconds\)"):
                    call()
            done.set()
        done.clear()
    assert asked.is_set()


def test_a_url_without_end_is_not_read_on(monkeypatch):
    monkeypatch.setattr("ordinalclip.pipeline.MOST_FETCHED", 1 << 20)
    assert MOST_FETCHED > 1 << 20

    def pour(request):
        request.send_response(200)
        request.end_headers()
        for _ in range(200):
            request.wfile.write(bytes(1 << 16))

    with server(pour) as url, pytest.raises(BrokenImageError, match=r"not fetched \(more than 1 MB\)"):
        fetch(url)


# ---- options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"topk": 3}, "has no option topk; it takes top_k, timeout and interval"),
        ({"attn_implementation": "eager"}, r"no option attn_implementation; .*; model_kwargs=\{...\} takes"),
        ({"top_k": -1}, "top_k must be a whole number from 0, got -1"),
        ({"top_k": 2.0}, "top_k must be a whole number"),
        ({"timeout": 0}, "timeout must be a number of seconds above 0, got 0"),
        ({"timeout": "3"}, "timeout must be a number of seconds"),
    ],
)
def test_options_are_refused_by_name(folder, pipe, files, options, said):
    with pytest.raises(ValueError, match=said):
        pipe(files[0], **options)
    with pytest.raises(ValueError, match=said):
        pipeline(TASK, model=str(folder), **options)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, torch.device("cpu")])
def test_device_map(folder, files, expected, device_map):
    answer = pipeline(TASK, model=str(folder), device_map=device_map)
    same([answer(files[0])], expected[:1])
    model = OrdinalModel.from_pretrained(folder, device_map=device_map)
    wanted = torch.accelerator.current_accelerator(check_available=True) if device_map == "auto" else None
    assert model.device.type == answer.model.device.type == (wanted.type if wanted else "cpu")


@pytest.mark.parametrize("device_map", ["balanced", {"encoder": "cpu", "head": "cpu"}, "gpu"])
def test_a_model_is_not_divided(folder, device_map):
    loads = [lambda: pipeline(TASK, model=str(folder), device_map=device_map)]
    loads += [lambda: AutoModel.from_pretrained(folder, device_map=device_map)]
    for load in loads:
        with pytest.raises(ValueError, match=r"device_map must be 'auto', a device .*: the model goes to one device"):
            load()


def test_dtype(folder, files):
    for name in ("bfloat16", torch.bfloat16):
        assert pipeline(TASK, model=str(folder), dtype=name)(files[0])["unit"] == "%"
    with pytest.raises(ValueError, match=r"dtype 'int8' is unknown; choices: .*float32"):
        OrdinalModel.from_pretrained(folder, dtype="int8")


def test_attention_where_there_is_a_choice(tmp_path, files):
    folder = saved(tmp_path / "model", make_family("hf:hf_vit", tmp_path))
    answers = {}
    for name in ("eager", "sdpa"):
        built = pipeline(TASK, model=str(folder), model_kwargs={"attn_implementation": name})
        models = [
            built.model,
            *(load.from_pretrained(folder, attn_implementation=name) for load in (OrdinalModel, AutoModel)),
        ]
        assert [model.encoder.tower.model.config._attn_implementation for model in models] == [name] * 3
        answers[name] = built(files)
        built.save_pretrained(tmp_path / name)
        assert "attn" not in (tmp_path / name / "config.json").read_text()
    same(answers["eager"], answers["sdpa"])


def test_attention_is_refused_where_there_is_none(folder):
    for name, said in (
        ("eager", r"this model \(tiny\) has no choice of attention"),
        ("kernels/x", "choices: eager, sdpa"),
    ):
        for load in (
            lambda name=name: pipeline(TASK, model=str(folder), model_kwargs={"attn_implementation": name}),
            lambda name=name: OrdinalModel.from_pretrained(folder, attn_implementation=name),
            lambda name=name: AutoModel.from_pretrained(folder, attn_implementation=name),
        ):
            with pytest.raises(ValueError, match=f"^attn_implementation.*{said}"):
                load()
    content = json.loads((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="no field attn_implementation"):
        OrdinalConfig.from_dict({**content, "attn_implementation": "eager"})


# ---- saving, and loading elsewhere


def test_a_saved_pipeline_answers_the_same_and_holds_no_code(tmp_path, pipe, files, expected):
    pipe.save_pretrained(tmp_path / "copy")
    assert {file.name for file in (tmp_path / "copy").iterdir()} == {
        *("config.json", "model.safetensors", "preprocessor_config.json")
    }
    content = (tmp_path / "copy" / "config.json").read_text()
    assert "custom_pipelines" not in content
    assert "auto_map" not in content
    for load in (load_pipeline, lambda name: pipeline(TASK, model=name, trust_remote_code=False)):
        assert load(str(tmp_path / "copy"))(files) == pipe(files)
    same(pipe(files), expected)
    pipe.save_pretrained(tmp_path / "again")  # nothing is left in the model of having been saved
    assert (tmp_path / "again" / "config.json").read_text() == content
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is a file; a model is saved as a folder"):
        pipe.save_pretrained(tmp_path / "file")


def test_a_pipeline_of_a_model_in_memory(folder, files, expected):
    model = OrdinalModel.from_pretrained(folder)
    same(OrdinalRegressionPipeline(model=model)(files), expected)
    same(pipeline(TASK, model=model, image_processor=model.image_processor)(files), expected)


WITHOUT = """
import sys, transformers
for line in sys.argv[2:]:
    try:
        eval(line, {**vars(transformers), "transformers": transformers, "FOLDER": sys.argv[1]})
    except Exception as error:
        print(type(error).__name__, " ".join(str(error).split()))
    else:
        print("loaded")
"""
LINES = (
    "transformers.AutoConfig.from_pretrained(FOLDER)",
    "transformers.AutoModel.from_pretrained(FOLDER)",
    "transformers.AutoModelForImageClassification.from_pretrained(FOLDER)",
    f"transformers.pipeline('{TASK}', model=FOLDER)",
)


@pytest.mark.slow
def test_without_the_import_the_error_names_the_package(folder):
    """All that a folder without code can say: transformers puts the model's type, our name, into its error."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for first in ("", "import ordinalclip"):
        words = [sys.executable, "-c", first + WITHOUT, str(folder), *LINES]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True, timeout=300)
        said = done.stdout.splitlines()
        assert len(said) == len(LINES)
        if first:
            assert said == ["loaded"] * len(LINES)
        else:
            assert all(
                line.startswith("ValueError The checkpoint you are trying to load has model type `ordinalclip`")
                for line in said
            )
        assert "trust_remote_code" not in done.stdout + done.stderr
