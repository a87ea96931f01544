"""Files: what stands at a place stays what it is, kills leave nothing, locks hold between processes."""

import errno
import os
import pathlib
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from rampwrap import files
from rampwrap.errors import InputError, RampwrapError, TableError
from rampwrap.files import cache_folder, check_target, locked, make_folder, replacing


def write(path: str | os.PathLike[str], data: bytes = b"new") -> None:
    with replacing(path) as stream:
        stream.write(data)


class TestReplacing:
    def test_links_are_followed(self, tmp_path: pathlib.Path) -> None:
        """The link stays and its target is new, also where the target is not there yet."""
        (tmp_path / "there").mkdir()
        for name in ("old", "none"):
            link = tmp_path / f"link-{name}"
            link.symlink_to(pathlib.Path("there", name))
        (tmp_path / "there/old").write_bytes(b"old")
        for name in ("old", "none"):
            write(tmp_path / f"link-{name}")
            assert (tmp_path / f"link-{name}").is_symlink()
            assert (tmp_path / "there" / name).read_bytes() == b"new"
        assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["none", "old"]

    def test_a_fifo_is_written_to(self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It stays one, and whoever reads it gets the bytes; without a reader the answer is a sentence."""
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        seen: list[bytes] = []
        reader = threading.Thread(target=lambda: seen.append(fifo.read_bytes()))
        reader.start()
        write(fifo, b"x" * 200_000)
        reader.join(10)
        assert seen == [b"x" * 200_000] and stat.S_ISFIFO(fifo.lstat().st_mode)
        monkeypatch.setattr(files, "_READER_S", 0.1)
        with pytest.raises(TableError, match="nobody reads it"):
            write(fifo)
        assert [path.name for path in tmp_path.iterdir()] == ["fifo"]

    def test_standard_output(self, tmp_path: pathlib.Path) -> None:
        """``/dev/stdout`` is where the process's output goes, in order with the rest of it."""
        code = (
            "import sys; from rampwrap.files import replacing\n"
            "print('a', flush=True)\n"
            "with replacing('/dev/stdout') as stream: stream.write(b'b\\n')\n"
            "print('c', flush=True)"
        )
        with (tmp_path / "said").open("wb") as said:
            subprocess.run([sys.executable, "-c", code], stdout=said, check=True)
        assert (tmp_path / "said").read_text() == "a\nb\nc\n"

    @pytest.mark.parametrize("mask", [0o077, 0o002, 0o022])
    def test_umask(self, tmp_path: pathlib.Path, mask: int) -> None:
        """As of any program that opens a file to write."""
        before = os.umask(mask)
        try:
            write(tmp_path / "t")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "t").stat().st_mode) == 0o666 & ~mask

    def test_folders(self, tmp_path: pathlib.Path) -> None:
        """Refused at once, with a fix that helps."""
        for place in (tmp_path, f"{tmp_path}/none/"):
            with pytest.raises(TableError, match="is a folder; name a file in it"):
                check_target(place)
            with pytest.raises(TableError, match="is a folder"):
                write(place)
        with pytest.raises(TableError, match="choose a folder that exists"):
            check_target(tmp_path / "none" / "t")

    def test_kills_leave_nothing_for_long(self, tmp_path: pathlib.Path) -> None:
        """What a kill in the middle of writing left goes with the next writing; the file is whole throughout."""
        target = tmp_path / "t"
        write(target, b"old")
        for _ in range(3):
            child = os.fork()
            if not child:
                os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
                write(target)
            os.waitpid(child, 0)
            assert target.read_bytes() == b"old"
        assert len(list(tmp_path.iterdir())) > 1
        write(target)
        assert list(tmp_path.iterdir()) == [target] and target.read_bytes() == b"new"

    def test_other_failures_than_a_full_disk(self, tmp_path: pathlib.Path) -> None:
        """Are not answered with the advice to free space."""
        with pytest.raises(TableError, match="Input/output error") as caught, replacing(tmp_path / "t"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        assert "space" not in str(caught.value) and not list(tmp_path.iterdir())


class TestLocked:
    def test_between_processes(self, tmp_path: pathlib.Path) -> None:
        """Another process is kept out, a killed one is not waited for, and nothing stays."""
        code = f"import time; from rampwrap.files import locked\nwith locked({str(tmp_path / 'x')!r}): print(1, flush=True); time.sleep(99)"
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert child.stdout is not None and child.stdout.readline() == b"1\n"
        with pytest.raises(TimeoutError), locked(tmp_path / "x"):
            pass
        child.kill()
        child.communicate()
        with locked(tmp_path / "x", wait_s=5):
            assert [path.name for path in tmp_path.iterdir()] == ["x.lock"]
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
    def test_file_systems_without_locks(
        self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        """A file's presence keeps others out, and is gone afterwards."""
        import fcntl

        def none(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", none)
        monkeypatch.setattr("warnings.warn", lambda *_, **__: None)
        with locked(tmp_path / "x"), pytest.raises(TimeoutError), locked(tmp_path / "x"):
            pass
        assert not list(tmp_path.iterdir())
        write(tmp_path / "t")
        assert [path.name for path in tmp_path.iterdir()] == ["t"]


class TestCache:
    @pytest.fixture(autouse=True)
    def no_home(self, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Iterator[None]:
        def home() -> pathlib.Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(pathlib.Path, "home", staticmethod(home))
        monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
        yield

    def test_without_a_home(self, tmp_path: pathlib.Path) -> None:
        """A folder of the user's own among the temporary files."""
        assert cache_folder() == tmp_path / f"rampwrap-{os.getuid()}" == cache_folder()
        assert stat.S_IMODE(cache_folder().stat().st_mode) == 0o700

    def test_never_somebody_elses(self, tmp_path: pathlib.Path) -> None:
        """What others could write to, or a link that others could have put there, is not loaded from."""
        place = cache_folder()
        for mode in (0o777, 0o720, 0o702):
            place.chmod(mode)
            with pytest.raises(InputError, match="XDG_CACHE_HOME"):
                cache_folder()
        for mode in (0o755, 0o700, 0o500):  # others may read it
            place.chmod(mode)
            assert cache_folder() == place
        place.rmdir()
        place.symlink_to(tmp_path)
        with pytest.raises(InputError, match="XDG_CACHE_HOME"):
            cache_folder()

    def test_given(self, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
        """$XDG_CACHE_HOME comes first."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
        assert cache_folder() == tmp_path / "c" / "rampwrap"

    def test_a_folder_that_cannot_be_made(self) -> None:
        """One sentence with the fix."""
        with pytest.raises(RampwrapError, match=r"/dev/null/x.*\(Not a directory\); give another."):
            make_folder("/dev/null/x", "give another")
