"""The contract of heads: options that are declared once, methods that speak for themselves, heads of other packages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ordinalclip import OrdinalModel, Ranks
from ordinalclip.config import load_config
from ordinalclip.heads import (
    HeadContext,
    available_heads,
    build_head,
    head_class,
    head_options,
    head_section,
    import_object,
    names_from_a_file,
)
from ordinalclip.language import PromptHead
from ordinalclip.sections import describe

RANKS = Ranks.linear(0, 4, 5)
METHODS = sorted(available_heads())
MODULE = '''
import torch
from baselines.embedding import EmbeddingHead
from baselines.regression import L1
from ordinalclip.heads import Head


class Shifted(L1):
    """L1 whose answers are shifted.

    Args:
        shift: of the answers,
            in the label's unit.
        steps, width: two of them.
    """

    def __init__(self, context, shift: float = 0.5, steps: int = 1, width: int = 2):
        super().__init__(context)
        self.shift = shift

    def predict(self, outputs):
        prediction = super().predict(outputs)
        return prediction._replace(value=prediction.value + self.shift)


class Untaught(Head):
    """Answers the middle rank; nothing learns."""

    learns = False

    def forward(self, features):
        return {"logits": -(torch.arange(5.0) - 2).abs().expand(len(features), -1)}

    def loss(self, outputs, targets):
        return {"loss": outputs["logits"].mean()}


class Flat(EmbeddingHead):
    """An embedding of its own default."""

    def __init__(self, context, *, embedding_dim: int = 3, sharpness: float, **shared):
        super().__init__(context, embedding_dim, **shared)


def function():
    pass
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The folder of a module `outside_heads` that is on the path, as PYTHONPATH would put it there."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "outside_heads.py").write_text(MODULE)
    (folder / "outside_broken.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop("outside_heads", None)


@pytest.mark.parametrize("method", METHODS)
def test_every_option_is_described_and_has_a_default(method):
    options = head_options(method)
    assert {name: default for name, default, _ in describe(head_section(method), "head.")} == {
        f"head.{name}": option.default for name, option in options.items()
    }
    for name, _, description in describe(head_section(method), "head."):
        assert len(description) > 10, name
        assert not description.startswith("see "), name


def test_options_are_collected_along_the_base_classes():
    assert set(head_options("rm_loss")) == {
        *("sigma", "alpha", "momentum", "mining", "embedding_dim", "hidden_dim", "readout", "radius")
    }
    assert head_options("rank_n_contrast")["readout"].default == "l1"  # a default of its own
    assert head_options("rank_n_contrast")["readout"].description == head_options("atrip")["readout"].description
    assert head_options("coop")["init_from_names"].default is True
    assert head_options("ordinalclip")["init_from_names"].default is False
    assert set(head_options("ordinalclip")) - set(head_options("coop")) == {"num_base_ranks", "interpolation"}
    assert set(head_options("plc_src")) == {"outliers", "margin", "gap"}
    assert head_options("l1") == {}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=atrip", "head.raduis=0.2"], r"head\.raduis is not a key; nearest: head\.radius"),
        (["method=atrip", "head.radius=far"], r"head\.radius: .*number.*'far'"),
        (["method=cosface", "head.readout=nn"], r"head\.readout: .*'neighbors', 'nearest' or 'l1'"),
        (["method=coop", "head.num_base_ranks=3"], r"head\.num_base_ranks is not a key; nearest: head\.num_context"),
        (["method=coop", "head.alignment=both"], r"head\.alignment: .*'official' or 'paper'"),
        (["method=plc_src", "head.outliers=many"], r"head\.outliers: .*number.*'many'"),
        (["method=loss", "head.options=3"], r"head\.options: .*dictionary"),
    ],
)
def test_shared_options_are_checked_key_by_key(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, overrides)


def test_shared_options_reach_the_head():
    config = load_config(None, ["method=atrip", "head.radius=0.25", "head.hidden_dim=null"])
    head = build_head("atrip", HeadContext(RANKS, 6), config.head)
    assert head.neighbors.radius.item() == 0.25
    assert isinstance(head.layers, torch.nn.Linear)
    with pytest.raises(
        ValueError, match=r"options of method 'atrip': head\.raduis is not a key; nearest: head\.radius"
    ):
        build_head("atrip", HeadContext(RANKS, 6), {"raduis": 1})
    with pytest.raises(TypeError, match="raduis"):
        head_class("atrip")(HeadContext(RANKS, 6), raduis=1)


def test_methods_say_what_they_are():
    assert {method for method in METHODS if not head_class(method).learns} == {
        *("constant", "large", "ridge", "svr", "zero_shot", "prototypes")
    }
    prompted = {method for method in METHODS if issubclass(head_class(method), PromptHead)}
    assert {method for method in METHODS if head_class(method).rebuilt} == prompted | {"numclip"}
    assert prompted > {"ordinalclip", "coop"}
    for method in (*prompted, "zero_shot", "text_anchors"):
        model = OrdinalModel.build("tiny", RANKS, method)
        names = {name.partition(".")[0] for name in model.head.state_dict()}
        assert set(model.head.rebuilt) <= names
        prototypes, deployed = model.head.rank_prototypes(), model.deploy().head.rank_prototypes()
        assert prototypes.shape == deployed.shape == (5, model.config.input_dim)
        assert torch.allclose(torch.nn.functional.normalize(prototypes, dim=1), deployed, atol=1e-6)
    assert build_head("l1", HeadContext(RANKS, 6), {}).rank_prototypes() is None


def test_a_head_of_your_own_by_its_import(module, tmp_path):
    config = load_config(None, ["method=outside_heads:Shifted", "head.shift=2"])
    assert config.head == {"shift": 2.0}
    assert head_options(config.method)["shift"].description == "of the answers, in the label's unit"
    assert head_options(config.method)["width"].description == "two of them"
    model = OrdinalModel.build("tiny", RANKS, config.method, config.head, label_mean=2, label_std=1).eval()
    model.save_pretrained(tmp_path / "model")
    loaded, pixels = OrdinalModel.from_pretrained(tmp_path / "model"), torch.randn(2, 3, 64, 64)
    assert loaded.config.head_class == "outside_heads:Shifted"
    assert torch.equal(loaded.predict(pixels).value, model.predict(pixels).value)

    flat = head_options("outside_heads:Flat")
    assert flat["embedding_dim"].default == 3
    assert flat["embedding_dim"].description == "width of the embedding"  # of the class that first described it
    for head in ({"shift": "far"}, {"shfit": 1}):
        with pytest.raises(ValueError, match=r"head\.(shift: .*number|shfit is not a key; nearest: head\.shift)"):
            load_config(None, ["method=outside_heads:Shifted", *(f"head.{key}={value}" for key, value in head.items())])
    with pytest.raises(ValueError, match=r"head\.sharpness: Field required"):
        load_config(None, ["method=outside_heads:Flat"])


def test_a_head_of_your_own_that_does_not_learn(module):
    assert head_class("outside_heads:Shifted").learns
    assert not head_class("outside_heads:Untaught").learns
    head = build_head("outside_heads:Untaught", HeadContext(RANKS, 6), {})
    assert head.predict(head(torch.zeros(3, 6))).rank.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            "no_such_module:Mine",
            r"'no_such_module' cannot be imported .*No module named.*installed packages.*PYTHONPATH",
        ),
        ("outside_broken:Mine", r"'outside_broken' cannot be imported .*No module named 'no_such_package'"),
        ("outside_heads:Shiftde", r"module 'outside_heads' has no 'Shiftde'; nearest: Shifted"),
        ("outside_heads:function", r"<function function .*> is not a subclass of ordinalclip\.heads\.Head"),
        ("outside_heads:Untaught.sub", r"write module:name, e\.g\..*got 'outside_heads:Untaught\.sub'"),
        (
            "outside_heads",
            r"'outside_heads' is unknown; nearest: .*; ordinalclip methods .*, a head of your own is module:Class",
        ),
    ],
)
def test_what_is_no_head(module, method, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, [f"method={method}"])


LOAD = """
import importlib, sys, torch
from ordinalclip import OrdinalModel
try:
    for name in sys.argv[2:]:
        importlib.import_module(name)
    print(OrdinalModel.from_pretrained(sys.argv[1]).predict(torch.zeros(1, 3, 64, 64)).value.item())
