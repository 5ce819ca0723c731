"""What `save` replaces, what it leaves behind when it fails, and which files are read."""

import mmap
import os
import resource
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from cases import SOME, Weight, assert_same_weight, pack

import pyda8w4
from pyda8w4 import _filesystem
from pyda8w4._timing import cold_bytes, last_level_cache_bytes

OLD, NEW = {"w": pack(SOME[2])}, {"w": pack(SOME[3])}
SAVE = """
import os, sys, numpy as np, pyda8w4
packed = pyda8w4.prepack(np.zeros((512, 1024), np.uint8), np.ones(512, np.float32))
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "weights.safetensors"
    pyda8w4.save(path, OLD)
    return path


# What the module os has on Linux only, and what it does not have on Windows either.
LINUX_ONLY = ["O_PATH", "O_TMPFILE", "getxattr", "removexattr", "sched_getaffinity", "setxattr"]
NOT_WINDOWS = ["O_DIRECTORY", "O_NONBLOCK", "fchown", "geteuid", "getloadavg"]


@pytest.fixture(params=["without a name", "with a name", "no proc", "as on macOS"])
def unfinished(request, monkeypatch):
    """How the file is kept that is not finished: not every file system has files without names."""
    if request.param == "with a name":
        open_ = os.open

        def without(path, flags, *arguments, **more):
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(95, "Operation not supported")
            return open_(path, flags, *arguments, **more)

        monkeypatch.setattr(os, "open", without)
    elif request.param == "no proc":
        monkeypatch.setattr(os.path, "exists", lambda path: False)
    elif request.param == "as on macOS":
        for name in LINUX_ONLY:
            monkeypatch.delattr(os, name, raising=False)
    return request.param


@pytest.fixture
def windows(monkeypatch):
    """The module os as it is there, where functions take neither descriptors of folders nor effective users."""
    access, open_, replace, unlink = os.access, os.open, os.replace, os.unlink
    for name in LINUX_ONLY + NOT_WINDOWS:
        monkeypatch.delattr(os, name, raising=False)

    def open_path(path, flags, mode=0o777, *, dir_fd=None):
        assert dir_fd is None and not Path(path).is_dir()
        return open_(path, flags, mode)

    def replace_path(source, target, *, src_dir_fd=None, dst_dir_fd=None):
        assert src_dir_fd is dst_dir_fd is None
        replace(source, target)

    def unlink_path(path, *, dir_fd=None):
        assert dir_fd is None
        unlink(path)

    def access_path(path, mode, *, effective_ids=False):
        assert not effective_ids
        return access(path, mode)

    for name, function in (
        ("access", access_path),
        ("open", open_path),
        ("replace", replace_path),
        ("unlink", unlink_path),
    ):
        monkeypatch.setattr(os, name, function)


def assert_holds(path, weights):
    assert_same_weight(pyda8w4.load(path)["w"], weights["w"])


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def child(code, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120, **options
    )


# ---- symbolic links ----------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["relative", "absolute", "two links", "another folder", "linked folder"])
def test_save_through_a_symbolic_link_writes_its_target(path, way, unfinished):
    folder = path.parent / "folder"
    folder.mkdir()
    link = folder / "link"
    if way == "linked folder":
        os.symlink(path.parent, link)
        link = link / path.name
    else:
        os.symlink(path if way == "absolute" else Path("..") / path.name, link)
    if way == "two links":
        os.symlink(link, path.parent / "second")
        link = path.parent / "second"
    elif way == "another folder":
        target = folder / "target"
        path.rename(target)
        link.unlink()
        link = path
        os.symlink(target, link)
        path = target
    before = set(path.parent.iterdir()), set(folder.iterdir())
    pyda8w4.save(link, NEW)
    assert way == "linked folder" or link.is_symlink()
    assert not path.is_symlink()
    assert_holds(path, NEW)
    assert (set(path.parent.iterdir()), set(folder.iterdir())) == before


def test_save_through_a_link_to_nothing_makes_its_target(tmp_path):
    (tmp_path / "folder").mkdir()
    link = tmp_path / "link"
    link.symlink_to("folder/target")
    pyda8w4.save(link, NEW)
    assert link.is_symlink()
    assert_holds(tmp_path / "folder" / "target", NEW)


def test_a_link_to_a_file_that_has_no_name_any_more(tmp_path):
    with open(tmp_path / "file", "w") as file:
        (tmp_path / "file").unlink()
        path = f"/proc/self/fd/{file.fileno()}"
        with pytest.raises(FileNotFoundError, match=path):
            pyda8w4.save(path, NEW)
    assert not list(tmp_path.iterdir())


def test_links_in_a_circle_are_an_error(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match=str(tmp_path / "a")):
        pyda8w4.save(tmp_path / "a", NEW)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


# ---- permissions and owners --------------------------------------------------------------------


@pytest.mark.parametrize("permissions", [0o600, 0o640, 0o664, 0o666, 0o755, 0o200])
def test_permissions_are_kept(path, permissions, unfinished):
    path.chmod(permissions)
    umask = os.umask(0o022)
    try:
        pyda8w4.save(path, NEW)
    finally:
        os.umask(umask)
    assert mode(path) == permissions
    path.chmod(0o600)
    assert_holds(path, NEW)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o027, 0o077])
def test_new_files_have_the_permissions_of_the_umask(tmp_path, umask, unfinished):
    before = os.umask(umask)
    try:
        pyda8w4.save(tmp_path / "new", NEW)
    finally:
        os.umask(before)
    assert mode(tmp_path / "new") == 0o666 & ~umask


def test_a_private_file_is_private_while_it_is_written(path, unfinished, monkeypatch):
    path.chmod(0o600)
    seen = []
    take_over = _filesystem._take_over

    def look(descriptor, *arguments):
        seen.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        take_over(descriptor, *arguments)
        seen.append(stat.S_IMODE(os.fstat(descriptor).st_mode))

    monkeypatch.setattr(_filesystem, "_take_over", look)
    pyda8w4.save(path, NEW)
    assert seen == [0o600, 0o600]


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@as_root
def test_the_owner_is_kept(path):
    os.chown(path, 65534, 12345)
    path.chmod(0o640)
    pyda8w4.save(path, NEW)
    assert (path.stat().st_uid, path.stat().st_gid, mode(path)) == (65534, 12345, 0o640)


@as_root
@pytest.mark.parametrize("group, permissions", [(12345, 0o664), (23456, 0o604)])
def test_the_group_of_another_users_file_is_kept_or_gets_no_permissions(path, monkeypatch, group, permissions):
    # What the system allows those who are not root: no other owner, and only groups of their own.
    fchown = os.fchown

    def refuse(descriptor, user, group):
        if user != -1 or group != 12345:
            raise PermissionError(1, "Operation not permitted")
        fchown(descriptor, user, group)

    os.chown(path, 65534, group)
    path.chmod(0o664)
    monkeypatch.setattr(os, "fchown", refuse)
    pyda8w4.save(path, NEW)
    assert mode(path) == permissions
    assert (path.stat().st_gid == group) == (group == 12345)


@as_root
def test_what_others_must_not_write_is_refused():
    with tempfile.TemporaryDirectory() as name:  # those of pytest are closed to other users
        folder = Path(name)
        folder.chmod(0o777)
        theirs = folder / "theirs"
        pyda8w4.save(theirs, OLD)
        theirs.chmod(0o644)
        inside = folder / "folder" / "file"
        inside.parent.mkdir(0o755)
        pyda8w4.save(inside, OLD)
        inside.chmod(0o666)
        code = """
