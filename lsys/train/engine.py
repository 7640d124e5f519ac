"""Model chunks, gradients and optimizer of one rank: Megatron's DDP, distributed optimizer and pipeline schedules behind four verbs."""

import contextlib
import itertools
import math
import weakref
from collections.abc import Container, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from lsys.config import Config
from lsys.config.losses import layer_losses
from lsys.config.reports import TOKENS, Slots, declared
from lsys.data.plan import RankBatch
from lsys.model.hybrid import HybridModel
from lsys.model.megatron_config import transformer_config
from lsys.model.module_state import step_hooks
from lsys.model.parameters import initialise
from lsys.observe.added_loss import scales
from lsys.observe.values import Collector
from lsys.runtime.groups import Groups
from lsys.train import finite, megatron_state, origin
from lsys.train.errors import RunError
from lsys.train.origin import StepStart
from lsys.train.own import scheduler_class, take_over
from lsys.train.protocol import Losses, Update


class Engine:
    """One rank's share of the model and its optimizer: `lsys.train.protocol.TrainingEngine` by Megatron.

    Attributes:
        config: Megatron's configuration.
        chunks: DDP-wrapped pipeline chunks (one without virtual stages).
        optimizer, scheduler: Megatron's.
    """

    def __init__(self, settings: Config, groups: Groups) -> None:
        self.settings, self.groups = settings, groups
        self.config, self.slots = transformer_config(settings), Slots(declared(settings))
        self.overlap = settings.train.overlap if settings.train.overlap is not None else groups.device.type == "cuda"
        self.chunks = [self._wrap(chunk, index) for index, chunk in enumerate(self._build_chunks())]
        self._check_layers()
        self.optimizer = get_megatron_optimizer(_optimizer_config(settings, self._gathers_late), self.chunks)
        take_over(self.optimizer, settings.optimizer)
        self.scheduler = _scheduler(settings, self.optimizer)
        self.stateful = [module for chunk in self.chunks for module in step_hooks(chunk)]
        self._losses: Losses | None = None  # that the last forward and backward passes gave
        self._start = StepStart.of(self.chunks)  # of the last step
        self._install_hooks()

    @property
    def _gathers_late(self) -> bool:
        """Whether parameters are gathered during the next forward pass, and so are stale after an optimizer step."""
        return self.overlap and self.settings.optimizer.distributed

    def _build_chunks(self) -> list[HybridModel]:
        groups, virtual = self.groups.collection, self.settings.parallel.virtual_pipeline
        first, last = groups.pp.rank() == 0, self.groups.is_last_stage
        chunks = []
        for stage in range(virtual):
            chunk = HybridModel(
                self.settings,
                self.config,
                groups,
                self.groups.context,
                pre_process=first and stage == 0,
                post_process=last and stage == virtual - 1,
                vp_stage=stage if virtual > 1 else None,
            )
            initialise(chunk, self.settings.model, self.settings.train.seed)
            chunks.append(chunk)
        return chunks

    def _wrap(self, chunk: HybridModel, index: int) -> DistributedDataParallel:
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=self.overlap,
            overlap_param_gather=self._gathers_late,
            use_distributed_optimizer=self.settings.optimizer.distributed,
        )
        return DistributedDataParallel(self.config, ddp, chunk, disable_bucketing=index > 0)

    def _check_layers(self) -> None:
        """Megatron drops layers silently where degrees do not divide them; the built ones are counted instead of trusted."""
        groups = self.groups.collection
        built = torch.tensor(sum(len(chunk.module.decoder.layers) for chunk in self.chunks), device=self.groups.device)
        dist.all_reduce(built, group=groups.pp)
        if built.item() != self.settings.model.layers:
            raise RunError(
                f"{built.item()} layers were built for model.layers {self.settings.model.layers}: pipeline "
                f"{self.settings.parallel.pipeline} x virtual_pipeline {self.settings.parallel.virtual_pipeline} must divide it"
            )

    def _install_hooks(self) -> None:
        """The callbacks by which Megatron's schedules drive gradient synchronisation."""
        config = self.config
        config.finalize_model_grads_func = finalize_model_grads
        # Not its bound method: an optimizer of fp32 shards reaches, through autograd's nodes, the hooks of DDP, and so this very
        # configuration. Python's collector does not see into those nodes, and would never free an engine and its groups.
        optimizer = weakref.proxy(self.optimizer)
        config.grad_scale_func = lambda loss: optimizer.scale_loss(loss)
        if self.overlap:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    def forward_backward(
        self, batches: Sequence[RankBatch], *, forward_only: bool = False, force_all_reduce: bool = False
    ) -> Losses:
        """Run the micro-batches of a step through Megatron's schedule; gradients are summed, reduced and divided by the global token count.

        Args:
            batches: this data replica's micro-batches as this context rank sees them; alike on all pipeline and tensor ranks.
            forward_only: no gradients.
            force_all_reduce: leave whole gradients on every data rank (instead of shards), for inspection.

        Returns:
            Losses over all ranks, equal on all of them.
        """
        if not forward_only:
            self._start = StepStart.of(self.chunks)
            self._begin(self.scheduler.num_steps + 1)
        collector = self._pass(batches, forward_only, force_all_reduce)
        losses = Losses.of(collector.reduce())
        if not forward_only:
            self._losses = losses
        return losses

    def _begin(self, step: int) -> None:
        for module in self.stateful:
            module.begin_step(step)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _pass(self, batches: Sequence[RankBatch], forward_only: bool, force_all_reduce: bool = False) -> Collector:
        """What this rank alone reports in the passes."""
        for chunk in self.chunks:
            chunk.train(not forward_only)
        groups = self.groups
        found = scales(layer_losses(self.settings), batches, groups.collection.dp_cp, groups.device)
        collector = Collector(self.slots, groups, found)
        iterators = [zip(batches, itertools.repeat(collector), strict=False) for _ in self.chunks]
        # Megatron's forward_only alone records a graph, and keeps its tensors.
        with torch.set_grad_enabled(not forward_only):
            get_forward_backward_func()(
                forward_step_func=_forward_step,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
                num_microbatches=len(batches),
                seq_length=batches[0].slots * self.settings.parallel.context,  # Megatron divides by the context degree
                micro_batch_size=1,
                forward_only=forward_only,
                force_all_reduce=force_all_reduce,
            )
        if not forward_only:
            collector.pending.require_none()
        return collector

    def step(self) -> Update:
        """Clip and update, unless loss or norm is not finite; advance the schedule. Then modules with a state of their own end the step, or
        have the state that they had before it."""
        assert self._losses is not None
        found_inf = self.optimizer.prepare_grads()
        norm = finite.gradient_norm(self.optimizer)
        applied = self._losses.are_finite and math.isfinite(norm) and not found_inf
        if not self.settings.optimizer.distributed:
            applied = finite.agreed(applied, self.groups.device, self.groups.collection.dp_cp)
        if applied:
            finite.apply(self.optimizer, norm)
        self.scheduler.step(increment=1)
        if applied:
            for module in self.stateful:
                module.end_step(self.scheduler.num_steps, self._losses.values)
        else:
            self._start.restore_states()
        return Update(norm, applied)

    def find_not_finite(self, batches: Sequence[RankBatch]) -> str:
        assert self._losses is not None
        return origin.find(self, batches, self._losses.are_finite)

    def rerun(self, batches: Sequence[RankBatch]) -> Collector:
        """What this rank alone reports in the last step's passes, run once more; gradients are left as it computes them by itself, unreduced.

        Random generators and states of modules are in it as they were in the step, and afterwards as they are now.
        """
        now = StepStart.of(self.chunks)
        self._start.restore()
        try:
            with self.settled_parameters():
                self._begin(self.scheduler.num_steps)
                with origin.without_reduction(self.config, self.chunks):
                    return self._pass(batches, False)
        finally:
            now.restore()

    def numbers(self) -> Iterator[tuple[str, Tensor]]:
        for _, name, parameter in origin.parameters(self.chunks):
            yield name, parameter.detach()
        yield from finite.states(self.optimizer)

    def state(self, *, loading: bool) -> dict[str, Any]:
        """What a checkpoint holds; see `lsys.checkpoint.held.Held`."""
        replicas = self.groups.collection.dp_cp
        return megatron_state.sharded(self.chunks, self.optimizer, self.scheduler, replicas, loading=loading)

    def load_state(self, state: dict[str, Any]) -> None:
        megatron_state.put(self.chunks, self.optimizer, self.scheduler, state)

    def weights_state(self, stored: Container[str]) -> dict[str, Any]:
        """What a checkpoint fills of the model alone; see `lsys.checkpoint.held.Held`."""
        return megatron_state.weights(self.chunks, self.groups.collection.dp_cp, stored)

    def load_weights(self, state: dict[str, Any]) -> None:
        megatron_state.put_weights(self.chunks, self.optimizer, state)

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    @contextlib.contextmanager
    def settled_parameters(self) -> Iterator[None]:
        """Inside, parameters are whole and current: for validation and checkpoints.

        With overlapped gathering Megatron fetches a parameter when the next training forward pass first needs it; until then it is stale.
        """
        if self._gathers_late:
            for chunk in self.chunks:
                chunk.disable_forward_pre_hook()
        try:
            yield
        finally:
            if self._gathers_late:
                for chunk in self.chunks:
                    chunk.enable_forward_pre_hook()


