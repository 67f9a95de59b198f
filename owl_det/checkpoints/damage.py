"""The error of a checkpoint that is not whole."""

from owl_det.errors import CheckpointError


class DamagedError(CheckpointError):
    """Files of a checkpoint that are missing, cut short or changed."""
