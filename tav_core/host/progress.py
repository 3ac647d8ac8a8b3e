"""The host's progress bar, and what its user has asked of saved files."""

from __future__ import annotations

from typing import Any

import comfy.cli_args
import comfy.model_management
import comfy.utils


def progress_bar(total: int) -> Any:
    """Return the host's progress bar of the node that runs; its ``update_absolute`` raises once the user cancels."""
    return comfy.utils.ProgressBar(total)


def raise_if_cancelled() -> None:
    """Raise the host's own exception if the user has cancelled the run."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def saves_workflows() -> bool:
    """Say whether saved files hold their workflow; the user may have started the host with --disable-metadata."""
    return not comfy.cli_args.args.disable_metadata
