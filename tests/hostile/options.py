"""Words of a call, and lines of a configuration, that mean nothing."""

from hostile import case

SMALL = ("data.num_train=8", "data.num_validation=4", "data.num_test=4")


def refused(what, says, *overrides):
    """`train default` with these overrides is refused, and nothing is written."""

    @case(what, says, after=lambda folder: untouched(folder))
    def _(folder):
        return ["train", "default", *SMALL, *([] if "output_dir=" in overrides else ["output_dir=run"]), *overrides]


def bad_file(what, says, content, *overrides, command="train"):
    """A command on a file c.yaml with this content is refused."""

    @case(what, says, after=lambda folder: untouched(folder))
    def _(folder):
        (folder / "c.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
        return [command, "c.yaml", *overrides]


def untouched(folder):
    assert not (folder / "run").exists()
    assert not (folder / "runs").exists()
    assert not (folder / "ran").exists()


# ---- keys

refused("a key that does not exist", r"train\.lrr is not a key; .*train\.lr\b", "train.lrr=1")
refused("a key with an empty part", r"'train\.\.lr' is no key: write names with single dots", "train..lr=1")


@case("a key given twice with two values", r"train\.lr is given twice, as 1 and as 2: the last counts", status=0)
def _(folder):
    return ["check-data", "default", "-q", *SMALL, "train.lr=1", "train.lr=2"]


refused("a key below a value", r"train\.lr\.x lies below a key that is given a value", "train.lr=1", "train.lr.x=2")
refused("a section given a number", r"train: a section of keys is wanted, such as train\.KEY=VALUE, got '5'", "train=5")
refused("an option of another method", r"head\.outliers is not a key; nearest:", "head.outliers=0.1")
refused("an option of a method that has none", r"head\.x is not a key; there are none", "method=l1", "head.x=1")
refused("steps and epochs at once", r"train is given in ways that exclude", "train.max_steps=3", "train.epochs=2")

# ---- numbers

refused("an infinite learning rate", r"train\.lr: Input should be a finite number, got inf", "train.lr=inf")
refused("a learning rate of YAML's infinity", r"train\.lr: Input should be a finite number, got inf", "train.lr=.inf")
refused("a learning rate that is no number", r"train\.lr: Input should be a finite number, got nan", "train.lr=nan")
refused("a learning rate too small for a float", r"train\.lr: .*valid number, got '1e-400'", "train.lr=1e-400")
refused("a learning rate too large for a float", r"train\.lr: .*valid number, got '1e400'", "train.lr=1e400")
refused(
    "a learning rate of a hundred thousand",
    r"train\.lr: .*less than or equal to 100, got 1e\+?0?5|100000",
    "train.lr=1e5",
)
refused("a learning rate that is missing", r"train\.lr: Input should be a valid number, got ''", "train.lr=")
refused("a learning rate after two equals signs", r"train\.lr: .*valid number, got '=3'", "train.lr==3")
refused("a truth value for a number of steps", r"train\.max_steps: .*valid integer, got 'true'", "train.max_steps=true")
refused("a truth value for a learning rate", r"train\.lr: .*valid number, got 'false'", "train.lr=false")
refused("a number for a truth value", r"train\.exact: .*valid boolean, got '1'", "train.exact=1")
refused("a fraction of a step", r"train\.max_steps: .*valid integer, got 1\.5|'1\.5'", "train.max_steps=1.5")
refused("a whole number written as a fraction", r"seed: .*valid integer, got '?1\.0", "seed=1.0")
refused(
    "underscores in a number, as Python has them", r"train\.max_steps: .*integer, got '1_000'", "train.max_steps=1_000"
)
refused("a hexadecimal number", r"train\.max_steps: .*integer, got '0x10'", "train.max_steps=0x10")
refused(
    "leading zeros, which YAML 1.1 reads as octal", r"train\.max_steps: .*integer, got '010'", "train.max_steps=010"
)
refused("minutes and seconds, base 60 in YAML 1.1", r"train\.max_steps: .*integer, got '1:30'", "train.max_steps=1:30")
refused("digits of another script", r"train\.max_steps: .*integer, got '١٠'", "train.max_steps=١٠")
refused(
    "a code to be evaluated", r"train\.lr: .*valid number, got .__import__", "train.lr=__import__('os').mkdir('ran')"
)
refused("a seed that NumPy does not take", r"seed: .*less than or equal to 4294967295", f"seed={2**64}")
refused("a seed of five thousand digits", r"seed: .*valid integer, got '1{20,60} \.\.\. 1{10,}'", f"seed={'1' * 5000}")
refused("more steps than anybody waits for", r"train\.max_steps: .*1000000000", "train.max_steps=99999999999")
refused(
    "a batch of a billion",
    r"evaluation\.batch_size: .*less than or equal to 1048576",
    "evaluation.batch_size=1000000000",
)
refused(
    "pictures of a hundred thousand pixels",
    r"model\.image_size: .*less than or equal to 4096",
    "model.image_size=100000",
)
refused(
    "a zoom from large to small", r"data\.augment\.scale: the smallest zoom comes first", "data.augment.scale=[1.2,0.8]"
)
refused("a zoom of three numbers", r"data\.augment\.scale", "data.augment.scale=[1,2,3]")
refused("a picture mirrored twice the same way", r"model\.mirror: each direction", "model.mirror=[vertical,vertical]")
refused("no neighbourhood at all", r"evaluation\.space_ks: .*at least 1 item", "evaluation.space_ks=[]")
refused("an infinite CS", r"evaluation\.cs\.0: .*finite number", "evaluation.cs=[inf]")
refused(
    "a tracker that nobody knows", r"train\.trackers: wandbb is unknown; choices: .*wandb", "train.trackers=[wandbb]"
)
refused(
    "a tracker that is not installed", r"train\.trackers: \w+ is not installed; pip install \w+", "train.trackers=[aim]"
)
refused("no folder to write to", r"output_dir: .*at least 1 character", "output_dir=")
refused("nothing where text is wanted", r"ranks\.unit: null is no text; leave the key out", "ranks.unit=null")

# ---- options of heads

refused(
    "a context of a million tokens", r"num_context 1000000 .* the text tower takes at most", "head.num_context=1000000"
)
refused("no base ranks", r"head\.num_base_ranks: .*greater than or equal to 1, got 0", "head.num_base_ranks=0")
refused(
    "more base ranks than ranks", r"num_base_ranks must be between 1 and the number of ranks", "head.num_base_ranks=500"
)
refused("a layer of a billion", r"head\.embedding_dim: .*16384", "method=rm_loss", "head.embedding_dim=1000000000")
refused("a margin below nothing", r"head\.margin: .*greater than or equal to 0", "method=triplet", "head.margin=-1")
refused("a scale without end", r"head\.scale: .*finite number", "method=cnn", "head.scale=inf")
refused(
    "a template with a place for what there is not",
    r"head\.templates: '\{name\} \{age\}' has braces besides",
    *("method=zero_shot", "head.templates=['{name} {age}']"),
)
refused(
    "a template that looks into Python",
    r"head\.templates: '\{name\} \{name\.__class__\}' has braces besides",
    *("method=zero_shot", "head.templates=['{name} {name.__class__}']"),
)
refused(
    "a template without the name",
    r"head\.templates: 'a photo' lacks the place \{name\}",
    *("method=zero_shot", "head.templates=[a photo]"),
)
refused("no templates", r"head\.templates: .*at least 1 item", "method=zero_shot", "head.templates=[]")

# ---- a latent space

LATENT = ("method=large", "model.backbone=e4e", "data.kinds=[tank]", "data.style=calm")
ENDS = ("head.direction=text", "head.source=0", "head.target=100")

refused("more labels than pictures", r"budget must be between 1 and .* the pool, 8; got 9", *LATENT, "head.budget=9")
refused(
    "few labels for a training that reads all",
    r"head\.budget: training reads all labels; draw fewer samples with data\.shots",
    *("method=large_tuned", "model.backbone=e4e", "head.budget=5"),
)
refused("a text direction without its ends", r"needs head\.source and head\.target", *LATENT, ENDS[0])
refused("a text direction without a text tower", r"direction=text needs a text tower: of the backbone", *LATENT, *ENDS)
refused(
    "a text direction with a text tower of another space",
    r"direction=text needs an image encoder and a text tower of the same CLIP, or a generator's encoder",
    *("method=large", "model.backbone=timm:test_vit", "model.text=tiny", *ENDS),
)
refused(
    "a text direction from a text to itself",
    r"'100' and '100' have the same features: no direction leads from one to the other",
    *(*LATENT, "model.text=tiny", *ENDS[::2], "head.source=100"),
)
refused(
    "layers weighed by a generator that is not there",
    r"layers=generator needs the encoder of a generator with its generator: model\.backbone=e4e",
    *("method=large", "model.backbone=tiny", "head.layers=generator"),
)
refused(
    "pictures of another size than a latent encoder's",
    r"backbone e4e: its encoder takes pictures of 32 px alone, model\.image_size is 64",
    *(*LATENT, "model.image_size=64"),
)

# ---- ranks

refused("a million ranks", r"10,?000", "ranks.low=0", "ranks.high=1", "ranks.num=1000000")
refused("ranks beyond float32", r"between -1e\+18 and 1e\+18", "ranks.values=[0,1e39]")
refused("ranks that float32 cannot tell apart", r"are the same number in float32", "ranks.values=[100000000,100000001]")
refused("a rank that is no number", r"ranks\.values\.1: .*finite number", "ranks.values=[0,nan]")
refused("a rank that is a truth value", r"ranks\.values\.1: .*valid number, got 'yes'", "ranks.values=[0,yes]")
refused("a tolerance without end", r"ranks\.tolerance: .*finite number", "ranks.tolerance=inf")


# ---- files

bad_file(
    "a file with a key twice",
    r"c\.yaml: not valid YAML: line 2, .*key 'seed' is here and in line 1",
    "seed: 1\nseed: 2\n",
)
bad_file("a file with a key twice in a section", r"line 1, .*key 'lr' is here and", "train: {lr: 1, lr: 2}\n")
bad_file(
    "a file that calls Python", r"line 1, .*the tag \S*python/object", "seed: !!python/object/apply:os.mkdir [ran]\n"
)
bad_file(
    "a file of aliases that stand for billions",
    r"more than 200000 values, aliases included",
    "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
    + "".join(f"{c}: &{c} [{','.join(['*' + p] * 10)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)),
)
bad_file("an alias inside of itself", r"an alias that stands inside of what it means", "a: &a [*a]\n")
bad_file("a file nested a thousand deep", r"nested more than 40 levels deep", "a: " + "[" * 1000)
bad_file("a file larger than configurations are", r"larger than 1 MB", "#" + "x" * (1 << 20) + "\n")
bad_file("a file of zeros", r"no text", b"\0" * 1000)
bad_file("a picture", r"no text in UTF-8: byte 0 is 0x89", b"\x89PNG\r\n\x1a\n" + b"\0" * 100)
bad_file("a file in UTF-16", r"no text in UTF-8: byte 0 is 0xff", "seed: 1\n".encode("utf-16"))
bad_file("a file indented by tabs", r"line 2, column 1: .*character '..?t'", "train:\n\tlr: 1\n")
bad_file("a file that holds a list", r"a configuration is a mapping of keys to values, got a list", "- seed\n")
bad_file("a file that holds one word", r"a configuration is a mapping of keys to values, got one value", "seed\n")
bad_file("a file with two documents", r"line 2, .*another document", "seed: 1\n--- \nseed: 2\n")
bad_file("a file with a bracket that is not closed", r"line 2, column 1: .*expected ',' or '\]'", "seed: [1\n")
bad_file("a file that extends nothing", r"extends is the path of one file", "extends:\n")
bad_file("a file that extends itself", r"extend each other in a circle", "extends: c.yaml\n")


@case("a configuration that is not there", r"demp\.yaml: no such configuration file; nearest: demo\.yaml")
def _(folder):
    (folder / "demo.yaml").write_text("seed: 1\n")
    return ["train", "demp.yaml"]


@case("a configuration in a folder that is not there", r"no such configuration file; there is no folder .*confgis")
def _(folder):
    return ["train", "confgis/demo.yaml"]


@case("a folder for a configuration", r"mine: a folder, where the YAML file .*config\.yaml in .*mine")
def _(folder):
    (folder / "mine").mkdir()
    (folder / "mine" / "config.yaml").write_text("seed: 1\n")
    return ["train", "mine"]


# ---- right, though it looks wrong

RANKS = ("ranks.low=0", "ranks.high=100", "ranks.num=6")
STEP = ("train.max_steps=1", "train.batch_size=4", "evaluation.report=false", "output_dir=run")


@case("names of ranks that YAML 1.1 takes for truth values and numbers", r"\bno\b.*1\.10", status=0)
def _(folder):
    (folder / "c.yaml").write_text("ranks: {values: [0, 30, 60, 100], names: [no, 007, off, 1.10], unit: on}\n")
    return ["check-data", "c.yaml", *SMALL]


@case("a method on the command line over a file with options of another", r"run folder: run", status=0)
def _(folder):
    (folder / "c.yaml").write_text("method: ordinalclip\nhead: {num_base_ranks: 3}\n")
    return ["train", "c.yaml", "method=l1", *SMALL, *RANKS, *STEP]


@case("the defaults for check-data", r"ranks: 6, 0 to 100", status=0)
def _(folder):
    return ["check-data", "default", *SMALL, *RANKS]


# ---- cached features

refused("cached features without a number of views", r"features=cached needs data\.views", "model.features=cached")
refused(
    "cached features of an encoder with adapters",
    r"model: features=cached: the image encoder stays as it is, which lora_rank changes",
    "model.features=cached",
    "data.views=1",
    "model.lora_rank=4",
)
refused("no view of a training picture", r"data\.views: Input should be greater than or equal to 1", "data.views=0")


@case("features to be cleared, of which nothing is said", r"features clear: of which KEY\? .*or all")
def _(folder):
    return ["features", "clear"]


@case("features to be cleared that are not there", r"features clear: no names begin with 'abc'")
def _(folder):
    return ["features", "clear", "abc"]
