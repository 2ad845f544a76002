"""Airflow: each shard is a task that is retried while it ends with 75, then one task merges them."""

from __future__ import annotations

from datetime import datetime, timedelta

from airflow import DAG
from airflow.providers.standard.operators.bash import BashOperator

JOB = "jobs/rehearsal-echo.yaml"
NUM_SHARDS = 4
# Code 3 (some lines are answered with an error) is an end. All else is tried again: after 75 the same command goes on,
# and what only a person can mend (64 to 78) fails again within a second.
RUN = """
overnight run {job} --shard {number}/{count} --time-limit 50m --quiet
code=$?
[ $code -eq 3 ] && exit 0
exit $code
"""

with DAG(
    dag_id="overnight",
    schedule="0 20 * * *",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
) as dag:
    merge = BashOperator(
        task_id="merge", bash_command=f"overnight merge {JOB} --quiet || [ $? -eq 3 ]", cwd="/srv/overnight"
    )
    for number in range(1, NUM_SHARDS + 1):
        run = BashOperator(
            task_id=f"shard_{number}",
            bash_command=RUN.format(job=JOB, number=number, count=NUM_SHARDS),
            cwd="/srv/overnight",
            retries=24,
            retry_delay=timedelta(seconds=30),
        )
        run >> merge
