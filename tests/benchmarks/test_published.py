"""Predicted speeds beside published ones: within a quarter each and 15 % in the mean."""

from pathlib import Path

import pytest

from benchmarks.published import CASES, V3_GPU_HOURS, V3_STEP_SECONDS, V3_TOKENS, predicted, read_cluster, rows, table
from fp8moe.cli.compose import CONFIGS


@pytest.fixture(scope="module")
def errors():
    return {name: ours / theirs - 1 for name, ours, theirs in rows()}


def test_every_published_speed_is_predicted_within_a_quarter_and_their_mean_within_15_percent(errors):
    assert len(errors) == 5
    assert max(map(abs, errors.values())) <= 0.25, errors
    assert sum(map(abs, errors.values())) / len(errors) <= 0.15, errors


def test_deepseek_v3s_step_and_gpu_hours():
    step = predicted(CASES[0])
    assert step.gpu_hours(V3_TOKENS) == pytest.approx(V3_GPU_HOURS, rel=0.14)
    assert step.seconds == pytest.approx(V3_STEP_SECONDS, rel=0.14)
    assert step.mfu == pytest.approx(0.389, rel=0.17) and step.mfu_noncausal == pytest.approx(0.437, rel=0.17)
    assert step.days(V3_TOKENS) * 2048 * 24 == pytest.approx(step.gpu_hours(V3_TOKENS))
    assert step.cost(V3_TOKENS) == pytest.approx(2 * step.gpu_hours(V3_TOKENS))


def test_what_the_project_has_no_key_for_makes_a_peers_step_longer():
    for case in CASES:
        plain = predicted(type(case)(case.name, case.settings, case.cluster, case.published, case.source))
        longer = predicted(case).seconds
        assert longer > plain.seconds if case.recomputed or case.tensor_parallel > 1 else longer == plain.seconds


def test_the_table_stands_in_the_docs():
    written = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    for line in table().splitlines():
        assert line in written, f"docs/planning.md lacks: {line}"


@pytest.mark.parametrize("path", sorted((CONFIGS / "cluster").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_cluster_can_be_read(path):
    assert read_cluster(path.stem).name == path.stem
