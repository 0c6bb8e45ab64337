"""The files for Kubernetes and SkyPilot, against the schemas that those have published, and what they start."""

import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from fp8moe.cli.command import parse
from fp8moe.cli.compose import compose
from fp8moe.cli.train import command_parser
from tests.launch import skypilot_keys

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "launch" / "kubernetes"
SKYPILOT = ROOT / "launch" / "skypilot.yaml"
TYPES = {str: "string", int: "integer", dict: "object", list: "array", bool: "boolean"}


def documents(name: str) -> dict[str, dict]:
    """The documents of a file, by kind."""
    return {one["kind"]: one for one in yaml.safe_load_all((KUBERNETES / name).read_text())}


def differences(given, kept, where: str = "") -> list[str]:
    """What the schema's classes did not take over: they drop keys that they do not know."""
    if isinstance(given, dict) and isinstance(kept, dict):
        return [text for key in given for text in differences(given[key], kept.get(key), f"{where}.{key}")]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        pairs = enumerate(zip(given, kept, strict=True))
        return [text for i, (one, other) in pairs for text in differences(one, other, f"{where}[{i}]")]
    return [] if given == kept else [f"{where} is {given!r} and the schema has {kept!r}"]


CLASSES = {
    ("trainjob.yaml", "TrainingRuntime"): "TrainerV1alpha1TrainingRuntime",
    ("trainjob.yaml", "TrainJob"): "TrainerV1alpha1TrainJob",
    ("jobset.yaml", "JobSet"): "JobsetV1alpha2JobSet",
}


def schema(name, kind):
    """The class of a document; all of them take half a second to import, so not before a test asks for one."""
    from kubeflow_trainer_api import models

    return getattr(models, CLASSES[name, kind])


@pytest.mark.parametrize(("name", "kind"), CLASSES)
def test_kubernetes_files_are_what_their_schemas_say(name, kind):
    given = documents(name)[kind]
    assert differences(given, schema(name, kind).from_dict(given).to_dict()) == []


def test_an_unknown_key_and_a_wrong_type_are_found():
    given = documents("jobset.yaml")["JobSet"]
    given["spec"]["failurePolicy"]["maxRestart"] = 10
    job_set = schema("jobset.yaml", "JobSet")
    kept = job_set.from_dict(given).to_dict()
    assert differences(given, kept) == [".spec.failurePolicy.maxRestart is 10 and the schema has None"]
    given["spec"]["failurePolicy"]["maxRestarts"] = "ten"
    with pytest.raises(ValueError, match="maxRestarts"):
        job_set.from_dict(given)


def test_the_files_of_kubernetes_cover_every_kind():
    assert {(path.name, kind) for path in KUBERNETES.glob("*") for kind in documents(path.name)} == set(CLASSES)


def node(kind: str) -> dict:
    """The container that trains, of the JobSet or of the runtime."""
    if kind == "JobSet":
        jobs = documents("jobset.yaml")["JobSet"]["spec"]["replicatedJobs"]
    else:
        jobs = documents("trainjob.yaml")["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"]
    (container,) = jobs[0]["template"]["spec"]["template"]["spec"]["containers"]
    return container


@pytest.mark.parametrize("kind", ["TrainJob", "JobSet"])
def test_what_kubernetes_starts_is_a_command_of_this_project(kind):
    job = documents("trainjob.yaml")["TrainJob"]["spec"]["trainer"] if kind == "TrainJob" else node(kind)
    assert (ROOT / job["command"][0]).stat().st_mode & 0o111, "the launcher must be executable"
    settings = parse(command_parser(), job["args"]).settings
    assert {"run_dir=/storage/runs/moonlight", "resume=auto"} < set(settings)
    compose(settings)


@pytest.mark.parametrize("kind", ["TrainingRuntime", "JobSet"])
def test_what_pods_mount_exists(kind):
    container = node(kind)
    text = (KUBERNETES / ("jobset.yaml" if kind == "JobSet" else "trainjob.yaml")).read_text()
    for mount in container["volumeMounts"]:
        assert re.search(rf"- name: {mount['name']}\n +(persistentVolumeClaim|emptyDir)", text), mount
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/storage", "/dev/shm"}


def test_nodes_of_the_jobset_agree_on_their_number_and_on_node_0():
    spec = documents("jobset.yaml")["JobSet"]
    job = spec["spec"]["replicatedJobs"][0]["template"]["spec"]
    environment = {one["name"]: one.get("value") for one in node("JobSet")["env"]}
    assert int(environment["NNODES"]) == job["parallelism"] == job["completions"]
    name, network = spec["metadata"]["name"], spec["spec"]["network"]["subdomain"]
    assert environment["MASTER_ADDR"] == f"{name}-{spec['spec']['replicatedJobs'][0]['name']}-0-0.{network}"


def started(tmp_path: Path, script: str, **environment: str) -> str:
    """The command line that torchrun.sh would run, for a shell script or a call of it."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    path = {"PATH": "/usr/bin:/bin", "PYTHON": str(python)}
    done = subprocess.run(
        ["bash", "-eu", "-c", script], cwd=ROOT, env=path | environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_launcher_takes_its_place_from_kubeflow(tmp_path):
    kubeflow = {"PET_NNODES": "4", "PET_NODE_RANK": "3", "PET_MASTER_ADDR": "10.0.0.1", "PET_MASTER_PORT": "29400"}
    line = started(tmp_path, "launch/torchrun.sh seed=1", **kubeflow, PET_NPROC_PER_NODE="8")
    place = "--nnodes 4 --node-rank 3 --nproc-per-node 8 --master-addr 10.0.0.1 --master-port 29400"
    assert place in line and line.endswith("-m fp8moe train seed=1\n")
    assert "--node-rank 2 " in started(tmp_path, "launch/torchrun.sh", **kubeflow, NODE_RANK="2")


def test_skypilots_file_has_the_keys_and_types_of_its_schema():
    task, allowed = yaml.safe_load(SKYPILOT.read_text()), json.loads(skypilot_keys.PATH.read_text())
    for part, given in (("task", task), ("resources", task["resources"])):
        for key, value in given.items():
            assert TYPES[type(value)] in allowed[part][key], f"{part}.{key}={value!r}"
    if importlib.util.find_spec("sky"):
        import sky

        assert skypilot_keys.keys() == allowed, "python -m tests.launch.skypilot_keys writes them again"
        assert sky.Task.from_yaml(str(SKYPILOT)).num_nodes == task["num_nodes"]


def test_what_skypilot_runs_is_torchrun_on_its_nodes(tmp_path):
    task = yaml.safe_load(SKYPILOT.read_text())
    nodes = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    line = started(tmp_path, task["run"], **task["envs"], **nodes, SKYPILOT_NODE_IPS="10.0.0.5\n10.0.0.6")
    assert "--nnodes 2 --node-rank 1 --nproc-per-node 8 --master-addr 10.0.0.5 --master-port 29500" in line
    settings = line.split("-m fp8moe train ")[1].split()
    assert settings == [*task["envs"]["RUN"].split(), f"run_dir={task['envs']['RUN_DIR']}", "resume=auto"]
    assert task["setup"].split() == ["make", "setup", "PINS=cuda"]
