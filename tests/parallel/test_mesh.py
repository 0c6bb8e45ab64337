"""Which ranks share a group, which place a rank has on the mesh, and which sizes are refused."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fp8moe.parallel import mesh as mesh_module
from fp8moe.parallel.mesh import Mesh, axis_ranks, build_mesh, listed, ranks_in_node, validate_mesh, warm_up


def test_experts_sit_side_by_side_and_rails_cross_nodes() -> None:
    axes = axis_ranks(2, 8, 4, ranks_per_node=2)
    assert axes["dp"] == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]]
    assert axes["ep"] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert axes["expert"][:4] == [[0, 4], [1, 5], [2, 6], [3, 7]] and axes["dense"] == axes["dp"]
    assert axes["node"][:4] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert axes["rail"][:4] == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert "rail" not in axis_ranks(2, 8, 4)


def test_groups_of_the_pipeline() -> None:
    axes = axis_ranks(4, 2, 2, mirrored=True, tied=True)
    assert axes["world"] == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert axes["pp"] == axes["up"] == axes["down"] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert axes["dense"] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert axes["expert"] == [[0, 6], [1, 7], [2, 4], [3, 5]]
    assert axes["tie"] == [[0, 6], [1, 7]]
    assert axis_ranks(1, 2, 2).keys() == {"dp", "ep", "dense", "expert"}  # nothing for a pipeline of one rank
    assert axis_ranks(2, 1, 1).keys() == {"dp", "ep", "dense", "expert", "world", "pp", "up", "down"}


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


def test_a_ranks_place() -> None:
    """pp=4, dp=6, ep=3: rank 17 is the 6th of pipeline rank 2, the 3rd of its ep group, in the second replica."""
    mesh = Mesh(4, 6, 3, rank=17)
    assert (mesh.world_size, mesh.edp) == (24, 2)
    assert (mesh.pp_rank, mesh.dp_rank, mesh.ep_rank, mesh.edp_rank) == (2, 5, 2, 1)
    assert (mesh.replicas, mesh.is_counted) == ([2], True)
    assert [Mesh(4, 1, 1, r, mirrored=True).replicas for r in range(4)] == [[0, 3], [1, 2], [1, 2], [0, 3]]
    assert [Mesh(4, 1, 1, r, mirrored=True).is_counted for r in range(4)] == [True, True, False, False]


@pytest.mark.parametrize(
    "sizes, says",
    [
        ((4, 0, 1, 8), "parallel.pp=0 must be at least 1"),
        ((4, 1, 0, 8), "parallel.ep=0 must be at least 1"),
        ((6, 4, 1, 8), "parallel.pp=4 does not divide 6 processes: use 1, 2, 3 or 6"),
        ((3, 1, 3, 8), "parallel.ep=3 does not divide num_experts=8: use 1, 2, 4 or 8"),
        ((6, 1, 4, 8), "parallel.ep=4 does not divide the 6 data-parallel processes: use 1 or 2"),
        ((8, 2, 8, 8), "parallel.ep=8 does not divide the 4 data-parallel processes: use 1, 2 or 4"),
    ],
)
def test_sizes_that_do_not_fit(sizes: tuple[int, int, int, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        validate_mesh(*sizes)


def test_sizes_that_fit() -> None:
    for sizes in ((1, 1, 1, 1), (8, 2, 4, 8), (6, 3, 2, 64)):
        validate_mesh(*sizes)
    assert (listed([3]), listed([1, 2]), listed([1, 2, 4])) == ("3", "1 or 2", "1, 2 or 4")


class Dist:
    """torch.distributed of a world without processes: groups are their ranks and options."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.made: list[tuple[Any, ...]] = []

    def get_rank(self) -> int:
        return self.rank

    def get_world_size(self) -> int:
        return self.world

    def new_group(self, ranks: list[int], timeout: timedelta, group_desc: str, pg_options: Any) -> tuple[Any, ...]:
        self.made.append((group_desc, tuple(ranks), timeout, pg_options))
        return (group_desc, *ranks)


def built(monkeypatch: pytest.MonkeyPatch, rank: int, *sizes: int, **options: Any) -> tuple[Mesh, Dist]:
    fake = Dist(rank, sizes[0] * sizes[1])
    monkeypatch.setattr(mesh_module, "dist", fake)
    return build_mesh(*sizes, timeout=timedelta(seconds=7), **options), fake


