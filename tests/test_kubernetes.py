"""deploy/kubernetes, rendered and checked without a cluster: schemas, arguments, and what the variants must share."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
from dockerfile import stages
from kustomize import Resource, containers, render
from serve_arguments import parse_serve, probe_routes, vllm_variables

import cmc_server
from cmc_server.api import readiness

ROOT = Path(__file__).parents[1]
KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = ["single", "replicas", "multi-node"]
#: The oldest Kubernetes that has everything used here, and the newest whose schema the package at hand holds.
VERSIONS = ["1.30", kubernetes_validate.latest_version()]
NAME = {"app.kubernetes.io/name": "cmc-server"}

each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)

# What the API documentation of the two custom kinds requires and allows, as far as the files use it. Pod templates in
# them are checked against Kubernetes' own schema.
SERVICE_MONITOR = {
    "required": ["selector", "endpoints"],
    "additionalProperties": False,
    "properties": {
        "selector": {"type": "object", "required": ["matchLabels"]},
        "endpoints": {
            "type": "array",
            "minItems": 1,
            "items": {
                "additionalProperties": False,
                "properties": {
                    "port": {"type": "string"},
                    "path": {"type": "string", "pattern": "^/"},
                    "interval": {"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"},
                },
            },
        },
    },
}
LEADER_WORKER_SET = {
    "required": ["leaderWorkerTemplate"],
    "additionalProperties": False,
    "properties": {
        "replicas": {"type": "integer", "minimum": 0},
        "leaderWorkerTemplate": {
            "required": ["workerTemplate"],
            "additionalProperties": False,
            "properties": {
                "leaderTemplate": {"type": "object"},
                "workerTemplate": {"type": "object"},
                "size": {"type": "integer", "minimum": 1},
                "restartPolicy": {"enum": ["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]},
            },
        },
    },
}
CUSTOM = {
    "ServiceMonitor": ("monitoring.coreos.com/v1", SERVICE_MONITOR),
    "LeaderWorkerSet": ("leaderworkerset.x-k8s.io/v1", LEADER_WORKER_SET),
}


def find(overlay: str, kind: str) -> Resource:
    (found,) = [resource for resource in render(KUBERNETES / "overlays" / overlay) if resource["kind"] == kind]
    return found


def templates(overlay: str) -> list[Resource]:
    """The pod templates, the one that serves HTTP first."""
    if overlay == "multi-node":
        group = find(overlay, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
        return [group["leaderTemplate"], group["workerTemplate"]]
    return [find(overlay, "Deployment")["spec"]["template"]]


def only_container(template: Resource) -> Resource:
    (container,) = template["spec"]["containers"]
    return dict(container)


def option(container: Resource, name: str) -> str:
    (value,) = [arg.partition("=")[2] for arg in container["args"] if arg.startswith(f"--{name}=")]
    return str(value)


def checkable(resource: Resource) -> Iterator[Resource]:
    """What Kubernetes' own schemas cover of a resource: all of it, or the pod templates in it."""
    if resource["kind"] not in CUSTOM:
        yield resource
    for key, template in resource["spec"].get("leaderWorkerTemplate", {}).items() if "spec" in resource else ():
        if key.endswith("Template"):
            yield {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": key}, "template": template}


@each_overlay
@pytest.mark.parametrize("version", VERSIONS)
def test_resources_fit_the_schemas_of_kubernetes(overlay: str, version: str) -> None:
    for resource in render(KUBERNETES / "overlays" / overlay):
        for part in checkable(resource):
            assert version.startswith(kubernetes_validate.validate(part, version, strict=True))


def test_schemas_notice_a_misspelt_field() -> None:
    deployment = find("single", "Deployment")
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    container["readinesProbe"] = container.pop("readinessProbe")
    with pytest.raises(jsonschema.ValidationError, match="readinesProbe"):
        kubernetes_validate.validate(deployment, VERSIONS[0], strict=True)


@each_overlay
def test_custom_resources_have_the_documented_form(overlay: str) -> None:
    for resource in render(KUBERNETES / "overlays" / overlay):
        if resource["kind"] in CUSTOM:
            api_version, schema = CUSTOM[resource["kind"]]
            assert resource["apiVersion"] == api_version
            jsonschema.validate(resource["spec"], schema)


def test_every_file_belongs_to_a_variant() -> None:
    used = {path.name for path in KUBERNETES.rglob("kustomization.yaml")}
    text = "".join(path.read_text("utf-8") for path in KUBERNETES.rglob("kustomization.yaml"))
    used |= {path.name for path in KUBERNETES.rglob("*") if path.is_file() and path.name in text}
    assert {path.name for path in KUBERNETES.rglob("*") if path.is_file()} == used


@each_overlay
def test_names_and_labels_agree(overlay: str) -> None:
    resources = render(KUBERNETES / "overlays" / overlay)
    assert all(resource["metadata"]["labels"] == NAME for resource in resources)
    assert all(template["metadata"]["labels"] == NAME for template in templates(overlay))
    selecting = ["PodDisruptionBudget", "NetworkPolicy", *(["Deployment"] if overlay != "multi-node" else [])]
    for kind in selecting:
        spec = find(overlay, kind)["spec"]
        assert spec.get("selector", spec.get("podSelector")) == {"matchLabels": NAME}
    leader = {"leaderworkerset.sigs.k8s.io/worker-index": "0"} if overlay == "multi-node" else {}
    service = find(overlay, "Service")["spec"]
    assert service["selector"] == NAME | leader
    claims = {r["metadata"]["name"] for r in resources if r["kind"] == "PersistentVolumeClaim"}
    for template in templates(overlay):
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        mounts = only_container(template)["volumeMounts"]
        assert {mount["name"] for mount in mounts} == set(volumes)
        bound = {v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v}
        assert bound == claims
        assert template["spec"]["serviceAccountName"] == find(overlay, "ServiceAccount")["metadata"]["name"]


@each_overlay
def test_ports_agree(overlay: str) -> None:
    server = only_container(templates(overlay)[0])
    (port,) = server["ports"]
    assert option(server, "port") == str(port["containerPort"]) == "8000"
    probes = [server[name]["httpGet"]["port"] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    (service,) = find(overlay, "Service")["spec"]["ports"]
    ingress = find(overlay, "NetworkPolicy")["spec"]["ingress"][0]["ports"][0]["port"]
    assert {*probes, service["targetPort"], ingress} == {port["name"]}
    if overlay != "single":
        assert find(overlay, "ServiceMonitor")["spec"]["endpoints"][0]["port"] == service["name"]


def test_paths_are_those_of_the_server() -> None:
    server = only_container(templates("single")[0])
    paths = {name: server[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert paths == {"startupProbe": "/health", "readinessProbe": "/ready", "livenessProbe": "/health"}
    assert set(paths.values()) <= probe_routes()


@each_overlay
def test_arguments_are_accepted_by_the_server(overlay: str) -> None:
    given = {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "leader.example"}
    image_folder = next(i.value for i in stages(ROOT / "Dockerfile")["gpu"] if i.keyword == "WORKDIR")
    for template in templates(overlay):
        container = only_container(template)
        args = [re.sub(r"\$\((\w+)\)", lambda name: given[name[1]], arg) for arg in container["args"]]
        settings, arguments = parse_serve(args)
        (delta,) = settings.deltas
        assert (ROOT / Path(delta.path).relative_to(image_folder) / "config.json").exists()
        num_gpus = int(container["resources"]["limits"]["nvidia.com/gpu"]) * arguments.nnodes
        assert arguments.tensor_parallel_size * arguments.pipeline_parallel_size == num_gpus


def test_ranks_of_a_group_differ_only_in_what_serves_http() -> None:
    group = find("multi-node", "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    leader, worker = copy.deepcopy(group["leaderTemplate"]), copy.deepcopy(group["workerTemplate"])
    server, rank = only_container(leader), only_container(worker)
    assert rank["args"] == [*server["args"], "--headless"]
    for name in ("startupProbe", "readinessProbe", "livenessProbe", "ports", "lifecycle"):
        del server[name]
    assert rank == {**server, "args": rank["args"]}


@each_overlay
def test_environment_is_read_by_somebody(overlay: str) -> None:
    for template in templates(overlay):
        names = {variable["name"] for variable in only_container(template)["env"]}
        assert names - {"HF_TOKEN"} <= vllm_variables()
        assert "HF_TOKEN" in names


@each_overlay
def test_pods_have_no_more_rights_than_they_need(overlay: str) -> None:
    for template in templates(overlay):
        spec, container = template["spec"], only_container(template)
        user = next(i.value for i in stages(ROOT / "Dockerfile")["gpu"] if i.keyword == "USER")
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert str(spec["securityContext"]["runAsUser"]) == user
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert writable == {"/cache", "/tmp", "/dev/shm"}
        keys = {v["name"]: v["valueFrom"] for v in container["env"] if "value" not in v and v["name"] != "VLLM_HOST_IP"}
        assert all("secretKeyRef" in source for source in keys.values())
        assert "optional" not in keys["VLLM_API_KEY"]["secretKeyRef"], "without a key no pod may start"


@each_overlay
def test_requests_may_finish_before_the_pod_is_killed(overlay: str) -> None:
    spec = templates(overlay)[0]["spec"]
    server = only_container(templates(overlay)[0])
    before = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] >= before + int(option(server, "shutdown-timeout")) + 20
    # Until SIGTERM the pod must be off the list of endpoints.
    assert before > 0


def test_starting_pods_are_given_the_time_that_the_image_gives_them() -> None:
    probe = only_container(templates("single")[0])["startupProbe"]
    (check,) = [i.value for i in stages(ROOT / "Dockerfile")["gpu"] if i.keyword == "HEALTHCHECK"]
    minutes = re.search(r"--start-period=(\d+)m", check)
    assert minutes
    allowed = probe["periodSeconds"] * probe["failureThreshold"]
    assert allowed == 60 * int(minutes[1])
    assert find("single", "Deployment")["spec"]["progressDeadlineSeconds"] > allowed


def test_readiness_probe_outlasts_the_question_to_the_workers() -> None:
    probe = only_container(templates("single")[0])["readinessProbe"]
    assert probe["timeoutSeconds"] > readiness._RPC_TIMEOUT


@each_overlay
def test_images_are_pinned_and_named_once(overlay: str) -> None:
    images = {
        container["image"]
        for resource in render(KUBERNETES / "overlays" / overlay)
        for container in containers(resource)
    }
    assert images == {f"registry.example.com/cmc-server:{cmc_server.__version__}-gpu"}
    texts = [path.read_text("utf-8") for path in KUBERNETES.rglob("*.yaml")]
    assert sum(text.count("newName:") for text in texts) == 1


def test_base_is_one_server_and_overlays_share_what_must_be_shared() -> None:
    assert find("single", "Deployment")["spec"]["replicas"] == 1
    assert find("replicas", "Deployment")["spec"]["replicas"] > 1
    for overlay, mode in (("single", "ReadWriteOnce"), ("replicas", "ReadWriteMany"), ("multi-node", "ReadWriteMany")):
        claims = [r for r in render(KUBERNETES / "overlays" / overlay) if r["kind"] == "PersistentVolumeClaim"]
        assert [claim["spec"]["accessModes"] for claim in claims] == [[mode]] * 2
