"""The errors a user can cause. Each message carries the value, the rule and the fix.

Programming mistakes are asserts; these classes are for input that came from outside. `videofm` turns them into one
line and an exit code (2 for a wrong request, 1 for work that failed), never into a traceback.
"""


class VideofmError(Exception):
    """Base of every error that a user's input can cause."""

    exit_code = 1


class ConfigError(VideofmError):
    """The request is wrong: an unknown key, a value out of range, a combination that cannot work."""

    exit_code = 2


class DataError(VideofmError):
    """Data that cannot be used: a missing file, a damaged shard, a folder without a usable clip."""


class MissingError(DataError):
    """A file that the data names is not there."""


class TransientError(DataError):
    """A store that did not answer, again and again. What it holds may be fine: no other sample takes its place."""


class CheckpointError(VideofmError):
    """A checkpoint or an exported folder that is absent, incomplete, damaged or of another model."""


class ParallelError(VideofmError):
    """A layout of processes that does not fit the machine or the model."""

    exit_code = 2


class Interrupted(VideofmError):
    """Work stopped on request (Ctrl-C, SIGTERM, `control/stop`) with everything saved that was finished."""

    exit_code = 75