import os, sys
from pyda8w4._filesystem import replaced_file
from pathlib import Path
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
for path in map(Path, sys.argv[1:]):
    try:
        with replaced_file(path) as file:
            file.write(b"x")
    except PermissionError as error:
        assert error.filename == str(path)
        print("refused")
with replaced_file(Path(sys.argv[1] + ".mine")) as file:
    file.write(b"x")
"""
        done = child(code, theirs, inside, inside.with_name("new"))
        assert (done.stdout, done.stderr) == ("refused\n" * 3, "")
        assert_holds(theirs, OLD)
        assert_holds(inside, OLD)
        assert {path.name for path in folder.iterdir()} == {"theirs", "theirs.mine", "folder"}
        assert list(inside.parent.iterdir()) == [inside]


# ---- files that are not regular ----------------------------------------------------------------


@pytest.fixture(params=["FIFO", "link to a FIFO", "socket", "device", "folder"])
def special(request, tmp_path):
    path = tmp_path / "special"
    match request.param:
        case "FIFO":
            os.mkfifo(path)
        case "link to a FIFO":
            os.mkfifo(tmp_path / "fifo")
            path.symlink_to("fifo")
        case "socket":
            server = socket.socket(socket.AF_UNIX)
            server.bind(os.path.relpath(path))
            request.addfinalizer(server.close)
        case "device":
            one, other = os.openpty()
            request.addfinalizer(lambda: (os.close(one), os.close(other)))
            path = Path(os.ttyname(other))
        case "folder":
            path.mkdir()
    return path


@pytest.mark.parametrize("function", ["save", "load", "open"])
def test_a_file_that_is_not_regular_is_refused(special, function):
    # In a child: without the check, a FIFO waits for ever.
    code = """
