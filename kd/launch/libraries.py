"""Imports of all that a run needs, for the process that the processes of runs are forks of (`kd.launch.processes`)."""

from kd.system.startup import without_collection

with without_collection(freeze=True):
    import kd.build.check
    import kd.launch.jobs
    import kd.results.tables
    import kd.training.fit
    import kd.training.tracking  # noqa: F401 - imported for other processes
