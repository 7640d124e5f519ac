"""The passes of Triton linear attention over spans: which kernel, with which tiles, over which tensors. No autograd."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsys.kernels.linear_attention.gpu import channel, scalar
from lsys.kernels.linear_attention.gpu.scan import Scan, scan_spans
from lsys.kernels.linear_attention.gpu.spans import Division, Spans
from lsys.kernels.linear_attention.gpu.tiles import grouped_sum
from lsys.kernels.linear_attention.transition import carry

CHUNK = 64  # tokens; of fp32, half of them, and of a state, for shared memory
CHANNEL_CHUNK = 16  # of a decay per channel, inside whose chunks work grows with the logarithm of the size
STATE = 16384  # elements of a state that a program holds: 64 registers a thread of 8 warps


class Logs(NamedTuple):
    """What the gradient of the log-decay takes and makes; see `scalar_pass_kernel`. Sums over blocks of columns are left."""

    inner: Tensor
    dg: Tensor
    edge: Tensor
    own: Tensor


class Gradients(NamedTuple):
    q: Tensor | None
    k: Tensor
    v: Tensor
    g: Tensor | None


def log_decays(log_decay: Tensor | None, v: Tensor) -> Tensor | None:
    """[H], [T, H] or [T, H, K] -> [T, H] or [T, H, K] in fp32; a view of [H]."""
    if log_decay is None:
        return None
    return log_decay.float().expand(v.shape[:2]) if log_decay.dim() == 1 else log_decay.float().contiguous()


class Passes:
    """Over packed tokens q, k [T, H_k, K], v [T, H, V], g None, [T, H] or [T, H, K], in the spans of a division."""

    def __init__(self, division: Division, scale: float, decay_gradient: bool) -> None:
        self.division, self.scale, self.decay_gradient = division, scale, decay_gradient

    def states(self, k: Tensor, v: Tensor, g: Tensor | None, begin: Tensor | None = None) -> Scan:
        """The states before the scanned spans, of segments that begin with `begin` [s, H, K, V] or zero."""
        update = torch.empty(self._states(k, v), dtype=torch.float32, device=v.device)
        transition = None if g is None else g.new_empty(len(update), *g.shape[1:])
        self._outer(k, v, g, update, transition, reverse=False)
        return scan_spans(update, transition, self.division.plan.counts, begin=begin)

    def local(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, before: Tensor) -> Tensor:
        """The output [T, H, V] from the states before the scanned spans [m, H, K, V]."""
        return self._recur("keys", self.division.every, q, k, v, g, before, torch.empty_like(v))

    def add_external(self, q: Tensor, g: Tensor | None, start: Tensor, intra: Tensor) -> Tensor:
        """`intra` [T, H, V] plus what states before the spans of segments with external state [ml, H, K, V] add to the output."""
        external = self.division.external
        o = torch.empty_like(intra) if external.whole else intra.clone()
        return self._recur("keys", external, q, None, intra, g, start, o, add=intra)

    def state_gradients(self, q: Tensor, do: Tensor, g: Tensor | None, scan: Scan, d_end: Tensor | None) -> Scan:
        """The gradients of the states after the scanned spans, given that of the states after their segments."""
        d_before = torch.empty(self._states(q, do), dtype=torch.float32, device=q.device)
        self._outer(q, do, g, d_before, None, reverse=True)
        counts, edge = self.division.plan.counts, self.decay_gradient
        return scan_spans(d_before, scan.transition, counts, begin=d_end, forward=scan, reverse=True, edge=edge)

    def carried_gradients(self, scan: Scan, d_end: Tensor | None, d_total: Tensor | None) -> Scan:
        """Gradients of the states after the spans of segments with external state, given those of states [L, H, K, V] and log-decays [L, H ...] of segments."""
        rows, counts = self.division.external_rows, self.division.external_plan.counts
        end = self.of_external(scan.end)
        if rows is not None:
            transition = None if scan.transition is None else scan.transition.index_select(0, rows)
            scan = scan._replace(each=scan.each.index_select(0, rows), transition=transition)
        scan, d_end = scan._replace(end=end), torch.zeros_like(end) if d_end is None else d_end.contiguous()
        edge = self.decay_gradient
        after = scan_spans(None, scan.transition, counts, begin=d_end, forward=scan, reverse=True, edge=edge)
        if after.edge is not None and d_total is not None:  # every log-decay of a segment is in the sum
            after = after._replace(edge=after.edge + d_total.index_select(0, self.division.entry))
        return after

    def gradients(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, before: Tensor, after: Scan, do: Tensor
    ) -> Gradients:
        """From the output's gradient, of all tokens.

        `before` [m, H, K, V] are the states before the spans, `after` the gradients of those after them.
        """
        spans, heads = self.division.every, v.shape[1]
        logs = _logs(spans, g, q, v, after.edge)
        dq = self._recur("values", spans, do, v, k, g, before, _of_heads(k, heads, spans), logs=logs)
        logs = None if logs is None else logs._replace(own=k)
        dk = self._recur("values", spans, v, do, q, g, after.each, _of_heads(k, heads, spans), reverse=True, logs=logs)
        dv = self._recur("keys", spans, k, q, do, g, after.each, _of_heads(v, heads, spans), reverse=True)
        return Gradients(grouped_sum(dq, q), grouped_sum(dk, k), dv, _sum_blocks(logs, g))

    def carried(self, k: Tensor, v: Tensor, g: Tensor | None, after: Scan) -> Gradients:
        """From the gradients of the states after the spans of segments with external state alone, zero for all other tokens."""
        spans, heads = self.division.external, v.shape[1]
        logs = _logs(spans, g, k, v, after.edge)
        dk = self._recur(
            "values", spans, v, None, k, g, after.each, _of_heads(k, heads, spans), reverse=True, logs=logs
        )
        dv = self._recur("keys", spans, k, None, v, g, after.each, _of_heads(v, heads, spans), reverse=True)
        return Gradients(None, grouped_sum(dk, k), dv, _sum_blocks(logs, g))

    def of_external(self, x: Tensor) -> Tensor:
        """Rows of segments with external state among those of scanned ones: [s, ...] -> [L, ...]."""
        at = self.division.external_segments
        return x.detach() if at is None else x.index_select(0, at)

    def among_scanned(self, x: Tensor) -> Tensor:
        """The reverse, zero elsewhere."""
        at = self.division.external_segments
        if at is None:
            return x.contiguous()
        return x.new_zeros(len(self.division.plan.counts), *x.shape[1:]).index_copy(0, at, x)

    def at_spans(self, scan: Scan, state: Tensor) -> Tensor:
        """What is left of the states before segments with external state [L, H, K, V] at each of their spans: [ml, H, K, V]."""
        rows, state = self.division.external_rows, state.index_select(0, self.division.entry)
        if scan.cumulative is None:
            return state
        return carry(scan.cumulative if rows is None else scan.cumulative.index_select(0, rows), state)

    def with_external(self, scan: Scan, start: Tensor | None) -> Scan:
        """The states before spans, with what is left of external ones."""
        if start is None:
            return scan
        rows = self.division.external_rows
        return scan._replace(each=scan.each + start if rows is None else scan.each.index_add(0, rows, start))

    def _states(self, k: Tensor, v: Tensor) -> tuple[int, ...]:
        return len(self.division.scanned), v.shape[1], k.shape[2], v.shape[2]

    def _outer(
        self, x: Tensor, z: Tensor, g: Tensor | None, out: Tensor, total: Tensor | None, *, reverse: bool
    ) -> None:
        heads = z.shape[1]
        options = dict(tiles(x, z), X_GROUP=heads // x.shape[1], REVERSE=reverse)
        self._launch("outer", self.division.scanned, (x, z, g, out, total), g, heads, **options)

    def _recur(
        self, across: str, spans: Spans, x: Tensor, y: Tensor | None, z: Tensor, g: Tensor | None, states: Tensor, out: Tensor,
        *, reverse: bool = False, add: Tensor | None = None, logs: Logs | None = None,
    ) -> Tensor:  # fmt: skip
        """`scalar_pass_kernel` over some spans into `out`; y None is zero, z then says no more than its shape.

        across: whether x and y have the channels of keys, and z those of values, or the reverse.
        """
        heads, transposed = out.shape[1], across == "values"
        flags = dict(
            REVERSE=reverse, LOCAL=y is not None, ADD=add is not None, DG=logs is not None, TRANSPOSED=transposed
        )
        options = dict(tiles(x, z), X_GROUP=heads // x.shape[1], Z_GROUP=heads // z.shape[1], **flags)
        of_logs = (None,) * 4 if logs is None else (logs.own, logs.inner, logs.edge, logs.dg)
        self._launch("pass", spans, (x, y, z, g, states, out, add, *of_logs), g, heads, len(x), **options)
        return out

    def _launch(
        self, name: str, spans: Spans, arrays: tuple[Tensor | None, ...], g: Tensor | None, heads: int, *more: int, **options: Any
    ) -> None:  # fmt: skip
        programs = len(spans) * heads * options["BLOCKS"]
        if programs == 0:
            return
        family, variant = (scalar, "scalar") if g is None or g.dim() == 2 else (channel, "channel")
        if variant == "channel" and name == "pass":
            options |= dict(C=CHANNEL_CHUNK, LEVELS=CHANNEL_CHUNK.bit_length() - 1)
        strides, options = (0, 0) if g is None else g.stride()[:2], dict(options, H=heads, DECAY=g is not None)
        with torch.cuda.device(spans.table.device) if spans.table.is_cuda else nullcontext():
            getattr(family, f"{variant}_{name}_kernel")[(programs,)](
                *arrays, spans.table, self.scale, *strides, *more, **options
            )


def tiles(x: Tensor, z: Tensor) -> dict[str, Any]:
    """The compile-time sizes of a kernel whose programs hold a state of all channels of x and a block of those of z."""
    rows, columns = (max(16, triton.next_power_of_2(each.shape[2])) for each in (x, z))
    single = x.dtype == torch.float32
    block = min(columns, STATE // rows // (2 if single else 1))
    return dict(
        DX=x.shape[2],
        DZ=z.shape[2],
        BX=rows,
        BZ=block,
        BLOCKS=triton.cdiv(z.shape[2], block),
        C=CHUNK // 2 if single else CHUNK,
        # Of a state as a factor: in fp16 it could overflow. fp32 is multiplied on tensor cores, in three parts.
        WIDE=tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float32,
        PRECISION="tf32x3" if single else "tf32",
        STAGES=1 if single else 2,
        num_warps=8 if single or rows * block > STATE // 2 else 4,
    )


def _of_heads(x: Tensor, heads: int, spans: Spans) -> Tensor:
    """For the gradient of x, in each of `heads` heads, which are to be summed if x has fewer: [T, heads, D]."""
    new = torch.empty if spans.whole else torch.zeros
    dtype = x.dtype if x.shape[1] == heads else torch.float32
    return new(x.shape[0], heads, x.shape[2], dtype=dtype, device=x.device)


def _logs(spans: Spans, g: Tensor | None, own: Tensor, v: Tensor, edge: Tensor | None) -> Logs | None:
    if g is None or edge is None:
        return None
    shape = g.shape if g.dim() == 3 else (tiles(v, own)["BLOCKS"], *g.shape)
    new = torch.empty if spans.whole else torch.zeros
    return Logs(g.new_empty(shape), new(shape, dtype=g.dtype, device=g.device), edge, own)


def _sum_blocks(logs: Logs | None, g: Tensor | None) -> Tensor | None:
    if logs is None or g is None:
        return None
    return logs.dg if g.dim() == 3 else logs.dg.sum(0)
