"""LARGE: regression from the latent space of a generator (Nitzan, Gal, Brenner and Cohen-Or, CVPR 2022)."""
