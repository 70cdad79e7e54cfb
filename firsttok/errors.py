"""Every error a user can cause, each with one sentence that says what, where and what to do."""

import errno
import os
import re

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
    "SubjectBoundaryError",
    "TargetTokenError",
    "TemplateError",
    "TextFormatError",
    "UnknownModelError",
    "UnsupportedModelError",
    "ViewError",
    "WorkerError",
    "sentence_of",
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


class SubjectBoundaryError(BadInputError):
    """A token straddles the end of the subject, so that there is no last token of its own."""


class SpecialTokenError(BadInputError):
    """A text, a subject or a target holds a special token where none belongs."""


class EmptyTargetError(BadInputError):
    """A target is empty or white space only."""


class TargetTokenError(BadInputError):
    """A target yields no token of its own after its prompt."""


class UnknownModelError(BadInputError):
    """No model goes by this name, and there is no such folder."""


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


_ADVICE = {
    errno.EACCES: "choose one you may use",
    errno.EDQUOT: "free some space or choose another disk",
    errno.ELOOP: "remove the link that points to itself",
    errno.EMFILE: "close some files, or raise the limit with: ulimit -n",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOSPC: "free some space or choose another disk",
    errno.EPERM: "choose one you may use",
    errno.EROFS: "choose one you may use",
}
"""What helps, by the system's number of an error."""
_MEMORY = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Cannot allocate memory",
    "DefaultCPUAllocator",
    "bad_alloc",
    "failed to map segment",
    "out of memory",
)
"""What libraries write where memory is used up, though they raise no MemoryError."""
_NAMELESS = {
    "embedded null": "a path holds a NUL character; leave it out",
    "Exceeds the limit (4": "a whole number has more than 4300 digits; give a shorter one",
    "Could not determine home": "no user has the home folder that a path with '~' names; write "
    "the path in full",
    "Symlink loop": "a path runs into a link that points to itself; remove that link",
    "can't start new thread": "no more threads can be started; close other programs",
    "surrogates not allowed": "a text holds half a surrogate pair, which is no character; write "
    "it again as UTF-8",
}
"""What Python raises as a ValueError or a RuntimeError without naming the file or the text."""


def sentence_of(error: BaseException) -> str | None:
    """What the user is told about an error, wherever it came from.

    Returns:
        One sentence if the user, the files or the machine caused it; None if the program did, whose
        traceback is needed then.
    """
    if isinstance(error, FirsttokError):
        return str(error)
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or (
        isinstance(error, ImportError | RuntimeError) and any(sign in text for sign in _MEMORY)
    ):
        detail = f" ({text[:150]})" if text else ""
        return f"there is not enough memory{detail}; close other programs or take a smaller model"
    # Libraries in Rust and C++ give the system's number in the text alone.
    told = re.search(r"(?:os error |\[errno )(\d+)", text, re.IGNORECASE)
    number = getattr(error, "errno", None) or (int(told.group(1)) if told else None)
    if isinstance(error, OSError) or told:
        name = getattr(error, "filename", None)
        place = "a file" if name is None else os.fsdecode(name) if isinstance(name, bytes) else name
        reason = os.strerror(number) if number else text[:300] or type(error).__name__
        advice = _ADVICE.get(number or 0, "check it and run the same command again")
        return f"{place} cannot be used ({reason}); {advice}"
    if isinstance(error, ValueError | RuntimeError):
        for sign, sentence in _NAMELESS.items():
            if sign in text:
                return sentence
    return None
