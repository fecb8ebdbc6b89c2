"""Cost of `kd-report` over many configurations.

    python experiments/growth/configurations.py RESULT.json FOLDER COUNT

writes, after the record of a finished run, those of COUNT configurations with three seeds each, and times the command.
"""

import copy
import json
import resource
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    """Write the records, and time."""
    record, folder, count = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), int(sys.argv[3])
    record.pop("checksum", None)
    for number in range(count):
        for seed in range(3):
            one = copy.deepcopy(record)
            one["identity"]["method"]["temperature"] = number % 50
            one["identity"]["optimizer"]["lr"] = 1e-5 * (1 + number // 50)
            digest = f"{number:09}{seed:03}"
            one |= {"seed": seed, "family": f"f{number}", "digest": digest, "finished": digest}
            place = folder / f"kd-s{seed}-{digest}"
            place.mkdir(parents=True, exist_ok=True)
            (place / "result.json").write_text(json.dumps(one, indent=2))
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "kd.report", str(folder)], check=True, capture_output=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    print(json.dumps({"configurations": count, "wall_s": round(time.perf_counter() - began, 2), "cpu_s": round(used, 2)}))


if __name__ == "__main__":
    main()
