"""What the nodes' schemas share."""

from comfy_api.latest import io

CATEGORY = "Tune-A-Video"

MotionType = io.Custom("TAV_MOTION")
