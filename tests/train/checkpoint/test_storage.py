"""Files of a checkpoint: safetensors that its own library reads, hashed as written; any damage is named."""

from __future__ import annotations

import json
import pickle
import random
import re
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from fp8moe.errors import DataError
from fp8moe.train import checkpoint
from fp8moe.train.checkpoint import CheckpointConfig, folder_of
from fp8moe.train.checkpoint.files import LocalFolder, writing_problem
from fp8moe.train.checkpoint.manifest import problems, read_manifest
from fp8moe.train.checkpoint.storage import Part, write_safetensors

TENSORS = {
    "master.a": torch.randn(3, 5),
    "exp_avg.a": torch.randn(3, 5).bfloat16(),
    "load.b": torch.arange(7),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "strided": torch.randn(6, 4)[::2].t(),
}


def saved(root: Path, step: int = 1) -> Path:
    kept = CheckpointConfig(keep=9)
    return checkpoint.save(root, step, '{"step": 1}\n', TENSORS, kept=kept, is_first=True, group=None)


def test_why_nothing_can_be_written_is_said_without_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert writing_problem(tmp_path / "new") is None and not any(tmp_path.iterdir())
    (tmp_path / "file").touch()
    assert writing_problem(tmp_path / "file" / "below") == "Not a directory"

    def lost(_: LocalFolder) -> None:
        raise OSError("the store is gone")  # as remote file systems raise it, without a number

    monkeypatch.setattr(LocalFolder, "make", lost)
    assert writing_problem(tmp_path / "new") == "the store is gone"


@pytest.mark.parametrize("chunk", [LocalFolder.chunk, 7])
def test_its_own_library_reads_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(LocalFolder, "chunk", chunk)
    written = write_safetensors(
        folder_of(tmp_path),
        "file.safetensors",
        [Part(name, tensor.dtype, tensor.shape, lambda tensor=tensor: tensor) for name, tensor in TENSORS.items()],
    )
    content = (tmp_path / "file.safetensors").read_bytes()
    assert (written.size, written.xxh3) == (len(content), xxhash.xxh3_128(content).hexdigest())
    read = load_file(tmp_path / "file.safetensors")
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype is tensor.dtype and torch.equal(read[name], tensor), name


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = saved(tmp_path)
    assert problems(path) == []
    back = {name: torch.full_like(tensor, 3) for name, tensor in TENSORS.items()}
    checkpoint.load(path, back)
    for name, tensor in TENSORS.items():
        assert torch.equal(back[name], tensor), name
    with pytest.raises(DataError, match=r"can't be read .*: resume from another checkpoint"):
        checkpoint.load(path, {"unknown": torch.zeros(2)})
    with pytest.raises(DataError, match=r"can't be read"):
        checkpoint.load(path, {"master.a": torch.zeros(3, 6)})


def test_every_damage_is_found_and_named(tmp_path: Path) -> None:
    """100 corruptions: a flipped bit anywhere, a file cut off anywhere, a file that is missing."""
    path = saved(tmp_path)
    dice = random.Random(0)
    names = sorted(read_manifest(path))
    assert names == ["index.json", "rank-0.safetensors", "state.json"]
    for trial in range(100):
        file = path / dice.choice([*names, "manifest.json"])
        whole = file.read_bytes()
        if trial % 3 == 0:
            content = bytearray(whole)
            content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
            file.write_bytes(content)
        elif trial % 3 == 1:
            file.write_bytes(whole[: dice.randrange(len(whole))])
        else:
            file.unlink()
        found = problems(path)
        if file.name == "manifest.json":  # a bit of its white space changes nothing that it says
            harmless = trial % 3 == 0 and not found and read_manifest(path)
            cut = trial % 3 == 1 and whole[: len(file.read_bytes())].rstrip() == whole.rstrip()
            assert found or harmless or cut
        else:
            assert len(found) == 1 and found[0].startswith(file.name), (trial, found)
        file.write_bytes(whole)
    assert problems(path) == []


def test_ranks_share_the_work(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (path / "state.json").write_text("{}")
    shares = [problems(path, share, 4) for share in range(4)]
    assert sorted(map(len, shares)) == [0, 0, 0, 1]
    assert [one for share in shares for one in share] == problems(path)


def test_a_manifest_stays_in_its_folder(tmp_path: Path) -> None:
    path = saved(tmp_path)
    content = json.loads((path / "manifest.json").read_text())
    content["files"]["../../secret"] = {"size": 1, "xxh3": "0"}
    (path / "manifest.json").write_text(json.dumps(content))
    assert problems(path) == ["manifest.json names a file outside its folder"]


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.target,)


def test_torchs_planner_is_loaded_by_what_saves_or_loads_alone() -> None:
    """It brings sharded tensors and sympy: a second of every command that starts."""
    slow = re.compile(
        r"^(import|from) .*(torch\.distributed\.(checkpoint|tensor)|torch_checkpoint|sympy)", re.MULTILINE
    )
    sources = (Path(checkpoint.__file__).parents[2]).rglob("*.py")
    assert [path.name for path in sources if slow.search(path.read_text())] == ["torch_checkpoint.py"]


def test_no_pickle_ever_runs(tmp_path: Path) -> None:
    """Not even with a manifest that was made for it: nothing that reads a checkpoint can execute anything."""
    target = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(target))
    pickle.loads(bomb)
    assert target.exists(), "the bomb is real"
    target.unlink()
    for name in ("state.json", "index.json", "rank-0.safetensors", "manifest.json", ".metadata", "__0_0.distcp"):
        path = saved(tmp_path / name)
        whole = (path / name).read_bytes() if (path / name).exists() else b""
        (path / name).write_bytes(bomb + whole)
        if name in read_or_empty(path):
            content = json.loads((path / "manifest.json").read_text())
            data = bomb + whole
            content["files"][name] = {"size": len(data), "xxh3": xxhash.xxh3_128(data).hexdigest()}
            (path / "manifest.json").write_text(json.dumps(content))
            assert problems(path) == []
        back = {key: torch.zeros_like(tensor) for key, tensor in TENSORS.items()}
        if name in ("index.json", "rank-0.safetensors"):
            with pytest.raises(DataError, match=r"can't be read"):
                checkpoint.load(path, back)
        else:
            checkpoint.load(path, back)
        assert not target.exists(), name


def read_or_empty(path: Path) -> dict[str, object]:
    try:
        return dict(read_manifest(path))
    except ValueError:
        return {}
