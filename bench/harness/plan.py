"""What `fsdp plan` foretells of a workload's model."""

import json
import subprocess

from . import workloads

UNITS = {"gpt33m": "blocks.*", "tiny200": "layers.*"}


def description(model):
    """The model for `fsdp plan`: parameters by their full names, whose dots make modules."""
    return {"class": model, "parameters": {name: list(shape) for name, shape in workloads.parameter_shapes(model)}}


def of(workload, tool, folder):
    """The plan, as a dict of fsdp_plan_t's fields, of the workload with AdamW."""
    file = folder / f"{workload.name}.plan.json"
    file.write_text(json.dumps(description(workload.model)))
    done = subprocess.run(
        [tool, "plan", "--json", "-n", str(workload.world_size), "--unit", UNITS[workload.model], str(file)],
        check=True, capture_output=True, text=True, timeout=60)
    return json.loads(done.stdout)
