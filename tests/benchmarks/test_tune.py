"""The search for tiles: what it tries is legal, what it chooses is the fastest, and it needs a GPU."""

from dataclasses import replace

import pytest
import torch

from benchmarks import tune
from benchmarks.peers import Operands
from fp8moe.kernels.tiles import CONSUMERS, LENGTHS, Tile, length_of


@pytest.mark.parametrize("op", list(tune.OPS))
def test_candidates_fit_an_sm_and_their_op(op):
    found = list(tune.candidates("gluon", op))
    assert len(found) == len(set(found)) >= 16
    assert {tile.consumers for tile in found} == {"free", "turns"}, "what the table has"
    every = list(tune.candidates("gluon", op, CONSUMERS))
    assert {replace(tile, consumers="free") for tile in every} < set(found) < set(every)
    assert {tile.consumers for tile in every} == set(CONSUMERS)
    for tile in found:
        rows = op in ("gemm", "grouped_gemm")
        scales = 4 * tile.block_m + (tile.block_n if rows else 4 * tile.block_n)
        ring = tile.stages * ((tile.block_m + tile.block_n) * 128 + scales)
        assert ring + (2 * 3 * 64 * 32 * 2 if rows else 0) <= 227 * 1024 - 512
        assert op != "grouped_gemm" or tile.block_m == 128


def test_every_length_of_every_op_is_searched():
    lengths = {op: {length_of(p.k) for p in tune.PROBLEMS if p.op == op} for op in tune.OPS}
    assert all(found == set(LENGTHS) for found in lengths.values()), lengths


@pytest.mark.parametrize("p", [p for p in tune.SMALL if length_of(p.k) == "short"], ids=lambda p: p.op)
def test_every_op_is_called(p):
    p, device = replace(p, m=128, n=128, k=256), torch.device("cpu")
    x, total = Operands.make(p, device), torch.zeros(p.groups, p.m, p.n)
    total = total if p.groups > 1 else total[0]
    found = tune.call_of("reference", p, x, total)().unflatten(0, (p.groups, -1))
    if p.op == "grouped_gemm" or p.groups == 1:
        expected = x.a.dequantize().unflatten(0, (p.groups, -1)) @ x.b.dequantize().view(p.groups, p.n, p.k).mT
    else:
        a, b = (columns.dequantize().unflatten(1, (p.groups, -1)).transpose(0, 1) for columns in (x.a, x.b))
        found, expected = total, a @ b.mT
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)


def test_the_best_of_each_shape_is_the_geometric_mean_of_what_all_problems_have():
    a, b, c = (Tile(128, 128, stages, 8, 4) for stages in (4, 5, 6))
    assert tune.best([{a: 1.0, b: 2.0, c: 0.1}, {a: 4.0, b: 1.0}]) == [b]
    assert tune.best([{a: 1.0, b: 1.0}]) == [a]
    tall, pair = Tile(256, 128, 4, 8, 4), Tile(256, 128, 4, 8, 4, multicast=True)
    assert tune.best([{a: 3.0, b: 2.0, tall: 2.5, pair: 1.0}]) == [pair, b, tall]
    turns = Tile(128, 128, 4, 16, 4, consumers="turns")
    assert tune.best([{a: 3.0, b: 2.0, turns: 1.5}]) == [turns, b], "another order is another kind"
    assert tune.best([{a: 3.0, b: 2.0, turns: 2.5}]) == [b], "and of no use where a tile without one is faster"
    assert tune.best([{turns: 2.5}]) == [turns]
    with pytest.raises(ValueError, match="no tile computed every problem"):
        tune.best([{a: 1.0}, {b: 1.0}])


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as end:
        tune.main([])
    assert end.value.code == 2 and "torch sees 0" in capsys.readouterr().err
