"""One row of tests for each version of TRL and transformers. Started by run.sh, in the environment of constraints.txt."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "compat"
# Each trainer's own tests; a row that refuses a trainer runs those of the others.
TRAINERS = {
    "RankedRewardTrainer": "tests/trainers/reward",
    "RankedDPOTrainer": "tests/trainers/dpo",
    "PPOPtxTrainer": "tests/trainers/ppo_ptx",
}
ALL = "tests/losses tests/models tests/hub tests/trainers"

# What a row may change, because TRL and transformers bound it; everything else is as in constraints.txt.
RELEASED = ("trl", "transformers", "huggingface_hub", "tokenizers", "datasets")


def name_of(requirement):
    return re.match(r"[\w-]+", requirement).group()


PINNED = {name_of(line): line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] != "#"}
REQUIRED = {
    name_of(line): line for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
}
OLDEST = re.sub(">=([0-9.]+)", r"==\1", REQUIRED["transformers"])
ROWS = (
    f"trl==1.15.0 {PINNED['transformers']}",
    f"{PINNED['trl']} {OLDEST}",
    f"{PINNED['trl']} {PINNED['transformers']}",
    "trl transformers",
)


def run(*command, **environment):
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def install(row, folder):
    """Put what `row` changes in the base environment into `folder`; pip's complaint where no versions fit.

    prefopt's own bounds on what the row names are left out, so that a version outside them can be tried.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wanted = [
        *row.split(),
        *(line for name, line in REQUIRED.items() if name not in map(name_of, row.split())),
    ]
    constraints, report = WORK / "constraints.txt", WORK / "report.json"
    constraints.write_text("\n".join(line for name, line in PINNED.items() if name not in RELEASED))
    done = run(
        *("-m", "pip", "install", "-q", "--upgrade", "--dry-run", "--report", str(report)),
        *("-c", str(constraints), *wanted),
    )
    if done.returncode == 0:
        changed = [item["metadata"] for item in json.loads(report.read_text())["install"]]
        changed = [f"{metadata['name']}=={metadata['version']}" for metadata in changed]
        done = run("-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *changed)
    if done.returncode == 0:
        return ""
    _, _, conflict = done.stderr.partition("The conflict is caused by:\n")
    lines = conflict.partition("\n\n")[0] or done.stderr.strip().splitlines()[-1]
    return "; ".join(line.strip() for line in lines.splitlines())


def refusals(environment):
    """Trainer -> the sentence with which its import ends."""
    code = (
        "import json, prefopt\n"
        "refused = {}\n"
        f"for name in {list(TRAINERS)}:\n"
        "    try: getattr(prefopt, name)\n"
        "    except ImportError as error: refused[name] = str(error)\n"
        "print(json.dumps(refused))"
    )
    done = run("-c", code, **environment)
    if done.returncode:
        return dict.fromkeys(TRAINERS, done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def test(tests, environment, log):
    """pytest's counts, and the first line of its summary that names a failure; its output goes to `log`."""
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *tests, **environment)
    log.write_text(done.stdout + done.stderr)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines()[-1:]
    passed, failed, errors, skipped = (
        sum(int(number) for number in re.findall(rf"(\d+) {word}", lines[-1]))
        for word in ("passed", "failed", "error", "skipped")
    )
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    reason = (failures or lines[-1:])[0] if done.returncode else ""
    return f"{passed}/{failed + errors}/{skipped}", reason


def measure(row):
    """TRL, transformers, verdict, counts and reason of a row."""
    folder = WORK / re.sub(r"[^\w.]+", "_", row)
    complaint = install(row, folder)
    if complaint:
        return (*row.split()[:2], "not installable", "", complaint)
    environment = {
        "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        # Of the lines of its summary, pytest keeps what fits.
        "COLUMNS": "400",
    }
    code = "from importlib.metadata import version\nprint(version('trl'), version('transformers'))"
    versions = run("-c", code, **environment).stdout.split()
    refused = refusals(environment)
    usable = [folder for name, folder in TRAINERS.items() if name not in refused]
    if not usable:
        return (*versions, "refused", "", " ".join(refused.values()))
    tests = shlex.split(os.environ.get("TESTS", " ".join(usable) if refused else ALL))
    counts, reason = test(tests, environment, WORK / f"{folder.name}.log")
    verdict = "fails" if reason else "works" if not refused else f"refuses {', '.join(refused)}"
    return (*versions, verdict, counts, " ".join([reason, *refused.values()]).strip())


def main():
    rows = sys.argv[1:] or ROWS
    print("| TRL | transformers | verdict | passed/failed/skipped | reason |\n|---|---|---|---|---|")
    verdicts = []
    for row in rows:
        cells = measure(row)
        verdicts.append(cells[2])
        print(f"| {' | '.join(cells)} |", flush=True)
    sys.exit("fails" in verdicts)


if __name__ == "__main__":
    main()
