"""The methods that OrdinalCLIP is compared with, each a head on image features."""

HEADS = {
    "cnn": "baselines.classification:CNNHead",
    "l1": "baselines.regression:L1",
    "constant": "baselines.constant:Constant",
}
