"""A study as job arrays of a SLURM cluster: one array for each wave of runs, one task for each run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from distinit_plugin.demos.runs import Say
from distinit_plugin.errors import UserError
from distinit_plugin.files import write_text
from distinit_plugin.studies.grid import Plan, Run
from distinit_plugin.studies.results import states_of
from distinit_plugin.studies.state import FINISHED

FOLDER = "slurm"
"""Below the study's folder: scripts and logs."""

_SCRIPT = """#!/usr/bin/env bash
# Wave {number} of the study {name}: one task of the array does one run, by its place in the list.
#SBATCH --job-name=study
#SBATCH --array={array}
#SBATCH --output={folder}/wave_{number}_%a.log
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120

set -euo pipefail
runs=({runs})
cd {here}

# Before the time limit the run saves its state, then the task queues again and goes on from it.
requeue=0
trap 'requeue=1; kill -USR1 $(jobs -p) 2>/dev/null || true' USR1

{python} -m distinit_plugin.cli study {source} --output {output} --only "${{runs[$SLURM_ARRAY_TASK_ID]}}" &
child=$!

# "wait" returns when a signal comes; the run itself may still be saving.
status=0
wait "$child" || status=$?
while kill -0 "$child" 2>/dev/null; do
    status=0
    wait "$child" || status=$?
done
if [[ $requeue == 1 && $status != 0 ]]; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
    exit 0
fi
exit "$status"
"""


def scripts(plan: Plan, processes: int = 0) -> list[tuple[Path, str]]:
    """The files and their texts, one for each wave that has something left to do.

    Args:
        plan: Of the study.
        processes: Tasks of an array at once; 0: as many as the cluster gives.
    """
    states = states_of(plan)
    waves = [[run for run in wave if states[run.digest].state != FINISHED] for wave in plan.waves()]
    folder = plan.study.output.absolute() / FOLDER
    return [
        (folder / f"wave_{number}.sh", _script(plan, number, runs, folder, processes))
        for number, runs in enumerate(waves, start=1)
        if runs
    ]


def _script(plan: Plan, number: int, runs: Sequence[Run], folder: Path, processes: int) -> str:
    at_once = f"%{processes}" if processes else ""
    return _SCRIPT.format(
        number=number,
        name=plan.study.name,
        array=f"0-{len(runs) - 1}{at_once}",
        folder=shlex.quote(str(folder).replace("%", "%%")),  # else sbatch would replace what follows it
        runs=" ".join(shlex.quote(Path(run.folder).name) for run in runs),
        here=shlex.quote(os.getcwd()),
        python=shlex.quote(os.environ.get("PYTHON", sys.executable)),
        source=shlex.quote(str(plan.study.source)),
        output=shlex.quote(str(plan.study.output.absolute())),
    )


def submit(plan: Plan, *, processes: int = 0, words: Sequence[str] = (), say: Say) -> None:
    """Write the scripts and queue them; a wave begins when all tasks of the wave before it have ended.

    Args:
        plan: Of the study.
        processes: Tasks of an array at once; 0: as many as the cluster gives.
        words: For sbatch.
        say: Told the numbers of the jobs.

    Raises:
        UserError: There is no sbatch, or it refuses.
    """
    before = ""
    for path, text in scripts(plan, processes):
        write_text(path, text)
        after = [f"--dependency=afterany:{before}"] if before else []
        command = ["sbatch", "--parsable", *after, *words, str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise UserError(
                f"sbatch cannot be started ({error.strerror}): --launch slurm is for machines of a SLURM cluster. The "
                f"script is {path}; --launch local does the runs here."
            ) from error
        found = re.match(r"[0-9]+", done.stdout.strip())
        if done.returncode or found is None:
            said = " ".join((done.stderr.strip() or done.stdout.strip()).split())
            raise UserError(f"sbatch refuses {path} (exit status {done.returncode}): {said}")
        before = found[0]
        say(f"queued {path.name} as job {before}")
