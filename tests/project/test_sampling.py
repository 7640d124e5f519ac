"""The sample of slow cases: over consecutive commits each case once, however commits can be counted."""

import subprocess
from collections import Counter
from pathlib import Path

import pytest
from support.sampling import ONE_IN, commits, left_out

NAMES = [f"test_many[{i}]" for i in range(20)] + ["test_two[a]", "test_two[b]", *(f"test_one{i}" for i in range(60))]


def kept(part: int, names: list[str] = NAMES) -> set[str]:
    return set(names) - left_out(names, part)


@pytest.mark.parametrize("first", [0, 1, 1000])
def test_over_as_many_commits_as_there_are_parts_each_case_is_taken_once(first: int) -> None:
    taken = Counter(name for part in range(first, first + ONE_IN) for name in kept(part))
    assert taken == dict.fromkeys(NAMES, 1)


def test_a_part_has_as_many_of_each_test_as_any_other() -> None:
    for part in range(ONE_IN):
        assert sum(name.startswith("test_many") for name in kept(part)) in (20 // ONE_IN, 20 // ONE_IN + 1)
        assert 2 < sum(name.startswith("test_one") for name in kept(part)) < 20  # single cases are spread, too


def test_cases_of_other_tests_and_their_order_change_nothing() -> None:
    more = [*reversed(NAMES), "test_new[a]", "test_new[b]"]
    assert all(kept(part, more) & {*NAMES} == kept(part) for part in range(ONE_IN))


def git(folder: Path, *arguments: str) -> None:
    own = [
        "-c",
        "user.name=x",
        "-c",
        "user.email=x@x",
        "-c",
        "commit.gpgsign=false",
        "-c",
        "protocol.file.allow=always",
    ]
    subprocess.run(["git", *own, *arguments], cwd=folder, check=True, capture_output=True)


def commit(folder: Path, name: str) -> None:
    git(folder, "commit", "--allow-empty", "-m", name)


def test_a_commit_and_a_merge_are_one_each(tmp_path: Path) -> None:
    assert commits(tmp_path) == 0  # without git
    git(tmp_path, "init", "-b", "main")
    assert commits(tmp_path) == 0  # without a commit
    for number in range(1, 4):
        commit(tmp_path, str(number))
        assert commits(tmp_path) == number
    git(tmp_path, "checkout", "-b", "side", "HEAD~1")
    for name in "abc":
        commit(tmp_path, name)
    git(tmp_path, "checkout", "main")
    git(tmp_path, "merge", "--no-ff", "side", "-m", "merge")
    assert commits(tmp_path) == 4


def test_a_shallow_clone_goes_by_the_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, shallow = tmp_path / "whole", tmp_path / "shallow"
    whole.mkdir()
    git(whole, "init", "-b", "main")
    for day in (20000, 20001):
        monkeypatch.setenv("GIT_COMMITTER_DATE", f"{day * 24 * 3600 + 5} +0000")
        commit(whole, str(day))
    git(tmp_path, "clone", "--depth", "1", whole.as_uri(), str(shallow))
    assert commits(whole) == 2 and commits(shallow) == 20001


def test_without_the_program_git_the_part_is_fixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commits(Path(__file__).parent) == 0
