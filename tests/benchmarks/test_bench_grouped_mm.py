"""The benchmark of BF16 experts: it runs on a CPU, records what it says, and tries the tiles it lists."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import bench_grouped_mm as bench
from fp8moe.kernels import backend, tiles


def test_it_records_every_product_beside_torchs(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    assert bench.main(["--device", "cpu", "--repeats", "2", "--warmup", "0", "--json", str(path)]) == 0
    records = {(r["name"], r["shape"]): r for r in json.loads(path.read_text())}
    ours = {name.removeprefix("reference ") for name, _ in records if name.startswith("reference ")}
    assert ours == {"grouped_mm", "grouped_mm dgrad", "grouped_mm_wgrad", "wgrad"}
    for (name, _), record in records.items():
        assert record["value"] > 0 and (record["baseline"] == bench.PEER) == name.startswith("reference ")


@pytest.mark.parametrize("runs", list(bench.CANDIDATES))
def test_a_tile_is_used_for_the_call(runs: str) -> None:
    usual, found = tiles.choose(runs, "wgrad", 64, 64, 64), bench.CANDIDATES[runs]
    for tile in found:
        seen = bench.with_tile(tile, lambda: tiles.choose(runs, "wgrad", 64, 64, 64))()
        assert seen == tile
        assert tile.stages * (tile.block_m + tile.block_n) * 2 * 64 <= 227 * 1024 - 1024
    assert set(tiles.production_tiles(runs, "grouped_mm_wgrad")) <= set(found)
    assert tiles.choose(runs, "wgrad", 64, 64, 64) == usual


@pytest.mark.parametrize("experts", [1, 3])
def test_each_candidate_computes_the_product(experts: int) -> None:
    torch.manual_seed(0)
    found = bench.products(experts, 8, 16, 24, torch.device("cpu"), searched=False)
    assert set(found) == ({"wgrad"} if experts == 1 else {"grouped_mm", "grouped_mm dgrad", "grouped_mm_wgrad"})
    runs = backend.provider("grouped_mm", backend.resolve(torch.device("cpu")))
    for op, calls in found.items():
        assert list(calls) == [bench.PEER, f"{runs} {op}"]
        expected = calls[bench.PEER]()
        assert isinstance(expected, torch.Tensor) and expected.isfinite().all()