except ValueError as error:
    print("ValueError:", error)
"""


@pytest.mark.slow
def test_a_saved_model_names_the_import_that_is_missing(module, tmp_path, monkeypatch):
    """A package with an entry point, and processes in which it is not installed, with and without its module."""
    metadata = module / "outside-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[ordinalclip.heads]\noutside = outside_registry:HEADS\n")
    (module / "outside_registry.py").write_text('HEADS = {"shifted": "outside_heads:Shifted"}\n')
    assert available_heads()["shifted"] == "outside_heads:Shifted"
    assert load_config(None, ["method=shifted", "head.shift=1"]).head == {"shift": 1.0}
    model = OrdinalModel.build("tiny", RANKS, "shifted", {"shift": 3.0}, label_mean=2, label_std=1).eval()
    assert (model.config.method, model.config.head_class) == ("shifted", "outside_heads:Shifted")
    model.save_pretrained(tmp_path / "model")

    root = str(Path(__file__).parents[1])
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "outside_heads.py").write_text(MODULE)

    def load(*folders, imports=()):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *map(str, folders)])}
        command = [sys.executable, "-c", LOAD, str(tmp_path / "model"), *imports]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    value = model.predict(torch.zeros(1, 3, 64, 64)).value.item()
    assert float(load(module)) == pytest.approx(value)
    only = tmp_path / "only"  # the class is enough, but a model does not import it by itself
    assert float(load(only, imports=["outside_heads"])) == pytest.approx(value)
    for folders in ((only,), ()):
        message = load(*folders)
        assert "this model's method 'shifted' comes from another package: " in message
        assert "which a model's files may not import by themselves; if you trust it, import outside_heads" in message


def test_what_the_files_of_a_model_may_import(tmp_path, monkeypatch):
    """Ours, losses of torch and dlordinal, and what the program has imported itself, if Python did not bring it."""
    (tmp_path / "stranger.py").write_text("from pathlib import Path\nPath('ran').touch()\ndef loss(): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with names_from_a_file():
        for known in ("baselines.regression:L1", "torch.nn:CrossEntropyLoss", "pytest:approx"):
            assert callable(import_object(known, "it"))
        for foreign in ("stranger:loss", "shutil:rmtree", "subprocess:run", "torch.hub:load", "torch:load", "this:s"):
            with pytest.raises(ValueError, match=r"it names code of the module .* may not import by themselves"):
                import_object(foreign, "it")
    assert not (tmp_path / "ran").exists()
    import_object("stranger:loss", "it")  # named by the user
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("method", ["ordinalclip", "l1"])
def test_models_of_our_own_methods_name_no_import(method):
    assert OrdinalModel.build("tiny", RANKS, method).config.head_class == ""
