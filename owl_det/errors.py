"""Errors that a user can mend. Commands print them as one line and exit with code 2."""


class UserError(Exception):
    """Something the user gave is wrong; the message names the file or field and the remedy."""


class ConfigError(UserError):
    """A config key, type or combination of values that cannot be run."""


class DataError(UserError):
    """A data set that is missing, empty, malformed or too damaged to use."""


class CheckpointError(UserError):
    """A checkpoint that is missing or does not fit the model."""
