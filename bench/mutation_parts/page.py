"""The results as a page."""

from collections.abc import Sequence
from typing import Any

SAME = "Nothing changes"  # what a reason begins with where a fault is none
# Why a fault may survive, by what it changes: "file: old -> new".
REASONS: dict[str, str] = {
    "kernels/linear_attention/gpu/passes.py: rows * block > STATE // 2 -> (rows * block >= STATE // 2)": (
        f"{SAME} in results: a launch has more warps for one size of state"
    ),
    "kernels/linear_attention/chunked/handover.py: back.written.clear() -> pass": (
        "Memory is let go of a little later, when the graph is; no number changes"
    ),
    "lsys/bench/point.py: sys.argv[1:] if words is None else words -> (words if words is None else sys.argv[1:])": (
        f"{SAME}: no caller gave words; the argument is gone"
    ),
    "lsys/checkpoint/files.py: place + saved.nbytes -> (place)": (
        f"{SAME}: of a file that is cut off torch's reader says so before"
    ),
    "lsys/config/messages.py: field and field.description -> (field)": f"{SAME}: every key has a description",
    "lsys/data/prepare.py: 4 * arguments.workers -> (2 * (4 * arguments.workers))": (
        f"{SAME} in what is made: how many pieces wait for a worker"
    ),
    "lsys/mixers/card.py: super().__init_subclass__() -> pass": f"{SAME}: object's does nothing",
    'parallel/attention/__init__.py: raise ValueError(f"q, k and v must share dtype and device; got {found}") -> pass': (
        f"{SAME} in what is told: the kernels refuse it in the same words"
    ),
    "lsys/checkpoint/optimizer.py: 0.0 -> 1.0": f"{SAME}: the step of the checkpoint takes its place",
    "lsys/data/stream.py: 1.0 -> 2.0": f"{SAME}: the search for a key begins with one token more",
    "lsys/train/observers.py: self._step.close() -> pass": "Of a step that fails, whose record nobody reads",
    "lsys/runtime/lock.py: self.quiet / 10 -> (2 * (self.quiet / 10))": (
        "How often a lock is looked at while it is watched; the least of this and a second"
    ),
    "parallel/comm.py: dist.reduce_scatter_tensor(out, padded, group=self.group, async_op=True) -> "
    "(dist.reduce_scatter_tensor(out, padded, async_op=True))": "Only GPUs come here; on CPU sums are made otherwise",
    "lsys/checkpoint/replicas.py: 2 -> 3": f"{SAME}: more odd numbers are made than are taken",
    "lsys/checkpoint/files.py: self._hash_to(0) -> pass": f"{SAME}: the thread has ended before the digest is read",
    "lsys/data/entropy.py: self._size >= self.block -> (self._size > self.block)": f"{SAME}: pairs are counted one document later",
    "lsys/model/loss.py: reduce_from_tensor_model_parallel_region(picked * here, group=tp_group) -> "
    "(reduce_from_tensor_model_parallel_region(picked * here))": f"{SAME}: Megatron's own group of tensor ranks is the same",
    "lsys/observe/waterfall_split.py: self._blocked.clear() -> pass": f"{SAME}: the list was made anew afterwards; the line is gone",
    "lsys/train/run.py: install_megatron() -> pass": f"{SAME}: the import that follows does it",
    "lsys/bench/point.py: run.data -> run.tensor": "Only slow tests run a point of a sweep",
    "lsys/bench/lab.py: [] if node is None else [str(node)] -> ([str(node)] if node is None else [])": (
        "Only slow tests run the lab, where namespaces of networks can be made"
    ),
    "parallel/ledger/__init__.py: end.synchronize() -> pass": "Only GPUs come there",
    "gradients summed in bf16: dtype=torch.promote_types(parts.dtype, torch.float32)) -> dtype=parts.dtype)": (
        f"{SAME} on CPU: torch sums bf16 in fp32 and rounds once either way"
    ),
    "the gradient of a resumed segment's state: fresh = slice(int(self.resumes), None) -> fresh = slice(0, None)": (
        f"{SAME}: the block in which the segment begins comes later, and writes the gradient that counts"
    ),
}


def page(runs: Sequence[tuple[dict[str, Any], Sequence[Any]]]) -> str:
    """Markdown: of each run how many faults of each package the tests caught, and every one that survived, with the reason.

    Args:
        runs: about (seed, count, commit, machine, minutes), and the verdicts of all faults in the order of judging.
    """
    lines = ["# Do the tests notice faults?"]
    known = [verdict for _, verdicts in runs for verdict in verdicts if verdict.group == "known"]
    if known:
        told = f"Of faults that once passed every test, single and many at once, {_caught(known)} of {len(known)} were caught."
        lines += ["", told, *_survivors(known)]
    for about, verdicts in runs:
        drawn = [verdict for verdict in verdicts if verdict.group != "known"]
        lines += ["", *_drawn(about, drawn)] if drawn else []
    return "\n".join(lines) + "\n"


def _drawn(about: dict[str, Any], verdicts: Sequence[Any]) -> list[str]:
    counted = [verdict for verdict in verdicts if verdict.outcome != "no fault"]
    same = [each for each in counted if each.outcome == "survived" and _reason(each).startswith(SAME)]
    rest = len(counted) - len(same)
    shares = f"{_caught(counted)} of {len(counted)}, {100 * _caught(counted) / max(1, len(counted)):.1f}%"
    again = f", what no test had caught again on {', '.join(about['again'])}" if about.get("again") else ""
    is_whole = all(each.outcome != "open" for each in counted)
    who = "What `make test-fast` runs" if is_whole else "The tests nearest to each, a minute or two of them,"
    rows = ["| package | caught | of |", "| --- | ---: | ---: |"]
    for group in sorted({verdict.group for verdict in counted}):
        these = [verdict for verdict in counted if verdict.group == group]
        rows.append(f"| {group} | {_caught(these)} | {len(these)} |")
    return [
        f"## Drawn with seed {about['seed']}",
        "",
        f"`python bench/mutations.py --seed {about['seed']} --count {about['count']}`; {about['machine']}; commit {about['commit']}{again}; "
        f"{about['minutes']:.0f} minutes.",
        "",
        f"{who} caught {shares}; without the {len(same)} that change nothing, {_caught(counted)} of {rest}, "
        f"{100 * _caught(counted) / max(1, rest):.1f}%. {len(verdicts) - len(counted)} more were drawn that do not import or stop the "
        "quickstart's first step.",
        "",
        *rows,
        *_survivors(counted),
    ]


def _caught(verdicts: Sequence[Any]) -> int:
    return sum(verdict.outcome == "caught" for verdict in verdicts)


def _survivors(verdicts: Sequence[Any]) -> list[str]:
    """Those that no test caught, and those that only the nearest tests have judged."""
    survived = [_survivor(verdict) for verdict in verdicts if verdict.outcome == "survived"]
    unjudged = [_survivor(verdict) for verdict in verdicts if verdict.outcome == "open"]
    lines = ["", "Survivors:", "", *survived] if survived else []
    return lines + (
        ["", "The nearest tests passed with these, all others have not judged them yet:", "", *unjudged]
        if unjudged
        else []
    )


def _survivor(verdict: Any) -> str:
    became = f"- {verdict.name}: `{' '.join(verdict.old.split())}` became `{' '.join(verdict.new.split())}`"
    return f"{became}. {_reason(verdict)}." if verdict.outcome == "survived" else became


def _reason(verdict: Any) -> str:
    file = verdict.name.partition(":")[0]
    return REASONS.get(f"{file}: {verdict.old} -> {verdict.new}", "no reason known: a test is missing")
