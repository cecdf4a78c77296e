"""The split of the standard library: by path alone, disjoint, and without test suites."""

from moe_compress.reference.data import SPLITS, split_of, stdlib_documents, stdlib_files


def make_library(root, names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")


def test_every_file_is_in_exactly_one_split(tmp_path):
    names = [f"package{i % 7}/module{i}.py" for i in range(400)]
    make_library(tmp_path, names)
    found = [file.relative_to(tmp_path).as_posix() for split in SPLITS for file in stdlib_files(split, tmp_path)]
    assert sorted(found) == sorted(names)
    shares = [len(stdlib_files(split, tmp_path)) / len(names) for split in SPLITS]
    assert 0.84 < shares[0] < 0.96 and all(0.01 < share < 0.1 for share in shares[1:])


def test_the_split_does_not_depend_on_other_files(tmp_path):
    make_library(tmp_path, ["a.py", "b.py"])
    assert [split for split in SPLITS if tmp_path / "a.py" in stdlib_files(split, tmp_path)] == [split_of("a.py")]


def test_test_suites_and_installed_packages_are_left_out(tmp_path):
    make_library(tmp_path, ["test/test_os.py", "json/tests/test_x.py", "site-packages/torch.py", "os.py"])
    files = [file for split in SPLITS for file in stdlib_files(split, tmp_path)]
    assert files == [tmp_path / "os.py"]


def test_files_that_are_not_utf8_are_passed_over(tmp_path):
    (tmp_path / "latin.py").write_bytes(b"# \xe9\xe9\n")
    assert not [text for split in SPLITS for text in stdlib_documents(split, tmp_path)]


def test_the_running_library_has_text_in_every_split():
    for split in SPLITS:
        assert sum(map(len, stdlib_documents(split))) > 100_000
