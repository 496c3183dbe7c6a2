"""Makes jobset.schema.json.gz from JobSet's published CustomResourceDefinition (kubernetes-sigs/jobset, Apache-2.0),
without descriptions; objects refuse fields that they do not name, as the API server does with strict validation.

python tests/golden/make_jobset_schema.py config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml      # of v0.9.1
"""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import yaml


def slim(schema: Any, names: bool = False) -> Any:
    """The schema without what describes and does not decide; `names`: whether keys are fields of an object."""
    if isinstance(schema, list):
        return [slim(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {
        key: slim(value, key == "properties")
        for key, value in schema.items()
        if names or (key != "description" and not key.startswith("x-kubernetes-"))
    }
    if not names and "properties" in kept:
        kept.setdefault("additionalProperties", False)
    return kept


if __name__ == "__main__":
    versions = yaml.safe_load(Path(sys.argv[1]).read_text())["spec"]["versions"]
    schema = slim(next(version for version in versions if version["storage"])["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    text = json.dumps(schema, separators=(",", ":"), sort_keys=True)
    Path(__file__).with_name("jobset.schema.json.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))
