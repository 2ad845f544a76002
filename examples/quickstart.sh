#!/usr/bin/env bash
# A night in small: check the job, look at the plan, run it, look at the answers, run it again (nothing is done twice).
set -euo pipefail
cd "$(dirname "$0")/.."
overnight validate jobs/quickstart.yaml
overnight plan jobs/quickstart.yaml
overnight run jobs/quickstart.yaml
overnight status jobs/quickstart.yaml
head -n 1 runs/quickstart.jsonl
overnight run jobs/quickstart.yaml
