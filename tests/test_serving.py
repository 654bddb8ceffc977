"""examples/serving: an exported model behind LitServe, with real processes, real clients and a real kill."""

import csv
import importlib.util
import io
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from conftest import QUICK, random_model
from PIL import Image

from ordinalclip.cli import main
from ordinalclip.export import TOLERANCE, export
from ordinalclip.gauges import draw

ROOT = Path(__file__).parents[1]
SERVER = ROOT / "examples" / "serving" / "server.py"
CLIENTS = 200


@pytest.fixture(scope="module")
def script():
    """benchmarks/serving.py."""
    spec = importlib.util.spec_from_file_location("serving_benchmark", ROOT / "benchmarks" / "serving.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a few seconds that keeps intervals."""
    folder = tmp_path_factory.mktemp("run") / "mine"
    keys = ["data.num_train=64", "data.num_validation=128", "data.calibration=0.5", "data.kinds=[thermometer]"]
    keys += ["train.max_steps=40", "ranks.unit=%", "method=cross_entropy"]
    assert main(["train", "default", *QUICK, *keys, f"output_dir={folder}", "--quiet"]) == 0
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "onnx"
    export(run, folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Pictures of several sizes and modes."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(40):
        image = draw("thermometer", float(rng.uniform(0, 100)), rng)
        image = image.resize((int(rng.integers(50, 200)), 90)) if number % 4 else image.convert("L")
        image.save(folder / f"{number}.{'png' if number % 3 else 'jpg'}")
    return sorted(folder.iterdir())


@pytest.mark.slow
def test_one_model_answers_alike_in_every_way(script, run, files, tmp_path):
    found = script.everywhere(run, files, 0.8, tmp_path, sys.executable)
    assert next(iter(found)) == "pipeline"
    assert len(found) == 5
    assert found["pipeline"]["value"].nunique() > 3
    assert (found["pipeline"]["low"] < found["pipeline"]["high"]).any()
    moved = script.differences(found, 100)
    assert (moved["pictures"] == len(files)).all()
    assert moved[script.COLUMNS].to_numpy().max() < TOLERANCE


@pytest.mark.slow
def test_no_request_is_lost_under_load_though_a_worker_is_killed(script, exported, files):
    outcomes, seconds = script.under_load(exported, files, CLIENTS, 1200)
    load = script.client
    print(f"\n{load.summary(outcomes, seconds)}")
    assert len(outcomes) == 1200
    assert len({each.job.kind for each in outcomes}) == 18
    assert [each for each in outcomes if not each.as_expected] == []
    expected = {level: script.tabled(exported, files, level, sys.executable) for level in (0.6, 0.9)}
    assert (expected[0.6]["high"] < expected[0.9]["high"]).any()
    names = [file.name for file in files]
    for each in outcomes:
        if each.job.kind == load.GOOD:
            ours = [each.answer[column] for column in script.COLUMNS]
            level = float(each.job.sends["data"].get("level", 0.9))
            theirs = expected[level].iloc[names.index(each.job.name)].tolist()
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)


@pytest.fixture(scope="module")
def address(script, exported):
    with script.serving(exported, bytes=300_000, pixels=40_000, timeout=20) as (address, _):
        yield address


def post(address, content, level=None, name="a.png"):
    data = {} if level is None else {"level": str(level)}
    answer = httpx.post(f"{address}/predict", files={"image": (name, content)}, data=data, timeout=30, trust_env=False)
    return answer.status_code, answer.json()


@pytest.mark.slow
def test_an_answer_has_what_predict_py_prints(exported, address, files):
    status, answer = post(address, files[0].read_bytes(), 0.8)
    assert status == 200
    command = [sys.executable, str(exported / "predict.py"), "--level", "0.8", str(files[0])]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (row,) = csv.DictReader(io.StringIO(printed))
    assert set(answer) - {"rank", "level"} == set(row) - {"file"}
    assert (answer["unit"], answer["name"], answer["level"]) == (row["unit"], row["name"], 0.8)
    assert post(address, files[0].read_bytes())[1]["level"] == 0.9


@pytest.mark.slow
def test_what_is_refused_says_why_and_is_counted(address, files):
    large, fine = io.BytesIO(), files[0].read_bytes()
    Image.new("L", (300, 200)).save(large, "png")
    refusals = {
        "300 x 200 pixels are too many": (large.getvalue(),),
        "no such file, or an empty one": (b"",),
        "not a picture of a format that is read (JPEG, PNG": (b"text",),
        "truncated": (fine[: len(fine) // 2],),
        "the level is 0.5 to": (fine, 0.123),
        "level: Input should be a valid number": (fine, "many"),
        "too large": (bytes(300_001),),
    }
    for why, sent in refusals.items():
        status, answer = post(address, *sent)
        assert status == (413 if why == "too large" else 422)
        assert why in answer["detail"]
        assert "object at 0x" not in answer["detail"]
    answer = httpx.post(f"{address}/predict", data={"level": "0.9"}, trust_env=False)
    assert (answer.status_code, answer.json()) == (422, {"detail": "image: Field required"})
    counted = httpx.get(f"{address}/metrics", trust_env=False).text
    assert 'ordinal_requests_total{status="422"} 7.0' in counted
    assert 'ordinal_requests_total{status="413"} 1.0' in counted
    assert "ordinal_requests_in_progress 0.0" in counted
    assert "ordinal_batch_size_count" in counted


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_with_all_its_processes(number, script, exported, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with script.serving(exported, workers=2) as (address, server):
        family = psutil.Process(server.pid).children(recursive=True)
        assert len(family) >= 4  # two that answer, one that listens, the manager of their queues
        server.send_signal(number)
        assert server.wait(30) == 0
        assert not script.healthy(address)
    _, alive = psutil.wait_procs(family, 10)
    assert alive == []
    assert list(tmp_path.glob("metrics-*")) == []


@pytest.mark.slow
def test_a_model_without_intervals_refuses_a_level(script, files, tmp_path):
    export(random_model("l1"), tmp_path / "plain")
    with script.serving(tmp_path / "plain") as (address, _):
        status, answer = post(address, files[0].read_bytes())
        assert status == 200
        assert not {"low", "high", "level", "probability"} & set(answer)
        assert post(address, files[0].read_bytes(), 0.9) == (422, {"detail": "level: this model keeps no intervals"})


@pytest.mark.slow
def test_what_cannot_be_served_is_refused_in_a_line(exported, tmp_path):
    refusals = {
        (tmp_path,): "holds no predict.py: `ordinalclip export RUN --out FOLDER` writes one",
        (exported, "--workers", "0"): "--workers is above 0, got 0",
        (exported, "--wait", "nan"): "--wait is above 0, got nan",
        (exported, "--wait", "9", "--timeout", "5"): "--wait is less than --timeout (5), got 9",
        (exported, "--port", "80"): "--port is 1024 to 65535, got 80",
    }
    for words, why in refusals.items():
        command = [sys.executable, str(SERVER), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.endswith(f"{why}\n")
