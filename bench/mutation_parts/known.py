"""Faults that once passed every test, each as a change of text: what was found by hand is never lost again."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """`old` stands exactly once in `file`; the fault has `new` in its place."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Known:
    """A fault of one change, or of several at once."""

    name: str
    changes: tuple[Change, ...]


ENGINE, REPORTER = "lsys/train/engine.py", "lsys/observe/reporter.py"


def _one(name: str, file: str, old: str, new: str) -> Known:
    return Known(name, (Change(file, old, new),))


# What once passed every test of training and reporting together.
TOGETHER = (
    _one("the loss's mask ignored", "lsys/model/loss.py", "(held * output.mask).sum(1)", "held.sum(1)"),
    _one(
        "masked tokens counted",
        ENGINE,
        "tokens = batch.loss_mask.sum()",
        "tokens = torch.ones_like(batch.loss_mask).sum()",
    ),
    _one("MFU doubled", REPORTER, "100 * flops / self.peak", "200 * flops / self.peak"),
    _one("tokens/s of all ranks", REPORTER, "interval.tokens_per_second / self.ranks,", "interval.tokens_per_second,"),
    _one(
        "efficiency times ranks",
        REPORTER,
        "self.efficiency.percent(flops / self.ranks)",
        "self.efficiency.percent(flops)",
    ),
    _one("pauses counted in steps", "lsys/observe/meter.py", "self.began += time.perf_counter() - began", "pass"),
    _one("the CPU's peak halved", "lsys/observe/hardware.py", "return 2 * size**3 / best", "return size**3 / best"),
    _one("no clipping", ENGINE, "clip_grad=options.clip,", "clip_grad=0.0,"),
    _one("beta2 is beta1", ENGINE, "adam_beta2=options.beta2,", "adam_beta2=options.beta1,"),
    _one("no weight decay", ENGINE, "end_wd=options.weight_decay,", "end_wd=0.0,"),
    _one("no warm-up", ENGINE, "lr_warmup_steps=options.warmup_steps,", "lr_warmup_steps=0,"),
    _one("the decay twice as long", ENGINE, "lr_decay_steps=steps,", "lr_decay_steps=2 * steps,"),
    _one(
        "no least learning rate",
        ENGINE,
        "min_lr=options.min_lr,\n        weight_decay",
        "min_lr=0.0,\n        weight_decay",
    ),
)

KNOWN: tuple[Known, ...] = (
    *TOGETHER,
    _one(
        "what is not finite is applied",
        ENGINE,
        "applied = self._losses.are_finite and math.isfinite(norm) and not found_inf",
        "applied = True",
    ),
    _one("backward products once", "lsys/predict/work.py", "found[name] += 2 * amount", "found[name] += amount"),
    _one(
        "nothing hides gradients",
        "lsys/predict/seconds.py",
        'max(0.0, found["data"] - hides)',
        'max(0.0, found["data"])',
    ),
    _one(
        "a GPU's MLP keeps less",
        "lsys/mixers/dense.py",
        "self.activation.kept if fused is None else fused",
        "self.activation.kept if fused is None else fused - 1",
    ),
    _one(
        "the gradient of a resumed segment's state",
        "kernels/linear_attention/chunked/blocks.py",
        "fresh = slice(int(self.resumes), None)",
        "fresh = slice(0, None)",
    ),
    _one(
        "the ring sends one token too far",
        "parallel/attention/ring.py",
        "mask.reach(), layout.ranks",
        "mask.reach() and mask.reach() + 1, layout.ranks",
    ),
    _one(
        "gradients summed in bf16",
        "parallel/comm.py",
        "dtype=torch.promote_types(parts.dtype, torch.float32))",
        "dtype=parts.dtype)",
    ),
    _one(
        "residual weights too wide",
        "lsys/model/parameters.py",
        "math.sqrt(2 * model.layers)",
        "math.sqrt(model.layers)",
    ),
    _one("slow nodes pass", "launch/preflight/rules.py", "if rate < SLOW * usual:", "if rate < SLOW / 2 * usual:"),
    Known("thirteen at once", tuple(change for known in TOGETHER for change in known.changes)),
)
