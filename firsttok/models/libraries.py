"""Other libraries, while they are imported and used: kept quiet, and not slowed down."""

import contextlib
import gc
import logging
import warnings
from collections.abc import Generator

__all__ = ["collection_paused", "quiet_libraries"]


@contextlib.contextmanager
def quiet_libraries() -> Generator[None, None, None]:
    """Keep warnings and progress bars of other libraries off the terminal."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    hub_verbosity = hub_logging.get_verbosity()
    root_level = logging.getLogger().level
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # TransformerLens warns through the root logger.
    logging.getLogger().setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        logging.getLogger().setLevel(root_level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def collection_paused() -> Generator[None, None, None]:
    """Put off the search for reference cycles, if it is on.

    Importing transformers and TransformerLens makes a million objects that stay; looking through
    them again and again for garbage takes a second.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()
