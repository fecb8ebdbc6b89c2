"""Students outside of their runs: exported folders, the runtimes that execute them, predictions of files, and latencies."""
