"""Image encoders: what their heads look at, and what pruning them does (see `vit_heads`)."""
