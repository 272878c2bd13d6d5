"""launch/gke_jobset.yaml against Kubernetes' own schema of what it holds: a Job and its pods."""

import copy

import pytest
import yaml

from tests import shrunken

kubernetes_validate = pytest.importorskip(
  "kubernetes_validate", reason="pip install kubernetes-validate, 22 MB, checks it offline"
)


@pytest.fixture
def job():
  """The Job that a JobSet, which is no part of Kubernetes itself, makes of its template."""
  jobset = yaml.safe_load((shrunken.ROOT / "launch/gke_jobset.yaml").read_text())
  (replicated,) = jobset["spec"]["replicatedJobs"]
  metadata = {"name": f"{jobset['metadata']['name']}-{replicated['name']}-0"}
  return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata} | replicated["template"]


def check(job):
  kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)


def test_the_jobs_of_the_set_fit_the_schema(job):
  check(job)


@pytest.mark.parametrize(
  "place, key",
  [
    (("spec",), "parallellism"),
    (("spec", "template", "spec"), "nodeselector"),
    (("spec", "template", "spec", "containers", 0), "volumeMount"),
  ],
)
def test_a_mistyped_key_does_not(job, place, key):
  broken = part = copy.deepcopy(job)
  for name in place:
    part = part[name]
  part[key] = 1
  with pytest.raises(kubernetes_validate.ValidationError):
    check(broken)