def test_groups_of_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh, fake = built(monkeypatch, 3, 2, 2, 2, ranks_per_node=1)
    assert (mesh.dp_group, mesh.ep_group) == (("dp1", 2, 3), ("ep1", 2, 3))
    assert mesh.world_group == ("world0", 0, 1, 2, 3)
    assert (mesh.pp_group, mesh.up_group, mesh.down_group) == (("pp1", 1, 3), ("up1", 1, 3), ("down1", 1, 3))
    assert (mesh.dense_group, mesh.expert_group, mesh.tie_group) == (("dense1", 2, 3), None, None)
    assert (mesh.rail_group, mesh.node_group) == (("rail1", 2, 3), None)
    assert {made[2] for made in fake.made} == {timedelta(seconds=7)} and all(len(made[1]) > 1 for made in fake.made)
    other = built(monkeypatch, 0, 2, 2, 2, ranks_per_node=1)[1]
    assert other.made == fake.made  # every rank makes every group, in one order
    names = ("world", "dp", "ep", "dense", "pp", "up", "down", "rail")
    assert mesh.groups == tuple(dict.fromkeys(getattr(mesh, f"{name}_group") for name in names))


def test_groups_of_a_mirrored_and_of_a_tied_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh, _ = built(monkeypatch, 3, 4, 2, 1, mirrored=True)
    assert mesh.mirrored and mesh.dense_group == ("dense1", 2, 3, 4, 5) == ("dense1", *mesh.expert_group[1:])
    assert built(monkeypatch, 3, 4, 2, 1, tied=True)[0].tie_group is None
    assert built(monkeypatch, 7, 4, 2, 1, tied=True)[0].tie_group == ("tie1", 1, 7)
    data = built(monkeypatch, 1, 1, 4, 2)[0]  # without a pipeline the world is dp
    assert data.world_group == data.dp_group == ("dp0", 0, 1, 2, 3)
    assert (data.dense_group, data.expert_group) == (("dense0", 0, 1, 2, 3), ("expert1", 1, 3))


def test_groups_whose_messages_travel_beside_compute_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In SMs, wherever these are; messages of layers go before compute."""
    nccl = SimpleNamespace(Options=lambda: SimpleNamespace(config=SimpleNamespace()))
    monkeypatch.setattr(Dist, "ProcessGroupNCCL", nccl, raising=False)
    _, fake = built(monkeypatch, 0, 2, 8, 4, ranks_per_node=2, nccl_ctas=20)
    made = {name.rstrip("0123456789"): options for name, _, _, options in fake.made}
    bounded = {axis: options for axis, options in made.items() if options is not None}
    assert (
        bounded.keys() == {"ep", "rail", "node", "dense", "expert"}
        and {"world", "dp", "pp", "up", "down"} < made.keys()
    )
    assert all(options.config == SimpleNamespace(max_ctas=20, cga_cluster_size=1) for options in bounded.values())
    first = {axis for axis, options in bounded.items() if options.is_high_priority_stream}
    assert first == {"ep", "rail", "node"}
    assert {made[3] for made in built(monkeypatch, 0, 2, 8, 4, ranks_per_node=2)[1].made} == {None}


def test_a_world_of_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh_module, "dist", Dist(0, 3))
    with pytest.raises(ValueError, match="mesh pp=2 x dp=2 needs 4 processes, and there are 3: start 4"):
        build_mesh(2, 2, 1, timeout=timedelta(seconds=7))
    assert build_mesh(1, 1, 1, timeout=timedelta(seconds=7)) == Mesh(1, 1, 1, 0)


def test_groups_that_steps_use_are_opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Group:
        def __init__(self, size: int) -> None:
            self.size = lambda: size

    opened: list[Any] = []
    monkeypatch.setattr(mesh_module, "all_reduce", lambda tensor, group: opened.append((group, tuple(tensor.shape))))
    monkeypatch.setattr(mesh_module, "exchange", lambda rows, group, name: opened.append((group, tuple(rows.shape))))
    dp, ep = Group(4), Group(2)
    warm_up(Mesh(1, 4, 2, 0, world_group=dp, dp_group=dp, ep_group=ep), torch.device("cpu"))  # type: ignore[arg-type]
    assert opened == [(dp, (1,)), (ep, (1,)), (ep, (2, 1))], "experts alone exchange"
    opened.clear()
    world, up, pp = Group(8), Group(2), Group(2)
    of_pipeline = dict(world_group=world, dp_group=dp, pp_group=pp, up_group=up, down_group=Group(2))
    warm_up(Mesh(2, 4, 1, 0, **of_pipeline), torch.device("cpu"))  # type: ignore[arg-type]
    assert opened == [(world, (1,)), (pp, (1,))], "links are opened in pairs, and dp's messages are the host's"
