"""Configurations: overrides, types, and errors that name the nearest key."""

from pathlib import Path

import pytest

from ordinalclip.compare import load_comparison
from ordinalclip.config import describe, load_config, parse_config
from ordinalclip.heads import available_heads

CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))


def test_overrides_and_round_trip(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train: {lr: 1e-3}\nhead: {num_base_ranks: 5}\n")
    config = load_config(path, ["train.batch_size=64", "data.kinds=[dial, tank]", "head.prompt='the age is'"])
    assert config.train.lr == 1e-3
    assert config.train.batch_size == 64
    assert config.data.kinds == ["dial", "tank"]
    assert config.head == {"num_base_ranks": 5, "prompt": "the age is"}
    config.save(tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.l_r=1", r"train\.l_r is not a key; nearest: train\.lr"),
        ("trian.lr=1", r"trian is not a key; nearest: train"),
        ("head.nun_context=4", r"head\.nun_context is not a key; nearest: head\.num_context"),
        ("head.num_context=four", r"head\.num_context: .*integer.*'four'"),
        ("head.alignment=both", r"head\.alignment: .*'official' or 'paper'"),
        ("method=ordinal", "method 'ordinal' is unknown; choices: .*coop"),
        ("train.lr=fast", r"train\.lr: .*number.*'fast'"),
        ("train.batch_size=0", r"train\.batch_size: .*greater than or equal to 1, got 0"),
        ("data.split=[0.5, 0.5, 0.5]", "three shares that add up to 1"),
        ("data.table=a.csv", "source is gauges"),
        ("ranks.low=3", "low, high and num belong together"),
        ("train.lr", "write key=value"),
        ("data.kinds=[a", r"data\.kinds: Input should be a valid list, got .\[a."),
        ("seed.x=1", "configuration: seed"),
    ],
)
def test_typos_and_wrong_values(override, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, [override])


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml: no such configuration"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match=r"list\.yaml: a configuration is a mapping"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ValueError, match=r"broken\.yaml: not valid YAML"):
        load_config(tmp_path / "broken.yaml")


def test_every_key_is_described():
    assert all(description for _, _, description in describe())


def test_several_problems_at_once():
    with pytest.raises(ValueError, match=r"lr.*;.*seeed"):
        parse_config({"train": {"lr": -1}, "seeed": 3}, "file")


@pytest.mark.parametrize("name", [name for name in SHIPPED if not name.startswith(("compare/", "accelerate/"))])
def test_shipped_configurations_are_valid_and_say_how_to_run_them(name):
    header = (CONFIGS / name).read_text(encoding="utf-8").partition("\n\n")[0]
    assert f"ordinalclip train configs/{name}" in header
    config = load_config(CONFIGS / name, ["data.root=somewhere"])
    assert config.output_dir == f"runs/{name.removesuffix('.yaml')}"


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("compare/")])
def test_shipped_comparisons_are_valid(name):
    assert f"ordinalclip compare configs/{name}" in (CONFIGS / name).read_text(encoding="utf-8")
    comparison = load_comparison(CONFIGS / name, ["data.root=somewhere"])
    assert comparison.config.output_dir == f"runs/{name.removesuffix('.yaml')}"


def test_every_method_that_learns_has_a_configuration_and_a_row():
    methods = set(available_heads()) - {"prototypes"}
    shipped = {load_config(path).method for path in (CONFIGS / "methods").glob("*.yaml")}
    assert shipped == methods - {"constant", "zero_shot"}
    for name in ("gauges", "elpv"):
        comparison = load_comparison(CONFIGS / "compare" / f"{name}.yaml", ["data.root=somewhere"])
        assert {run.method for run in comparison.runs.values()} >= methods - {"zero_shot", "loss"}
