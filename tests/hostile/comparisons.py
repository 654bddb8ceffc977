"""Comparison files that mean nothing."""

from hostile import case

BASE = """\
output_dir: out
seeds: [1]
base:
  data: {num_train: 8, num_validation: 4, num_test: 4}
  ranks: {low: 0, high: 100, num: 6}
  train: {max_steps: 1, batch_size: 4}
"""
METHODS = "methods: {a: {base: {method: l1}}}\n"


def refused(what, says, content, *overrides, command="compare"):
    """A command on a file c.yaml with this content is refused, and nothing is written."""

    @case(what, says, after=lambda folder: untouched(folder))
    def _(folder):
        (folder / "c.yaml").write_text(content)
        return [command, "c.yaml", *overrides]


def untouched(folder):
    assert {each.name for each in folder.iterdir()} == {"c.yaml"}


refused(
    "a comparison given to train",
    r"c\.yaml is a comparison: ordinalclip compare c\.yaml",
    BASE + METHODS,
    command="train",
)
refused("a comparison given to check-data", r"c\.yaml is a comparison", BASE + METHODS, command="check-data")
refused("a run given to compare", r"c\.yaml is the configuration of a run: ordinalclip train c\.yaml", "method: l1\n")
refused("a comparison of nothing", r"methods: .*at least 1 item", BASE + "methods: {}\n")
refused("a comparison without methods", r"methods: Field required", "seeds: [1]\n")
refused("methods as a list", r"methods: .*dictionary", BASE + "methods: [l1, mse]\n")
refused(
    "a method that is not known", r"method 'l2' is unknown; nearest: ", BASE + "methods: {a: {base: {method: l2}}}\n"
)
refused(
    "a method whose base is a word", r"methods\.a\.base: .*dictionary, got 'l1'", BASE + "methods: {a: {base: l1}}\n"
)
refused("settings that are no list", r"settings: .*list", BASE + METHODS + "settings: {train.lr: 1}\n")
refused("no settings", r"settings: .*at least 1 item", BASE + METHODS + "settings: []\n")
refused("a setting that is a number", r"settings\.0: .*dictionary", BASE + METHODS + "settings: [1]\n")
refused("no seeds", r"seeds: .*at least 1 item", BASE + METHODS, "seeds=[]")
refused("one seed instead of a list", r"seeds: .*valid list, got 1|'1'", BASE + METHODS, "seeds=1")
refused("a seed twice", r"seeds must be different, got \[1, 1\]", BASE + METHODS, "seeds=[1,1]")
refused("a seed below 0", r"seeds\.0: .*greater than or equal to 0, got -1", BASE + METHODS, "seeds=[-1]")
refused("no jobs", r"jobs: .*greater than or equal to 1, got 0", BASE + METHODS, "jobs=0")
refused("a million jobs", r"jobs: .*less than or equal to 1024", BASE + METHODS, "jobs=1000000")
refused(
    "a word that is not a way to tune", r"tuning is not a key; nearest: tuning_seeds", BASE + METHODS + "tuning: best\n"
)
refused("no variants", r"variants: .*at least 1 item", BASE + METHODS + "variants: {}\n")
refused(
    "a method without a name",
    r"names of methods and variants have 1 to 100",
    BASE + 'methods: {"": {base: {method: l1}}}\n',
)
refused(
    "a method with a name too long for a folder",
    r"have 1 to 100 characters",
    BASE + f"methods: {{{'a' * 300}: {{base: {{method: l1}}}}}}\n",
)
refused(
    "a seed for one method",
    r"seed is not for a run .*set seeds",
    BASE + "methods: {a: {base: {method: l1, seed: 5}}}\n",
)
refused("a seed for all runs", r"seed is not for a run .*set seeds", BASE + METHODS, "seed=5")
refused(
    "a method named twice",
    r"line 9, .*key 'a' is here and in line 8",
    BASE + "methods:\n  a: {base: {method: l1}}\n  a: {base: {method: mse}}\n",
)
refused(
    "the same key by a setting and on the command line",
    r"train\.lr is set on the command line and by settings",
    BASE + METHODS + "settings: [{train: {lr: 1.0e-3}}]\n",
    "train.lr=1",
)
