"""Words of a call that mean nothing."""

from hostile import case


@case("a key that does not exist", r"train\.lrr is not a key; .*train\.lr\b")
def _(folder):
    return ["train", "default", "train.lrr=1"]
