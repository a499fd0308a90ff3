"""One writer a shard: a lock of the kernel, which dies with the process that holds it.

Locks are `flock` on small files in `.locks` of the output directory; pid and host stand inside for
people. They order work and do not guard data: a shard is written under a name of its own and
renamed, so that even two writers make the same whole file. Hence a file system without locks costs
double work at worst. Linux passes flock on NFS to the server, so hosts that share a mount see each
other's locks, unless it is mounted with `nolock` or `local_lock=flock|all`: then only processes of
one host do.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import warnings
from contextlib import suppress
from pathlib import Path

from llm2vec_fast.corpus.place import is_remote

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

DIRECTORY = ".locks"
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
BUSY = {errno.EAGAIN, errno.EACCES}


class LockError(ValueError):
    """A shard that another living process is writing."""


class Locks:
    """The locks that this run holds; leaving the context gives all of them back.

    raises: LockError naming the holder
    """

    def __init__(self, output: Path):
        self.directory = output / DIRECTORY
        self.held: dict[str, int] = {}
        self.mutex = threading.Lock()  # one thread takes, another gives back
        self.closed = False

    def __enter__(self) -> Locks:
        return self

    def __exit__(self, *exc_info) -> None:
        with self.mutex:
            self.closed = True  # a reading thread that hangs may come back later
        for name in list(self.held):
            self.give_back(name)
        if is_remote(self.directory):
            return
        try:
            self.directory.rmdir()
        except OSError:
            pass  # others still hold locks there

    def take(self, name: str) -> None:
        """Locks a shard until `give_back`."""
        if fcntl is None or is_remote(self.directory):
            return
        path = self.directory / f"{name}.lock"
        while True:
            handle = self._open(path)
            try:
                locked = self._lock(handle, path)
                # A holder removes its file before it lets go. Who waited for that one has a lock
                # on a file that is nowhere any more.
                stale = locked and not _same_file(handle, path)
            except BaseException:
                os.close(handle)
                raise
            if not stale:
                break
            os.close(handle)
        if locked:
            with suppress(OSError):  # a full disk: the lock holds without a name in it
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)
        with self.mutex:
            if self.closed:
                os.close(handle)
                raise LockError("the run that wanted this lock is over")
            self.held[name] = handle

    def give_back(self, name: str) -> None:
        """Lets go of a shard; of one that is not held, nothing happens."""
        with self.mutex:
            handle = self.held.pop(name, None)
        if handle is not None:
            (self.directory / f"{name}.lock").unlink(missing_ok=True)
            os.close(handle)

    def _open(self, path: Path) -> int:
        while True:
            try:
                return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # not yet there, or cleared by a run that has just ended
                self.directory.mkdir(parents=True, exist_ok=True)

    def _lock(self, handle: int, path: Path) -> bool:
        """False where the file system knows no locks."""
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in BUSY:
                holder = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
                raise LockError(
                    f"{path.name.removesuffix('.lock')} in {path.parent.parent} is being written "
                    f"by {holder}. Wait for it or stop it; to share one output among processes, "
                    "start them with torchrun."
                ) from error
            if error.errno not in UNSUPPORTED:
                raise
            warnings.warn(
                f"{path.parent.parent} is on a file system without locks: do not run two jobs "
                "there at once, they would do the same work twice",
                stacklevel=2,
            )
            return False
        return True


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
