"""The hybrid decoder: embedding, Megatron's transformer block over per-layer specs, output layer, loss."""

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lsys.config import Config
from lsys.config.reports import LOSS, final_parts
from lsys.model.layers import block_spec
from lsys.model.loss import Output, final_loss, require_parts
from lsys.model.packed import PackedMicroBatch
from lsys.parallel.comm import SequenceComm
from lsys.runtime.groups import own_device


class HybridModel(LanguageModule):
    """One pipeline chunk of the decoder.

    Args:
        settings: the run's configuration.
        config: its translation for Megatron (`lsys.model.megatron_config`).
        pg_collection: Megatron's process groups.
        comm: the context ranks.
        pre_process, post_process: whether this chunk holds the embedding, the output layer.
        vp_stage: index of the chunk on this pipeline stage; None without virtual stages.

    Attributes:
        vocab: ids of tokens are below this; the rest of the padded vocabulary is in no softmax.
    """

    def __init__(
        self,
        settings: Config,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        comm: SequenceComm,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = settings.model.tied
        self.vocab, vocab = settings.model.vocab, settings.model.padded_vocab
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config, vocab, max_sequence_length=0, position_embedding_type="none", tp_group=pg_collection.tp
            )
        self.decoder = TransformerBlock(
            config,
            block_spec(settings, config, comm, vp_stage=vp_stage, pp_rank=pg_collection.pp.rank()),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        if post_process:
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                vocab,
                config=config,
                init_method=config.embedding_init_method,
                bias=False,
                skip_weight_param_allocation=pre_process and settings.model.tied,
                tp_group=pg_collection.tp,
            )
            self.loss, self.loss_name = final_loss(settings), settings.train.loss
            self.loss_parts = final_parts(settings)
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()
        self.to(own_device())  # buffers and modules that a user's own part made where torch makes them

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Megatron's schedules hand over what the stage before sent: a list of one."""
        self.decoder.set_input_tensor(input_tensor[0])

    def forward(self, tokens: Tensor, targets: Tensor, packed: PackedMicroBatch, mask: Tensor | None = None) -> Tensor:
        """On the last stage the loss, a scalar: the total over the rank's tokens; its parts are reported. Else [slots / tensor, 1, hidden].

        Args:
            tokens, targets: int64 [slots]. mask: fp32 [T_r], 1 where the target counts; None: all do.
        """
        hidden = self._hidden(tokens, packed)
        if not self.post_process:
            return hidden
        mask = torch.ones_like(packed.positions, dtype=torch.float32) if mask is None else mask
        weight = self.output_layer.weight if self._output_weight is None else self._output_weight
        output = Output(
            hidden, weight, targets[: len(mask)], mask, self.pg_collection.tp, packed, self._project, self.vocab
        )
        losses = require_parts(self.loss(output), self.loss_name, self.loss_parts)
        total = losses[LOSS]
        for name, part in losses.items():
            packed.report(name, part)
            total = total if name == LOSS else total + part
        return total

    def logits(self, tokens: Tensor, packed: PackedMicroBatch) -> Tensor:
        """tokens int64 [slots] -> logits [slots, 1, vocab / tensor] on the last stage, else [slots / tensor, 1, hidden].

        Those of the vocabulary's padding, ids of `vocab` and above, as they come.
        """
        hidden = self._hidden(tokens, packed)
        return self._project(hidden) if self.post_process else hidden

    def _hidden(self, tokens: Tensor, packed: PackedMicroBatch) -> Tensor:
        """[slots] -> [slots / tensor, 1, hidden]."""
        hidden = (
            self.embedding(tokens[None], None) if self.pre_process else None
        )  # [1, slots] -> [slots / tensor, 1, hidden]
        return self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=packed)

    @property
    def _output_weight(self) -> Tensor | None:
        """The embedding's, where it is the output layer's too."""
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None

    def _project(self, hidden: Tensor) -> Tensor:
        return self.output_layer(hidden, weight=self._output_weight)[0]  # gathers the slots

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state.pop(
            f"{prefix}output_layer._extra_state", None
        )  # Transformer Engine's; empty here, absent on other stages
        return state
