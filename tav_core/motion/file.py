"""MOTION: what one-shot tuning learns, and the one safetensors file it is kept in.

Keys are LDM paths inside the UNet: ``<block>.attn1.to_q.diff`` and ``<block>.attn2.to_q.diff`` [c, c], the
difference that tuning makes to a query projection, and ``<block>.attn_temp.to_q|to_k|to_v.weight`` [c, c],
``<block>.attn_temp.to_out.0.weight|bias``, ``<block>.norm_temp.weight|bias`` [c], the temporal layers;
``<block>`` is for instance ``input_blocks.1.1.transformer_blocks.0``.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import Refusal
from ..out_of_memory import is_out_of_memory

DAMAGED = "It is damaged: copy it again, or tune again."

FORMAT = "tune-a-video motion"
# Version 2 has low-rank files too; whole ones are written as version 1, which older packs read.
FORMAT_VERSION = 2
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# SDXL's has 1260. A header of some megabytes can name a million empty ones.
MOST_TENSORS = 10_000
QUERY_SUFFIX = ".diff"
TEMPORAL_MARKS = (".attn_temp.", ".norm_temp.")
TEMPORAL_LEAVES = (
    "attn_temp.to_q.weight",
    "attn_temp.to_k.weight",
    "attn_temp.to_v.weight",
    "attn_temp.to_out.0.weight",
    "attn_temp.to_out.0.bias",
    "norm_temp.weight",
    "norm_temp.bias",
)


@dataclass(frozen=True)
class Motion:
    """Tuned weights and how they came about.

    ``tensors``: see the module's text. ``metadata``: strings; base_family (SD1, SD2, SDXL), prediction_type
    (epsilon, v), prompt, frame_count, width, height (pixels), steps, seed, options (JSON).
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def query_deltas(self) -> dict[str, Tensor]:
        """Deltas by the path of the weight they belong to, e.g. ``<block>.attn1.to_q.weight``."""
        return {
            key.removesuffix(QUERY_SUFFIX) + ".weight": value
            for key, value in self.tensors.items()
            if key.endswith(QUERY_SUFFIX)
        }

    def temporal(self) -> dict[str, Tensor]:
        """Weights of the temporal layers by their path."""
        return {key: value for key, value in self.tensors.items() if any(m in key for m in TEMPORAL_MARKS)}

    def to(self, dtype: torch.dtype) -> Motion:
        """The same motion with its tensors in another dtype, on the CPU."""
        tensors = {key: value.to("cpu", dtype).contiguous() for key, value in self.tensors.items()}
        return Motion(tensors, self.metadata)


def save_motion(motion: Motion, path: Path) -> None:
    """Write a motion file; see ``write_safetensors``."""
    version = FORMAT_VERSION if "rank" in motion.metadata else 1
    metadata = {"format": FORMAT, "format_version": str(version), **motion.metadata}
    write_safetensors(motion.tensors, metadata, path)


def write_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Write a file in a temporary folder beside ``path``, then move it: never half a file, nor after a power cut.

    ``tensors``: on the CPU, contiguous. Raises OSError or SafetensorError if it cannot be written. A writer that is
    killed leaves its folder, ``.<name>*.part``, and nothing else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder, because safetensors writes under a temporary name of its own first. And no name that ends in
    # .safetensors in it, because the host lists those in the folders of a models folder.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}", suffix=".part") as scratch:
        temporary = Path(scratch, "motion")
        safetensors.torch.save_file(dict(tensors), temporary, metadata=dict(metadata))
        # It may be private to its owner; a model file is for whoever may read its folder.
        os.chmod(temporary, _mode_of_new_files(Path(scratch)))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    if os.name == "posix":  # elsewhere a folder cannot be opened, and renaming is written through
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _mode_of_new_files(folder: Path) -> int:
    """Return the permissions that a new file in ``folder`` gets.

    Asking for the umask would change it for the whole process, and other threads write files meanwhile.
    """
    probe = folder / "probe"
    probe.touch()
    return stat.S_IMODE(probe.stat().st_mode)


