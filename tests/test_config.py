"""Configurations: overrides, types, and errors that name the nearest key."""

from pathlib import Path

import pytest

from ordinalclip.compare import load_plan
from ordinalclip.config import RunConfig, load_config, parse_config, read_layers, read_overrides, stack
from ordinalclip.heads import available_heads
from ordinalclip.sections import describe
from ordinalclip.written import dump, values

CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
BASES = ["methods/base.yaml", "compare/rivals.yaml", "compare/frozen.yaml"]  # extended by others, not run


def test_overrides_and_round_trip(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train: {lr: 1e-3}\nhead: {num_base_ranks: 5}\n")
    config = load_config(path, ["train.batch_size=64", "data.kinds=[dial, tank]", "head.prompt='the age is'"])
    assert config.train.lr == 1e-3
    assert config.train.batch_size == 64
    assert config.data.kinds == ["dial", "tank"]
    assert config.head == {"num_base_ranks": 5, "prompt": "the age is"}
    (tmp_path / "saved.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.l_r=1", r"train\.l_r is not a key; nearest: train\.lr"),
        ("trian.lr=1", r"trian is not a key; nearest: train"),
        ("head.nun_context=4", r"head\.nun_context is not a key; nearest: head\.num_context"),
        ("head.num_context=four", r"head\.num_context: .*integer.*'four'"),
        ("head.alignment=both", r"head\.alignment: .*'official' or 'paper'"),
        ("method=ordinal", "method 'ordinal' is unknown; nearest: ordinalclip"),
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
    assert all(description for _, _, description in describe(RunConfig))


def test_several_problems_at_once():
    with pytest.raises(ValueError, match=r"lr.*;.*seeed"):
        parse_config({"train": {"lr": -1}, "seeed": 3}, "file")


def write(folder: Path, **files: str) -> Path:
    """Write NAME.yaml for every name; returns the path of the first."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(files))}.yaml"


def test_extends_merges_mappings_and_replaces_lists(tmp_path):
    (tmp_path / "shared").mkdir()
    write(tmp_path / "shared", middle="extends: ../bottom.yaml\nhead: {num_context: 4}\ntrain: {lr: 0.5, ema: 0.9}\n")
    top = write(
        tmp_path,
        top="extends: shared/middle.yaml\ntrain: {lr: 0.25}\ndata: {kinds: [tank]}\nseed: 3\n",
        bottom="head: {prompt: a, num_context: 2}\ntrain: {lr: 1, batch_size: 8}\ndata: {kinds: [dial]}\nseed: 1\n",
    )
    assert values(stack(read_layers(top))) == {
        "head": {"prompt": "a", "num_context": 4},
        "train": {"lr": 0.25, "ema": 0.9, "batch_size": 8},
        "data": {"kinds": ["tank"]},
        "seed": 3,
    }
    assert load_config(top, ["train.lr=2"]).train.lr == 2


def test_a_comparison_extends_another(tmp_path):
    path = write(
        tmp_path,
        more="extends: few.yaml\nseeds: [7]\nmethods: {B: {base: {method: l1}}}\n",
        few="seeds: [1, 2]\nbase: {train: {max_steps: 3}}\nmethods: {A: {base: {method: coop}}}\n",
    )
    comparison = load_plan(path)
    assert comparison.config.seeds == [7]
    assert {(run.method, run.train.max_steps) for run in comparison.runs.values()} == {("coop", 3), ("l1", 3)}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "extends: a.yaml"}, r"in a circle: \S*/a\.yaml extends \S*/a\.yaml$"),
        (
            {"a": "extends: b.yaml", "b": "extends: ../folder/a.yaml"},
            r"in a circle: \S*/a\.yaml extends \S*/b\.yaml extends \S*/a\.yaml$",
        ),
        ({"a": "extends: b.yaml"}, r"/a\.yaml extends \S*/b\.yaml: no such configuration file"),
        ({"a": "extends: ''"}, r"/a\.yaml extends \S*: no such configuration file"),
        ({"a": "extends: [b.yaml]", "b": ""}, r"/a\.yaml: extends is the path of one file .*got \['b\.yaml'\]"),
        ({"a": "extends:"}, r"/a\.yaml: extends is the path of one file .*got None"),
        ({"a": "extends: b.yaml", "b": "- 1"}, r"/b\.yaml: a configuration is a mapping"),
        (
            {"a": "extends: b.yaml\nseed: 2", "b": "train: {l_r: 1}"},
            r"/a\.yaml, which extends \S*/b\.yaml: train\.l_r is not a key; nearest: train\.lr",
        ),
    ],
)
def test_extends_refuses_with_both_files(tmp_path, files, message):
    (tmp_path / "folder").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_config(write(tmp_path / "folder", **files))


@pytest.mark.parametrize("name", [name for name in SHIPPED if not name.startswith(("compare/", "accelerate/"))])
def test_shipped_configurations_are_valid_and_say_how_to_run_them(name):
    header = (CONFIGS / name).read_text(encoding="utf-8").partition("\n\n")[0]
    config = load_config(CONFIGS / name)
    if name not in BASES:
        assert f"ordinalclip train {Path(name).stem}" in header
        assert config.output_dir == f"runs/{name.removesuffix('.yaml')}"


def test_methods_share_one_experiment():
    """Whatever the files of configs/methods say themselves: only the method and its learning rates differ."""
    base = load_config(CONFIGS / "methods" / "base.yaml").model_dump()
    own = {"output_dir": "", "method": "", "head": {}}
    for path in (CONFIGS / "methods").glob("*.yaml"):
        config = load_config(path).model_dump()
        config["train"] |= {"lr_encoder": None, "lr_head": None}
        assert config | own == base | own, path.name


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("accelerate/")])
def test_shipped_launchers_are_what_accelerate_reads(name):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(CONFIGS / name)).to_dict().keys() >= set(stack(read_layers(CONFIGS / name))) - {
        "debug"
    }


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("compare/") and name not in BASES])
def test_shipped_comparisons_are_valid(name):
    text = (CONFIGS / name).read_text(encoding="utf-8")
    assert f"ordinalclip compare {Path(name).stem}" in text
    given = ["data.source=table", "data.table=any.csv"] if "\nrecipe: " in text else []  # instead of a prepared folder
    comparison = load_plan(CONFIGS / name, given)
    assert comparison.config.output_dir == f"runs/{name.removesuffix('.yaml')}"


def test_every_method_that_learns_has_a_configuration_and_a_row():
    methods = set(available_heads()) - {"prototypes"}
    names = [name for name in SHIPPED if name.startswith("methods/") and name not in BASES]
    shipped = {load_config(CONFIGS / name).method for name in names}
    assert shipped == methods - {"constant", "zero_shot"}
    for name in ("gauges", "elpv"):
        comparison = load_plan(CONFIGS / "compare" / f"{name}.yaml")
        assert {run.method for run in comparison.runs.values()} >= methods - {
            "zero_shot",
            "loss",
        }  # of which any loss can be a line


def test_text_is_kept_as_it_is_written_and_numbers_are_numbers(tmp_path):
    path = write(
        tmp_path,
        c="ranks: {values: [1, 2.50, 1e1, -.5e1], names: [no, 007, 1.10, 1_000], unit: 2024-01-01}\n"
        "method: ordinalclip\nhead: {prompt: 1:30, num_base_ranks: null}\n"
        "train: {exact: off, lr: 1e-3, mixed_precision: no, ema:}\nmodel: {text: }\n",
    )
    path.write_text(path.read_text().replace("[1, 2.50, 1e1, -.5e1]", "[-.5e1, 1, 2.50, 1e1]"))
    config = load_config(path, ["output_dir=010", "data.license=# a: b", "data.group= x ", "ranks.unit=%"])
    assert config.ranks.values == [-5.0, 1.0, 2.5, 10.0]
    assert config.ranks.names == ["no", "007", "1.10", "1_000"]
    assert config.head == {"prompt": "1:30", "num_base_ranks": None}
    assert (config.train.exact, config.train.lr, config.train.mixed_precision, config.train.ema) == (
        *(False, 1e-3, "no", None),
    )
    assert (config.output_dir, config.data.license, config.data.group) == ("010", "# a: b", "x")
    assert (config.ranks.unit, config.model.text) == ("%", "")
    (tmp_path / "saved.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "saved.yaml") == config


def test_options_of_a_loss_are_values(tmp_path):
    config = load_config(
        None, ["method=loss", "head.options={alpha: 1.0, sum: yes, base_loss: a:B, none: null, l: [2]}"]
    )
    assert config.head["options"] == {"alpha": 1.0, "sum": True, "base_loss": "a:B", "none": None, "l": [2]}


def test_infinity_stays_infinity(tmp_path):
    """In the folder of a run, where null would be no width: the run could not be read, resumed or scored again."""
    config = load_config(None, ["method=rm_loss", "head.sigma=inf"])
    assert config.head == {"sigma": float("inf")}
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config
    assert config.model_dump(mode="json")["head"] == {"sigma": float("inf")}  # what a checkpoint holds


def test_a_method_leaves_options_of_another_behind_in_files_alone(tmp_path, caplog):
    path = write(
        tmp_path,
        top="extends: bottom.yaml\nmethod: coop\n",
        bottom="method: ordinalclip\nhead: {num_base_ranks: 3, num_context: 4}\n",
    )
    assert load_config(path).head == {"num_context": 4}
    assert caplog.messages == [
        f"head.num_base_ranks of {tmp_path}/bottom.yaml is not an option of method coop: left out"
    ]
    assert load_config(path, ["method=l1"]).head == {}
    assert load_config(path, ["method=ordinalclip"]).head == {"num_context": 4}
    with pytest.raises(ValueError, match=r"head\.num_base_ranks is not a key"):
        load_config(path, ["head.num_base_ranks=3"])
    caplog.clear()
    assert load_config(tmp_path / "bottom.yaml", ["method=ordinalclip"]).head == {"num_base_ranks": 3, "num_context": 4}
    assert not caplog.messages
    with pytest.raises(ValueError, match="method 'ordinal' is unknown"):
        load_config(path, ["method=ordinal"])


@pytest.mark.parametrize(
    ("file", "overrides", "expected"),
    [
        (
            "ranks: {low: 0, high: 9, num: 4, unit: a}",
            ["ranks.values=[1,2]"],
            {"values": [1, 2], "low": None, "unit": "a"},
        ),
        ("ranks: {values: [1, 2]}", ["ranks.low=0", "ranks.high=9", "ranks.num=4"], {"values": None, "num": 4}),
        ("ranks: {low: 0, high: 9, num: 4}", ["ranks.num=5"], {"low": 0, "num": 5}),
        ("ranks: {low: 0, high: 9, num: 4}", ["ranks.values=null"], {"low": 0, "num": 4}),
        ("data: {source: table, train_table: a, test_table: b}", ["data.table=c"], {"table": "c", "test_table": ""}),
        ("data: {source: table, table: c}", ["data.train_table=a"], {"table": "", "train_table": "a"}),
        ("data: {source: table, table: c}", ["data.source=hub", "data.hub=h"], {"table": "", "hub": "h"}),
        ("train: {epochs: 5, max_steps: 1000}", ["train.max_steps=3"], {"epochs": None, "max_steps": 3}),
        ("train: {max_steps: 7}", ["train.epochs=2"], {"epochs": 2, "max_steps": 1000}),
        ("train: {max_steps: 7, lr: 1}", ["train={lr: 2}"], {"lr": 2, "max_steps": 7}),
    ],
)
def test_what_is_said_in_one_way_replaces_what_a_file_below_says_in_another(tmp_path, file, overrides, expected):
    section = file.partition(":")[0]
    bottom = write(tmp_path, bottom=file)
    above = write(tmp_path, top=f"extends: bottom.yaml\n{nested_yaml(overrides)}")
    for config in (load_config(bottom, overrides), load_config(above)):
        assert getattr(config, section).model_dump().items() >= expected.items()


def nested_yaml(overrides):
    return dump(values(read_overrides(overrides)))


def test_an_empty_section_says_nothing(tmp_path):
    path = write(
        tmp_path, top="extends: bottom.yaml\ntrain:\nhead:\n", bottom="train: {lr: 0.5}\nhead: {num_context: 4}"
    )
    assert load_config(path).train.lr == 0.5
    assert load_config(path).head == {"num_context": 4}


def test_aliases_and_merge_keys(tmp_path):
    path = write(
        tmp_path, c="model: {mirror: &m [vertical], lora_targets: *m}\ntrain: {<<: {lr: 0.5, ema: 0.9}, ema: 0.8}\n"
    )
    config = load_config(path)
    assert config.model.lora_targets == ["vertical"]
    assert (config.train.lr, config.train.ema) == (0.5, 0.8)


@pytest.mark.parametrize(
    ("section", "content"),
    [
        ("train", {"max_steps": True}),
        ("train", {"max_steps": 5.0}),
        ("train", {"max_steps": "5"}),
        ("train", {"lr": False}),
        ("train", {"lr": "0.1"}),
        ("train", {"exact": 1}),
        ("train", {"exact": "true"}),
        ("train", {"lr": float("nan")}),
        ("data", {"root": 5}),
        ("data", {"root": "a\0b"}),
        ("model", {"mirror": "vertical"}),
    ],
)
def test_no_type_is_taken_for_another(section, content):
    with pytest.raises(ValueError, match=f"from Python: {section}.{next(iter(content))}: "):
        parse_config({section: content}, "from Python")


def test_every_number_has_bounds():
    """A key without an upper bound is a way to ask for more memory than there is, or for a float that is none."""
    free = {
        name for name, info in numeric_fields(RunConfig) if not any(hasattr(m, "le") or hasattr(m, "lt") for m in info)
    }
    theirs = {name for name in free if name.startswith(("ranks.", "data.")) and "augment" not in name}
    assert free - theirs == set()


def numeric_fields(section, prefix=""):
    from ordinalclip.sections import Section

    for name, info in section.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield from numeric_fields(annotation, f"{prefix}{name}.")
        elif annotation in (int, float) or annotation in (int | None, float | None):
            yield prefix + name, info.metadata


def test_names_of_files_that_are_not_there(tmp_path):
    write(tmp_path, demo="seed: 1")
    with pytest.raises(FileNotFoundError, match=r"demp\.yaml: no such configuration file; nearest: demo\.yaml in"):
        load_config(tmp_path / "demp.yaml")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*/nowhere"):
        load_config(tmp_path / "nowhere" / "demo.yaml")
    with pytest.raises(IsADirectoryError, match=r"a folder, where the YAML file"):
        load_config(tmp_path)
