"""The plan's text: a table of memory that is as wide as a screen, whatever the number of pipeline ranks."""

from __future__ import annotations

import re

from fp8moe.cli.cluster import compose_cluster
from fp8moe.cli.compose import compose
from fp8moe.plan.plan_text import COLUMNS, plan_text, ranges, short
from fp8moe.plan.prediction import predict
from fp8moe.train.config import resolve


def test_every_pipeline_rank_stands_in_one_column_of_one_table() -> None:
    """Each of 16 ranks of 1f1b keeps another number of micro-batches, so none stands with another."""
    words = ["model=dsv3_671b", "precision=fp8", "optimizer=adamw_dsv3", "data.paths=[a]", "data=indexed"]
    words += ["parallel=dsv3_2048", "parallel.schedule=1f1b", "batch.micro_batch=1", "batch.ramp_from=null"]
    words += ["batch.sequences=15360", "validation.samples=128"]
    config = resolve(compose(words).config, 2048)
    found = predict(config, compose_cluster(["cluster=h800_2048"]), 1e12)
    tables = [block.splitlines() for block in plan_text(found, ()).split("\n\n") if block.startswith("GB of pipeline")]
    columns = [re.split(r" {2,}", table[0].strip())[1:] for table in tables]
    assert [len(names) for names in columns] == [COLUMNS, 16 - COLUMNS]
    assert [name for names in columns for name in names] == [str(rank) for rank in range(16)]
    sums = [line.split()[1:] for table in tables for line in table if line.startswith("all  ")]
    assert [float(value) for row in sums for value in row] == [round(rank.total / 1e9, 2) for rank in found.balanced]


def test_numbers() -> None:
    assert ranges([1, 2, 3, 7]) == "1-3,7" and ranges([0]) == "0" and ranges([0, 2, 3]) == "0,2-3"
    assert [short(number) for number in (14.8e12, 2.664e6, 950)] == ["14.8T", "2.66M", "950"]
