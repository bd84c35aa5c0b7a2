"""What the latent engine costs, each figure a ratio measured in one run; docs/benchmarks.md holds what was measured."""
