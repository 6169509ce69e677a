import dataclasses
import json
import threading

import pytest

from research.core.errors import ResearchError
from research.sweep.ledger import FILE, Ledger, Trial

ONE = Trial("aa11", 0, ("seed=0",), "running", "aa11")


def test_the_last_line_of_a_trial_counts_and_the_order_is_that_of_the_first(tmp_path):
    ledger = Ledger(tmp_path / "sweep")
    assert ledger.trials() == []
    ledger.append(ONE)
    ledger.append(Trial("bb22", 1, ("seed=1",), "running", "bb22"))
    ledger.append(dataclasses.replace(ONE, state="finished", metrics={"test/loss": float("nan"), "test/accuracy": 0.5}, seconds=1.5))
    first, second = ledger.trials()
    assert (first.state, second.state) == ("finished", "running")
    assert first.overrides == ("seed=0",)
    assert first.metrics == {"test/loss": None, "test/accuracy": 0.5}  # a NaN is no JSON
    assert first.time.endswith("Z")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"trial": "cc33", "numb', "not JSON"),
        ("[1, 2]", "no JSON object"),
        (json.dumps({"trial": "cc33", "number": 2, "overrides": [], "run": "cc33"}), "lacks 'state'"),
        (json.dumps({"trial": "cc33", "number": 2, "overrides": [], "state": "fine", "run": "cc33"}), "state 'fine' is unknown"),
        (json.dumps({"trial": "cc33", "number": 2, "overrides": [], "state": "finished", "run": "../../etc"}), "no trial of this sweep"),
        (json.dumps({"trial": "../x", "number": 2, "overrides": [], "state": "finished", "run": "../x"}), "no trial of this sweep"),
    ],
)
def test_a_corrupt_line_is_named_and_skipped(tmp_path, capsys, line, reason):
    ledger = Ledger(tmp_path)
    ledger.append(ONE)
    with open(tmp_path / FILE, "a") as file:
        file.write(line)  # and no end of line: the writer was killed
    ledger.append(dataclasses.replace(ONE, state="finished"))
    assert [trial.state for trial in ledger.trials()] == ["finished"]
    out = capsys.readouterr().out
    assert f"{FILE}, line 2: " in out
    assert reason in out


def test_many_writers_lose_no_line(tmp_path):
    def write(i):
        for n in range(20):
            Ledger(tmp_path).append(Trial(f"{i:02}{n:02}", n, ("x" * 5000,), "finished", f"{i:02}{n:02}"))

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Ledger(tmp_path).trials()) == 160


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResearchError, match=r"cannot write .*file"):
        Ledger(tmp_path / "file").append(ONE)
