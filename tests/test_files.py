"""Files that are replaced as a whole, and errors of the file system as sentences."""

import errno
import os
from pathlib import Path

import pytest

from twoviews.errors import BadInput
from twoviews.files import file_error, file_errors, open_atomic, write_atomic


def test_text_and_bytes_replace_what_was_there(tmp_path):
    path = tmp_path / "x.json"
    write_atomic(path, "ä")
    assert path.read_bytes() == "ä".encode()
    write_atomic(path, b"\xff")
    assert path.read_bytes() == b"\xff"
    assert list(tmp_path.iterdir()) == [path]


def test_bytes_of_file_names_that_are_not_utf8_are_written_in_ascii(tmp_path):
    write_atomic(tmp_path / "x", os.fsdecode(b"\xfc"))
    assert (tmp_path / "x").read_bytes() == rb"\udcfc"


def test_permissions_are_those_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "x", "")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_an_error_keeps_the_old_file_and_leaves_no_part(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(RuntimeError), open_atomic(path) as file:
        file.write(b"half")
        assert path.read_text() == "old"
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOSPC, "no space is left on the device of /a/b; free some, or use another."),
        (errno.EROFS, "/a/b cannot be used (read-only file system); use another."),
        (errno.ENAMETOOLONG, "a name in it is too long"),
    ],
)
def test_errors_that_a_user_can_put_right_are_sentences(number, sentence):
    error = OSError(number, os.strerror(number))
    assert sentence in str(file_error(error, "/a/b", "use another"))
    with pytest.raises(BadInput, match="/a/b"), file_errors("/a/b"):
        raise error


def test_other_errors_stay_as_they_are():
    with pytest.raises(BrokenPipeError), file_errors("/a/b"):
        raise BrokenPipeError(errno.EPIPE, "broken")


def test_another_folder_is_no_remedy_for_an_input(tmp_path: Path) -> None:
    remedy = "choose another folder with cache="
    with (
        pytest.raises(BadInput, match="images.npz cannot be used .* make it readable"),
        file_errors(tmp_path / "cache", remedy),
    ):
        (tmp_path / "images.npz").read_bytes()
    (tmp_path / "file").touch()
    with (
        pytest.raises(BadInput, match="choose another folder with cache="),
        file_errors(tmp_path / "file" / "cache", remedy),
    ):
        (tmp_path / "file" / "cache").mkdir()
