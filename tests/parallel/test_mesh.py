"""Which ranks share a group."""

from __future__ import annotations

import pytest

from fp8moe.parallel.mesh import axis_ranks, ranks_in_node


def test_experts_sit_side_by_side_and_rails_cross_nodes() -> None:
    axes = axis_ranks(2, 8, 4, ranks_per_node=2)
    assert axes["dp"] == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]]
    assert axes["ep"] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert axes["edp"][:4] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert axes["node"][:4] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert axes["rail"][:4] == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert "rail" not in axis_ranks(2, 8, 4)


@pytest.mark.parametrize("layout", [(8, 8), (8, 4), (8, 2), (8, 1), (4, 8)])
def test_every_rank_has_one_node_and_one_rail(layout: tuple[int, int]) -> None:
    ep, per_node = layout
    axes = axis_ranks(1, 8, ep, per_node)
    for axis, size in (("node", min(ep, per_node)), ("rail", max(1, ep // per_node))):
        assert sorted(rank for ranks in axes[axis] for rank in ranks) == list(range(8))
        assert {len(ranks) for ranks in axes[axis]} == {size}


@pytest.mark.parametrize("ep, per_node", [(8, 3), (4, 0)])
def test_nodes_cut_the_ranks_evenly(ep: int, per_node: int) -> None:
    with pytest.raises(ValueError, match=rf"ranks_per_node={per_node} does not divide parallel.ep={ep}: use 1, 2"):
        ranks_in_node(ep, per_node)