def _forward_step(
    batches: Iterator[tuple[RankBatch, Collector]], chunk: DistributedDataParallel
) -> tuple[Tensor, object]:
    batch, collector = next(batches)

    def loss(total: Tensor) -> tuple[Tensor, Tensor, None]:
        """(sum to differentiate, its tokens, nothing for Megatron to keep). Megatron divides by the tokens of all ranks."""
        tokens = batch.loss_mask.sum()
        collector.add(TOKENS, tokens)
        return total, tokens.int(), None

    with collector.forward() as values:
        return chunk(batch.tokens, batch.targets, batch.packed.without_tables(values), batch.loss_mask), loss


def _optimizer_config(settings: Config, gathers_late: bool) -> OptimizerConfig:
    options = settings.optimizer
    half = settings.train.precision == "bf16"
    return OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.beta1,
        adam_beta2=options.beta2,
        adam_eps=options.eps,
        clip_grad=options.clip,
        bf16=half,
        params_dtype=torch.bfloat16 if half else torch.float32,
        use_distributed_optimizer=options.distributed,
        overlap_param_gather=gathers_late,
    )


def _scheduler(settings: Config, optimizer: object) -> OptimizerParamScheduler:
    options, steps = settings.optimizer, settings.train.steps
    return scheduler_class(settings)(
        optimizer,
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=options.warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style={"wsd": "WSD"}.get(options.schedule, options.schedule),
        wsd_decay_steps=options.decay_steps or max(1, steps // 5),
        lr_wsd_decay_style="linear",
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # on resume the YAML's learning rate counts, not the checkpoint's
    )