def load_motion(path: Path) -> Motion:
    """Read a motion file. Raises Refusal, naming the file and the remedy, for anything else."""
    try:
        # safetensors takes a file that may not be read for one that is missing.
        with open(path, "rb"), safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            if metadata.get("format") != FORMAT:
                raise Refusal(
                    "file",
                    f"{path.name} is a safetensors file, but not a Tune-A-Video motion",
                    "Choose a file written by Save Motion.",
                )
            version = metadata.pop("format_version", "")
            if version not in map(str, range(1, FORMAT_VERSION + 1)):
                raise Refusal(
                    "file",
                    f"{path.name} has motion format version {version[:20] or 'unknown'}; this version of the pack "
                    f"reads up to {FORMAT_VERSION}",
                    "Update the pack, or tune again with this one.",
                )
            if len(file.keys()) > MOST_TENSORS:
                raise Refusal(
                    "file",
                    f"{path.name} holds {len(file.keys())} tensors, and no motion has more than {MOST_TENSORS}",
                    DAMAGED,
                )
            # Copied out of the memory map, so the file may be replaced while they are in use.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except OSError as error:
        if is_out_of_memory(error):
            raise
        remedy = (
            "Allow it to the account that runs ComfyUI."
            if error.errno in (errno.EACCES, errno.EPERM)
            else "Look at its disk or network folder, and queue again."
        )
        raise Refusal("file", f"{path.name} cannot be opened ({error.strerror or error})", remedy) from error
    except SafetensorError as error:
        if is_out_of_memory(error):
            raise
        raise Refusal(
            "file",
            f"{path.name} cannot be read as a motion file ({error})",
            "It is damaged or incomplete: copy it again, or tune again.",
        ) from error
    del metadata["format"]
    odd = next((key for key, value in tensors.items() if value.dtype not in _DTYPES), None)
    if odd is not None:
        raise Refusal(
            "file",
            f"{path.name} holds {str(tensors[odd].dtype).removeprefix('torch.')} values (first in {odd[:200]}), but a "
            "motion is fp16, bf16 or fp32",
            DAMAGED,
        )
    empty = next((key for key, value in tensors.items() if 0 in value.shape), None)
    if empty is not None:
        raise Refusal("file", f"{path.name} holds a tensor without values ({empty[:200]})", DAMAGED)
    bad = next((key for key, value in tensors.items() if not torch.isfinite(value).all()), None)
    if bad is not None:
        raise Refusal("file", f"{path.name} holds values that are not finite (first in {bad})", "Tune again.")
    return Motion(tensors, metadata)


def check_fits(motion: Motion, query_shapes: Mapping[str, torch.Size], family: str) -> None:
    """Refuse a motion that does not belong to a UNet, naming the first key and both shapes.

    ``query_shapes``: shape of every ``<block>.attn1|attn2.to_q.weight`` of the UNet. ``family``: the
    model's base family. Raises Refusal.
    """
    tuned_on = motion.metadata.get("base_family", family)
    if tuned_on != family:
        raise Refusal(
            "motion",
            f"it was tuned on {tuned_on}, but the model is {family}",
            "Load a motion of the model's own family, or a checkpoint of the motion's.",
        )
    if not motion.tensors:
        raise Refusal("motion", "it holds no weights", "Tune again.")
    for key, value in sorted(motion.tensors.items()):
        expected = _expected_shape(key, query_shapes)
        if expected is None:
            raise Refusal(
                "motion",
                f"{key} has no place in this model",
                "Load the checkpoint that it was tuned on, or tune this one.",
            )
        if value.shape != expected:
            raise Refusal(
                "motion",
                f"it does not fit the model: {key} is {list(value.shape)}, the model needs {list(expected)}",
                "Load the checkpoint that it was tuned on, or tune this one.",
            )
    for block in sorted({key.partition(mark)[0] for key in motion.tensors for mark in TEMPORAL_MARKS if mark in key}):
        missing = next((leaf for leaf in TEMPORAL_LEAVES if f"{block}.{leaf}" not in motion.tensors), None)
        if missing is not None:
            raise Refusal(
                "motion", f"{block}.{missing} is missing", "The file is incomplete: copy it again, or tune again."
            )


def _expected_shape(key: str, query_shapes: Mapping[str, torch.Size]) -> torch.Size | None:
    if key.endswith(QUERY_SUFFIX):
        return query_shapes.get(key.removesuffix(QUERY_SUFFIX) + ".weight")
    leaf = next((leaf for leaf in TEMPORAL_LEAVES if key.endswith(f".{leaf}")), None)
    query = query_shapes.get(f"{key.removesuffix(f'.{leaf}')}.attn1.to_q.weight")
    if leaf is None or query is None:
        return None
    inner, channels = query
    if leaf == "attn_temp.to_out.0.weight":
        return torch.Size((channels, inner))
    if leaf in ("attn_temp.to_out.0.bias", "norm_temp.weight", "norm_temp.bias"):
        return torch.Size((channels,))
    return torch.Size((inner, channels))
