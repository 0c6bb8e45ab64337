"""The summary's table, its figures of balance by hand, and the file."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fp8moe.train.durations import duration
from fp8moe.train.summary import Summary, balance, count_of, table, write_summary

SUMMARY = Summary(
    loss=2.5,
    val_loss_ema=None,
    val_loss=2.25,
    val_bits_per_byte=1.5,
    byte_bigram_bits_per_byte=2.0,
    tokens_per_second=12345.6,
    max_violation=0.5,
    max_violation_by_layer={"one": 0.5},
    expert_token_shares={"one": [0.75, 0.25]},
    fp8_saturated_share=0.0,
    fp8_underflow_share=0.125,
    steps=80,
    skipped_steps=0,
    tokens=320000,
    wall_seconds=200.0,
    world_size=2,
    precision="fp8",
    run_dir="runs/one",
    trace=None,
)


def lines(summary: Summary) -> dict[str, str]:
    """The table's texts by the name before each."""
    pairs = (re.split(r" {2,}", line.strip(), maxsplit=1) for line in table(summary).splitlines())
    return {name: text for name, text in pairs}


def test_the_table() -> None:
    assert lines(SUMMARY) == {
        "training loss": "2.5000 nats a token, mean of the last 10 steps",
        "validation loss": "2.2500 nats a token, after step 80",
        "validation bits per byte": "1.5000",
        "byte bigram, same text": "2.0000: the run takes 25.0% less",
        "tokens a second": "12,346 on 2 processes, fp8, mean of steps 2 to 80",
        "expert balance (MaxVio)": "0.500 in the worst layer, over the whole run; 0 is even",
        "one": "75.0% 25.0%",
        "FP8 values": "0.00% saturated, 12.50% underflowed, in the last step that counted them",
        "steps": "80, 320,000 tokens in 3m20s, start-up included",
        "run directory": "runs/one",
    }


def test_what_is_missing_has_no_line_and_what_is_wrong_stands_out() -> None:
    bare = replace(SUMMARY, val_bits_per_byte=None, max_violation=None, fp8_saturated_share=None, world_size=1)
    assert not {"validation bits per byte", "expert balance (MaxVio)", "one", "FP8 values"} & lines(bare).keys()
    assert lines(bare)["tokens a second"].endswith("on 1 process, fp8, mean of steps 2 to 80")
    worse = lines(replace(SUMMARY, val_bits_per_byte=3.0, skipped_steps=2))
    assert worse["byte bigram, same text"] == "2.0000: the run takes 50.0% MORE"
    assert worse["skipped steps"].startswith("2 of the whole run: ")


def test_a_policy_says_what_it_has_learned() -> None:
    of_policy = replace(SUMMARY, reward=0.1875, reward_batches=4, held_out_accuracy=0.25, loss=-0.0027)
    assert list(lines(of_policy))[:3] == ["reward", "held-out accuracy", "policy loss"]
    assert lines(of_policy)["reward"] == "0.1875, mean of the last 4 batches of rollouts"
    assert lines(of_policy)["held-out accuracy"] == "25.0%, when last measured"
    assert lines(of_policy)["policy loss"] == "-0.0027, mean of the last 10 steps"
    one = lines(replace(of_policy, reward_batches=1, held_out_accuracy=None))
    assert one["reward"] == "0.1875, of the last batch of rollouts" and "held-out accuracy" not in one


def test_a_resumed_run_tells_its_own_start_from_the_whole() -> None:
    resumed = lines(replace(SUMMARY, first_step=61, tokens=80000, consumed_samples=5120, seq_len=64, rollbacks=1))
    assert resumed["steps, whole run"] == "80, 5,120 sequences of 64 tokens"
    assert resumed["steps, this start"] == "20 (61 to 80), 80,000 tokens in 3m20s, start-up included"
    assert resumed["tokens a second"].endswith("mean of steps 62 to 80") and "steps" not in resumed
    assert resumed["rollbacks"] == "1 to a checkpoint, in this start"
    one = lines(replace(SUMMARY, first_step=80, loss_steps=1))
    assert one["tokens a second"].endswith("fp8, of step 80")
    assert one["training loss"] == "2.5000 nats a token, of the last step"


def test_many_experts_are_summed_up_and_idle_ones_are_counted() -> None:
    sixteen = lines(replace(SUMMARY, expert_token_shares={"one": [1 / 16] * 16}))["one"]
    assert sixteen == " ".join(["6.2%"] * 16)
    shares = [0.0, 0.0, 0.5] + [0.5 / 29] * 29
    many = lines(replace(SUMMARY, expert_token_shares={"one": shares}))["one"]
    assert many == "0.00% to 50.00% of the tokens an expert, 3.12% is even  2 EXPERTS WITHOUT TOKENS"


def test_balance_by_hand() -> None:
    violations, shares = balance({"a": torch.tensor([5, 1, 1, 1]), "b": torch.zeros(4, dtype=torch.int64)})
    assert violations == {"a": pytest.approx(1.5), "b": 0.0}
    assert shares == {"a": [0.625, 0.125, 0.125, 0.125], "b": [0.0] * 4}


def test_the_file_is_strict_json(tmp_path: Path) -> None:
    write_summary(replace(SUMMARY, loss=math.nan), tmp_path / "summary.json")
    text = (tmp_path / "summary.json").read_text()
    written = json.loads(text, parse_constant=pytest.fail)
    assert '\n "loss": null,\n' in text and text.endswith("\n}\n"), "a key a line, for readers"
    assert written["loss"] is None and written["expert_token_shares"] == {"one": [0.75, 0.25]}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_durations_and_counts() -> None:
    seconds = {0.2: "0s", 0.5: "1s", 59.4: "59s", 60: "1m00s", 200: "3m20s", 3599: "59m59s", 3600: "1h00m"}
    assert {number: duration(number) for number in seconds} == seconds
    assert duration(18420) == "5h07m"
    assert (count_of(1, "rank", "ranks"), count_of(2, "rank", "ranks")) == ("1 rank", "2 ranks")
