"""Checkpoints behind URLs: the same bytes and sentences as on a local disk; file:// is a local path."""

from __future__ import annotations

import time
from pathlib import Path

import fsspec
import pytest
import torch
import torch.distributed as dist

from fp8moe.__main__ import main
from fp8moe.cli.compose import as_yaml
from fp8moe.cli.resume import compose_run, note
from fp8moe.errors import ConfigError, DataError
from fp8moe.train import checkpoint
from fp8moe.train.checkpoint import CheckpointConfig, folder_of, location
from fp8moe.train.checkpoint.location import Url
from fp8moe.train.config import resolve
from fp8moe.train.loop import run_to_end
from fp8moe.train.run_dir import describe_start
from tests.parallel.ranks import TIMEOUT, run_ranks
from tests.train.checkpoint.store import full_of, url_of
from tests.train.runs import SMALL, built, configured, stored, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def save(root: checkpoint.Location, step: int, keep: int = 9) -> checkpoint.Location:
    kept = CheckpointConfig(keep=keep)
    return checkpoint.save(root, step, "{}", full_of(step), kept=kept, is_first=True, group=None)


def test_what_a_name_means() -> None:
    assert location("file:///a/b") == location("/a/b") == Path("/a/b") and location("a/b") == Path("a/b")
    url = location("memory://a/b/")
    assert url == Url("memory://a/b") and url.name == "b" and str(url.parent / "c") == "memory://a/c"
    for wrong in ("nosuch://a", "s3://bucket/a"):  # s3fs is not installed here
        with pytest.raises(ConfigError, match=rf"^{wrong} can't be opened \(.*\): use a path"):
            folder_of(location(wrong))


@pytest.mark.parametrize("scheme", ["memory", "file", "store"])
def test_a_url_does_what_a_path_does(tmp_path: Path, scheme: str) -> None:
    url = {"memory": f"memory:/{tmp_path}", "file": f"file://{tmp_path}/c", "store": url_of(tmp_path)}[scheme]
    root = location(url)
    assert checkpoint.complete(root) == [] and checkpoint.refusal(root, 1.0) is None
    assert not (tmp_path / "c").exists() and folder_of(root).names() == [], "looking leaves nothing behind"
    for step in (9, 10, 11):
        assert save(root, step, keep=2) == root / f"step-{step}"
    save(root, 11, keep=2)
    assert checkpoint.complete(root) == [root / "step-10", root / "step-11"]
    assert {*folder_of(root).names()} == {"step-10", "step-11", "latest"}
    with folder_of(root).open("latest") as file:
        assert file.read() == b"step-11\n"
    assert checkpoint.problems(root / "step-11") == [], "nothing of the first was left"
    back = full_of(float("nan"))
    checkpoint.load(root / "step-10", back)
    assert torch.equal(back["master"], torch.full((4,), 10.0))
    # Damage is named, and what has no manifest is not taken for complete.
    folder = folder_of(root / "step-11")
    size = folder.size("rank-0.safetensors")
    folder.create("rank-0.safetensors").fill(b"x" * size)
    assert checkpoint.problems(root / "step-11")[0].startswith("rank-0.safetensors has other bytes than were written")
    with pytest.raises(DataError, match=r"step-11 can't be read \(.*\): resume from another checkpoint"):
        checkpoint.load(root / "step-11", full_of(0))
    folder.create("rank-0.safetensors").fill(b"x")
    assert checkpoint.problems(root / "step-11") == [f"rank-0.safetensors has 1 bytes and was written with {size}"]
    folder.remove("rank-0.safetensors")
    assert checkpoint.problems(root / "step-11") == ["rank-0.safetensors is missing"]
    folder.remove("manifest.json")
    assert checkpoint.find(str(root), None) == root / "step-10"
    with pytest.raises(ConfigError, match=r"step-11 holds no complete checkpoint: name a run directory"):
        checkpoint.find(str(root / "step-11"), None)


def test_an_error_of_a_stores_own_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = location(url_of(tmp_path / "forbidden"))
    refused = checkpoint.refusal(root, 1.0)
    assert isinstance(refused, ConfigError) and str(refused) == (
        f"no file can be written to {root} (StoreError: 403 Forbidden): use another run_dir or checkpoint.path"
    )
    with pytest.raises(DataError, match=r"step-1 can't be written \(.*StoreError: 403 Forbidden.*\): free sp"):
        save(root, 1)
    with pytest.raises(DataError, match=r"^resume=store:.* can't be looked up \(StoreError: 403 Forbidden\): che"):
        checkpoint.find(str(root), None)
    with pytest.raises(DataError, match=r"^checkpoint.path=store:.* can't be looked up"):
        checkpoint.check_root(str(root), None, "none")
    assert main(["verify", str(root)]) == 3 and "can't be looked up (StoreError: 403" in capsys.readouterr().err


