"""Each rule refuses what cannot run, and what it proposes instead passes."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.made import make

from lsys.config.messages import ConfigError
from lsys.config.notices import notices
from lsys.config.rules import check, require
from lsys.kernels.mask import Mask, SharedPrefix
from lsys.mixers.softmax import Softmax

CASES: list[tuple[dict[str, Any], int, str]] = [
    (
        dict(model__pattern="LLQ"), 1,
        "model.pattern: 'Q' in 'LLQ' is no token mixer; there are S (softmax attention), W (",
    ),
    (dict(model__pattern="LW"), 1, "model.window: it is empty, and pattern 'LW' has W layers; give the tokens of"),
    (dict(model__pattern=""), 1, "model.pattern: it is empty"),
    (dict(model__groups=5), 1, "model.groups: 5 groups do not divide 12 heads; 4 or 6 does"),
    (
        dict(model__hidden=100, model__head_dim=None), 1,
        "model.heads: 12 heads do not divide hidden 100 and head_dim is empty; 10 or 20 does",
    ),
    (
        dict(model__head_dim=7), 1,
        "model.head_dim: 7 is odd, and rotary positions turn pairs of channels; 6 or 8 does",
    ),
    (
        dict(model__pattern="MD", model__linear__key_heads=5), 1,
        "model.linear.key_heads: 5 key heads do not divide 12 linear heads; 4 or 6 does",
    ),
    (
        dict(model__pattern="MS", model__linear__key_heads=2, parallel__tensor=4), 4,
        "parallel.tensor: tensor 4 does not divide 2 linear key heads; 2 does, or change model.linear.key_heads",
    ),
    (
        dict(model__pattern="R", model__linear__key_dim=5), 1,
        "model.linear.key_dim: 5 is odd, and the phases of R layers turn pairs of channels; 4 or 6 does",
    ),
    (
        dict(parallel__tensor=4, parallel__context=4), 24,
        "parallel: tensor 4 x context 4 = 16 does not divide 24 ranks; context 3 or 6 does",
    ),
    (dict(parallel__tensor=4), 6, "parallel: tensor 4 does not divide 6 ranks; tensor 3 or 6 does"),
    (dict(parallel__context=2, parallel__tensor=4), 3, "the number of ranks must be a multiple of 8"),
    (
        dict(parallel__tensor=8), 8,
        "parallel.tensor: tensor 8 does not divide 12 heads, 12 key-value groups, 12 linear heads; 4 does",
    ),
    (
        dict(model__groups=2, parallel__tensor=4), 4,
        "parallel.tensor: tensor 4 does not divide 2 key-value groups; 2 does, or change model.groups",
    ),
    (
        dict(model__ffn=90, parallel__tensor=4), 4,
        "4 does not divide 90 channels of the MLP; 2 does, or change model.ffn",
    ),
    (
        dict(model__vocab_multiple=1, model__vocab=95, parallel__tensor=2), 2,
        "2 does not divide 95 entries of the padded vocabulary; 1 does",
    ),
    (
        dict(model__linear__heads=3, parallel__tensor=2), 2,
        "tensor 2 does not divide 3 linear heads; 1 does",
    ),
    (
        dict(parallel__pipeline=3), 3,
        "parallel.pipeline: pipeline 3 does not divide 16 layers; pipeline 1 does, or model.layers 15 or 18",
    ),
    (
        dict(parallel__pipeline=3, parallel__virtual_pipeline=2, train__batch_tokens=3072), 3,
        "pipeline 3 x virtual_pipeline 2 = 6 does not divide 16 layers; pipeline 2 or 4 does, or model.layers 12 or 18",
    ),
    (
        dict(parallel__virtual_pipeline=2), 1,
        "parallel.virtual_pipeline: 2 chunks per stage need more than 1 pipeline stage; 1 does",
    ),
    (dict(parallel__expert=2), 2, "parallel.expert: expert 2 for a model without experts; 1 does"),
    (
        dict(train__batch_tokens=3000), 1,
        "train.batch_tokens: 3000 tokens are not whole micro-batches of 1024; 2048 or 3072 does",
    ),
    (dict(train__batch_tokens=500), 1, "500 tokens are not whole micro-batches of 1024; 1024 does"),
    (
        dict(train__batch_tokens=5 * 1024), 2,
        "5 micro-batches (5120 / 1024 tokens) cannot be shared by 2 data replicas; 4096 or 6144 does",
    ),
    (
        dict(train__batch_tokens=6 * 1024, parallel__pipeline=4, parallel__virtual_pipeline=2), 4,
        "no multiple of pipeline 4, which the interleaved schedule needs; 4096 or 8192 does",
    ),
    (
        dict(train__micro_batch_tokens=2, parallel__context=4), 4,
        "train.micro_batch_tokens: 2 tokens leave some of 4 context ranks without any; 4",
    ),
    (dict(optimizer__warmup_steps=10), 1, "optimizer.warmup_steps: 10 is not below train.steps 10; 9 or fewer"),
    (
        dict(optimizer__schedule="wsd", optimizer__decay_steps=11), 1,
        "optimizer.decay_steps: 11 is above train.steps 10; 10 or fewer",
    ),
    (
        dict(optimizer__schedule="wsd", optimizer__decay_steps=8, optimizer__warmup_steps=4), 1,
        "optimizer.decay_steps: 8 after 4 steps of warm-up is above train.steps 10; 6 or fewer",
    ),
    (dict(optimizer__min_lr=1.0), 1, "optimizer.min_lr: 1.0 is above optimizer.lr 0.0003; 0.0003 or less"),
    (
        dict(train__profile=dict(first=3, ranks=[0, 2])), 2,
        "train.profile.ranks: [2] are not among 2 ranks; there are ranks 0 to 1",
    ),
    (
        dict(train__profile=dict(first=9, steps=3)), 1,
        "train.profile.first: steps 9 to 11 go beyond train.steps 10; 8 or less",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "world_size", "message"), CASES)
def test_each_rule(changes: dict[str, Any], world_size: int, message: str) -> None:
    found = [str(mistake) for mistake in check(make(**changes), world_size)]
    assert len(found) == 1 and message in found[0], found


def test_a_good_configuration_passes() -> None:
    assert check(make(), 1) == []
    assert (
        check(make(parallel__tensor=3, parallel__context=5, parallel__pipeline=4, parallel__virtual_pipeline=2), 240)
        == []
    )
    assert (
        check(make(parallel__pipeline=4, train__batch_tokens=6 * 1024), 4) == []
    )  # 6 micro-batches: fine without interleaving


def test_all_mistakes_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        require(
            make(
                model__groups=5,
                parallel__pipeline=3,
                parallel__expert=2,
                optimizer__min_lr=1.0,
                train__batch_tokens=1000,
            ),
            7,
        )
    assert [m.key for m in caught.value.mistakes] == [
        "model.groups", "parallel", "parallel.pipeline", "parallel.expert", "train.batch_tokens", "optimizer.min_lr"
    ]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(tensor=st.integers(1, 12), context=st.integers(1, 9), pipeline=st.integers(1, 8), world=st.integers(1, 200))
def test_a_proposed_degree_divides_the_ranks(tensor: int, context: int, pipeline: int, world: int) -> None:
    config = make(parallel__tensor=tensor, parallel__context=context, parallel__pipeline=pipeline)
    found = [mistake for mistake in check(config, world) if mistake.key == "parallel"]
    assert bool(found) == (world % (tensor * context * pipeline) != 0)
    for mistake in found:
        words = mistake.fix.split()
        if words[0] in ("tensor", "context", "pipeline"):
            for number in (int(word) for word in words if word.isdigit()):
                degrees = dict(tensor=tensor, context=context, pipeline=pipeline) | {words[0]: number}
                fixed = make(**{f"parallel__{axis}": degree for axis, degree in degrees.items()})
                assert "parallel" not in [m.key for m in check(fixed, world)]


def test_interleaving_rule_is_megatrons() -> None:
    """Megatron's own, with groups of `pipeline` micro-batches: at least one group, and no smaller last one."""
    for pipeline in (2, 4):
        for count in range(1, 13):
            config = make(parallel__pipeline=pipeline, parallel__virtual_pipeline=2, train__batch_tokens=1024 * count)
            allowed = pipeline <= count and not 0 < count % pipeline < pipeline
            assert (check(config, pipeline) == []) == allowed, (pipeline, count)


