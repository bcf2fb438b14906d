"""The one family of errors that a user of editlib can cause.

Every message is one line that says what was given, what was expected and what to do about it; the
command line prints it to stderr and leaves with exit code 2.
"""


class EditlibError(Exception):
    """Base of all errors raised by editlib for bad input or an impossible job."""


class RequestError(EditlibError, ValueError):
    """A request, retain or data file that cannot be used; names file, line and field."""


class HparamsError(EditlibError, ValueError):
    """A hyper-parameter that is unknown, missing, of the wrong type or out of range."""


class ModelError(EditlibError, ValueError):
    """A model or tokenizer that cannot be loaded or edited."""


class StatsError(EditlibError, ValueError):
    """Layer statistics that are missing, damaged or belong to another model."""


class CorpusError(EditlibError, ValueError):
    """A corpus that cannot be read or holds too little text."""


class TokenError(EditlibError, ValueError):
    """An unlearning token that is missing, damaged or belongs to another model."""


class EditError(EditlibError, ValueError):
    """An edit that could not be solved; the model is left unchanged."""


class MetricError(EditlibError, ValueError):
    """A measurement that cannot be made, or a file of results that cannot be read."""


class DeltaError(EditlibError, ValueError):
    """A delta file that is damaged, or belongs to another model."""


class ChainError(EditlibError, ValueError):
    """A chain folder that is none, is damaged, is in use, or does not hold what was asked for."""


class AttackError(EditlibError, ValueError):
    """An attack that does not exist, lacks a package, or was given settings it cannot run with."""


class ConfigError(EditlibError, ValueError):
    """The file of a comparison that cannot be read, holds an unknown key, or asks for what there is not."""


class OutputError(EditlibError, OSError):
    """An output folder or file that cannot be written as asked."""


class FetchError(EditlibError, OSError):
    """A packaged model or corpus that is neither cached nor can be downloaded."""
