"""The training step: what is learned (`objectives`), its `gradients`, what applies them."""