NOTICES: list[tuple[dict[str, Any], int | None, str]] = [
    (dict(parallel__layout="contiguous"), None, "parallel.layout contiguous has no effect"),
    (dict(optimizer__decay_steps=3), None, "optimizer.decay_steps has no effect"),
    (dict(optimizer__schedule="constant", optimizer__min_lr=1e-5), None, "optimizer.min_lr has no effect"),
    (
        dict(model__pattern="S", model__linear__heads=3),
        None,
        "model.linear.heads has no effect: no layer of pattern 'S' is L, R, G, M, D, N or K",
    ),
    (
        dict(model__pattern="MS", model__linear__decay=False),
        None,
        "model.mixers.lightning.decay has no effect: no layer of pattern 'MS' is L",
    ),
    (
        dict(model__pattern="MS", model__linear__decay=False),
        None,
        "model.linear.decay is now model.mixers.lightning.decay; it is read as before",
    ),
    (
        dict(model__pattern=["mamba2", "S"], model__mixers__lightning__decay=False),
        None,
        "model.mixers.lightning.decay has no effect: no layer of pattern '[mamba2, S]' is L",
    ),
    (
        dict(model__mixers__far={"kind": "window", "window": 4}),
        None,
        "model.mixers.far.window has no effect: no layer of",
    ),
    (dict(model__pattern="MD", model__linear__lrpe="all"), None, "model.mixers.lightning.lrpe has no effect"),
    (dict(model__pattern="LR", model__linear__gate_rank=8), None, "model.mixers.gla.gate_rank has no effect"),
    (
        dict(model__pattern="LR", model__linear__conv_width=2),
        None,
        "model.mixers.mamba2.conv_width has no effect: no layer of pattern 'LR' is M",
    ),
    (
        dict(model__pattern="M", model__linear__negative_eigenvalues=True),
        None,
        "model.mixers.gated_delta.negative_eigenvalues has no",
    ),
    (dict(parallel__linear="zeco"), None, "parallel.linear zeco has no effect: context is 1"),
    (
        dict(parallel__linear="lasp1", parallel__context=2, model__pattern="S"),
        None,
        "parallel.linear lasp1 has no effect: no layer of pattern 'S' has a state",
    ),
    (dict(model__pattern="L", model__groups=2), None, "model.groups has no effect"),
    (dict(parallel__attention="ring"), None, "parallel.attention ring has no effect: context is 1"),
    (
        dict(parallel__attention="ring", parallel__context=2, model__pattern="L"),
        None,
        "parallel.attention ring has no effect: no layer of pattern 'L' is S or W",
    ),
    (dict(model__window=64), None, "model.window has no effect: no layer of pattern 'LLLS' is W"),
    (dict(model__layers=3), None, "S in model.pattern 'LLLS' has no effect: there are only 3 layers"),
    (dict(train__validate_every=3), None, "train.validate_every has no effect"),
    (dict(train__validate_tokens=3, data__validation_fraction=0.0), None, "train.validate_tokens has no effect"),
    (dict(checkpoint__every=3, checkpoint__save=False), None, "checkpoint.every has no effect"),
    (dict(data__corpora=[{"path": "a", "weight": 2}]), None, "data.corpora.0.weight has no effect"),
    (
        dict(parallel__pipeline=4, train__batch_tokens=2048),
        8,
        "1 micro-batches per replica leave some of 4 pipeline stages idle",
    ),
    (dict(), 1, "optimizer.distributed has no effect"),
]


@pytest.mark.parametrize(("changes", "world_size", "message"), NOTICES)
def test_settings_without_effect_are_told(changes: dict[str, Any], world_size: int | None, message: str) -> None:
    found = notices(make(**changes), world_size)
    assert any(line.startswith(message) for line in found), found


def test_no_notice_without_cause() -> None:
    assert notices(make(), 2) == []
    assert notices(make(model__pattern="RGMD", model__linear__key_heads=4, model__rope_base=5e5), 2) == []
    assert notices(make(parallel__context=2, parallel__linear="zeco", model__pattern="D"), 2) == []


def test_a_card_whose_documents_see_others_is_refused() -> None:
    """Positions, FLOPs and decoding of a layer are of documents by themselves."""

    class Prefixed(Softmax):
        @property
        def mask(self) -> Mask:
            return Mask(documents=SharedPrefix((2, 1)))

    model = make().model
    (refusal,) = Prefixed("prefixed", model, None).refusals()
    assert refusal.key == "pattern" and "SharedPrefix(groups=(2, 1))" in refusal.problem and "Own()" in refusal.fix
    assert not [*Softmax("softmax", model, None).refusals()]
