"""Work folders: what a killed process left is removed, what a living one has is not."""

import subprocess
import sys
from pathlib import Path

from mojomesh_features.work_folder import open_work_folder

LIVES = """
import sys
from pathlib import Path
from mojomesh_features.work_folder import open_work_folder

with open_work_folder(Path(sys.argv[1])) as own:
    (own / "spill").touch()
    print(flush=True)
    sys.stdin.read()
"""


def test_a_folder_goes_when_its_process_was_killed_and_not_before(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", LIVES, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with open_work_folder(tmp_path) as own:
            assert len(list(tmp_path.rglob("spill"))) == 1
            other.kill()
            other.wait()
            assert len(list(tmp_path.rglob("spill"))) == 1
            with open_work_folder(tmp_path) as next_one:
                assert sorted(tmp_path.iterdir()) == sorted([own, next_one])
    assert list(tmp_path.iterdir()) == []
