"""Files as the system sees them: mapping one, and replacing one without a moment in which it is neither old nor new."""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

_ACL = "system.posix_acl_access"  # permissions beyond those of owner, group and others


def check_path(path: Any) -> Path:
    try:
        found = Path(path)
    except TypeError:
        raise TypeError(f"path must be a str or path-like, got {type(path).__name__}") from None
    try:
        name = os.fsencode(found)
    except UnicodeEncodeError:
        name = b"\0"
    if b"\0" in name:
        raise ValueError(f"path must be a name that files can have, got {str(path)!r}")
    return found


def cache_folder() -> Path:
    """Where the user keeps what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyda8w4"


def _check_regular(path: Path, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise _os_error(errno.EISDIR, path)
    if not stat.S_ISREG(status.st_mode):
        kind = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}.get(stat.S_IFMT(status.st_mode), "a device")
        raise ValueError(f"path must be of a regular file, got {path}, which is {kind}")


def _os_error(code: int | None, path: Path) -> OSError:
    """Of the subclass that belongs to the code."""
    return OSError(code, os.strerror(code or 0), str(path))


def map_file(path: Path) -> npt.NDArray[np.uint8]:
    """The bytes of a regular file, mapped."""
    # Opening a FIFO waits for a writer, unless told not to. Windows has none.
    at_once = getattr(os, "O_NONBLOCK", 0)
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | at_once)) as file:
        status = os.fstat(file.fileno())
        _check_regular(path, status)
        return np.asarray(np.memmap(file, np.uint8, mode="r")) if status.st_size else np.empty(0, np.uint8)


def release(data: npt.NDArray[np.uint8]) -> None:
    """Let the system take back the memory of a file that `map_file` mapped. It is read again when it is used.

    Windows takes it back when it needs it.
    """
    if isinstance(data.base, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
        data.base.base.madvise(mmap.MADV_DONTNEED)  # type: ignore[union-attr]


@contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to. Where the block ends without an exception, it is on the disk and takes the place of `path`.

    A symbolic link stays, and its target is replaced. The new file has the owner and permissions of the old one.
    Errors of the system name `path`.
    """
    try:
        old = _status_of_writable(path)
        target = Path(os.path.realpath(path, strict=old is not None)) if path.is_symlink() else path
        folder, begin = _open_folder(target.parent)
        temporary = begin / f".pyda8w4-{secrets.token_hex(8)}.tmp"
        try:
            # Until it has what the old file has, nobody else may open it.
            descriptor, named = _create(folder, temporary, 0o666 if old is None else 0o600)
            with open(descriptor, "wb") as file:
                if old is not None:
                    _take_over(file.fileno(), target, old)
                yield file
                file.flush()
                os.fsync(descriptor)
                if not named:
                    os.link(f"/proc/self/fd/{descriptor}", temporary, dst_dir_fd=folder)
            os.replace(temporary, begin / target.name, src_dir_fd=folder, dst_dir_fd=folder)
            if folder is not None:
                _sync_folder(folder)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=folder)
            if folder is not None:
                os.close(folder)
    except OSError as error:
        raise _os_error(error.errno, path) from error


def _status_of_writable(path: Path) -> os.stat_result | None:
    """None where there is no file. One that may not be written is not to be replaced either."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    _check_regular(path, status)
    if not os.access(path, os.W_OK, effective_ids=hasattr(os, "geteuid")):
        raise _os_error(errno.EACCES, path)
    return status


def _open_folder(path: Path) -> tuple[int | None, Path]:
    """-> the open folder, and what names in it begin with.

    Names are relative to it: a temporary one is never too long, and is never left in another folder. Windows opens no
    folders, and names there begin with the folder's.
    """
    if not hasattr(os, "O_DIRECTORY"):
        return None, path
    return os.open(path, getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY), Path()


def _create(folder: int | None, name: Path, mode: int) -> tuple[int, bool]:
    """A file without a name, of which nothing is left if this process is killed, or else one with this name.

    -> its descriptor, and whether it has the name.
    """
    if hasattr(os, "O_TMPFILE"):  # Linux only
        with suppress(OSError):
            descriptor = os.open(".", os.O_TMPFILE | os.O_WRONLY, mode, dir_fd=folder)
            if os.path.exists(f"/proc/self/fd/{descriptor}"):  # by which it gets its name in the end
                return descriptor, False
            os.close(descriptor)
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)
    return os.open(name, flags, mode, dir_fd=folder), True


def _take_over(descriptor: int, path: Path, old: os.stat_result) -> None:
    """Give the new file the owner and the permissions of the old one, or fewer permissions.

    Those of Windows are the folder's.
    """
    if not hasattr(os, "fchown"):
        return
    mode = stat.S_IMODE(old.st_mode)
    try:
        os.fchown(descriptor, old.st_uid, old.st_gid)
    except OSError:  # the file of another user: only its group can be kept, if that
        try:
            os.fchown(descriptor, -1, old.st_gid)
        except OSError:
            mode &= ~stat.S_IRWXG
    if hasattr(os, "setxattr"):  # Linux only
        with suppress(OSError):  # the folder may have given it a list
            os.removexattr(descriptor, _ACL)
        with suppress(OSError):
            os.setxattr(descriptor, _ACL, os.getxattr(path, _ACL))
    os.fchmod(descriptor, mode)


def _sync_folder(folder: int) -> None:
    """Put the new name on the disk. Should that fail, a loss of power can bring back the old file, all of it."""
    with suppress(OSError):  # a folder that may be written but not read
        descriptor = os.open(".", os.O_RDONLY, dir_fd=folder)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
