"""What `bench/faults.py` makes of what its sections find: the file, the page, the exit code, and what is not good printed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import faults
    from bench.fault_parts.cases import drawn, outcome

    def section(seed: int, count: int, folder: Path) -> dict[str, Any]:
        assert folder.is_dir()
        numbers = [drawn(seed, "made-up").randrange(9) for _ in range(count)]
        cases: list[dict[str, Any]] = [{"number": number, "good": True} for number in numbers]
        return outcome([*cases[1:], {"number": 7, "good": count != 3, "text": "it\nbroke"}], "seen")

    monkeypatch.setattr(faults, "SECTIONS", {name: (section, 2, f"fault {name}") for name in ("one", "two")})
    return faults


def run(faults: Any, monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> int:
    monkeypatch.setattr(faults.signal, "signal", lambda *_: None)
    places = ["--out", str(folder / "out.json"), "--page", str(folder / "page.md")]
    monkeypatch.setattr(sys, "argv", ["faults.py", *places, *words])
    return faults.main()


def test_sections_are_kept_and_what_is_not_good_is_printed(
    faults: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(faults, monkeypatch, tmp_path, "--section", "two", "--count", "two=3", "--seed", "5") == 1
    assert "fault two: 2 of 3 seen\nNOT GOOD: {'number': 7, " in capsys.readouterr().out
    assert run(faults, monkeypatch, tmp_path, "--section", "one") == 0  # of the one that ran now
    found = json.loads((tmp_path / "out.json").read_text())
    assert [(found[name]["good"], found[name]["of"], found[name]["seed"]) for name in ("one", "two")] == [
        (2, 2, 1),
        (2, 3, 5),
    ]
    page = (tmp_path / "page.md").read_text()
    assert "| fault one | 2 | 2 | seen | 1 | 0.0 | " in page and "| fault two | 2 | 3 | seen | 5 | 0.0 | " in page
    assert "Not good of fault two:\n- number 7: it broke\n" in page and "Not good of fault one" not in page


@pytest.mark.parametrize("word", ["one", "one=", "one=0", "one=x", "three=4"])
def test_a_count_that_is_none_is_refused(
    faults: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(faults, monkeypatch, tmp_path, "--count", word)
    assert (
        ended.value.code == 2
        and f"--count {word}: SECTION=N is wanted, a section of one, two" in capsys.readouterr().err
    )
