"""The demo's model: a Stable Diffusion of 9.2 million parameters that comes with the pack."""