import sys, pyda8w4
path, function = sys.argv[1:]
if function == "open":
    import pyda8w4.checkpoints
    pyda8w4.checkpoints.open(path)
elif function == "save":
    pyda8w4.save(path, {})
else:
    pyda8w4.load(path)
"""
    if function == "open":
        if special.is_dir():
            pytest.skip("folders are checkpoints, too")
        pytest.importorskip("gguf", reason="gguf is not installed")
    kind, where = stat.S_IFMT(special.stat().st_mode), special.lstat().st_ino
    done = child(code, special, function)
    last = done.stderr.splitlines()[-1]
    if special.is_dir():
        hint = " (pyda8w4.checkpoints.open takes those of models)" if function == "load" else ""
        assert last == f"IsADirectoryError: [Errno 21] Is a directory{hint}: '{special}'"
    elif stat.S_ISSOCK(kind) and function != "save":
        assert last == f"OSError: [Errno 6] No such device or address: '{special}'"
    else:
        names = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device"}
        assert last == f"ValueError: path must be of a regular file, got {special}, which is {names[kind]}"
    assert (stat.S_IFMT(special.stat().st_mode), special.lstat().st_ino) == (kind, where)
    assert stat.S_ISCHR(kind) or {path.name for path in special.parent.iterdir()} <= {"special", "fifo"}


@pytest.mark.parametrize("function", [pyda8w4.load, lambda path: pyda8w4.save(path, {})], ids=["load", "save"])
def test_a_path_that_is_none_is_named(function):
    for path in (None, 3, b"file", [], 1.5):
        with pytest.raises(TypeError, match=f"path must be a str or path-like, got {type(path).__name__}"):
            function(path)


@pytest.mark.parametrize("path", ["a\0b", "\ud800", Path("a\0b")], ids=ascii)
def test_a_path_that_no_file_can_have_is_named(path):
    for function in (pyda8w4.load, lambda path: pyda8w4.save(path, {})):
        with pytest.raises(ValueError, match="path must be a name that files can have, got '"):
            function(path)


# ---- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w" * 255, "\N{GREEK SMALL LETTER OMEGA}" * 127, " ", "-", "a\nb", ".hidden", "~"])
def test_every_name_that_a_file_can_have(tmp_path, name, unfinished):
    for weights in (OLD, NEW):
        pyda8w4.save(tmp_path / name, weights)
        assert_holds(tmp_path / name, weights)
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_a_path_as_long_as_paths_can_be(tmp_path, unfinished):
    folder = tmp_path
    while len(str(folder)) < 4095 - 260:
        folder = folder / ("f" * 250)
    folder.mkdir(parents=True)
    folder = folder / ("f" * (4095 - 4 - len(str(folder))))
    folder.mkdir()
    path = folder / "ww"
    assert len(str(path)) == 4095
    for weights in (OLD, NEW):
        pyda8w4.save(path, weights)
        assert_holds(path, weights)


def test_a_name_that_is_too_long_is_an_error_that_has_it(tmp_path, unfinished):
    path = tmp_path / ("w" * 256)
    with pytest.raises(OSError, match="File name too long") as raised:
        pyda8w4.save(path, NEW)
    assert raised.value.filename == str(path)
    assert not list(tmp_path.iterdir())


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for path in ("file", "./file", "folder/../file", Path("folder/file")):
        pyda8w4.save(path, NEW)
        assert_holds(path, NEW)
    assert {path.name for path in tmp_path.rglob("*")} == {"file", "folder"}


# ---- other systems -----------------------------------------------------------------------------


def test_saving_and_mapping_on_windows(tmp_path, windows, monkeypatch):
    monkeypatch.delattr(mmap, "MADV_DONTNEED")
    path = tmp_path / "weights"
    for weights in (OLD, NEW):
        pyda8w4.save(path, weights)
        assert_holds(path, weights)
    _filesystem.release(_filesystem.map_file(path))

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left on device"):
        pyda8w4.save(path, OLD)
    assert_holds(path, NEW)
    assert list(tmp_path.iterdir()) == [path]


def test_what_windows_does_not_say(windows):
    assert last_level_cache_bytes() is None
    assert cold_bytes() > 0


# ---- what is left where it fails ---------------------------------------------------------------


def test_file_and_folder_are_on_the_disk(path, monkeypatch, unfinished):
    done = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor):
        status = os.fstat(descriptor)
        done.append(("folder" if stat.S_ISDIR(status.st_mode) else "file", status.st_ino, status.st_size))
        fsync(descriptor)

    def record_replace(*arguments, **more):
        done.append("replace")
        replace(*arguments, **more)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    pyda8w4.save(path, NEW)
    file, folder = path.stat(), path.parent.stat()
    assert done == [("file", file.st_ino, file.st_size), "replace", ("folder", folder.st_ino, folder.st_size)]


@pytest.mark.parametrize("call", ["fsync", "replace", "fchmod"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_failure_leaves_the_old_file_and_nothing_else(path, monkeypatch, unfinished, call, error):
    def fail(*arguments, **more):
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)) as raised:
        pyda8w4.save(path, NEW)
    if isinstance(error, OSError):
        assert (raised.value.errno, raised.value.filename) == (28, str(path))
    assert_holds(path, OLD)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("exists", [True, False])
def test_no_room_leaves_nothing(tmp_path, exists):
    path = tmp_path / "weights.safetensors"
    if exists:
        pyda8w4.save(path, OLD)
    code = SAVE + "pyda8w4.save(sys.argv[1], {'w': packed})"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    done = child(code, path, preexec_fn=limit)
    assert done.stderr.splitlines()[-1] == f"OSError: [Errno 27] File too large: '{path}'"
    assert list(tmp_path.iterdir()) == [path] * exists
    if exists:
        assert_holds(path, OLD)


def test_a_killed_process_leaves_nothing(path):
    code = SAVE + "os.fsync = lambda descriptor: os.kill(os.getpid(), 9)\npyda8w4.save(sys.argv[1], {'w': packed})"
    assert child(code, path).returncode == -9
    assert_holds(path, OLD)
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_read(tmp_path):
    # Its own fsync needs a descriptor to read it: that of the file must do.
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(0o300)
    pyda8w4.save(folder / "file", NEW)
    assert_holds(folder / "file", NEW)
    folder.chmod(0o700)


def test_missing_folders_are_an_error(tmp_path):
    for path in (tmp_path / "missing" / "file", tmp_path / "file" / "file"):
        (tmp_path / "file").touch()
        with pytest.raises((FileNotFoundError, NotADirectoryError)) as raised:
            pyda8w4.save(path, NEW)
        assert raised.value.filename == str(path)


def test_names_that_take_more_than_a_reader_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(pyda8w4._packed_file, "MOST_HEADER_BYTES", 2000)
    pyda8w4.save(tmp_path / "file", {"w" * 100: pack(Weight(1, 1))})
    assert list(pyda8w4.load(tmp_path / "file")) == ["w" * 100]
    with pytest.raises(ValueError, match="weights must have names for a header of at most 100 MB"):
        pyda8w4.save(tmp_path / "other", {"w" * 1000: pack(Weight(1, 1))})
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
