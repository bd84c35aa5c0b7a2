"""What the latent engine costs, each figure a ratio measured in one run; see README.md in this folder."""
