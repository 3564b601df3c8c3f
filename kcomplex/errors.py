"""The errors of kcomplex: one root, and leaves that are also the fitting builtin."""


class KComplexError(Exception):
    """Anything that kcomplex refuses to do; the message says what, where, and what to do about it."""


class SpecError(KComplexError, ValueError):
    """A specification string (estimator, mode, schedule) or a configuration value that makes no sense."""


class UnknownNameError(KComplexError, LookupError):
    """A name that no installed plug-in answers to."""


class PluginError(KComplexError, ImportError):
    """A plug-in that was found but can't be loaded; its own error is the cause."""


class FormatError(KComplexError, ValueError):
    """A file that is truncated, corrupted, hostile or of an unknown kind."""


class SourceNotFoundError(KComplexError, FileNotFoundError):
    """A path that doesn't exist."""


class WeightsError(KComplexError, ValueError):
    """Weights that can't be measured the way that was asked for."""


class StreamError(KComplexError, ValueError):
    """An encoded stream that is truncated or corrupted."""


class RefusedStreamError(StreamError):
    """A stream that needn't be damaged: of another version, made with other weights, or larger than is allowed."""


class VerificationError(KComplexError, AssertionError):
    """A stream that doesn't give back what its description promised."""


class DataError(KComplexError, ValueError):
    """A data set that is missing, or isn't what its name says."""


class RunError(KComplexError, ValueError):
    """A run store that is missing, taken or unreadable, or a value that it can't hold."""
