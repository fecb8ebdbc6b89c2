"""A session of its own for the server that processes are forks of (`kd.launch.processes`), which imports this module first.

Signals to the group of the command, such as Ctrl-C and the SIGTERM of `timeout`, would end the server, also while it imports,
and with it the only way to know how its forks end.
"""

import os

os.setsid()
