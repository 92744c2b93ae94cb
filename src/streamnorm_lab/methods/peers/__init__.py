"""Other people's normalizations, each written from its paper, for the experiments to compare with."""