def test_parts_of_tensors_are_read_in_bounded_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another layout reads boxes of what was written whole; no request is longer than a piece or one row."""
    whole = {"a": torch.randn(37, 5, 3), "b": torch.randn(1001), "c": torch.tensor(2.0), "d": torch.empty(0, 3)}
    kept = CheckpointConfig()
    path = checkpoint.save(location(url_of(tmp_path)), 1, "{}", whole, kept=kept, is_first=True, group=None)
    folder = folder_of(path)
    monkeypatch.setattr(type(folder), "chunk", 64)
    from fp8moe.train.checkpoint.storage import TensorFile

    with folder.open("rank-0.safetensors") as file:
        opened, lengths = TensorFile(file, folder.chunk), []
        readinto = file.readinto
        file.readinto = lambda content: lengths.append(len(content)) or readinto(content)
        for box in ([slice(0, 37), slice(0, 5), slice(0, 3)], [slice(11, 30), slice(1, 4), slice(2, 3)]):
            expected = whole["a"][tuple(box)]
            target = torch.full_like(expected, float("nan"))
            opened.read_into(target, "a", box)
            assert torch.equal(target, expected)
        assert max(lengths) == 5 * 3 * 4, "a row, which is less than 64 bytes"
        target = torch.full((500,), float("nan"))
        opened.read_into(target, "b", [slice(501, 1001)])
        assert torch.equal(target, whole["b"][501:]) and max(lengths) == 64
    back = {name: torch.full_like(tensor, float("nan")) for name, tensor in whole.items()}
    checkpoint.load(path, back)
    assert all(torch.equal(back[name], tensor) for name, tensor in whole.items())


def run_once(settings: list[str]) -> tuple[float, dict[str, torch.Tensor]]:
    run = built(configured(settings, world_size=2))
    summary = run_to_end(run, time.perf_counter())
    return summary.val_loss, stored(run)


def save_and_load(url: str) -> list[bool]:
    """On a rank: its own tensor and one that both have, saved; both ranks' tensors, loaded."""
    rank, root = dist.get_rank(), location(url)
    group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    tensors = {f"own.{rank}": torch.full((3,), float(rank)), "shared": torch.arange(5.0)}
    path = checkpoint.save(root, 7, "{}", tensors, kept=CheckpointConfig(), is_first=rank == 0, group=group)
    back = {name: torch.full((3,), float("nan")) for name in ("own.0", "own.1")} | {"shared": torch.zeros(5)}
    checkpoint.load(path, back, group)
    return [torch.equal(back[f"own.{one}"], torch.full((3,), float(one))) for one in (0, 1)] + [
        torch.equal(back["shared"], torch.arange(5.0)),
        checkpoint.problems(path) == [],
    ]


@pytest.mark.parametrize("scheme", ["file", "store"])
def test_two_ranks_write_one_checkpoint(tmp_path: Path, scheme: str) -> None:
    url = f"file://{tmp_path}/kept" if scheme == "file" else url_of(tmp_path / "kept")
    assert run_ranks(save_and_load, 2, url) == [[True] * 4] * 2
    assert {path.name for path in (tmp_path / "kept" / "step-7").iterdir()} == {
        *("state.json", "index.json", "manifest.json", "rank-0.safetensors", "rank-1.safetensors")
    }


def test_two_ranks_resume_behind_a_url(corpus: list[str], tmp_path: Path) -> None:
    url = url_of(tmp_path / "kept")
    settings = [*corpus, "checkpoint.every=2", "checkpoint.keep=9", "steps=4", "parallel.ep=2"]
    settings += [f"checkpoint.path={url}", f"run_dir={tmp_path / 'run'}"]
    whole = run_ranks(run_once, 2, settings)
    assert not (tmp_path / "run" / "checkpoints").exists()
    folder_of(location(url) / "step-4").remove("manifest.json")
    resumed = run_ranks(run_once, 2, [*settings, "resume=auto"])
    for (loss, tensors), (expected, reference) in zip(resumed, whole, strict=True):
        assert loss == expected
        assert [name for name in tensors if not torch.equal(tensors[name], reference[name])] == []


def test_a_run_whose_checkpoints_are_elsewhere(
    corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its configuration comes along, by its run directory or, where that is lost, out of the checkpoint."""
    url, run_dir = f"memory:/{tmp_path}", tmp_path / "run"
    first = [*SMALL, *corpus, "precision=bf16", "optimizer.beta2=0.9", "steps=2", f"checkpoint.path={url}"]
    config = resolve(compose_run([*first, f"run_dir={run_dir}"], 1)[0].config, 1)
    run_to_end(built(config), time.perf_counter())
    describe_start(run_dir, 0, as_yaml(config), None)
    for words in ([f"resume={run_dir}"], [f"resume={url}"], ["resume=auto", f"checkpoint.path={url}", "run_dir=new"]):
        composed, origin = compose_run([*words, "steps=9"], 1)
        assert origin is not None and (composed.config.optimizer.beta2, composed.config.model) == (0.9, config.model)
        assert composed.config.checkpoint.path == url
        told = note(origin, composed.config)
        assert told is not None and told.endswith("step 2 with its configuration; changed: steps 2 -> 9"), told
        resolve(composed.config, 1)
    # A new run, even one like it, does not write between the first one's checkpoints.
    with pytest.raises(ConfigError, match=r"^checkpoint.path=memory:.* holds 1 checkpoints and a fresh run"):
        resolve(compose_run(first, 1)[0].config, 1)
    assert compose_run([], 1, str(run_dir))[0].config.checkpoint.path is None
    for named in (url, str(run_dir), f"{url}/step-2"):
        assert main(["verify", named]) == 0 and f"{url}/step-2: ok, 3 files" in capsys.readouterr().out
        assert main(["inspect", named]) == 0 and "2 of 2, 2 updates, 0 skipped" in capsys.readouterr().out
    fsspec.filesystem("memory").pipe(f"{tmp_path}/step-2/state.json", b"{}")
    assert main(["verify", url]) == 3 and "state.json has 2 bytes and was written with" in capsys.readouterr().err


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert CheckpointConfig(path="kept").resolved().path == str(tmp_path / "kept")
    assert CheckpointConfig(path="memory://kept").resolved().path == "memory://kept"
    assert CheckpointConfig().resolved().path is None
