"""The command line writes what it says, and a GPU session survives a part that fails."""

import json
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from penstock.bench.cli import app

ROOT = Path(__file__).resolve().parents[2]


def test_one_operator_from_the_command_line(tmp_path):
    done = CliRunner().invoke(app, ["rms_norm", "--device", "cpu", "--quick", "--output", str(tmp_path), "--no-host"])
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "rms_norm.json").read_text())
    assert [result["case"] for result in document["results"]] == ["decode_row", "head_norm"]
    assert "ceilings: copy" in done.output and "torch F.rms_norm" in done.output


def test_a_wrong_name_says_what_there_is():
    done = CliRunner().invoke(app, ["rms_morn", "--device", "cpu"])
    assert done.exit_code == 2
    assert "no operator rms_morn" in done.output


def test_the_session_survives_an_operator_that_crashes(tmp_path):
    command = [sys.executable, "benchmarks/gpu_session.py", "--device", "cpu", "--quick", "--minutes", "1"]
    command += ["--parts", "operators", "--operators", "no_such_operator", "--output", str(tmp_path), "--commit", "abc"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "no_such_operator: no numbers, exit status 2" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"operators.json", "session.log", "summary.txt"}
