"""The way in: what a start loads, what the package registers, what the commands say of themselves."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import get_args

import pytest
from transformers import AutoModel, AutoModelForImageClassification, pipeline

import ordinalclip
from ordinalclip import OrdinalModel, Ranks, gauges, shipped
from ordinalclip.backbones import available_families
from ordinalclip.cli import COMMANDS, main, make_gauges, tune
from ordinalclip.compare import load_plan
from ordinalclip.config import load_config
from ordinalclip.heads import available_heads, head_options
from ordinalclip.signals import INTERRUPTED
from ordinalclip.tuning.plan import Pruner

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
MODULE = ["-m", "ordinalclip"]
SCRIPT = [str(Path(sys.executable).parent / "ordinalclip")]
# What reads YAML and describes keys; all else that is not Python's own is too much for a command that has not begun.
LIGHT = {
    *("ordinalclip", "shtab", "yaml", "pydantic", "pydantic_core"),
    *("annotated_types", "typing_extensions", "typing_inspection"),  # of pydantic
}
INSTALLED = set(packages_distributions())


def python(*words, status=0):
    done = subprocess.run([sys.executable, *words], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return done


def imported(*words):
    """Top-level modules of installed packages that a start of Python imports."""
    report = python("-X", "importtime", *words).stderr
    names = {line.rpartition("|")[2].strip() for line in report.splitlines() if line.startswith("import time:")}
    return {name.partition(".")[0] for name in names} & {*INSTALLED, "ordinalclip"}


BARE = imported("-c", "pass")  # what this environment imports in any case


def test_imports_are_seen():
    program = "import sys; sys.argv = ['ordinalclip']; import ordinalclip.gauges"
    assert {"ordinalclip", "numpy", "PIL"} <= imported("-c", program) <= {*BARE, "ordinalclip", "numpy", "PIL"}


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--help"],
        ["--version"],
        ["--print-completion", "bash"],
        *([name, "--help"] for name in COMMANDS),
        ["configs"],
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_imported_before_a_command_runs(words):
    assert imported(*MODULE, *words) - LIGHT <= BARE


def test_the_script_starts_as_light_as_the_module():
    assert imported(*SCRIPT, "train", "--help") - LIGHT <= BARE


WHAT_IMPORTING_DOES = """
import sys
from transformers import pipeline
pipeline
before = {name.partition(".")[0] for name in sys.modules}
import ordinalclip
print(*sorted({name.partition(".")[0] for name in sys.modules} - before - set(sys.stdlib_module_names)))
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers.pipelines import PIPELINE_REGISTRY
kind = type(AutoConfig.for_model("ordinalclip"))
print(AutoModel._model_mapping[kind].__name__, AutoModelForImageClassification._model_mapping[kind].__name__)
print(PIPELINE_REGISTRY.check_task("image-ordinal-regression")[1]["impl"].__name__)
"""


def test_importing_after_transformers_registers_and_loads_little_more():
    """What more: this package, and pydantic, which takes a tenth of a second."""
    more, models, task = python("-c", WHAT_IMPORTING_DOES).stdout.splitlines()
    assert set(more.split()) <= LIGHT
    assert "ordinalclip" in more
    assert models == "OrdinalModel OrdinalModel"
    assert task == "OrdinalRegressionPipeline"


def test_a_command_imports_what_is_asked_for():
    program = (
        "import sys; sys.argv = ['/usr/bin/ordinalclip']\nimport ordinalclip\n"
        "from ordinalclip import Ranks\nassert 'torch' not in sys.modules\nprint(Ranks.of(2).names)"
    )
    assert python("-c", program).stdout == "('0', '1')\n"


def test_what_the_package_offers_is_there():
    assert sorted(ordinalclip._HOMES) == sorted(ordinalclip.__all__)
    for name in ordinalclip.__all__:
        assert getattr(ordinalclip, name).__module__ == f"ordinalclip.{ordinalclip._HOMES[name]}"
        assert name in dir(ordinalclip)
    with pytest.raises(AttributeError, match="module 'ordinalclip' has no attribute 'Rank'"):
        _ = ordinalclip.Rank


def test_auto_classes_and_the_pipeline_give_a_saved_model(tmp_path):
    saved = OrdinalModel.build("tiny", Ranks.linear(0, 100, 5), "cross_entropy").eval()
    saved.save_pretrained(tmp_path)
    for auto in (AutoModel, AutoModelForImageClassification):
        model = auto.from_pretrained(tmp_path)
        assert type(model) is OrdinalModel
        assert all((tensor == saved.state_dict()[name]).all() for name, tensor in model.state_dict().items())
    picture = gauges.make_gauges("dial", 1)["image"][0]
    answer = pipeline("image-ordinal-regression", model=str(tmp_path))(picture, top_k=5)
    likeliest = pipeline("image-classification", model=str(tmp_path))(picture, top_k=5)
    assert [each["label"] for each in likeliest] == [each["name"] for each in answer["top"]]


def test_the_version_stands_in_one_place(capsys):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "ordinalclip.__version__"}
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"ordinalclip {ordinalclip.__version__}\n"


def test_a_bare_call_prints_the_help(capsys):
    assert main([]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("usage: ordinalclip")
    assert said.err == ""
    assert all(f"    {name} " in said.out for name in COMMANDS)


def test_quiet_stands_before_or_after_the_command(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(make_gauges, "run", lambda arguments: seen.append((arguments.quiet, arguments.debug)) or 0)
    for words in (
        ["make-gauges", "a"],
        ["-q", "make-gauges", "a"],
        ["make-gauges", "a", "-q"],
        ["--debug", "make-gauges", "a"],
    ):
        assert main(words) == 0
    assert seen == [(False, False), (True, False), (True, False), (False, True)]


def test_tune_knows_the_pruners():
    assert get_args(Pruner) == tune.PRUNERS


def test_make_gauges_knows_the_gauges():
    for name in ("KINDS", "STYLES", "MAX_IMAGES", "MAX_SEED", "MIN_SIZE", "MAX_SIZE"):
        assert getattr(make_gauges, name) == getattr(gauges, name)


def test_ctrl_c_while_a_command_imports_its_libraries_is_one_line(tmp_path):
    """Also inside of a library that makes errors of its own out of whatever comes, as extension modules do."""
    (tmp_path / "psutil.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    signal.pause()\n"
        "except BaseException:\n    raise ImportError('psutil: initialization failed')\n"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, *MODULE, "train", "demo", f"output_dir={tmp_path}/run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "", "ordinalclip: stopped by Ctrl-C\n")


def test_methods_lists_every_method_with_its_options(capsys):
    assert main(["methods"]) == 0
    blocks = capsys.readouterr().out.split("\n\n")
    said = {block.partition(":")[0]: block for block in blocks}
    assert available_heads().keys() <= said.keys()
    for method in available_heads():
        assert all(f"{option}=" in said[method] for option in head_options(method)), method
    assert "arXiv:2206.02338" in said["ordinalclip"]
    ours = {"text_anchors", "prototypes", "constant", "l1", "mse", "cross_entropy", "loss"}  # or everybody's
    assert {method for method in available_heads() if "\n  paper: " not in said[method]} == ours


@pytest.mark.parametrize("method", ["ordinalclip", "triplet", "loss", "baselines.regression:Huber"])
def test_methods_explains_one(method, capsys):
    assert main(["methods", method]) == 0
    said = capsys.readouterr().out
    documented = dict(re.findall(r"^  head\.(\w+) \(.*?\): (.*) \[.+\]$", said, re.M))
    assert documented == {name: option.description for name, option in head_options(method).items()}
    if method == "ordinalclip":
        assert re.search(r"head\.num_base_ranks \(3\): .* \[whole number from 1, or null\]\n", said)


def test_an_unknown_method_is_an_error_with_the_nearest(capsys):
    assert main(["methods", "cornn"]) == 2
    assert re.fullmatch(r"ordinalclip: method 'cornn' is unknown; nearest: corn, .*\n", capsys.readouterr().err)


def test_backbones_lists_every_family(capsys):
    assert main(["backbones"]) == 0
    said = capsys.readouterr().out
    for family, about in available_families().items():
        assert all(
            re.search(rf"^{re.escape(spec)} +{re.escape(what)}$", said, re.M) for spec, what in about.specs.items()
        )
        key, _, example = about.example.partition("=")
        assert key in ("model.backbone", "model.text")
        assert all(spec.partition(":")[0] == family for spec in (*about.specs, example))


RUNS = shipped.names(("", "methods"))


def test_configs_lists_every_configuration_in_a_line(capsys):
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0]: line for line in lines if line.startswith("  ")}
    files = {
        path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in (ROOT / "configs").rglob("*.yaml")
    }
    assert listed.keys() == files - {"methods/base", "compare/rivals", "compare/frozen"}  # extended, not run
    assert listed["demo"].endswith(
        "OrdinalCLIP on 64 pictures of an instrument that the tiny CLIP has never seen. [pictures: generated]"
    )
    assert listed["morph"].endswith("[pictures: data.root=FOLDER with train.txt, validation.txt, test.txt]")
    assert listed["compare/elpv"].endswith("[pictures: data.root=FOLDER with labels.csv]")
    assert listed["compare/hci"].endswith("[pictures: --data FOLDER, ordinalclip prepare hci]")


@pytest.mark.parametrize("name", ["demo", "morph", "methods/corn", "ordinalclip"])
def test_configs_show_prints_a_file_that_stands_alone(name, tmp_path, capsys):
    assert main(["configs", "show", name]) == 0
    copy = tmp_path / "mine.yaml"
    copy.write_text(capsys.readouterr().out)
    assert "extends" not in copy.read_text()
    assert copy.read_text().startswith("# ")
    assert load_config(copy) == load_config(name)


def test_names_are_found_where_the_command_wants_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert load_config("corn") == load_config("methods/corn") == load_config(ROOT / "configs/methods/corn.yaml")
    assert load_config("default") == load_config()
    (tmp_path / "mine.yaml").write_text("extends: corn\nseed: 9\n")
    assert load_config("mine.yaml") == load_config("corn", ["seed=9"])
    (tmp_path / "default").write_text("seed: 7\n")  # a file that is there is the file
    (tmp_path / "corn").write_text("seed: 7\n")
    assert load_config("corn") == load_config("default") == load_config(None, ["seed=7"])
    (tmp_path / "l1.yaml").write_text("seed: 8\n")  # which of the two is meant is not guessed
    (tmp_path / "mine.yaml").write_text("extends: l1\n")
    for given in ("l1", "mine.yaml"):
        with pytest.raises(ValueError, match=r"l1: there is .*l1\.yaml, and methods/l1 of the package; write"):
            load_config(given)
    assert load_config("methods/l1").method == "l1"
    (tmp_path / "l1.yaml").unlink()
    (tmp_path / "wide.yaml").write_text("extends: demo\nseeds: [7]\n")
    assert load_plan("wide.yaml").config.seeds == [7]  # of a comparison, the comparison of that name
    for words, said in (
        (["train", "gauges"], "gauges is a comparison: ordinalclip compare gauges"),
        (["compare", "l1"], "l1 is the configuration of a run: ordinalclip train l1"),
        (
            ["train", "coop2"],
            "coop2: no such configuration file, and none of this name comes with the package; nearest: coop,",
        ),
        (["train", "configs/demo.yaml"], "there is no folder configs; one comes with the package by the name demo"),
        (["configs", "show", "../pyproject"], "../pyproject: no such configuration file"),
        (["configs", "show"], "of which name?"),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err


def test_short_names_are_unique_for_each_command():
    for places in (("", "methods"), ("compare",)):
        assert len(set(shipped.short_names(*places))) == len(shipped.names(places)) > 3


def test_a_real_bash_completes_commands_options_and_configurations(tmp_path):
    (tmp_path / "complete.sh").write_text(python(*MODULE, "--print-completion", "bash").stdout)
    (tmp_path / "pictures").mkdir()
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(tmp_path)
        os.execve("/bin/bash", ["bash", "--norc", "--noprofile", "-i"], {**os.environ, "TERM": "dumb", "PS1": "$ "})
    shown = ""

    def say(keys, until):
        nonlocal shown
        shown = ""
        os.write(terminal, keys.encode())
        end = time.monotonic() + 20
        while until not in shown and time.monotonic() < end:
            if select.select([terminal], [], [], 0.2)[0]:
                shown += os.read(terminal, 4096).decode(errors="replace")
        assert until in shown, shown

    try:
        say(
            "bind 'set enable-bracketed-paste off'; ordinalclip() { echo \"<$*>\"; }; "
            "source complete.sh; echo rea''dy\n",
            "ready\r\n",
        )
        for keys, given in (
            ("ordinalclip chec\t", "check-data"),
            ("ordinalclip train ordr\t", "train ordreg"),
            ("ordinalclip train --qui\t", "train --quiet"),
            ("ordinalclip compare gauges_\t", "compare gauges_shots"),
            ("ordinalclip configs show bone\t", "configs show bone_age"),
            ("ordinalclip make-gauges x --kind the\t", "make-gauges x --kind thermometer"),
            ("ordinalclip check-data pict\t", "check-data pictures/"),
        ):
            say(keys + "\n", f"<{given}>")
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(terminal)
