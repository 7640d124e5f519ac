"""What can be wrong, each a pure function of the nodes' reports: the host at fault, value, rule and remedy."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from lsys.launch.preflight.finding import Finding, everyone, odd, size
from lsys.launch.preflight.report import Report

CLOCK_SECONDS = 2.0  # torchrun gives up a node whose heartbeat is 15 s old by the reader's clock
SHM_BYTES = 1 << 26  # what containers have by default is just that
SHM_BYTES_PER_GPU = 1 << 27  # NCCL's buffers between the GPUs of a node
SLOW = 0.5  # of the other nodes' rate


def _launch(reports: Sequence[Report], names: Sequence[str]) -> Iterator[Finding]:
    for what in ("nodes", "ranks"):
        values = [getattr(report, what) for report in reports]
        yield from odd(names, values, what, f"give every node the same --{what}")
    numbers = Counter(report.index for report in reports if report.index >= 0)
    for number, count in numbers.items():
        if count > 1:
            twins = tuple(name for name, report in zip(names, reports, strict=True) if report.index == number)
            remedy = "start each node once, with its own number"
            yield Finding(twins, f"{count} nodes call themselves node {number}", remedy)


def _configuration(reports: Sequence[Report], names: Sequence[str]) -> Iterator[Finding]:
    refused: dict[str, list[str]] = {}
    for name, report in zip(names, reports, strict=True):
        for mistake in report.mistakes:
            refused.setdefault(mistake, []).append(name)
    for mistake, hosts in refused.items():
        problem, _, remedy = mistake.partition("; ")
        yield Finding(everyone(hosts, names), problem, remedy or "docs/configuration.md has all keys")
    read = {name: report.config for name, report in zip(names, reports, strict=True) if report.config}
    remedy = "every node must read the same configuration: copy the file, and give each the same options"
    for key in sorted({key for config in read.values() for key in config}):
        values = [config.get(key) for config in read.values()]
        yield from odd([*read], values, f"{key} is", remedy, repr)


def _files(reports: Sequence[Report], names: Sequence[str]) -> Iterator[Finding]:
    for path in sorted({path for report in reports for path in report.files}):
        sizes = {name: r.files[path] for name, r in zip(names, reports, strict=True) if path in r.files}
        absent = [name for name, size in sizes.items() if size < 0]
        if absent:
            remedy = "copy it there, or mount the storage that has it"
            yield Finding(everyone(absent, names), f"{path} not found", remedy)
        there = {name: f"{size:,} bytes" for name, size in sizes.items() if size >= 0}
        yield from odd([*there], [*there.values()], f"{path} has", "copy it anew")


def _versions(reports: Sequence[Report], names: Sequence[str]) -> Iterator[Finding]:
    for package in sorted({package for report in reports for package in report.versions}):
        values = [report.versions.get(package, "none") for report in reports]
        yield from odd(names, values, package, "install the same on every node")
    if len({report.versions.get("lsys") for report in reports}) == 1:
        code = [report.code for report in reports]
        yield from odd(names, code, "lsys's source has the digest", "update the checkout")
    drivers = [report.driver or "none" for report in reports]
    yield from odd(names, drivers, "GPU driver", "install the same on every node")


def _gpus(reports: Sequence[Report], names: Sequence[str]) -> Iterator[Finding]:
    counted = [", ".join(f"{n} x {gpu}" for gpu, n in Counter(report.gpus).items()) or "none" for report in reports]
    yield from odd(names, counted, "GPUs:", "take the node out, or look for a GPU that is lost: nvidia-smi -L")
    for name, report in zip(names, reports, strict=True):
        count = len(report.gpus)
        if 0 < count < report.ranks:
            yield Finding(
                (name,), f"{count} GPUs for {report.ranks} ranks; each rank needs its own", f"--ranks {count}"
            )


def _limits(reports: Sequence[Report], names: Sequence[str]) -> Iterator[Finding]:
    for name, report in zip(names, reports, strict=True):
        shm = SHM_BYTES + SHM_BYTES_PER_GPU * min(len(report.gpus), report.ranks)
        if report.shm < shm * 0.98:  # a file system's own blocks
            problem = f"/dev/shm has {size(report.shm)} free; {report.ranks} ranks need {size(shm)}"
            yield Finding((name,), problem, "start the container with a larger --shm-size, or remount it")
        files = 512 + 16 * report.nodes * report.ranks
        if 0 <= report.descriptors < files:
            problem = f"{report.descriptors} open files are allowed; {report.nodes * report.ranks} ranks need {files}"
            yield Finding((name,), problem, f"raise the limit: ulimit -n {files}")


def _folder(reports: Sequence[Report], names: Sequence[str]) -> Iterator[Finding]:
    for name, report in zip(names, reports, strict=True):
        if not report.folder or not report.reach and len(reports) > 1:  # it left before it looked
            continue
        if report.error:
            yield Finding(
                (name,), f"train.folder {report.folder}: {report.error}", "make it, or let this user write there"
            )
        elif not report.marker:
            problem = f"train.folder {report.folder} is not the storage that {names[0]} sees there"
            yield Finding(
                (name,), problem, "mount the same storage on every node: checkpoints are written by all of them"
            )
    here = reports[0] if reports else None
    if here and here.folder and not here.error:
        keep = here.config.get("checkpoint.keep", 1)
        needed = here.checkpoint * max(1, keep + 1 - here.kept)  # the oldest goes when the newest is whole
        if here.free < needed:
            problem = f"{size(here.free)} free in train.folder {here.folder}; its checkpoints take {size(needed)} more"
            yield Finding((names[0],), problem, "make room, lower checkpoint.keep, or take another train.folder")


def _clocks(reports: Sequence[Report], names: Sequence[str]) -> Iterator[Finding]:
    """Against the median clock: the host's own may be the wrong one."""
    usual = statistics.median_low([report.offset for report in reports]) if reports else 0.0
    if len(reports) == 2:
        usual = reports[0].offset
    for name, report in zip(names, reports, strict=True):
        off = report.offset - usual
        if abs(off) - report.uncertainty > CLOCK_SECONDS:
            way = "ahead of" if off > 0 else "behind"
            problem = f"its clock is {abs(off):.1f} s {way} the others; at most {CLOCK_SECONDS:.0f} s do"
            yield Finding((name,), problem, "synchronise it: chronyc makestep, or timedatectl set-ntp true")


