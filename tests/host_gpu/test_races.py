"""Logs written by hand, of two streams and one allocation, and what is wrong in them."""

from __future__ import annotations

import pytest

from tests.host_gpu.overlap import LEAST, products_under_messages
from tests.host_gpu.races import (
    ALLOCATE,
    FREE,
    OF_DEVICE,
    OF_EVENT,
    READ,
    RECORD,
    RECORD_STREAM,
    SYNCHRONIZE,
    WAIT,
    WRITE,
    Line,
    races,
)

MINE: Line = (ALLOCATE, 0, 100, 200, "")
WRITTEN: Line = (WRITE, 0, 100, 200, "fill")
READ_THERE: Line = (READ, 1, 150, 160, "sum")
GONE: Line = (FREE, 0, 100, 200, "")
ORDERED: list[Line] = [(RECORD, 0, 7, 0, ""), (WAIT, 1, 7, 0, "")]
BY_A_THIRD: list[Line] = [(RECORD, 0, 7, 0, ""), (WAIT, 2, 7, 0, ""), (RECORD, 2, 9, 0, ""), (WAIT, 1, 9, 0, "")]
BACK: list[Line] = [(RECORD, 1, 8, 0, ""), (WAIT, 0, 8, 0, "")]


@pytest.mark.parametrize(
    "log",
    [
        [MINE, WRITTEN, *ORDERED, READ_THERE],
        [MINE, WRITTEN, (SYNCHRONIZE, 0, 0, 0, ""), READ_THERE],  # the host waited for the stream,
        [MINE, WRITTEN, (RECORD, 0, 7, 0, ""), (SYNCHRONIZE, OF_EVENT, 7, 0, ""), READ_THERE],  # an event,
        [MINE, WRITTEN, (SYNCHRONIZE, OF_DEVICE, 0, 0, ""), READ_THERE],  # all
        [MINE, (READ, 0, 100, 200, "sum"), READ_THERE],  # nobody writes
        [MINE, (WRITE, 0, 100, 150, "fill"), READ_THERE],  # other bytes
        [MINE, WRITTEN, *ORDERED, READ_THERE, *BACK, GONE],
        [MINE, WRITTEN, *ORDERED, READ_THERE, (RECORD_STREAM, 1, 100, 200, ""), GONE],
        [MINE, WRITTEN, *BY_A_THIRD, READ_THERE],
        [MINE, WRITTEN, GONE, (ALLOCATE, 1, 100, 200, ""), READ_THERE],  # another allocation at the same place
    ],
)
def test_ordered_accesses_are_none(log: list[Line]) -> None:
    assert races(log) == []


@pytest.mark.parametrize(
    ("log", "kind"),
    [
        ([MINE, WRITTEN, READ_THERE], "race"),
        ([MINE, WRITTEN, ORDERED[0], READ_THERE], "race"),  # recorded, not waited for
        ([MINE, ORDERED[0], WRITTEN, ORDERED[1], READ_THERE], "race"),  # recorded too early
        ([MINE, READ_THERE, WRITTEN], "race"),  # the other way round
        ([MINE, WRITTEN, *ORDERED, (WRITE, 1, 150, 160, "add"), (READ, 0, 100, 200, "sum")], "race"),  # the way back
        ([MINE, (WRITE, 0, 159, 170, "fill"), READ_THERE], "race"),  # one byte
        ([MINE, WRITTEN, *ORDERED, READ_THERE, GONE], "freed too early"),
        ([MINE, WRITTEN, *ORDERED, READ_THERE, (RECORD_STREAM, 2, 100, 200, ""), GONE], "freed too early"),
        ([MINE, WRITTEN, *ORDERED, READ_THERE, BACK[0], READ_THERE, BACK[1], GONE], "freed too early"),
    ],
)
def test_what_nothing_orders_is_found(log: list[Line], kind: str) -> None:
    (found,) = races(log)
    assert found.startswith(f"{kind}: ") and ("sum" in found or "add" in found)


def test_a_pair_of_ops_is_told_once() -> None:
    assert len(races([MINE, WRITTEN, READ_THERE, WRITTEN, READ_THERE])) == 2  # either way


MESSAGE: list[Line] = [(RECORD, 0, 1, 0, ""), (WAIT, 1, 1, 0, ""), (WRITE, 1, 0, LEAST, "all_to_all_single")]
ARRIVED: list[Line] = [(RECORD, 1, 2, 0, ""), (WAIT, 0, 2, 0, "")]
PRODUCT: Line = (WRITE, 0, 5000, 6000, "fp8moe::gemm")
OTHER: Line = (WRITE, 0, 6000, 7000, "fp8moe::rms_norm")


@pytest.mark.parametrize(
    ("log", "products"),
    [
        ([PRODUCT, *MESSAGE, PRODUCT, PRODUCT, OTHER, *ARRIVED, OTHER, PRODUCT], [2]),
        ([PRODUCT, *MESSAGE, *ARRIVED, PRODUCT, OTHER], [0]),
        (
            [*MESSAGE[:2], PRODUCT, MESSAGE[2], PRODUCT, *ARRIVED, OTHER],
            [2],
        ),  # it may begin where its stream has waited
        ([PRODUCT, *MESSAGE, (SYNCHRONIZE, 1, 0, 0, ""), PRODUCT, OTHER], [0]),  # the host has waited
        ([PRODUCT, *MESSAGE, PRODUCT], []),  # nobody has waited for it
        ([PRODUCT, *MESSAGE, *MESSAGE, PRODUCT, *ARRIVED, OTHER], [1, 1]),
    ],
)
def test_products_under_messages_are_counted(log: list[Line], products: list[int]) -> None:
    assert products_under_messages(log) == products
