"""The sample of slow cases: some of every test, the same for a seed, all of them over many."""

from pathlib import Path

from support.sampling import commit, left_out

NAMES = [f"test_many[{i}]" for i in range(20)] + ["test_two[a]", "test_two[b]", "test_one"]


def kept(seed: str) -> set[str]:
    return set(NAMES) - left_out(NAMES, seed)


def test_a_part_of_each_test_and_one_at_least():
    counts = {test: sum(name.startswith(test) for name in kept("x")) for test in ("test_many", "test_two", "test_one")}
    assert counts == {"test_many": 4, "test_two": 1, "test_one": 1}


def test_a_seed_draws_the_same_and_many_seeds_draw_all():
    assert kept("x") == kept("x") != kept("y")
    assert set.union(*(kept(str(seed)) for seed in range(50))) == set(NAMES)


def test_without_git_the_seed_is_fixed(tmp_path: Path):
    assert commit(tmp_path) == "0"
