"""The table of tiles: complete, legal for the kernels that read it, and a pure choice."""

import pytest

from fp8moe.kernels import tiles
from fp8moe.kernels.tiles import CLASSES, Tile, choose, production_tiles, read_table, shape_class, write_table

OPS = ("gemm", "gemm_columns", "grouped_gemm", "grouped_wgrad")
UNQUANTIZED = ("wgrad", "grouped_mm_wgrad")  # Triton's alone


def test_classes_part_by_the_number_of_tiles_and_the_length_of_the_contraction():
    assert shape_class(4096, 7168, 16384) == "many_long"
    assert shape_class(4096, 7168, 2048) == "many_short"
    assert shape_class(512, 2048, 7168) == "few_long"  # 2 x 16 tiles
    assert shape_class(512, 2048, 7168, groups=8) == "many_long"
    assert shape_class(16, 16, 2049) == "few_long" and shape_class(16, 16, 2048) == "few_short"


@pytest.mark.parametrize("backend", ["gluon", "triton"])
def test_every_device_has_every_op_in_every_class(backend):
    ops = OPS + UNQUANTIZED * (backend == "triton")
    for device, backends in read_table().items():
        for op, classes in backends.get(backend, {}).items():
            assert op in ops and tuple(classes) == CLASSES, (device, op)
    for op in ops:
        assert isinstance(choose(backend, op, 4096, 4096, 4096), Tile)


def test_tiles_of_the_hopper_kernels_are_those_they_can_do():
    for op in OPS:
        for tile in production_tiles("gluon", op):
            assert (tile.block_m, tile.block_n) in ((256, 128), (128, 256), (128, 128)) and tile.warps == 4, (op, tile)
            assert op != "grouped_gemm" or tile.block_m == 128, "a taller tile could straddle two experts"
            rows = op in ("gemm", "grouped_gemm")  # columns keep their scales in the ring, rows a buffer to store from
            ring = tile.stages * (tile.block_m + tile.block_n) * (128 if rows else 132)
            assert ring + (2 * 64 * 128 * 2 if rows else 0) <= 227 * 1024 - 512, (op, tile)


def test_an_unknown_device_takes_the_default_and_an_unknown_op_is_refused():
    assert choose("gluon", "gemm", 4096, 4096, 4096, device="no such GPU") == choose("gluon", "gemm", 4096, 4096, 4096)
    with pytest.raises(ValueError, match=r"no tiles for op 'swiglu'.*gluon gemm"):
        choose("gluon", "swiglu", 1, 1, 1)


def test_a_device_of_its_own_wins(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    own = Tile(128, 128, 3, 4, 4)
    write_table(
        {**read_table(), "NVIDIA H200": {"gluon": {"gemm": {name: tiles.as_entry(own) for name in CLASSES}}}}, path
    )
    written = read_table(path)
    assert written["default"] == read_table()["default"]
    monkeypatch.setattr(tiles, "read_table", lambda: written)
    assert choose("gluon", "gemm", 4096, 4096, 4096, device="NVIDIA H200") == own
    assert choose("gluon", "grouped_gemm", 4096, 4096, 4096, device="NVIDIA H200").block_n == 256


def test_writing_the_table_as_it_is_changes_nothing(tmp_path):
    path = tmp_path / "tiles.json"
    write_table(read_table(), path)
    assert path.read_text() == tiles.TABLE.read_text()