def _network(reports: Sequence[Report], names: Sequence[str]) -> Iterator[Finding]:
    """Nodes that are cut off from several others; then pairs that do not reach each other."""
    failed = {
        (sender, int(receiver)): str(why)
        for sender, report in enumerate(reports)
        for receiver, why in report.reach.items()
        if isinstance(why, str)
    }
    while failed:
        often = Counter(node for pair in {tuple(sorted(pair)) for pair in failed} for node in pair)
        worst, count = often.most_common(1)[0]
        if count > 1:
            pairs = [pair for pair in failed if worst in pair]
            others = sorted({node for pair in pairs for node in pair} - {worst})
            whom = "any other node" if len(others) == len(reports) - 1 else ", ".join(names[other] for other in others)
            ways = {"from" if pair[1] == worst else "to" for pair in pairs}
            way = "to and from" if len(ways) == 2 else ways.pop()
            remedy = f"look at its interface {reports[worst].interface}, routes and firewall"
            yield Finding((names[worst],), f"no connection {way} {whom}: {failed[pairs[0]]}", remedy)
        else:
            pairs = [pair for pair in failed if worst in pair]
            for sender, receiver in pairs:
                back = "; the other way works" if (receiver, sender) not in failed else ""
                problem = (
                    f"does not reach {names[receiver]} ({reports[receiver].address}): {failed[sender, receiver]}{back}"
                )
                remedy = "look at the routes and firewalls of both; the job needs all ports between its nodes"
                yield Finding((names[sender],), problem, remedy)
        failed = {pair: why for pair, why in failed.items() if pair not in pairs}


def _rates(reports: Sequence[Report], names: Sequence[str]) -> Iterator[Finding]:
    """Nodes that send much slower than the others do, to whomever."""
    for report, name in zip(reports, names, strict=True):
        for receiver, why in report.rates.items():
            if isinstance(why, str):
                yield Finding((name,), f"could not send to {names[int(receiver)]}: {why}", "look at both nodes' links")
    best = {
        name: rate for name, report in zip(names, reports, strict=True) if (rate := max(speeds(report), default=0.0))
    }
    for name, rate in best.items():
        usual = statistics.median(other for whose, other in best.items() if whose != name) if len(best) > 1 else rate
        if rate < SLOW * usual:
            problem = f"sends at {rate / 1e6:,.0f} MB/s at best, the other nodes at {usual / 1e6:,.0f}"
            yield Finding((name,), problem, "look at its link, cable and interface", warning=True)


def speeds(report: Report) -> list[float]:
    return [rate for rate in report.rates.values() if isinstance(rate, float)]


RULES: tuple[Callable[[Sequence[Report], Sequence[str]], Iterable[Finding]], ...] = (
    _launch, _configuration, _files, _versions, _gpus, _limits, _folder, _clocks, _network, _rates
)  # fmt: skip
