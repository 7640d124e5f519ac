"""The grid of ranks is Megatron's."""

import pytest

from lsys.parallel.mesh import AXES, Mesh


def test_peers_are_megatrons_groups() -> None:
    from lsys.runtime import install_megatron

    install_megatron()
    from megatron.core.parallel_state import RankGenerator

    mesh = Mesh(48, tensor=2, pipeline=3, context=4)
    generator = RankGenerator(tp=2, ep=1, dp=mesh.data, pp=3, cp=4, order="tp-cp-ep-dp-pp")
    for axis, token in zip(AXES, ("tp", "cp", "dp", "pp"), strict=True):
        groups = [mesh.peers(rank, axis) for rank in range(48) if mesh.coordinate(rank, axis) == 0]
        assert sorted(groups) == sorted(map(list, generator.get_ranks(token))), axis


def test_coordinates_and_ranks_are_inverse() -> None:
    mesh = Mesh(48, tensor=2, pipeline=3, context=4)
    assert mesh.data == 2
    for rank in range(48):
        place = mesh.coordinates(rank)
        assert mesh.rank(**place) == rank
        for axis in AXES:
            assert mesh.peers(rank, axis)[place[axis]] == rank
    assert mesh.rank(tensor=1, context=2, data=1, pipeline=2) == 1 + 2 * 2 + 8 * 1 + 16 * 2


def test_nodes() -> None:
    assert Mesh(6, tensor=2).nodes(4) == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Mesh(6, tensor=4), "tensor 4 x context 1 x pipeline 1 = 4 does not divide 6 ranks"),
        (lambda: Mesh(4, tensor=0), "does not divide 4 ranks"),
        (lambda: Mesh(4).coordinates(4), "rank 4 is not among the 4 ranks"),
        (
            lambda: Mesh(4).peers(0, "expert"),
            "'expert' is no axis of the mesh; there are tensor, context, data, pipeline",
        ),
        (lambda: Mesh(4).rank(data=4), "data 4 is outside the mesh; data runs from 0 to 3"),
        (lambda: Mesh(4).nodes(0), "0 ranks per node"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
