"""What each check of the doctor finds on a planted machine: fake nvidia-smi, limits, memory, versions, speeds."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fp8moe.cuda_environment import QUEUES
from fp8moe.doctor import gemm, gpu, host, storage, versions
from fp8moe.doctor.finding import Finding, Level, merged
from fp8moe.doctor.odd import odd_ones, odd_places
from fp8moe.kernels import backend
from fp8moe.parallel.place import RankPlace, remember

ROOT = Path(__file__).resolve().parent.parent.parent
CPU = torch.device("cpu")


def wrong(findings: list[Finding]) -> dict[str, Level]:
    """Text -> level of those that are not fine; each of them says what to do."""
    assert all(bool(one.fix) == (one.level is not Level.OK) for one in findings)
    return {one.text: one.level for one in findings if one.level is not Level.OK}


SOUND = "0, NVIDIA H100 80GB HBM3, 550.54, 81559, 512, 1980, 1980, 1980, 40, 0, Disabled"


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program nvidia-smi that prints the file `answer` beside it, first in PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    script = f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ncat {tmp_path}/answer\n'
    (tmp_path / "nvidia-smi").write_text(script)
    (tmp_path / "nvidia-smi").chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("column", "value", "text", "level"),
    [
        (4, "30000", "gpu 1: other processes hold 30000 MiB", Level.ADVICE),
        (7, "1200", "gpu 1: its clock is limited to 1200 of 1980 MHz", Level.ADVICE),
        (8, "91", "gpu 1: 91 C", Level.ADVICE),
        (9, "2", "gpu 1: 2 uncorrected memory errors", Level.STOP),
        (10, "Enabled", "gpu 1: MIG is on", Level.ADVICE),
        (7, "[N/A]", None, Level.OK),
    ],
)
def test_a_gpu_with_one_thing_wrong(column: int, value: str, text: str | None, level: Level, smi: Path) -> None:
    second = ["1", *SOUND.split(", ")[1:]]
    second[column] = value
    (smi / "answer").write_text(f"{SOUND}\n{', '.join(second)}\n")
    found = gpu.check_gpus(2)
    assert found[0].text == "2 x NVIDIA H100 80GB HBM3; driver 550.54"
    assert wrong(found) == ({text: level} if text else {})
    asked = (smi / "asked").read_text()
    assert "--query-gpu=" in asked and not any(word in asked for word in ("-lgc", "-ac", "-rac", "-pl", "-pm"))


def test_gpus_that_torch_does_not_see_and_a_tool_that_fails(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (smi / "answer").write_text(f"{SOUND}\n")
    (unseen,) = (one for one in gpu.check_gpus(0) if one.level is Level.STOP)
    assert unseen.text == "nvidia-smi shows 1 GPUs and torch sees none" and "CUDA build" in unseen.fix
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "new enough for torch's CUDA 13.0" in gpu.check_gpus(0)[-1].fix
    (smi / "answer").write_text("NVIDIA-SMI has failed\n")
    assert wrong(gpu.check_gpus(0)) == {"nvidia-smi fails: it answers 'NVIDIA-SMI has failed\\n'": Level.STOP}
    (smi / "nvidia-smi").write_text("#!/bin/sh\necho no devices were found; exit 9\n")
    assert wrong(gpu.check_gpus(1)) == {"nvidia-smi fails: no devices were found": Level.ADVICE}
    (smi / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 5\n")
    monkeypatch.setattr(gpu, "QUERY_SECONDS", 0.2)
    assert wrong(gpu.check_gpus(1)) == {"nvidia-smi fails: no answer within 0.2 s": Level.ADVICE}
    (smi / "nvidia-smi").unlink()
    assert gpu.check_gpus(0)[0].text.startswith("no GPU") and not wrong(gpu.check_gpus(2))


@pytest.mark.parametrize(
    ("capability", "levels"),
    [(None, []), ((9, 0), [Level.OK]), ((8, 9), [Level.ADVICE]), ((10, 0), [Level.ADVICE]), ((8, 0), [Level.STOP])],
)
def test_fp8_by_compute_capability(capability: tuple[int, int] | None, levels: list[Level]) -> None:
    found = gpu.check_fp8(capability)
    wrong(found)
    assert [one.level for one in found] == levels


def test_limits_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_NOFILE: 1024, resource.RLIMIT_MEMLOCK: 1 << 16, resource.RLIMIT_CORE: -1}
    monkeypatch.setattr(host.resource, "getrlimit", lambda kind: (limits[kind], -1))
    monkeypatch.setattr(host, "INFINIBAND", tmp_path / "none")
    monkeypatch.setattr(host, "MEMORY", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal: 99999999 kB\nMemAvailable:   10000000 kB\n")
    shared = SimpleNamespace(f_frsize=4096, f_blocks=16384)
    monkeypatch.setattr(host.os, "statvfs", lambda path: shared)
    assert wrong(host.check_host(2, 64, gpu=False)) == {}
    on_gpus = wrong(host.check_host(8, 65, gpu=True))
    assert on_gpus.pop(f"{host.os.cpu_count()} cores, 10.2 GB of memory free") is Level.ADVICE
    assert on_gpus == {"/dev/shm has 0.0671 GB": Level.STOP, "a process may open 1024 files": Level.STOP}
    assert wrong(host.check_host(1, 1, gpu=True)) == {}
    monkeypatch.setattr(host, "INFINIBAND", tmp_path)
    assert wrong(host.check_host(1, 1, gpu=True)) == {"a process may lock 65536 bytes of memory": Level.STOP}
    limits[resource.RLIMIT_MEMLOCK] = limits[resource.RLIMIT_NOFILE] = resource.RLIM_INFINITY
    assert wrong(host.check_host(1, 4096, gpu=True)) == {}
    monkeypatch.setattr(host, "MEMORY", tmp_path / "absent")
    assert host.available_bytes() is None and host.check_host(1, 1, gpu=True)


def test_few_queues_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(QUEUES, "1")
    said = {f"{QUEUES}=1 has compute and messages between ranks wait for each other": Level.ADVICE}
    found = wrong(host.check_host(1, 2, gpu=True)).items()
    assert said.items() <= found
    for alike in (host.check_host(1, 1, gpu=True), host.check_host(1, 2, gpu=False)):
        assert not said.items() & wrong(alike).items()
    monkeypatch.setenv(QUEUES, "32")
    assert not said.items() & wrong(host.check_host(1, 2, gpu=True)).items()


def test_versions_and_back_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    found = versions.versions()
    assert found["torch"] == torch.__version__ and not wrong(versions.check_versions(found))
    assert versions.check_same(found, found) == []
    (differs,) = versions.check_same(found | {"torch": "2.11.0"}, found)
    assert differs.level is Level.STOP and differs.text == f"torch is 2.11.0, and {torch.__version__} on rank 0"
    monkeypatch.setattr(backend, "resolve", lambda device=None: "gluon")
    reasons = {"triton": None, "te": "the package is not installed"}
    monkeypatch.setattr(
        backend, "why_not", lambda name: reasons.get(name, "it was tried with Triton 3.6 to 3.8 and no")
    )
    lines = versions.check_kernels()
    assert lines[0].text.startswith("back end gluon would run: ") and "gluon: 5 ops" in lines[0].text
    assert f"triton: {len(backend.OPS) - 5} ops" in lines[0].text
    assert "triton could run (FP8MOE_BACKEND=triton)" in [one.text for one in lines]
    assert "te would not run: the package is not installed" in [one.text for one in lines] and not wrong(lines)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "install Triton 3.6 to 3.8, or set FP8MOE_UNTRIED=1" in [one.fix for one in versions.check_kernels()]


def test_a_back_end_that_cannot_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_chosen", None)
    monkeypatch.setenv(backend.VARIABLE, "deepgemm")
    ((text, level),) = wrong(versions.check_kernels()).items()
    assert level is Level.STOP and text.startswith("back end 'deepgemm' cannot run here: ")


def test_gemms_that_are_right_wrong_and_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_chosen", backend.REFERENCE)
    right = gemm.check_correct(CPU)
    assert [one.text.split(":")[0] for one in right] == ["BF16", "FP8 by reference"] and not wrong(right)
    real = gemm.gemm
    monkeypatch.setattr(gemm, "gemm", lambda x, w, out_dtype: real(x, w, out_dtype=out_dtype) * 1.01)
    assert list(wrong(gemm.check_correct(CPU)).values()) == [Level.STOP]
    monkeypatch.setattr(gemm, "gemm", lambda x, w, out_dtype: real(x, w, out_dtype=out_dtype) * float("nan"))
    assert list(wrong(gemm.check_correct(CPU)).values()) == [Level.STOP]
    monkeypatch.setattr(gemm, "gemm", lambda *operands, out_dtype: 1 / 0)
    (text,) = wrong(gemm.check_correct(CPU))
    assert text == "FP8 by reference fails: ZeroDivisionError: division by zero" and gemm.speeds(CPU) == {}


def test_speeds_of_gemms_beside_the_records_and_each_other() -> None:
    records = json.loads((ROOT / "benchmarks" / "results" / "gemm-h100.json").read_text())
    shape = f"M{gemm.M} N{gemm.N} K{gemm.K}"
    there = {one["name"]: one["value"] for one in records if one["shape"] == shape and one["metric"] == "throughput"}
    names = {name: "gemm bf16 cublas" if name == "bf16" else f"gemm {name}" for name in gemm.RECORDS}
    assert {name: pytest.approx(there[record], abs=0.5) for name, record in names.items()} == gemm.RECORDS
    fast, slow = {"bf16": 800.0, "gluon": 1290.0}, {"bf16": 790.0, "gluon": 500.0}
    assert wrong(gemm.check_speeds([fast] * 4, hopper=True)) == {}
    remember([RankPlace("a", gpu) for gpu in range(4)])
    odd = wrong(gemm.check_speeds([fast, fast, slow, fast], hopper=True))
    remember([])
    assert odd == {"rank 2 (gpu 2) is odd: FP8 by gluon at 39 % of the others' speed": Level.ADVICE}
    assert wrong(gemm.check_speeds([slow], hopper=True)) == {
        "FP8 by gluon should give 1308 TFLOPS and gives 500": Level.ADVICE
    }
    assert wrong(gemm.check_speeds([slow], hopper=False)) == {} and gemm.check_speeds([{}], hopper=False) == []


@pytest.mark.parametrize(
    ("speeds", "odd"),
    [
        ([10, 10, 10, 3], [3]),
        ([10, 11, 9, 10, 6.4, 10], [4]),
        ([10, 11, 9, 10, 7.5, 10], []),  # within SHARE
        ([10, 4, 8, 2, 6, 9], []),  # wide all over
        ([1, 1, 10, 10, 10, 10, 10], [0, 1]),
        ([10, 1], []),
        ([10, 10, 10, 1000], []),
        ([], []),
    ],
)
def test_the_odd_ones(speeds: list[float], odd: list[int]) -> None:
    assert list(odd_ones(dict(enumerate(speeds)))) == odd


def test_a_node_is_odd_by_its_ranks_and_a_rank_on_a_sound_node() -> None:
    hosts = [host for host in "abcd" for _ in range(4)]
    speeds = [10.0] * 16
    speeds[8:12] = [2.0] * 4
    speeds[1] = 1.0
    nodes, ranks = odd_places(speeds, hosts)
    assert nodes == {"c": pytest.approx(0.2)} and ranks == {1: pytest.approx(0.1)}


def test_a_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = storage.check_run_dir(tmp_path / "new" / "run", None, looks=True)
    assert not wrong(sound) and sound[0].text.startswith(f"run_dir={tmp_path / 'new' / 'run'}: ")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: SimpleNamespace(free=5e8))
    assert list(wrong(storage.check_run_dir(tmp_path, None, looks=True)).values()) == [Level.ADVICE]
    monkeypatch.setattr(storage.uuid, "uuid4", lambda: SimpleNamespace(hex="no/folder"))
    stopped = wrong(storage.check_run_dir(tmp_path, None, looks=True))
    assert stopped[f"{tmp_path} can't be written: No such file or directory"] is Level.STOP
    (tmp_path / "file").touch()
    for run_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        stopped = wrong(storage.check_run_dir(run_dir, None, looks=True))
        assert stopped[f"{tmp_path / 'file'} is no directory, and run_dir={run_dir} must be one"] is Level.STOP


def test_the_report_says_alike_findings_once_and_stops_first() -> None:
    fine, advice = Finding("a", "fine"), Finding("b", "slow", Level.ADVICE, "be quick")
    stop = Finding("a", "broken", Level.STOP, "mend it")
    of_node = Finding("b", "of a node", Level.ADVICE, "tell the node", "n1")
    report = merged([[fine, advice], [Finding("a", "else"), advice, stop], [of_node]], 2, {"x": 1})
    assert report.as_text().splitlines() == [
        "a", "    fine", "  X rank 1: broken", "b", "  ! ranks 0, 1: slow", "  ! n1: of a node",
        "to fix (X: prevents a run)", "  1. X rank 1: mend it", "  2. ! ranks 0, 1: be quick",
        "  3. ! n1: tell the node",
    ]  # fmt: skip
    as_json = json.loads(json.dumps(report.as_json()))
    assert [(one["text"], one["level"], one["ranks"]) for one in as_json["findings"]] == [
        ("fine", "ok", [0, 1, 2]), ("broken", "stop", [1]), ("slow", "advice", [0, 1]), ("of a node", "advice", [2]),
    ]  # fmt: skip
    assert as_json["figures"] == {"x": 1} and merged([[fine]], 1, {}).as_text() == "a\n    fine\nnothing to fix"
