"""Restarts are told from a person's new starts by what torchrun and Slurm set."""

import pytest

from lsys.runtime.job import Job, job_from_environment

ONE = {"TORCHELASTIC_RUN_ID": "a1", "TORCHELASTIC_RESTART_COUNT": "0"}
STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("now", "before", "expected"),
    [
        ({**ONE, "TORCHELASTIC_RESTART_COUNT": "1"}, ONE, True),
        (ONE, ONE, True),  # an agent that came back counts anew
        ({**ONE, "TORCHELASTIC_RUN_ID": "b2"}, ONE, False),
        ({"TORCHELASTIC_RUN_ID": "none"}, {"TORCHELASTIC_RUN_ID": "none"}, False),
        ({"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "1"}, {"TORCHELASTIC_RUN_ID": "none"}, True),
        ({}, {}, False),
        ({**STEP, **ONE, "SLURM_RESTART_COUNT": "1"}, {**STEP, **ONE, "TORCHELASTIC_RUN_ID": "x"}, True),  # requeued
        ({**STEP, **ONE, "TORCHELASTIC_RUN_ID": "b2"}, {**STEP, **ONE}, False),  # a second start in one allocation
        ({**STEP, "SLURM_STEP_ID": "1"}, STEP, False),
    ],
)
def test_who_started_it(now: dict[str, str], before: dict[str, str], expected: bool) -> None:
    assert job_from_environment(now).is_restart_of(job_from_environment(before)) is expected


def test_a_job_has_an_id_by_either_launcher() -> None:
    found = [job_from_environment(variables).has_id for variables in (ONE, STEP, {}, {"TORCHELASTIC_RUN_ID": "none"})]
    assert found == [True, True, False, False]


def test_a_job_goes_through_json() -> None:
    job = Job("a", "7.0", 1, 2)
    assert Job.from_tree(job.to_tree()) == job
    with pytest.raises((LookupError, TypeError, ValueError)):
        Job.from_tree({"run": "a"})
