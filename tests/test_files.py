"""Files and directories appear whole or not at all; a quoted error is one line."""

import pytest

from moe_compress.errors import UserError, first_line
from moe_compress.files import directory_in_progress, file_in_progress, put_between


def test_a_file_appears_when_its_block_ends(tmp_path):
    path = tmp_path / "file"
    with file_in_progress(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_fails_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ValueError), file_in_progress(path) as temporary:
        temporary.write_text("half")
        raise ValueError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_appears_whole_and_is_never_overwritten(tmp_path):
    path = tmp_path / "directory"
    with pytest.raises(ValueError), directory_in_progress(path) as temporary:
        (temporary / "half").touch()
        raise ValueError
    assert not path.exists()
    with directory_in_progress(path, keep=True) as temporary:
        assert (temporary / "half").exists()
    with pytest.raises(FileExistsError), directory_in_progress(path):
        pass


def test_what_stands_between_two_marks_is_replaced(tmp_path):
    path = tmp_path / "document"
    path.write_text("before <a> old </a> after")
    put_between(path, "<a>", "</a>", "\nnew\n\n")
    put_between(path, "<a>", "</a>", "newer")
    assert path.read_text() == "before <a>\n\nnewer\n\n</a> after"
    with pytest.raises(UserError, match="put <b> and </b>"):
        put_between(path, "<b>", "</b>", "lost")
    assert path.read_text() == "before <a>\n\nnewer\n\n</a> after"


def test_the_first_line_of_an_error_or_its_type():
    assert first_line(ValueError("\nwhat\nmore")) == "what"
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"
