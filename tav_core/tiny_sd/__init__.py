"""The demo's model: a Stable Diffusion of 7.5 million parameters that comes with the pack."""
