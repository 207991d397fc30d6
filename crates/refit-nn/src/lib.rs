//! Running models on Burn: sites, operators, mixers, caches, taps, kernels, generation.
