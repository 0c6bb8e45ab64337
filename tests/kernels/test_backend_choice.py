"""Which back end can run, what it says when it cannot, and who runs what it does not provide."""

import ast
import importlib.util
import inspect
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fp8moe.kernels
from fp8moe.kernels import backend
from fp8moe.kernels.quantize import quantize_rows

KERNELS = Path(fp8moe.kernels.__file__).parent
ROOT = Path(__file__).resolve().parent.parent.parent
ADAPTERS = [n for n in backend.BACKENDS if importlib.util.find_spec(f"fp8moe.kernels.{n}") is not None]


@pytest.fixture(autouse=True)
def undo(monkeypatch):
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    backend.set_backend(None)
    yield
    backend.set_backend(None)


def arguments(path, function):
    """Names and defaults of a function's arguments, without importing the file."""
    (found,) = (n.args for n in ast.parse(path.read_text()).body if getattr(n, "name", "") == function)
    defaults = [ast.unparse(d) if d else None for d in (*found.defaults, *found.kw_defaults)]
    return [a.arg for a in found.args], [a.arg for a in found.kwonlyargs], defaults


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_back_end_has_what_the_table_says_with_the_same_signature(name):
    for op in sorted(backend.PROVIDES[name]):
        module = backend._MODULE_OF[op]
        ours, public = (arguments(folder / f"{module}.py", op) for folder in (KERNELS / name, KERNELS))
        assert ours == public, op


@pytest.mark.parametrize("name", backend.BACKENDS)
@pytest.mark.parametrize("op", backend.OPS)
def test_every_op_has_somebody_to_run_it(name, op):
    assert op in backend.PROVIDES[backend.provider(op, name)]
    assert backend.provider("swiglu", name) == ("reference" if name == "reference" else "triton")


def test_no_op_of_a_gpu_is_left_to_the_reference():
    assert backend.PROVIDES["triton"] == set(backend.OPS)


def test_what_another_back_end_runs_is_said_once(caplog, monkeypatch):
    monkeypatch.setitem(backend.PROVIDES, "triton", backend.PROVIDES["triton"] - {"swiglu"})
    with caplog.at_level(logging.INFO, logger=backend.__name__):
        backend.set_backend("triton")
        quantize_rows(torch.zeros(2, 16))
        quantize_rows(torch.zeros(2, 16))
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith("kernels: back end triton (set_backend); by reference: swiglu")
    assert "quantize_rows" not in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
@pytest.mark.parametrize("name", [n for n in backend.BACKENDS if n not in ("reference", "triton")])
def test_a_back_end_that_cannot_run_says_why_and_which_would(name):
    with pytest.raises(ValueError, match=rf"'{name}' cannot run here: .*: use reference or triton$"):
        backend.set_backend(name)
    assert backend.resolve() == "reference"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_triton_on_a_cpu_only_interpreted():
    code = "from fp8moe.kernels import backend; backend.resolve()"
    env = {**os.environ, "FP8MOE_BACKEND": "triton", "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert "'triton' cannot run here: it needs a GPU" in done.stderr and "TRITON_INTERPRET=1" in done.stderr
    assert "use reference" in done.stderr
    env["TRITON_INTERPRET"] = "1"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, timeout=120).returncode == 0


@pytest.mark.parametrize(
    ("name", "capability", "reason"),
    [
        ("gluon", (8, 9), "for Hopper, compute capability 9.0, and this GPU has 8.9"),
        ("gluon", (10, 0), "for Hopper, compute capability 9.0, and this GPU has 10.0"),
        ("cublas", (8, 0), "for Hopper"),
        ("triton", (8, 0), "FP8 tensor cores come with compute capability 8.9, and this GPU has 8.0"),
        ("triton", (8, 9), None),
        ("gluon", (9, 0), None),
    ],
)
def test_the_gpu_decides(name, capability, reason, monkeypatch):
    import triton

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    if name not in ADAPTERS:
        reason = "this version has no adapter for it"
    said = backend.why_not(name)
    assert said is None if reason is None else reason in said


@pytest.mark.parametrize(
    ("package", "version", "tried"),
    [
        ("Triton", "3.5.1", "3.6 to 3.8"),
        ("Triton", "3.9.0", "3.6 to 3.8"),
        ("Triton", "3.10.0", "3.6 to 3.8"),
        ("torch", "2.10.0+cu130", "2.11 to 2.14"),
        ("torch", "2.15.0", "2.11 to 2.14"),
    ],
)
def test_a_version_that_was_not_tried_is_refused_unless_asked_for(package, version, tried, monkeypatch):
    import triton

    monkeypatch.setattr(triton if package == "Triton" else torch, "__version__", version)
    monkeypatch.delenv(backend.UNTRIED_VARIABLE, raising=False)
    said = f"it was tried with {package} {tried} and this is {version} (set FP8MOE_UNTRIED=1 to run it untried)"
    assert backend.why_not("triton") == said
    with pytest.raises(ValueError, match=r"^back end 'triton' cannot run here: it was tried with .*: use reference$"):
        backend.set_backend("triton")
    assert backend.why_not("reference") is None
    monkeypatch.setenv(backend.UNTRIED_VARIABLE, "1")
    assert "tried" not in (backend.why_not("triton") or "")


@pytest.mark.parametrize(("package", "version"), [("Triton", "3.6.0"), ("Triton", "3.8.1"), ("torch", "2.14.0a0+git1")])
def test_a_version_within_those_tried_is_accepted(package, version, monkeypatch):
    import triton

    monkeypatch.setattr(triton if package == "Triton" else torch, "__version__", version)
    assert "tried" not in (backend.why_not("triton") or "")


@pytest.mark.parametrize("folder", ["triton", "gluon"])
def test_multiply_adds_are_fused_whatever_triton_does_unasked(folder):
    code = f"import fp8moe.kernels.{folder}, triton; assert triton.knobs.language.default_fp_fusion"
    env = {**os.environ, "TRITON_DEFAULT_FP_FUSION": "0"}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, timeout=120).returncode == 0


def test_a_gpu_gets_the_fast_one_and_a_cpu_the_specification(monkeypatch):
    backend._default.cache_clear()
    runnable = {"triton"}
    monkeypatch.setattr(backend, "why_not", lambda name: None if name in runnable else "no")
    assert backend.resolve(torch.device("cpu")) == "reference"
    assert backend.resolve(torch.device("cuda")) == "triton"
    backend._default.cache_clear()
    runnable.add("gluon")
    assert backend.resolve(torch.device("cuda")) == "gluon"
    backend._default.cache_clear()
    runnable.clear()
    assert backend.resolve(torch.device("cuda")) == "reference"
    backend._default.cache_clear()


def test_a_tensor_on_the_wrong_device_is_refused(monkeypatch):
    backend.set_backend("triton")
    monkeypatch.setattr(backend, "_interpreted", lambda: False)
    with pytest.raises(ValueError, match="'triton' runs on a GPU and this tensor is on cpu"):
        quantize_rows(torch.zeros(2, 16))


def test_the_environment_chooses(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "triton")
    assert backend.resolve() == "triton"
    assert inspect.unwrap(backend.op("quantize_rows")).__module__ == "fp8moe.kernels.triton.quantize"
    assert quantize_rows(torch.ones(2, 256)).scale_layout == "m_major"


def test_a_choice_takes_effect_at_once():
    x = torch.ones(2, 256)
    layouts = []
    for name in ("reference", "triton", "reference"):
        backend.set_backend(name)
        layouts.append(quantize_rows(x).scale_layout)
    assert layouts == ["token_major", "m_major", "token_major"]
