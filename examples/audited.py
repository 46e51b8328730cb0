"""Makes certificates, writes them to files, and has another program check them.

The commands are those of the shell. The auditor imports numpy alone, and has a proof of its own.
Needs the extra `demo`.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path


def run(command: str) -> None:
    print("$ cibp-fast", command, flush=True)
    subprocess.run([sys.executable, "-m", "cibp_fast", *shlex.split(command)], check=True)


attack = "--pgd-steps 5 --pgd-step-size none"
run(f"train --preset mnist5k-small-0.1-ibp --steps 80 {attack} --run-dir runs/audited")
run("certify runs/audited --eps 0.03 --examples 50 --output certificates --overwrite")
run("audit certificates")

for path in sorted(Path("certificates").iterdir()):
    print(f"{path.name}: {path.stat().st_size:,} bytes")
lines = Path("certificates/certificates.jsonl").read_text().splitlines()
records = [json.loads(line) for line in lines]
print(f"{sum(record['verified'] for record in records)} of {len(records)} verified; the first one:")
print(records[0])
