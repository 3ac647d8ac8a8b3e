"""Tune-A-Video, the method: usable without a ComfyUI server."""
