"""Every error a user can cause, each with one sentence that says what, where and what to do."""

__all__ = [
    "BadInputError",
    "CacheError",
    "CheckpointError",
    "DamagedFileError",
    "DownloadError",
    "EditMismatchError",
    "EmptyTargetError",
    "FactFormatError",
    "FirsttokError",
    "HyperparameterError",
    "LayerOutOfRangeError",
    "NonFiniteError",
    "SpecialTokenError",
    "SubjectAmbiguousError",
    "SubjectBoundaryError",
    "SubjectNotFoundError",
    "TargetTokenError",
    "TemplateError",
    "TextFormatError",
    "UnknownModelError",
    "UnsupportedModelError",
    "ViewError",
    "WorkerError",
]


class FirsttokError(Exception):
    """Base of all errors with a message meant for the user; the command line exits with code 2."""


class BadInputError(FirsttokError):
    """A file or an argument is not what it should be."""


class CheckpointError(BadInputError):
    """A model's files are not one whole model that can be loaded and edited."""


class DamagedFileError(BadInputError):
    """A file of firsttok's own is not as it was written, or not where it was written."""


class FactFormatError(BadInputError):
    """A record of facts is malformed; the message names file, record and field."""


class TextFormatError(BadInputError):
    """A file of sentences is malformed."""


class HyperparameterError(BadInputError):
    """A hyperparameter lies outside its range."""


class TemplateError(BadInputError):
    """A template does not hold exactly one ``{}``."""


class SubjectNotFoundError(BadInputError):
    """A subject does not occur in the text."""


class SubjectAmbiguousError(BadInputError):
    """A subject occurs more than once in the text."""


class SubjectBoundaryError(BadInputError):
    """A token straddles the end of the subject, so that there is no last token of its own."""


class SpecialTokenError(BadInputError):
    """A text, a subject or a target holds a special token where none belongs."""


class EmptyTargetError(BadInputError):
    """A target is empty or white space only."""


class TargetTokenError(BadInputError):
    """A target yields no token of its own behind its prompt."""


class UnknownModelError(BadInputError):
    """No model goes by this name, and no folder lies there."""


class UnsupportedModelError(FirsttokError):
    """The architecture, or a part of it, cannot be edited or read."""


class LayerOutOfRangeError(BadInputError):
    """The model has no such layer."""


class NonFiniteError(FirsttokError):
    """A weight, a key or a result is NaN or infinite."""


class EditMismatchError(FirsttokError):
    """An edit does not belong to this model."""


class ViewError(FirsttokError):
    """A view of a model was taken for the model itself."""


class CacheError(FirsttokError):
    """The cache folder cannot be used."""


class DownloadError(FirsttokError):
    """A download failed or did not match its checksum."""


class WorkerError(FirsttokError):
    """Workers of a cluster could not be started, or cannot do their work."""
